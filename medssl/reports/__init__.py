"""Reports, from result tables only: no torch."""

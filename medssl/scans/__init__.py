"""Scans: the only place that sees files, headers and identities."""

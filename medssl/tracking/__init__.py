"""Tracking: a journal on disk first, then MLflow."""

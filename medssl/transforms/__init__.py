"""Transforms: preprocessing (stored), sampling (read), augmentation (on the device)."""

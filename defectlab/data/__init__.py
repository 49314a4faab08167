"""Data sets: fetching and verifying, readers, augmentation, synthetic data."""

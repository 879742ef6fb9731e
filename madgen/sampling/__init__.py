"""Prompts and seeds to panoramas. Knows nothing of datasets, files or Lightning."""

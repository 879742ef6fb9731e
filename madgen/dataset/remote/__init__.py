"""Upload a dataset to remote storage."""

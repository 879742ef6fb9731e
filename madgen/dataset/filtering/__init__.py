"""Select samples of a dataset by their scores."""

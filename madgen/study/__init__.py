"""A preference study: people say which of two panoramas of one prompt they prefer. It reads datasets, never the engine."""

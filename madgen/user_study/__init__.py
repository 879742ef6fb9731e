"""A preference study: which of two panoramas of one prompt do people prefer? Reads datasets, never the engine."""

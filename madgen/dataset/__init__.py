"""Writing and reading the output: what lies on disk, and the rules by which it appears there."""

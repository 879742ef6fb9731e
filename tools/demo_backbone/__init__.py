"""Training of the demo backbone."""

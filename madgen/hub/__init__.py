"""Locate, identify and license model files. Imports no torch."""

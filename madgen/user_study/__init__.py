"""Preference studies: participants compare two panoramas of the same prompt, from different datasets."""

"""Helpers that know nothing of panoramas."""

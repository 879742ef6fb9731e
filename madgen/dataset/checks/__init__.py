"""The checks of `madgen verify`; independent of the code that writes datasets."""

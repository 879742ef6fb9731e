"""The exception for wrong input."""


class UserError(ValueError):
    """Invalid input. The message is one line with the value, its bound and the fix; the command line exits with 2."""

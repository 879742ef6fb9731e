"""The one exception whose message is for the user."""


class UserError(Exception):
    """The input is wrong: one line that names the value, its unit and the way out. The command line exits with 2."""

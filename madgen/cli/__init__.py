"""The command line interface. A command parses its arguments, imports what it needs and calls one function."""

"""`python -m madgen`."""

from madgen.cli import main

main()

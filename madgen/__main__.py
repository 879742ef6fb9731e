"""Run the command line by `python -m madgen`."""

from madgen.cli.app import main

main()

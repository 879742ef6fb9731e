"""Run the command line by `python -m madgen`."""

from madgen.cluster.signals import STOPPED, exit_on_signals
from madgen.utils.console import log_to_stderr


def main() -> None:
    """Run `madgen`; a signal during its imports also ends it with one line."""
    log_to_stderr()
    exit_on_signals(STOPPED)
    from madgen.cli.app import main as run

    run()


if __name__ == "__main__":
    main()

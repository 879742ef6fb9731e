"""The `madgen` command: its table of commands, exit statuses and one-line errors."""

import contextlib
import errno
import os
import sys
from typing import Annotated

import typer

from madgen.cli import config, dataset, evaluate, generate
from madgen.cli.deferred_libraries import defer_libraries
from madgen.cluster.signals import STOPPED, early_stop_status, exit_on_signals
from madgen.utils.console import ignore_invalid_size, ignoring_closed_pipe, log_to_stderr, print_anything
from madgen.utils.credentials import mask
from madgen.utils.errors import STORAGE_ERRORS, UserError
from madgen.utils.garbage import collect_rarely

app = typer.Typer(
    name="madgen",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "Generate": (generate.generate, generate.plan, generate.sample, generate.submit, generate.fetch),
    "Write job files": (config.init, config.config),
    "Inspect and publish datasets": (
        dataset.status,
        dataset.verify,
        dataset.regenerate,
        dataset.preview,
        dataset.index,
        dataset.filter_,
        dataset.split,
        dataset.merge_,
        dataset.push,
    ),
    "Evaluate": (evaluate.evaluate, evaluate.compare, evaluate.paper, evaluate.study),
}
for panel, functions in COMMANDS.items():
    for function in functions:
        app.command(function.__name__.rstrip("_"), rich_help_panel=panel)(function)

WRONG_PATH = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
"""Errors of paths that no rerun can help."""


def main() -> None:
    """Run the command line. Exit status: 0 complete, 2 wrong input, 3 stopped early, 4 quarantined samples, 1 a bug."""
    print_anything()
    ignore_invalid_size()
    log_to_stderr()
    defer_libraries()
    collect_rarely()
    try:
        exit_on_signals(STOPPED)
        _check_current_directory()
        with ignoring_closed_pipe():
            sys.exit(app(standalone_mode=False))
        sys.exit(early_stop_status())
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "madgen"
        message = error.format_message().rstrip(".")  # empty where the help was printed instead
        sys.exit(_report(f"{message}; see {command} --help", 2) if message else 2)
    except UserError as error:
        sys.exit(_report(str(error), 2))
    except OSError as error:
        if error.errno in WRONG_PATH:
            sys.exit(_report(f"{error}; choose another path", 2))
        if error.errno not in STORAGE_ERRORS:
            raise
        sys.exit(_report(f"{error}; fix this and rerun the same command", early_stop_status()))


def _report(message: str, status: int) -> int:
    """Print an error as one line on stderr, with credentials masked; return the exit status."""
    with contextlib.suppress(OSError):  # a closed pipe
        print(mask(f"madgen: {' '.join(message.split())}"), file=sys.stderr)
    return status


def _check_current_directory() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current directory cannot be read ({error.strerror}); change to another one") from error


def _print_version(requested: bool) -> None:
    if requested:
        from madgen import __version__

        print(f"madgen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Generate large datasets of coherent panoramas by joint diffusion (Merge-Attend-Diffuse).

    Exit status: 0 complete, 2 wrong input (one line, nothing written),
    3 stopped early (rerun the same command to resume), 4 complete except for
    quarantined samples, 1 a bug or a failed check.

    Examples:

        madgen generate jobs/demo.yaml
        madgen generate --help
    """


if __name__ == "__main__":
    main()

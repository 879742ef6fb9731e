"""The `madgen` command: its table of commands, exit statuses and one-line errors."""

import errno
import os
import sys
from typing import Annotated

import typer

from madgen.cli import config, dataset, evaluate, generate
from madgen.utils.console import log_to_stderr, print_anything
from madgen.utils.errors import UserError

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
        dataset.push,
    ),
    "Evaluate": (evaluate.evaluate, evaluate.compare, evaluate.paper, evaluate.study),
}
for panel, functions in COMMANDS.items():
    for function in functions:
        app.command(function.__name__.rstrip("_"), rich_help_panel=panel)(function)

STORAGE_ERRORS = {
    getattr(errno, name)
    for name in (
        "ENOSPC EDQUOT EFBIG EROFS EIO ESTALE EACCES EPERM ENOTCONN ETIMEDOUT EREMOTEIO ESHUTDOWN EMFILE ENFILE "
        "EBUSY ENODEV EHOSTDOWN EHOSTUNREACH ENOLCK ECONNRESET"
    ).split()
    if hasattr(errno, name)  # some exist on Linux alone
}
"""Errors of disks, quotas and file servers, which a rerun may not meet again."""


def main() -> None:
    """Run the command line. Exit status: 0 complete, 2 wrong input, 3 stopped early, 4 quarantined samples, 1 a bug."""
    print_anything()
    log_to_stderr()
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "madgen"
        if message := error.format_message().rstrip("."):  # empty where the help was printed instead
            print(f"madgen: {message}; see {command} --help", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"madgen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        print(f"madgen: {error}; fix this and rerun the same command to resume", file=sys.stderr)
        # Lightning kills the other ranks at once if a process that it started ends with anything but 0.
        sys.exit(3 if os.environ.get("LOCAL_RANK", "") in ("", "0") else 0)


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

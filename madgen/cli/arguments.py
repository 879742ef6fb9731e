"""Arguments and options that several commands share."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from madgen.config.schema import Job

logger = logging.getLogger(__name__)


def option(
    metavar: str | None, help: str, *names: str, panel: str | None = None, shown: bool | str = True, **more: Any
) -> Any:
    """Declare an option by its value and its help; `panel`: its group in the help, `shown`: the default in the help."""
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel, show_default=shown, **more)


JobArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB",
        help="Job files or names of presets, merged from left to right, and overrides such as sampling.width=4096.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides such as sampling.width=4096.")
]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Dataset directory (`output.dir` of the job).")]
Measured = Annotated[
    Path | None, option("DIR", "Dataset to take the measured throughput from.", shown="the job's own dataset")
]
Output = Annotated[Path, option("FILE", "Image file (.png, .jpg or .webp).", "-o", "--output")]
AsJson = Annotated[bool, option(None, "Print JSON instead of text.", "--json")]
Device = Annotated[str, option("auto|cpu|cuda", "Device that the metrics run on.")]


def load_job(arguments: list[str]) -> "Job":
    """Load the job that a command line names by files and overrides."""
    from madgen.config.loader import load_job

    return load_job(*split_arguments(arguments))


def announce_loading(job: "Job") -> None:
    """Say on a terminal which model is loaded and from where: importing libraries and reading weights takes seconds."""
    if not sys.stderr.isatty():
        return
    from madgen.cluster.launch import rank
    from madgen.hub.weights import ModelFiles

    backbone = job.backbone
    files = ModelFiles.of(backbone.pretrained, backbone.revision, backbone.config)
    where = files.pretrained if Path(files.pretrained).exists() else "the Hugging Face Hub or its cache"
    if rank() == 0:
        logger.info(f"loading {backbone.pretrained} from {where} ...")


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a command line into job files and overrides."""
    files = [argument for argument in arguments if "=" not in argument]
    if not files:
        raise UserError("no job file given; example: madgen generate jobs/demo.yaml")
    return files, [as_utf8(argument) for argument in arguments if "=" in argument]


def as_utf8(argument: str) -> str:
    """Return an argument that Python could not decode in the locale's encoding as the UTF-8 text that it is."""
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        return argument


@contextmanager
def writing_to(output: Path | None) -> Iterator[None]:
    """Turn an error about the path that the user chose, such as a file in place of a folder, into a UserError."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        path = Path(error.filename2 or error.filename)
        if output is None or not (
            path.is_relative_to(output)
            or output.is_relative_to(path)
            or path.name.startswith(f".{output.name}.")  # temporary, until it is renamed
        ):
            raise
        raise UserError(f"-o {output}: {error.strerror}; choose another path") from error

"""Commands that inspect, check, filter and publish datasets."""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from madgen.cli.arguments import AsJson, Directory, Output, option

logger = logging.getLogger(__name__)
picture_option = partial(option, "FILE|URL", shown="the one that its prompt names")


def status(
    directory: Directory,
    as_json: AsJson = False,
    watch: Annotated[bool, option(None, "Refresh every two seconds until the dataset is complete.", "--watch")] = False,
) -> None:
    """Show progress, throughput, ETA and every worker of a dataset, from its files alone.

    Examples:

        madgen status out/demo --watch
        madgen status out/demo --json
    """
    from madgen.dataset.layout import DatasetDir
    from madgen.monitoring.status_page import print_status

    print_status(DatasetDir(directory), as_json, watch)


def verify(
    directory: Directory,
    as_json: AsJson = False,
    repair: Annotated[bool, option(None, "Mark broken shards for regeneration.", "--repair")] = False,
) -> None:
    """Check that every planned sample exists and is intact: tars, members, checksums, images.

    Exit status 0: complete. 1: broken. 3: incomplete, with nothing broken. 4: complete
    except for quarantined samples.

    Examples:

        madgen verify out/demo
        madgen verify out/demo --repair
    """
    from madgen.dataset import verify as checks
    from madgen.dataset.layout import DatasetDir
    from madgen.utils.console import ignoring_closed_pipe
    from madgen.utils.progress import showing_progress

    with showing_progress(f"verifying {directory}", "shards") as progress:
        found = checks.verify(DatasetDir(directory), progress)
    repairing = repair and bool(found.broken or found.unplanned or found.derived)
    with ignoring_closed_pipe():
        checks.print_verdict(found, as_json, repairing)
    if repairing:
        from madgen.dataset.shards.recovery import print_repaired
        from madgen.dataset.shards.recovery import repair as run

        print_repaired(DatasetDir(directory), run(DatasetDir(directory), found))
    sys.exit(checks.exit_code(found))


def regenerate(
    directory: Directory,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of the sample, such as 1f0c9a2b-0003.")],
    output: Output,
    pretrained: Annotated[
        str | None,
        option("PATH", "Folder, file or Hub id of the backbone's weights.", shown="the location in dataset.json"),
    ] = None,
    image: Annotated[str | None, picture_option("Picture that the sample started from.")] = None,
    mask: Annotated[str | None, picture_option("Mask of the part that it kept.")] = None,
    control: Annotated[str | None, picture_option("Picture that its ControlNet followed.")] = None,
    style: Annotated[str | None, picture_option("Picture that its IP-Adapter followed.")] = None,
) -> None:
    """Regenerate one sample from its metadata and compare it with the stored image.

    Exit status 0: the same pixels. 5: only the last bits differ, as they may with
    other devices, threads, batch sizes or library versions. 1: another picture.

    Examples:

        madgen regenerate out/demo 1f0c9a2b-0003 -o again.png
    """
    if sys.stderr.isatty():
        logger.info(f"loading {pretrained or f'the models of {directory}'} ...")
    from madgen.generation.regenerate import regenerate as run

    named = {"image": image, "mask": mask, "control": control, "style": style}
    files = {name: file for name, file in named.items() if file is not None}
    sys.exit(run(directory, key, output, pretrained, files))


def preview(
    directory: Directory,
    limit: Annotated[int, option("N", "Show at most N panoramas, evenly spaced over the dataset.", min=1)] = 10_000,
    megabytes: Annotated[int, option("MB", "Size limit of the images in the page, without thumbnails.", min=0)] = 64,
) -> None:
    """Write a self-contained HTML gallery and a contact sheet.

    Examples:

        madgen preview out/demo
        madgen preview /scratch/alps --limit 500 --megabytes 200
    """
    from madgen.monitoring.gallery import write_contact_sheet, write_gallery
    from madgen.utils.progress import showing_progress

    with showing_progress(f"reading {directory}", "panoramas") as progress:
        page = write_gallery(directory, limit=limit, budget=megabytes * 1_000_000, progress=progress)
    print(page)
    print(write_contact_sheet(directory))


def index(directory: Directory) -> None:
    """Rebuild index.parquet, quarantine.jsonl and the dataset card from the sidecars.

    Examples:

        madgen index out/demo
    """
    from madgen.dataset.index import write_index, write_quarantine
    from madgen.dataset.layout import DatasetDir
    from madgen.utils.progress import showing_progress

    with showing_progress(f"indexing {directory}", "shards") as progress:
        index_file = write_index(DatasetDir(directory), progress)
    print(index_file)
    write_quarantine(DatasetDir(directory))


def filter_(
    directory: Directory,
    where: Annotated[
        str | None,
        option("EXPRESSION", "Keep samples that match an expression over scores, prompt, size, seed and kept columns."),
    ] = None,
    best: Annotated[int | None, option("N", "Keep the N best samples of each prompt, ranked by --by.")] = None,
    by: Annotated[
        str | None,
        option(
            "SCORE", "Score used to rank for --best: coherence, clip, seam or wrap (lower is better for seam, wrap)."
        ),
    ] = None,
    output: Annotated[Path | None, option("NEWDIR", "Directory of the new dataset.", "-o", "--output")] = None,
    keys: Annotated[
        Path | None, option("FILE", "Write the keys, one per line, instead of a dataset; - is the standard output.")
    ] = None,
) -> None:
    """Select samples by their scores, without sampling again; write a new dataset or a list of keys.

    Examples:

        madgen filter out/demo --where "coherence > 0.8 and seam < 1.2" -o best
        madgen filter out/demo --where "prompt contains 'fog'" --keys fog.txt
        madgen filter out/demo --best 2 --by coherence -o best
    """
    from madgen.dataset.filtering.filter import filter_dataset
    from madgen.dataset.filtering.selection import Choice, parse
    from madgen.dataset.kept_columns import KeptColumns
    from madgen.dataset.layout import DatasetDir

    source = DatasetDir(directory)
    kept = KeptColumns.of(source, source.read_manifest()) if where is not None else None
    choice = Choice(parse(where, kept) if where is not None else None, best, by)
    filter_dataset(source, choice, output, keys)


def split(
    directory: Directory,
    shares: Annotated[str, option("NAME=SHARE,...", "Names and shares of the parts, which add up to 1.")],
    output: Annotated[Path, option("NEWDIR", "Directory of the parts, one folder each.", "-o", "--output")],
    by: Annotated[
        str, option("prompt|sample", "Keep all samples of a prompt together, or assign each sample.")
    ] = "prompt",
) -> None:
    """Split a dataset into parts, such as training and validation, by a hash of prompt ids.

    The part of a prompt does not depend on the other prompts: a dataset that has grown is split in the same way.

    Examples:

        madgen split out/demo --shares train=0.9,val=0.1 -o parts
        madgen split out/demo --shares a=0.5,b=0.5 --by sample -o parts
    """
    from madgen.dataset.filtering.split import parse_shares, split_dataset
    from madgen.dataset.layout import DatasetDir

    split_dataset(DatasetDir(directory), parse_shares(shares), by, output)


def merge_(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Directories of two or more datasets.", show_default=False)
    ],
    output: Annotated[Path, option("NEWDIR", "Directory of the merged dataset.", "-o", "--output")],
    mixed: Annotated[
        bool, option(None, "Merge datasets of different settings, such as of two methods.", "--mixed")
    ] = False,
    prefix: Annotated[
        str | None,
        option(
            "A,B,...",
            "Put a prefix before the keys of each dataset, or of all but the first, to keep equal keys apart.",
        ),
    ] = None,
    copy: Annotated[
        bool, option(None, "Copy shards, which are hard links otherwise where that is possible.", "--copy")
    ] = False,
) -> None:
    """Merge datasets into one. A sample that several of them have is kept once.

    Settings that affect pictures must be the same, unless --mixed. Different
    pictures of the same key are refused, unless --prefix keeps them apart.

    Examples:

        madgen merge out/alps out/coast -o out/landscapes
        madgen merge out/mad out/plain --mixed --prefix mad-,plain- -o both
    """
    from madgen.dataset.merge import merge

    prefixes = () if prefix is None else tuple(prefix.split(","))
    merge(directories, output, mixed, prefixes, copy)


def push(
    directory: Directory,
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Target, such as s3://bucket/folder, gs://... or hf://datasets/owner/name."),
    ],
) -> None:
    """Upload a dataset to any fsspec file system, skipping files that are already there.

    Credentials come from the environment.

    Exit status 3: the upload is incomplete; rerun the same command to resume.

    Examples:

        madgen push /scratch/alps s3://bucket/alps
        madgen push out/demo hf://datasets/owner/demo
    """
    from madgen.dataset.layout import DatasetDir
    from madgen.generation.upload import push_now

    sys.exit(push_now(DatasetDir(directory), url))

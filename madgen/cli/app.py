"""The command line: each command parses, loads the job and calls one function."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from madgen.utils.errors import UserError

app = typer.Typer(
    name="madgen",
    help="Large synthetic datasets of coherent panoramas, by joint diffusion (Merge-Attend-Diffuse).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # of typer's own copy of click, which it does not export
DISK_TROUBLE = {
    getattr(errno, name)
    for name in (
        "ENOSPC EDQUOT EFBIG EROFS EIO ESTALE EACCES EPERM ENOTCONN ETIMEDOUT EREMOTEIO ESHUTDOWN EMFILE ENFILE "
        "EBUSY ENODEV EHOSTDOWN EHOSTUNREACH ENOLCK ECONNRESET"
    ).split()
    if hasattr(errno, name)  # not every system knows them all
}

JobArguments = Annotated[list[str], typer.Argument(metavar="JOB.yaml [MORE.yaml ...] [key=value ...]")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="a dataset's directory (output.dir)")]
Measured = Annotated[
    Path | None, typer.Option("--measured", metavar="DIR", help="a dataset that tells the rate; default: the job's own")
]
AsJson = Annotated[bool, typer.Option("--json", help="for scripts")]


WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What becomes of a wrong `-o`, or of a file where a folder should be."""


def _was_named(error: OSError) -> bool:
    """Whether the path at fault is one that the user gave, lies in it, or stands aside until it is whole."""
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    given = [argument for argument in sys.argv[2:] if len(argument) > 1]
    aside = [str(path.with_name(f".{path.name}.")) for path in map(Path, given) if path.name]
    return any(part in path for part in [*given, *aside] for path in paths)


def main() -> None:
    """Entry point. Exit status: 0 complete, 2 wrong input, 3 stopped early, 4 some samples quarantined, 1 a bug."""
    try:
        sys.exit(app(standalone_mode=False))
    except USAGE_ERROR as error:
        message = error.format_message()
        # Without any argument it is the help, which is meant to have more than one line.
        context = getattr(error, "ctx", None)
        help_ = f"see {context.command_path if context else 'madgen'} --help"
        print(message if len(sys.argv) == 1 else f"madgen: {message.rstrip('.')}; {help_}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"madgen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            if not (isinstance(error, WRONG_PATH) and _was_named(error)):
                raise
            print(f"madgen: {error.filename2 or error.filename}: {error.strerror}; name another path", file=sys.stderr)
            sys.exit(2)
        print(f"madgen: {error}; mend that, then run the same command again to continue", file=sys.stderr)
        # Lightning kills the other ranks at once if one of the processes it started ends with anything but 0.
        sys.exit(0 if int(os.environ.get("LOCAL_RANK", "0")) > 0 else 3)


def _load_job(arguments: list[str]):  # type: ignore[no-untyped-def]
    from madgen.config.loader import load_job

    files = [argument for argument in arguments if "=" not in argument]
    if not files:
        raise UserError("no job file given; example: madgen generate jobs/demo.yaml")
    return load_job(files, [argument for argument in arguments if "=" in argument])


def _print_version(wanted: bool) -> None:
    if wanted:
        from madgen import __version__

        print(f"madgen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Large synthetic datasets of coherent panoramas, by joint diffusion (Merge-Attend-Diffuse)."""


@app.command()
def generate(job: JobArguments) -> None:
    """Make what is missing of a dataset: the main job."""
    from madgen.cluster.signals import end_before_it_begins

    end_before_it_begins()
    loaded = _load_job(job)
    from madgen.generation.outcome import finished, report
    from madgen.generation.upload import hand_over
    from madgen.planning.resolved_run import ResolvedRun

    resolved = ResolvedRun.of(loaded)
    outcome = finished(resolved)
    if outcome is not None:
        outcome = hand_over(resolved, outcome)
    else:
        from madgen.cluster.launch import rank

        if loaded.monitor.wandb.mode != "disabled" and rank() == 0:
            import madgen.monitoring.early  # noqa: F401 -- before torch, or it takes longer

        from madgen.planning.forecast import forecast, warn

        warn(resolved, forecast(resolved))  # what cannot work is told before Lightning is imported

        from madgen.generation.run import generate as run

        outcome = run(resolved)
    report(outcome, resolved)
    sys.exit(outcome.code)


@app.command()
def submit(
    job: JobArguments,
    nodes: Annotated[str, typer.Option("--nodes", metavar="N|auto", help="auto: as few as --time allows")] = "1",
    gpus_per_node: Annotated[int | None, typer.Option("--gpus-per-node", help="one process each")] = None,
    tasks_per_node: Annotated[int | None, typer.Option("--tasks-per-node", help="processes, on CPU nodes")] = None,
    cpus_per_task: Annotated[int | None, typer.Option("--cpus-per-task")] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="HH:MM:SS|auto", help="auto: from `plan`")] = None,
    measured: Measured = None,
    array: Annotated[str | None, typer.Option("--array", metavar="0-63[%K]", help="independent tasks instead")] = None,
    partition: Annotated[str | None, typer.Option("--partition")] = None,
    account: Annotated[str | None, typer.Option("--account")] = None,
    qos: Annotated[str | None, typer.Option("--qos")] = None,
    sbatch: Annotated[list[str] | None, typer.Option("--sbatch", help="any other, e.g. --sbatch=--exclusive")] = None,
    env: Annotated[Path | None, typer.Option("--env", help="sourced first; see slurm/env.example.sh")] = None,
    chain: Annotated[int, typer.Option("--chain", min=1, help="so many jobs, one after the other")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only show the script")] = False,
) -> None:
    """Render the sbatch script of a job, show it and submit it."""
    loaded = _load_job(job)
    from madgen.cluster import sbatch as slurm
    from madgen.dataset.manifest import check_directory
    from madgen.planning.forecast import forecast
    from madgen.planning.resolved_run import ResolvedRun
    from madgen.planning.sizing import AUTO, count

    named = {"partition": partition, "account": account, "qos": qos}
    asked_nodes, asked_time = count("--nodes", nodes), None if time == AUTO else time
    resources = slurm.Resources(
        nodes=1 if asked_nodes is None else asked_nodes,
        tasks_per_node=tasks_per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=asked_time,
        array=array,
        options=[*(f"--{name}={value}" for name, value in named.items() if value is not None), *(sbatch or [])],
    )
    slurm.check(loaded, resources)
    resolved = ResolvedRun.of(loaded)
    expected = forecast(resolved)
    if AUTO in (nodes, time):
        from madgen.planning.estimate import outlook
        from madgen.planning.sizing import pick

        resources, why = pick(resources, outlook(resolved, expected.evaluations, measured), nodes, time)
        print(f"madgen: {why}", file=sys.stderr)
    script = slurm.render(loaded, job, resources, env)
    check_directory(resolved.directory, None, loaded.output.resume)
    if not dry_run:
        slurm.require_sbatch()
    print(script, end="")
    if note := slurm.idle_workers(resolved.plan.shard_count, resources.workers):
        print(note, file=sys.stderr)
    if not dry_run:
        print(slurm.what_next(loaded, slurm.submit(script, chain), array is not None), file=sys.stderr)


@app.command()
def plan(
    job: JobArguments,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="how long with so many devices?")] = None,
    measured: Measured = None,
    as_json: AsJson = False,
) -> None:
    """Show prompts, samples, shards, cost, disk and time of a job; writes nothing."""
    loaded = _load_job(job)
    from madgen.planning.estimate import outlook
    from madgen.planning.forecast import forecast, print_forecast, warn
    from madgen.planning.resolved_run import ResolvedRun

    resolved = ResolvedRun.of(loaded)
    expected = forecast(resolved, assume_spec=True)
    ahead = outlook(resolved, expected.evaluations, measured)
    print_forecast(resolved, expected, ahead.told(workers), as_json)
    warn(resolved, expected)


@app.command()
def fetch(
    job: JobArguments,
    extractor: Annotated[
        str | None, typer.Option("--extractor", metavar="paper|...", help="the networks of evaluate as well")
    ] = None,
) -> None:
    """Download the weights a job needs, for compute nodes without a network."""
    from madgen.generation.fetch import fetch as run
    from madgen.generation.fetch import fetch_networks

    run(_load_job(job))
    if extractor is not None:
        fetch_networks(extractor)


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="what to show")],
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="a .png, .jpg or .webp file")] = Path("panorama.png"),
    job: Annotated[Path | None, typer.Option("--job", help="a job file; the demo backbone with MAD without")] = None,
) -> None:
    """Make one picture, now. Its seed is prompts.seed."""
    from madgen.generation.sample import sample_one

    sample_one(prompt, output, job, overrides or [])


@app.command()
def status(
    directory: Directory,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="look again every two seconds, until it is complete")] = False,
) -> None:
    """Planned, done, in flight, rate, time left, and every worker; from files alone."""
    from madgen.dataset.layout import DatasetDir
    from madgen.monitoring.status_page import print_status

    print_status(DatasetDir(directory), as_json, watch)


@app.command()
def verify(
    directory: Directory,
    as_json: AsJson = False,
    repair: Annotated[bool, typer.Option("--repair", help="put what is broken back on the list of generate")] = False,
) -> None:
    """Prove planned = present: every tar, member, checksum and picture."""
    from rich.progress import Progress

    from madgen.dataset import verify as checks
    from madgen.dataset.layout import DatasetDir

    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("shards", total=None)
        found = checks.verify(DatasetDir(directory), lambda d, total: progress.update(task, completed=d, total=total))
    checks.print_verdict(found, as_json)
    if repair and found.broken:
        from madgen.dataset.repair import repair as reopen

        again = reopen(DatasetDir(directory), found)
        print(f"{len(found.broken)} shards are open again, {again} samples to make; run generate", file=sys.stderr)
    sys.exit(checks.exit_code(found))


@app.command()
def regenerate(
    directory: Directory,
    key: Annotated[str, typer.Argument(metavar="KEY")],
    output: Annotated[Path, typer.Option("-o", "--output", help="a .png, .jpg or .webp file")],
) -> None:
    """Make one sample again from its metadata and compare; exit 1 if its pixels differ."""
    from madgen.generation.regenerate import regenerate as run

    sys.exit(0 if run(directory, key, output) else 1)


@app.command("filter")
def filter_samples(
    directory: Directory,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="EXPRESSION", help="coherence > 0.8 and seam < 1.2, prompt contains 'fog'"),
    ] = None,
    best: Annotated[int | None, typer.Option("--best", metavar="N", help="only so many samples of each prompt")] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="SCORE", help="what --best goes by: coherence, clip, or the least seam or wrap"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="NEWDIR", help="where a dataset of them is to be")
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", metavar="FILE", help="or only their keys, one a line")] = None,
) -> None:
    """Choose samples by their scores, without sampling again: a new dataset, or their keys."""
    from madgen.dataset.filtering.expression import parse
    from madgen.dataset.filtering.filter import filter_dataset
    from madgen.dataset.filtering.selection import Choice
    from madgen.dataset.layout import DatasetDir

    choice = Choice(parse(where) if where is not None else None, best, by)
    filter_dataset(DatasetDir(directory), choice, output, keys)


@app.command()
def study(
    paths: Annotated[list[Path], typer.Argument(metavar="DIR DIR [DIR ...] | answers.json ...")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="STUDY", help="the study's folder")] = Path("study"),
    pairs: Annotated[int | None, typer.Option("--pairs", metavar="N", help="for each two datasets; default 20")] = None,
    controls: Annotated[int | None, typer.Option("--controls", metavar="N", help="in all; default 6")] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", help="coherence, match, quality or both (coherence and match)")
    ] = None,
    ties: Annotated[bool | None, typer.Option("--ties", help='"no difference" is an answer too')] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="of the choice of pairs; default 0")] = None,
    score: Annotated[bool, typer.Option("--score", help="read answers, write the report")] = False,
    right: Annotated[int | None, typer.Option("--right", metavar="N", help="controls; default all but one")] = None,
    as_json: AsJson = False,
) -> None:
    """Which of two panoramas do people prefer? Make a page that asks them, or --score their answers."""
    from madgen.user_study.command import run

    design = {"pairs": pairs, "controls": controls, "questions": question, "ties": ties, "seed": seed}
    run(paths, output, design, score, right, as_json)


@app.command()
def evaluate(
    directory: Directory,
    reference: Annotated[
        Path | None, typer.Option("--reference", metavar="DIR", help="a dataset of squares; made and kept without")
    ] = None,
    references: Annotated[int, typer.Option("--references", min=2, help="squares a prompt, where they are made")] = 500,
    metrics: Annotated[str | None, typer.Option("--metrics", metavar="a,b", help="such as fid,kid,clip_score")] = None,
    extractor: Annotated[
        str | None,
        typer.Option("--extractor", metavar="demo|paper|FOLDER[,role=...]", help="default: by the dataset's backbone"),
    ] = None,
    halves: Annotated[bool, typer.Option("--halves", help="one half against the other: of the squares")] = False,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="a prompt, with --halves")] = 1000,
    pool: Annotated[
        str, typer.Option("--pool", metavar="prompts|dataset", help="a score each, or one of all")
    ] = "prompts",
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the crops")] = 0,
    crop: Annotated[int | None, typer.Option("--crop", min=8, help="pixels; default: a view")] = None,
    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda")] = "auto",
    batch: Annotated[int, typer.Option("--batch", min=1, help="panoramas at once")] = 8,
    wandb: Annotated[bool, typer.Option("--wandb", help="into the dataset's run as well")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="default: DIR/report")] = None,
) -> None:
    """The paper's scores of a dataset: report.json, report.md and plots."""
    from madgen.evaluation import command as evaluation

    asked = evaluation.Request(
        directory,
        reference,
        references,
        metrics,
        extractor,
        seed,
        crop,
        halves,
        pairs,
        pool,
        output,
        device,
        batch,
        wandb=wandb,
    )
    written = evaluation.run(asked)
    if written is not None:
        print(written)


@app.command()
def compare(
    reports: Annotated[list[str], typer.Argument(metavar="[name=]DIR ...", help="datasets or reports")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.md", help="and its plots beside")
    ] = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="also numbers of different protocols, with a note")] = False,
) -> None:
    """Reports side by side as in the paper's tables, best and second best marked."""
    from madgen.evaluation.command import compare as run

    print(run(reports, output, mixed), end="")


@app.command()
def paper(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="one of jobs/paper, or like them")],
    overrides: Overrides = None,
    demo: Annotated[bool, typer.Option("--demo", help="the same with the demo backbone")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="the least of that, to see it work")] = False,
    extractor: Annotated[str | None, typer.Option("--extractor", help="instead of the file's; see evaluate")] = None,
    device: Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="for the scores")] = "auto",
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="DIR", help="default: out/paper")] = None,
) -> None:
    """A table or figure of the paper: generate, evaluate and draw what its file says; goes on where it was."""
    from madgen.evaluation.paper.plan import load_paper
    from madgen.evaluation.paper.run import run

    planned = load_paper(file, demo, quick, overrides or [], extractor)
    variant = "-quick" if quick else "-demo" if demo else ""
    for path in run(planned, output or Path(f"out/paper{variant}"), device):
        print(path)


@app.command()
def preview(
    directory: Directory,
    limit: Annotated[int, typer.Option(min=1, help="at most so many panoramas, evenly spaced")] = 10_000,
    megabytes: Annotated[
        int, typer.Option("--megabytes", min=0, metavar="MB", help="most MB of pictures in the page beside thumbnails")
    ] = 64,
) -> None:
    """Write a self-contained HTML gallery and a contact sheet."""
    from rich.progress import Progress

    from madgen.monitoring.gallery import write_contact_sheet, write_gallery

    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("panoramas", total=None)
        page = write_gallery(
            directory,
            limit=limit,
            budget=megabytes * 1_000_000,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    print(page)
    print(write_contact_sheet(directory))


@app.command()
def push(
    directory: Directory,
    url: Annotated[str, typer.Argument(metavar="URL", help="s3://bucket/folder, gs://, hf://datasets/owner/name, ...")],
) -> None:
    """Upload a dataset to any fsspec file system; what is there, whole, is not sent again. Keys: from the environment.

    Exit status 3: something is not there yet.
    """
    from madgen.dataset.layout import DatasetDir
    from madgen.generation.upload import push_now

    sys.exit(push_now(DatasetDir(directory), url))


@app.command()
def index(directory: Directory) -> None:
    """Rebuild index.parquet, quarantine.jsonl and the dataset card from the sidecars."""
    from madgen.dataset.index import write_index, write_quarantine
    from madgen.dataset.layout import DatasetDir

    print(write_index(DatasetDir(directory)))
    write_quarantine(DatasetDir(directory))


if __name__ == "__main__":
    main()

"""Commands that score datasets and compare them, by metrics or by people."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from madgen.cli.arguments import Device, Directory, Overrides, writing_to

PROTOCOL = "Protocol"
DESIGN = "Study design"
SCORING = "Scoring"


def evaluate(
    directory: Directory,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Metrics to compute, such as fid,kid,clip_score.",
            show_default="all that the extractor supports",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Folder of the report.", show_default="DIR/report"),
    ] = None,
    device: Device = "auto",
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Panoramas per batch.")] = 8,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also log the report to the dataset's W&B run.")] = False,
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Reference dataset of square images; generated and cached if omitted.",
            rich_help_panel=PROTOCOL,
        ),
    ] = None,
    references: Annotated[
        int,
        typer.Option(
            metavar="N", min=2, help="Square images per prompt of a generated reference.", rich_help_panel=PROTOCOL
        ),
    ] = 500,
    extractor: Annotated[
        str | None,
        typer.Option(
            metavar="demo|paper|FOLDER[,ROLE=...]",
            help="Networks that the metrics use.",
            show_default="demo for the demo backbone, else paper",
            rich_help_panel=PROTOCOL,
        ),
    ] = None,
    pool: Annotated[
        str,
        typer.Option(
            metavar="prompts|dataset",
            help="Compute scores per prompt, or over the whole dataset.",
            rich_help_panel=PROTOCOL,
        ),
    ] = "prompts",
    halves: Annotated[
        bool,
        typer.Option(
            "--halves",
            help="Compare one half of the dataset with the other, as for references.",
            rich_help_panel=PROTOCOL,
        ),
    ] = False,
    pairs: Annotated[
        int, typer.Option(metavar="N", min=1, help="Pairs of images per prompt for --halves.", rich_help_panel=PROTOCOL)
    ] = 1000,
    crop: Annotated[
        int | None,
        typer.Option(
            metavar="PX",
            min=8,
            help="Side of the square crops.",
            show_default="size of a view",
            rich_help_panel=PROTOCOL,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Seed of the random crops.", rich_help_panel=PROTOCOL)
    ] = 0,
) -> None:
    """Compute the paper's metrics of a dataset; write report.json, report.md and plots.

    Examples:

        madgen evaluate out/demo
        madgen evaluate out/demo --metrics clip_score,fid,giqa
        madgen evaluate out/demo --reference out/squares -o out/report
    """
    from madgen.cluster.signals import RESUMABLE, exit_on_signals
    from madgen.evaluation import command as evaluation

    exit_on_signals(RESUMABLE, signal.SIGINT)
    request = evaluation.Request(
        directory=directory,
        reference=reference,
        references=references,
        metrics=metrics,
        extractor=extractor,
        seed=seed,
        crop=crop,
        halves=halves,
        pairs=pairs,
        pool=pool,
        output=output,
        device=device,
        batch=batch,
        wandb=wandb,
    )
    with writing_to(output):
        written = evaluation.run(request)
    if written is not None:
        print(written)


def compare(
    reports: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]DIR", help="Datasets or reports, optionally with a name for the table."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE.md", help="Also write the table to a file, with plots next to it."
        ),
    ] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Allow reports with different protocols; the table notes it.")
    ] = False,
) -> None:
    """Print reports side by side as in the paper's tables, with the best and second best marked.

    Examples:

        madgen compare MAD=out/mad MultiDiffusion=out/md -o table.md
    """
    from madgen.evaluation.command import compare as run

    with writing_to(output):
        table = run(reports, output, mixed)
    print(table, end="")


def paper(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.yaml", help="Description of a table or figure, as in jobs/paper.")
    ],
    overrides: Overrides = None,
    demo: Annotated[bool, typer.Option("--demo", help="Use the demo backbone.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Use the demo backbone and a minimal configuration, as a smoke test.")
    ] = False,
    extractor: Annotated[
        str | None,
        typer.Option(
            metavar="demo|paper|FOLDER",
            help="Networks that the metrics use; see `madgen evaluate`.",
            show_default="from FILE.yaml",
        ),
    ] = None,
    device: Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Output folder.",
            show_default="out/paper, out/paper-demo or out/paper-quick",
        ),
    ] = None,
) -> None:
    """Reproduce a table or figure of the paper: generate, evaluate and draw. Resumes where it stopped.

    Examples:

        madgen paper jobs/paper/table1.yaml --quick
        madgen paper jobs/paper/table1.yaml prompts.limit=3
    """
    from madgen.cluster.signals import RESUMABLE, exit_on_signals
    from madgen.evaluation.paper.plan import load_paper
    from madgen.evaluation.paper.run import run

    exit_on_signals(RESUMABLE, signal.SIGINT)
    planned = load_paper(file, demo, quick, overrides or [], extractor)
    variant = "-quick" if quick else "-demo" if demo else ""
    with writing_to(output):
        for path in run(planned, output or Path(f"out/paper{variant}"), device):
            print(path)


def study(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Two or more datasets; with --score: files of answers.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="STUDY", help="Folder of the study.")] = Path(
        "study"
    ),
    pairs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Comparisons per pair of datasets.", show_default="20", rich_help_panel=DESIGN),
    ] = None,
    controls: Annotated[
        int | None,
        typer.Option(metavar="N", help="Control questions in total.", show_default="6", rich_help_panel=DESIGN),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Question to ask: coherence, match, quality, or both for coherence and match (repeatable).",
            show_default="both",
            rich_help_panel=DESIGN,
        ),
    ] = None,
    ties: Annotated[
        bool | None, typer.Option("--ties", help='Allow "no difference" as an answer.', rich_help_panel=DESIGN)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Seed of the choice of pairs and controls.", show_default="0", rich_help_panel=DESIGN
        ),
    ] = None,
    score: Annotated[
        bool, typer.Option("--score", help="Score files of answers and write the report.", rich_help_panel=SCORING)
    ] = False,
    right: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Control questions that a participant must answer correctly to be included.",
            show_default="all but one",
            rich_help_panel=SCORING,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel=SCORING)
    ] = False,
) -> None:
    """Build a web page that asks people which of two panoramas they prefer, or score their answers.

    Examples:

        madgen study out/mad out/multidiffusion -o study
        madgen study --score answers-1.json answers-2.json -o study
    """
    from madgen.user_study.command import run

    design = {"pairs": pairs, "controls": controls, "questions": question, "ties": ties, "seed": seed}
    with writing_to(output):
        run(paths, output, design, score, right, as_json)

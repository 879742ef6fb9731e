"""Commands that score datasets and compare them, by metrics or by people."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from madgen.cli.arguments import Device, Directory, Overrides, option, writing_to
from madgen.utils.errors import UserError

protocol_option = partial(option, panel="Protocol")
design_option = partial(option, panel="Study design")
scoring_option = partial(option, panel="Scoring")


def evaluate(
    directory: Directory,
    metrics: Annotated[
        str | None,
        option("A,B", "Metrics to compute, such as fid,kid,clip_score.", shown="all that the extractor supports"),
    ] = None,
    output: Annotated[Path | None, option("OUT", "Folder of the report.", "-o", "--output", shown="DIR/report")] = None,
    device: Device = "auto",
    batch: Annotated[int, option("N", "Panoramas per batch.", min=1)] = 8,
    wandb: Annotated[bool, option(None, "Also log the report to the dataset's W&B run.", "--wandb")] = False,
    reference: Annotated[
        Path | None, protocol_option("DIR", "Reference dataset of square images; generated and cached if omitted.")
    ] = None,
    references: Annotated[int, protocol_option("N", "Square images per prompt of a generated reference.", min=2)] = 500,
    extractor: Annotated[
        str | None,
        protocol_option(
            "demo|paper|FOLDER[,ROLE=...]",
            "Networks that the metrics use.",
            shown="demo for the demo backbone, else paper",
        ),
    ] = None,
    pool: Annotated[
        str, protocol_option("prompts|dataset", "Compute scores per prompt, or over the whole dataset.")
    ] = "prompts",
    halves: Annotated[
        bool, protocol_option(None, "Compare one half of the dataset with the other, as for references.", "--halves")
    ] = False,
    pairs: Annotated[int, protocol_option("N", "Pairs of images per prompt for --halves.", min=1)] = 1000,
    crop: Annotated[
        int | None, protocol_option("PX", "Side of the square crops.", shown="size of a view", min=8)
    ] = None,
    seed: Annotated[int, protocol_option("N", "Seed of the random crops.", min=0)] = 0,
) -> None:
    """Compute the paper's metrics of a dataset; write report.json, report.md and plots.

    Examples:

        madgen evaluate out/demo
        madgen evaluate out/demo --metrics clip_score,fid,giqa
        madgen evaluate out/demo --reference out/squares -o out/report
    """
    from madgen.cluster.signals import RESUMABLE, exit_on_signals
    from madgen.evaluation import command as evaluation

    exit_on_signals(RESUMABLE)
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
        Path | None, option("FILE.md", "Also write the table to a file, with plots next to it.", "-o", "--output")
    ] = None,
    mixed: Annotated[
        bool, option(None, "Allow reports with different protocols; the table notes it.", "--mixed")
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
    demo: Annotated[bool, option(None, "Use the demo backbone.", "--demo")] = False,
    quick: Annotated[
        bool, option(None, "Use the demo backbone and a minimal configuration, as a smoke test.", "--quick")
    ] = False,
    extractor: Annotated[
        str | None,
        option("demo|paper|FOLDER", "Networks that the metrics use; see `madgen evaluate`.", shown="from FILE.yaml"),
    ] = None,
    device: Device = "auto",
    output: Annotated[
        Path | None,
        option("DIR", "Output folder.", "-o", "--output", shown="out/paper, out/paper-demo or out/paper-quick"),
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

    exit_on_signals(RESUMABLE)
    planned = load_paper(file, demo, quick, overrides or [], extractor)
    variant = "-quick" if quick else "-demo" if demo else ""
    with writing_to(output):
        for path in run(planned, output or Path(f"out/paper{variant}"), device):
            print(path)


def study(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Two or more datasets; with --score: files of answers.")
    ],
    output: Annotated[Path, option("STUDY", "Folder of the study.", "-o", "--output")] = Path("study"),
    pairs: Annotated[int | None, design_option("N", "Comparisons per pair of datasets.", shown="20")] = None,
    controls: Annotated[int | None, design_option("N", "Control questions in total.", shown="6")] = None,
    question: Annotated[
        list[str] | None,
        design_option(
            "NAME",
            "Question to ask: coherence, match, quality, or both for coherence and match (repeatable).",
            shown="both",
        ),
    ] = None,
    ties: Annotated[bool | None, design_option(None, 'Allow "no difference" as an answer.', "--ties")] = None,
    seed: Annotated[int | None, design_option("N", "Seed of the choice of pairs and controls.", shown="0")] = None,
    score: Annotated[bool, scoring_option(None, "Score files of answers and write the report.", "--score")] = False,
    right: Annotated[
        int | None,
        scoring_option(
            "N", "Control questions that a participant must answer correctly to be included.", shown="all but one"
        ),
    ] = None,
    as_json: Annotated[bool, scoring_option(None, "Print JSON instead of text.", "--json")] = False,
) -> None:
    """Build a web page that asks people which of two panoramas they prefer, or score their answers.

    Examples:

        madgen study out/mad out/multidiffusion -o study
        madgen study --score answers-1.json answers-2.json -o study
    """
    questions = None if question is None else tuple(question)
    design: dict[str, Any] = {"pairs": pairs, "controls": controls, "questions": questions, "ties": ties, "seed": seed}
    given = {name: value for name, value in design.items() if value is not None}
    if score and given:
        name = next(iter(given)).replace("questions", "question")
        raise UserError(f"--{name} cannot be combined with --score: it is set when the study is created")
    if not score and (right is not None or as_json):
        raise UserError(f"--{'json' if as_json else 'right'} needs --score")
    with writing_to(output):
        if score:
            from madgen.user_study.report import score_study

            score_study(paths, output, right, as_json)
        else:
            from madgen.user_study.design import Design
            from madgen.user_study.make import make_study

            make_study(paths, output, Design(**given))

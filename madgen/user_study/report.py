"""Write the report of a study: `report.md` and `report.json` beside the key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from madgen.dataset.format import to_json
from madgen.user_study.answers import read_answers, read_key
from madgen.user_study.questions import QUESTIONS
from madgen.user_study.score import score
from madgen.utils.atomic import write_atomically
from madgen.utils.escaping import escaped

MAX_PROMPT_CHARACTERS = 60


def score_study(paths: Sequence[Path], folder: Path, right: int | None, as_json: bool) -> None:
    """Score answers, write `report.md` and `report.json` to the study's folder, and print one of them."""
    key = read_key(folder)
    report = score(read_answers(paths, key), key, right)
    text = to_markdown(report)
    write_atomically(folder / "report.json", to_json(report, indent=1))
    write_atomically(folder / "report.md", text.encode())
    print(to_json(report, indent=1).decode() if as_json else text, end="")


def to_markdown(report: dict[str, Any]) -> str:
    """Format a report."""
    return "\n".join([*_summary(report), *(line for found in report["comparisons"] for line in _table(found)), ""])


def _summary(report: dict[str, Any]) -> Iterator[str]:
    people, protocol = report["participants"], report["protocol"]
    yield "# Preference study"
    yield ""
    yield (
        f"{people['kept']} of {people['given']} participants answered at least {protocol['right']} of "
        f"{protocol['controls']} controls correctly; their {report['answers']} answers are scored. The panorama shown "
        f"first was preferred in {report['shown_first_preferred']:.1%} of the answers without a tie."
    )
    if people["dropped"]:
        yield ""
    for name, dropped in people["dropped"].items():
        yield f"- dropped: {escaped(name)}, {dropped['right']} of {protocol['controls']} correct"
    yield ""
    yield (
        f"Win rate: {protocol['rate']}. {protocol['confidence']:.0%} confidence interval: {protocol['interval']}. The "
        f"results apply to {protocol['of']}."
    )


def _table(comparison: dict[str, Any]) -> Iterator[str]:
    first, second, question = escaped(comparison["first"]), escaped(comparison["second"]), comparison["question"]
    yield ""
    yield f"## {first} vs. {second}"
    yield QUESTIONS[question].text if question in QUESTIONS else question
    yield ""
    yield f"| prompt | {first} preferred | 95 % interval | wins | losses | ties | participants | design effect |"
    yield "|---|---|---|---|---|---|---|---|"
    yield _line("**all**", comparison["overall"])
    for row in comparison["prompts"].values():
        yield _line(escaped(row["prompt"], MAX_PROMPT_CHARACTERS), row)


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"| {name} | {row['rate']:.1%} | {row['low']:.1%} – {row['high']:.1%} | {row['wins']} | {row['losses']} | "
        f"{row['ties']} | {row['participants']} | {row['design_effect']:.2f} |"
    )

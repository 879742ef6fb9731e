"""`madgen study --score answers*.json`: the win rates as a table, `report.md` and `report.json` beside the key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from madgen.dataset.layout import to_json
from madgen.user_study.answers import read_answers, read_key
from madgen.user_study.questions import QUESTIONS
from madgen.user_study.score import score
from madgen.utils.atomic import write_atomically
from madgen.utils.markdown import escaped

PROMPT_CHARACTERS = 60


def score_study(paths: Sequence[Path], folder: Path, right: int | None, as_json: bool) -> None:
    """Reads the answers, writes `folder/report.md` and `report.json`, and prints the one or the other."""
    key = read_key(folder)
    report = score(read_answers(paths, key), key, right)
    text = markdown(report)
    write_atomically(folder / "report.json", to_json(report, indent=1))
    write_atomically(folder / "report.md", text.encode())
    print(to_json(report, indent=1).decode() if as_json else text, end="")


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    return "\n".join([*_head(report), *(line for found in report["comparisons"] for line in _table(found)), ""])


def _head(report: dict[str, Any]) -> Iterator[str]:
    people, protocol = report["participants"], report["protocol"]
    yield "# Preference study"
    yield ""
    yield (
        f"{people['kept']} of {people['given']} participants answered at least {protocol['right']} of "
        f"{protocol['controls']} controls rightly; {report['answers']} answers are theirs. The panorama that was shown "
        f"first was preferred in {report['shown_first_preferred']:.1%} of those that are no tie."
    )
    if people["dropped"]:
        yield ""
    for name, dropped in people["dropped"].items():
        yield f"- dropped: {escaped(name)}, {dropped['right']} of {protocol['controls']} right"
    yield ""
    yield (
        f"Win rate: {protocol['rate']}. Intervals of {protocol['confidence']:.0%}: {protocol['interval']}. They speak "
        f"of {protocol['of']}."
    )


def _table(found: dict[str, Any]) -> Iterator[str]:
    first, second = escaped(found["first"]), escaped(found["second"])
    yield ""
    yield f"## {first} against {second}"
    yield f"{QUESTIONS[found['question']].text}" if found["question"] in QUESTIONS else found["question"]
    yield ""
    yield f"| prompt | {first} preferred | 95 % interval | wins | losses | ties | participants | design effect |"
    yield "|---|---|---|---|---|---|---|---|"
    yield _line("**all**", found["overall"])
    for row in found["prompts"].values():
        yield _line(escaped(row["prompt"], PROMPT_CHARACTERS), row)


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"| {name} | {row['rate']:.1%} | {row['low']:.1%} – {row['high']:.1%} | {row['wins']} | {row['losses']} | "
        f"{row['ties']} | {row['participants']} | {row['design_effect']:.2f} |"
    )

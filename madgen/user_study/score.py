"""Compute win rates from the answers of participants who passed the controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from madgen.user_study.answers import Answer, Participant
from madgen.user_study.intervals import CONFIDENCE, win_rate
from madgen.utils.errors import UserError

PROTOCOL = {
    "rate": "wins over answers, where a tie counts as half a win for each side",
    "interval": "Wilson score interval of the answers over their design effect (at least 1, clustered by participant), "
    "with Student's t for participants - 1",
    "confidence": CONFIDENCE,
    "of": "participants like these and to these pairs; not to other prompts, and uncorrected for several comparisons",
}


def required_controls(key: dict[str, Any], right: int | None) -> int:
    """Return the number of controls to pass: `right`, or by default all but one, as in the paper (5 of 6)."""
    controls = _count_controls(key)
    if right is None:
        return max(0, controls - 1)
    if not 0 <= right <= controls:
        raise UserError(f"--right must be 0 to {controls}, the number of controls in the study, got {right}")
    return right


def _count_controls(key: dict[str, Any]) -> int:
    return sum("right" in item for item in key["items"].values())


def score(people: Sequence[Participant], key: dict[str, Any], right: int | None = None) -> dict[str, Any]:
    """Return the report: participants kept and dropped, and the win rate of each two datasets for each question.

    Raises UserError if no answers are left.
    """
    required = required_controls(key, right)
    passed = {person.name: sum(_controls(person, key)) for person in people}
    kept = [person for person in people if passed[person.name] >= required]
    answers = [answer for person in kept for answer in _comparisons(person, key)]
    if not answers:
        raise UserError(
            f"no answers to score: {len(kept)} of {len(people)} participants pass {required} controls, and these have "
            "answered no other question"
        )
    decided = [answer for answer in answers if answer.picked is not None]
    comparisons = [
        _comparison(kept, key, question, pair)
        for question in key["questions"]
        for pair in combinations(range(len(key["datasets"])), 2)
    ]
    return {
        "study": key["study"],
        "protocol": {**PROTOCOL, "controls": _count_controls(key), "right": required},
        "participants": {
            "given": len(people),
            "kept": len(kept),
            "dropped": {
                person.name: {"right": passed[person.name], "answered": len(list(_controls(person, key)))}
                for person in people
                if person not in kept
            },
        },
        "answers": len(answers),
        "shown_first_preferred": sum(answer.picked == answer.first for answer in decided) / max(1, len(decided)),
        "datasets": key["datasets"],
        "comparisons": [comparison for comparison in comparisons if comparison["overall"]],
    }


def _controls(person: Participant, key: dict[str, Any]) -> Iterator[bool]:
    """Yield for each answered control whether the answer is right."""
    for answer in person.answers.values():
        if "right" in (item := key["items"][answer.item]):
            yield answer.picked == item["right"]


def _comparisons(person: Participant, key: dict[str, Any]) -> list[Answer]:
    return [answer for answer in person.answers.values() if "right" not in key["items"][answer.item]]


def _comparison(
    people: Sequence[Participant], key: dict[str, Any], question: str, pair: tuple[int, int]
) -> dict[str, Any]:
    """Compare the first dataset of a pair with the second, overall and by prompt."""
    items = {
        name: item
        for name, item in key["items"].items()
        if "right" not in item and item["question"] == question and _datasets(item, key) == pair
    }
    prompts = {item["prompt_id"]: item["prompt"] for item in items.values()}
    rows = {
        prompt: _row(people, key, [name for name, item in items.items() if item["prompt_id"] == prompt], pair[0])
        for prompt in sorted(prompts)
    }
    return {
        "question": question,
        "first": key["datasets"][pair[0]]["name"],
        "second": key["datasets"][pair[1]]["name"],
        "overall": _row(people, key, list(items), pair[0]),
        "prompts": {prompt: {"prompt": prompts[prompt], **row} for prompt, row in rows.items() if row},
    }


def _datasets(item: dict[str, Any], key: dict[str, Any]) -> tuple[int, ...]:
    return tuple(sorted(key["pictures"][image]["dataset"] for image in item["pictures"]))


def _row(people: Sequence[Participant], key: dict[str, Any], items: Sequence[str], first: int) -> dict[str, Any] | None:
    """Return the win rate of dataset `first` in these items, None without answers."""
    wins = [[_win(person.answers[name], key, first) for name in items if name in person.answers] for person in people]
    flat = [win for given in wins for win in given]
    if not flat:
        return None
    counts = {"wins": flat.count(1.0), "losses": flat.count(0.0), "ties": flat.count(0.5), "pairs": len(items)}
    return {**asdict(win_rate(wins)), **counts}


def _win(answer: Answer, key: dict[str, Any], first: int) -> float:
    if answer.picked is None:
        return 0.5
    return float(key["pictures"][answer.picked]["dataset"] == first)

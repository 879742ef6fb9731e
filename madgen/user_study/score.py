"""Answers to win rates: who passed the controls, and what they preferred."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from madgen.user_study.answers import Answer, Participant
from madgen.user_study.intervals import CONFIDENCE, rate_of
from madgen.utils.errors import UserError

PROTOCOL = {
    "rate": "wins over answers; a tie is half a win for each",
    "interval": "Wilson's, of the answers over their design effect (clusters are participants, at least 1), with "
    "Student's t for participants - 1",
    "confidence": CONFIDENCE,
    "of": "people such as these, asked about these pairs; not other prompts, and not corrected for several comparisons",
}


def needed(key: dict[str, Any], right: int | None) -> int:
    """Controls that a participant has to answer rightly; if nothing is said all but one, as in the paper (5 of 6)."""
    controls = sum("right" in item for item in key["items"].values())
    if right is None:
        return max(0, controls - 1)
    if not 0 <= right <= controls:
        raise UserError(f"--right must be 0 to {controls} controls, which is all that the study has, got {right}")
    return right


def score(people: Sequence[Participant], key: dict[str, Any], right: int | None = None) -> dict[str, Any]:
    """The report: participants kept and dropped, and for each question and two datasets the win rate of the first.

    UserError if nobody is left, or nobody has answered anything but controls.
    """
    least = needed(key, right)
    right_of = {person.name: sum(_controls(person, key)) for person in people}
    kept = [person for person in people if right_of[person.name] >= least]
    dropped = [person for person in people if right_of[person.name] < least]
    if not any(_compared(person, key) for person in kept):
        raise UserError(f"nothing to score: of {len(people)} participants {len(kept)} have {least} controls right and "
                        "none of these has answered anything else")  # fmt: skip
    comparisons = [
        _comparison(kept, key, question, pair)
        for question in key["questions"]
        for pair in combinations(range(len(key["datasets"])), 2)
    ]
    answers = [answer for person in kept for answer in _compared(person, key)]
    decided = [answer for answer in answers if answer.picked is not None]
    return {
        "study": key["study"],
        "protocol": {**PROTOCOL, "controls": sum("right" in item for item in key["items"].values()), "right": least},
        "participants": {
            "given": len(people),
            "kept": len(kept),
            "dropped": {
                person.name: {"right": right_of[person.name], "answered": len(list(_controls(person, key)))}
                for person in dropped
            },
        },
        "answers": len(answers),
        "shown_first_preferred": sum(answer.picked == answer.first for answer in decided) / max(1, len(decided)),
        "datasets": key["datasets"],
        "comparisons": [comparison for comparison in comparisons if comparison["overall"]],
    }


def _controls(person: Participant, key: dict[str, Any]) -> Iterator[bool]:
    """Of each control that was answered, whether rightly."""
    for answer in person.answers.values():
        if "right" in (item := key["items"][answer.item]):
            yield answer.picked == item["right"]


def _compared(person: Participant, key: dict[str, Any]) -> list[Answer]:
    return [answer for answer in person.answers.values() if "right" not in key["items"][answer.item]]


def _comparison(
    people: Sequence[Participant], key: dict[str, Any], question: str, pair: tuple[int, int]
) -> dict[str, Any]:
    """The first dataset of the pair against the second, in all and by prompt."""
    items = {
        name: item
        for name, item in key["items"].items()
        if "right" not in item and item["question"] == question and _datasets(item, key) == pair
    }
    names = [key["datasets"][index]["name"] for index in pair]
    prompts = {item["prompt_id"]: item["prompt"] for item in items.values()}
    of_prompt: dict[str, list[str]] = {prompt: [] for prompt in sorted(prompts)}
    for name, item in items.items():
        of_prompt[item["prompt_id"]].append(name)
    rows = {prompt: _row(people, key, asked, pair[0]) for prompt, asked in of_prompt.items()}
    return {
        "question": question,
        "first": names[0],
        "second": names[1],
        "overall": _row(people, key, list(items), pair[0]),
        "prompts": {prompt: {"prompt": prompts[prompt], **row} for prompt, row in rows.items() if row},
    }


def _datasets(item: dict[str, Any], key: dict[str, Any]) -> tuple[int, ...]:
    return tuple(sorted(key["pictures"][picture]["dataset"] for picture in item["pictures"]))


def _row(people: Sequence[Participant], key: dict[str, Any], items: Sequence[str], first: int) -> dict[str, Any] | None:
    """Wins of the dataset `first` in these items, with the interval; None without an answer."""
    wins = [[_win(person.answers[name], key, first) for name in items if name in person.answers] for person in people]
    flat = [win for given in wins for win in given]
    if not flat:
        return None
    counted = {"wins": flat.count(1.0), "losses": flat.count(0.0), "ties": flat.count(0.5), "pairs": len(items)}
    return {**asdict(rate_of(wins)), **counted}


def _win(answer: Answer, key: dict[str, Any], first: int) -> float:
    if answer.picked is None:
        return 0.5
    return float(key["pictures"][answer.picked]["dataset"] == first)

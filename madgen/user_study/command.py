"""`madgen study`, both halves of it: a page is made, or answers are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from madgen.utils.errors import UserError


def run(
    paths: Sequence[Path], folder: Path, design: Mapping[str, Any], score: bool, right: int | None, as_json: bool
) -> None:
    """`design` holds fields of `Design`, None where nothing was said; UserError for options of the other half."""
    given = {name: value for name, value in design.items() if value is not None}
    if score:
        if given:
            name = {"questions": "question"}.get(first := next(iter(given)), first)
            raise UserError(f"--{name} is for making a study, not for --score: the answers know what was asked")
        from madgen.user_study.report import score_study

        return score_study(paths, folder, right, as_json)
    if right is not None or as_json:
        raise UserError(f"--{'json' if as_json else 'right'} goes with --score")
    from madgen.user_study.design import Design
    from madgen.user_study.make import make_study

    if "questions" in given:
        given["questions"] = tuple(given["questions"])
    return make_study(paths, folder, Design(**given))

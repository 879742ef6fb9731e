"""The command `madgen study`: create a study, or score its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from madgen.utils.errors import UserError


def run(
    paths: Sequence[Path], folder: Path, design: Mapping[str, Any], score: bool, right: int | None, as_json: bool
) -> None:
    """Create a study of datasets, or score answers; raise UserError for options of the other mode.

    `design` holds the fields of `Design`, None for options that are not given.
    """
    given = {name: value for name, value in design.items() if value is not None}
    if score:
        if given:
            name = next(iter(given)).replace("questions", "question")
            raise UserError(f"--{name} cannot be combined with --score: it is set when the study is created")
        from madgen.user_study.report import score_study

        return score_study(paths, folder, right, as_json)
    if right is not None or as_json:
        raise UserError(f"--{'json' if as_json else 'right'} needs --score")
    from madgen.user_study.design import Design
    from madgen.user_study.make import make_study

    if "questions" in given:
        given["questions"] = tuple(given["questions"])
    return make_study(paths, folder, Design(**given))

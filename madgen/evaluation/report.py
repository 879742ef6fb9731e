"""Read and write reports: `report.json` holds every value and its protocol, `report.md` is for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from madgen.dataset.format import to_json
from madgen.evaluation.evaluate import VERSION
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError
from madgen.utils.escaping import escaped

MAX_PROMPT_CHARACTERS = 2000


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Write `report.json` and `report.md`; return the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", to_json(report, indent=1))
    write_atomically(folder / "report.md", to_markdown(report).encode())
    return folder / "report.md"


def read_report(path: Path) -> dict[str, Any]:
    """Read a `report.json` given its path, folder or dataset; raise UserError if it is missing or damaged."""
    candidates = [path, path / "report.json", path / "report" / "report.json"]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UserError(f"{path} contains no report.json; run madgen evaluate {path}")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(report, dict) or report.get("madgen_report") != VERSION:
        raise UserError(f"{file} is not a report of version {VERSION}; run madgen evaluate again")
    metrics = report.get("metrics")
    fields = {"mean", "std", "scale", "protocol", "label"}
    if not (isinstance(metrics, dict) and isinstance(report.get("dataset"), dict) and metrics):
        raise UserError(f"{file} is damaged: it has no scores; run madgen evaluate again")
    for name, score in metrics.items():
        valid = isinstance(score, dict) and fields <= score.keys() and isinstance(score["mean"], int | float | None)
        if not valid:
            raise UserError(f"{file} is damaged at {name}; run madgen evaluate again")
    return report


def to_markdown(report: dict[str, Any]) -> str:
    """Format all scores, those of each prompt, and their protocols."""
    dataset, metrics, by_prompt = report["dataset"], report["metrics"], report["pool"] == "prompts"
    planned = f" of {dataset['planned']} planned" if dataset["samples"] != dataset["planned"] else ""
    lines = [
        f"# Evaluation of {dataset['name']}",
        "",
        f"{dataset['samples']} panoramas{planned}, {dataset['prompts']} prompts, fingerprint "
        f"`{dataset['fingerprint']}`. "
        + ("Mean ± standard deviation over prompts." if by_prompt else "One score of all prompts together."),
        "",
        "| metric | value | network |",
        "|---|---|---|",
    ]
    lines += [f"| {heading(score)} | {value(score)} | {score['network']} |" for score in metrics.values()]
    lines += ["", "↑ higher is better, ↓ lower is better."]
    if by_prompt:
        lines += ["", "| prompt | " + " | ".join(heading(score) for score in metrics.values()) + " |"]
        lines.append("|---" * (1 + len(metrics)) + "|")
        for prompt, text in report["prompts"].items():
            cells = [_number(score["per_prompt"].get(prompt), score["scale"]) for score in metrics.values()]
            lines.append(f"| {escaped(text, MAX_PROMPT_CHARACTERS)} | " + " | ".join(cells) + " |")
    lines += ["", "## Protocol", ""]
    lines += [f"- {score['label']}: {_protocol(score)}" for score in metrics.values()]
    lines += ["", "## Networks", ""]
    networks = {score["network"]: score["protocol"]["network"] for score in metrics.values()}
    for name, labels in labels_by_network(metrics.values()).items():
        network = networks[name]
        lines.append(
            f"- {name} ({', '.join(labels)}): {network['network']}; {network['preprocessing']}; weights "
            f"`{network['weights'][:12]}`"
        )
    return "\n".join(lines) + "\n"


def heading(score: dict[str, Any]) -> str:
    """Return a metric's name with its scale and direction, as in the paper's tables."""
    return score["label"] + (" ×10³" if score["scale"] == 1000 else "") + (" ↑" if score["higher_is_better"] else " ↓")


def labels_by_network(scores: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Group the labels of metrics by network."""
    labels: dict[str, list[str]] = {}
    for score in scores:
        labels.setdefault(score["network"], []).append(score["label"])
    return labels


def value(score: dict[str, Any]) -> str:
    """Format mean ± standard deviation in the scale of the table."""
    mean = _number(score["mean"], score["scale"])
    return mean if score["std"] is None else f"{mean} ± {_number(score['std'], score['scale'])}"


def _number(plain: float | None, scale: float) -> str:
    """Format with two decimals, three below 1, or two significant digits below 0.01."""
    if plain is None:
        return "–"
    scaled = plain * scale
    if abs(scaled) >= 1:
        return f"{scaled:.2f}"
    return f"{scaled:.3f}" if abs(scaled) >= 0.01 else f"{scaled:.2g}"


def _protocol(score: dict[str, Any]) -> str:
    protocol = score["protocol"]
    crops, counts = protocol["crops"], protocol.get("pictures", {})
    seed = f", seed {crops['seed']}" if "seed" in crops else ""
    parts = [protocol["definition"], f"crops of {crops['side_px']} px: {crops['choice']}{seed}"]
    reference = protocol.get("reference")
    if reference and "fingerprint" in reference:
        parts.append(f"reference {reference['fingerprint'][:12]}, {_span(reference)} images per prompt")
    elif reference:
        parts.append("one random half of the images against the other")
    if "pairs" in counts:
        parts.append(f"{counts['pairs']} {crops['compared']}, or all if there are fewer")
    elif counts:
        parts.append(f"{_span(counts)} images per prompt")
    return "; ".join(parts) + f". `{score['protocol_id']}`"


def _span(counts: dict[str, Any]) -> str:
    return str(counts["least"]) if counts["least"] == counts["most"] else f"{counts['least']} to {counts['most']}"

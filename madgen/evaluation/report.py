"""A report on disk: `report.json` with every number and its protocol, `report.md` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from madgen.dataset.layout import to_json
from madgen.evaluation.evaluate import VERSION
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError
from madgen.utils.markdown import escaped

PROMPT_CHARACTERS = 2000


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """Writes `report.json` and `report.md` into a folder; the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", to_json(report, indent=1))
    write_atomically(folder / "report.md", to_markdown(report).encode())
    return folder / "report.md"


def read_report(path: Path) -> dict[str, Any]:
    """Of a `report.json`, its folder, or the dataset that it lies in; UserError if there is none."""
    candidates = [path, path / "report.json", path / "report" / "report.json"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise UserError(f"{path} holds no report.json; run madgen evaluate {path}")
    try:
        report = json.loads(found.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {found}: {error}") from error
    if not isinstance(report, dict) or report.get("madgen_report") != VERSION:
        raise UserError(f"{found} is no report of this version ({VERSION}); run madgen evaluate again")
    metrics = report.get("metrics")
    fields = {"mean", "std", "scale", "protocol", "label"}
    if not (isinstance(metrics, dict) and isinstance(report.get("dataset"), dict) and metrics):
        raise UserError(f"{found} is damaged: it has no scores; run madgen evaluate again")
    for name, score in metrics.items():
        known = isinstance(score, dict) and fields <= score.keys() and isinstance(score["mean"], int | float | None)
        if not known:
            raise UserError(f"{found} is damaged at {name}; run madgen evaluate again")
    return report


def to_markdown(report: dict[str, Any]) -> str:
    """The scores, each prompt's, and how they were made."""
    about, metrics = report["dataset"], report["metrics"]
    unfinished = f" of {about['planned']} planned" if about["samples"] != about["planned"] else ""
    lines = [f"# Scores of {about['name']}", ""]
    lines += [
        f"{about['samples']} panoramas{unfinished} of {about['prompts']} prompts, fingerprint `{about['fingerprint']}`."
    ]
    lines += ["Mean ± deviation over prompts." if report["pool"] == "prompts" else "All prompts together.", ""]
    lines += ["| score | | value | network |", "|---|---|---|---|"]
    for found in metrics.values():
        better = "higher is better" if found["higher_is_better"] else "lower is better"
        lines.append(f"| {heading(found)} | {better} | {value(found)} | {found['network']} |")
    if report["pool"] == "prompts":
        lines += ["", "| prompt | " + " | ".join(heading(found) for found in metrics.values()) + " |"]
        lines.append("|---" * (1 + len(metrics)) + "|")
        for prompt, text in report["prompts"].items():
            cells = [number(found["per_prompt"].get(prompt), found["scale"]) for found in metrics.values()]
            lines.append(f"| {escaped(text, PROMPT_CHARACTERS)} | " + " | ".join(cells) + " |")
    lines += ["", "## Protocol", ""]
    lines += [f"- {found['label']}: {_protocol(found)}" for found in metrics.values()]
    return "\n".join(lines) + "\n"


def heading(found: dict[str, Any]) -> str:
    """A metric's name with its direction and factor, as in the paper's tables."""
    factor = f" ×10³ {arrow(found)}" if found["scale"] == 1000 else f" {arrow(found)}"
    return found["label"] + factor


def arrow(found: dict[str, Any]) -> str:
    return "↑" if found["higher_is_better"] else "↓"


def value(found: dict[str, Any]) -> str:
    """Mean ± deviation, times the factor of the table."""
    mean = number(found["mean"], found["scale"])
    return mean if found["std"] is None else f"{mean} ± {number(found['std'], found['scale'])}"


def number(plain: float | None, scale: float) -> str:
    """Two decimals; three, or two digits, of what is small."""
    if plain is None:
        return "–"
    scaled = plain * scale
    if abs(scaled) >= 1:
        return f"{scaled:.2f}"
    return f"{scaled:.3f}" if abs(scaled) >= 0.01 else f"{scaled:.2g}"


def _protocol(found: dict[str, Any]) -> str:
    protocol = found["protocol"]
    network, crops = protocol["network"], protocol["crops"]
    parts = [
        protocol["definition"],
        f"{network['network']} (weights {network['weights'][:12]}; {network['preprocessing']})",
    ]
    seed = f", seed {crops['seed']}" if "seed" in crops else ""
    parts.append(f"crops of {crops['side_px']} px: {crops['choice']}{seed}")
    reference = protocol.get("reference")
    if reference and "fingerprint" in reference:
        parts.append(f"reference {reference['fingerprint'][:12]}, {_span(reference)} pictures each")
    elif reference:
        parts.append("one random half against the other")
    if "pairs" in protocol.get("pictures", ()):
        parts.append(f"{protocol['pictures']['pairs']} {crops['compared']}, or all that there are")
    elif "pictures" in protocol:
        parts.append(f"{_span(protocol['pictures'])} pictures each")
    return "; ".join(parts) + f". `{found['protocol_id']}`"


def _span(counts: dict[str, Any]) -> str:
    return str(counts["least"]) if counts["least"] == counts["most"] else f"{counts['least']} to {counts['most']}"

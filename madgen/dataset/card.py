"""Write the dataset card: sample images, and a README.md with the YAML header of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from madgen.dataset.format import FormatError, Manifest, SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.licences import recorded_licences
from madgen.dataset.reader import read_entry
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError
from madgen.utils.markdown import escaped

UNREADABLE = (OSError, ValueError, SyntaxError, LookupError, StopIteration, tarfile.TarError)
"""Errors that reading a damaged sample may raise."""
PICTURES = 4
PICTURE_FILES = tuple(f"samples/{number}.jpg" for number in range(1, PICTURES + 1))
"""Names of the card's images; no other names are used."""
PICTURE = (1536, 256)
"""Maximum width and height of the card's images in pixels."""
NOT_AFFECTING_SAMPLES = ("trainer", "monitor", "retry", "quarantine")
"""Sections of the job that affect how it runs, but not the dataset."""


@dataclass
class Facts:
    """Statistics of the samples for the card."""

    samples: int = 0
    bytes: int = 0
    quarantined: int = 0
    scores: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Number of samples with each score, and the sum of their values."""
    pictures: list[tuple[str, str]] = field(default_factory=list)
    """Files of the card's images and their prompts."""

    def add(self, entry: SampleEntry) -> None:
        """Add a sample by its sidecar entry."""
        self.samples += 1
        self.bytes += entry.size
        for name, value in (entry.scores or {}).items():
            count, total = self.scores.get(name, (0, 0.0))
            self.scores[name] = count + 1, total + value


def write_pictures(directory: DatasetDir, facts: Facts, counts: Sequence[tuple[str, int]]) -> None:
    """Write thumbnails of evenly spaced samples as `samples/1.jpg`, ...; `counts` are (shard, number of samples)."""
    total, folder = sum(count for _, count in counts), directory.root / "samples"
    wanted = [(2 * number + 1) * total // (2 * PICTURES) for number in range(min(PICTURES, total))]
    if total < PICTURES:
        wanted = list(range(total))
    begin = 0
    for shard, count in counts:
        indices = [index - begin for index in wanted if begin <= index < begin + count]
        entries = directory.read_sidecar(shard).samples if indices else ()
        for entry in (entries[index] for index in indices):
            with contextlib.suppress(UserError, *UNREADABLE):
                picture = _small(directory, entry)  # damaged samples are skipped; `verify` reports them
                folder.mkdir(exist_ok=True)
                path = folder / f"{len(facts.pictures) + 1}.jpg"
                write_atomically(path, picture)
                facts.pictures.append((f"samples/{path.name}", entry.prompt))
        begin += count
    for number in range(len(facts.pictures) + 1, PICTURES + 1):  # left from when there were more samples
        (folder / f"{number}.jpg").unlink(missing_ok=True)


def _small(directory: DatasetDir, entry: SampleEntry) -> bytes:
    image, stream = Image.fromarray(read_entry(directory, entry).image_HWC), io.BytesIO()
    image.thumbnail(PICTURE)
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def card(manifest: Manifest, facts: Facts) -> str:
    """Return the Markdown of the card. Raises FormatError if the manifest lacks something that it shows."""
    try:
        return _card(manifest, facts)
    except (LookupError, TypeError, AttributeError) as error:
        raise FormatError(
            f"dataset.json is damaged: its job or identity does not have what the card shows ({error!r:.80})"
        ) from error


def _card(manifest: Manifest, facts: Facts) -> str:
    job = manifest.job
    origin = _filtered(manifest.filtered) if manifest.filtered else _merged(manifest.sources or ())
    lost = f", {facts.quarantined} quarantined (`quarantine.jsonl`)" if facts.quarantined else ""
    return f"""---
pretty_name: {json.dumps(manifest.name)}
{_licence_header([source.licence or {} for source in manifest.sources or (manifest,)])}
task_categories: [text-to-image, unconditional-image-generation]
tags: [synthetic, image, text, panorama, webdataset, madgen]
size_categories: [{_size_category(facts.samples)}]
configs:
- config_name: default
  data_files: shards/*.tar
dataset_info:
- config_name: default
  features:
  - {{name: {job["output"]["format"]}, dtype: image}}
  - {{name: json, dtype: json}}
  - {{name: txt, dtype: string}}
  - {{name: __key__, dtype: string}}
  - {{name: __url__, dtype: string}}
---
# {manifest.name}

{facts.samples} of {manifest.plan.samples} synthetic panoramas ({facts.bytes / 1e6:.1f} MB){lost}, generated by
madgen {manifest.versions.get("madgen") or ""} by joint diffusion over overlapping views.
{origin}
{_gallery(facts)}
## Usage
`datasets.load_dataset("this folder or hub id")`, or `webdataset.WebDataset` over `shards/*.tar`. A sample is an image,
a JSON file with everything needed to regenerate it, and its prompt as text. `index.parquet` has one row per sample:
prompt, seed, size, scores, the licences of the weights, and its position in the shard.

## Generation
{_table(manifest, facts)}

{_licence_text(manifest.sources or (manifest,))}

The job:

{_job_yaml(job)}
"""


def _gallery(facts: Facts) -> str:
    return "\n".join(f"![]({file})\n\n*{escaped(prompt)}*\n" for file, prompt in facts.pictures)


def _table(manifest: Manifest, facts: Facts) -> str:
    job, identity = manifest.job, manifest.identity
    backbone, mad, sampling = identity["backbone"], job["method"]["mad"], job["sampling"]
    pretrained = escaped(_public(job["backbone"]["pretrained"]))
    rows = {
        "prompts": manifest.plan.prompts,
        **_generations(manifest),
        "backbone": f"{pretrained}, {backbone['dtype']}, weights `{backbone['weights']}`",
        "method": f"{job['method']['views']['layout']} views, MAD in the first {mad['steps']} steps",
        **_operators(identity["method"]),
        "sampling": f"{sampling['num_inference_steps']} steps, guidance scale {sampling['guidance_scale']}",
        **{f"{name}, mean": f"{total / count:.4f} of {count}" for name, (count, total) in sorted(facts.scores.items())},
        "fingerprint": f"`{manifest.fingerprint}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _generations(manifest: Manifest) -> dict[str, str]:
    """Return a row for the stages of a dataset that has grown."""
    counts = " + ".join(f"{generation.samples}" for generation in manifest.generations or ())
    return {"generations": f"{counts} panoramas"} if counts else {}


def _operators(method: dict[str, Any]) -> dict[str, str]:
    """Return rows for the settings of the merge operator and the initial noise that are not the defaults."""
    names = {"merge": "merging of predictions", "noise": "initial noise"}
    return {
        title: ", ".join(f"{key}={value}" for key, value in method[name].items())
        for name, title in names.items()
        if name in method
    }


HUB_LICENCES = ("apache-2.0", "mit", "creativeml-openrail-m", "openrail", "openrail++")
"""Licences that the Hugging Face hub knows by name, of those in `madgen.hub.license`."""


def _licence_header(licences: Sequence[dict[str, Any]]) -> str:
    """Return the lines of the card's YAML header; the hub has `other` for licences that it does not know."""
    licence = licences[0]
    if any(other.get("backbone") != licence.get("backbone") for other in licences):
        return "license: other"
    name, source = licence.get("backbone"), (licence.get("terms") or {}).get("source")
    if name is None or name in HUB_LICENCES or source is None:
        return f"license: {name or 'unknown'}"
    return f"license: other\nlicense_name: {name}\nlicense_link: {source}"


def _licence_text(manifests: Sequence[Manifest]) -> str:
    """Describe what the licences of the weights say about the pictures."""
    lines: dict[str, None] = {}
    for manifest in manifests:
        for title, each in recorded_licences(manifest):
            link = f", <{each.source}>" if each.source else ""
            lines[f"- {title}: {each.summary}{link}"] = None
    return "\n".join(["The use of the pictures depends on the licences of the weights:", "", *lines])


def _job_yaml(job: dict[str, Any]) -> str:
    """Return the job as an indented code block, which no value can break out of."""
    import yaml

    shown = {name: value for name, value in job.items() if name not in NOT_AFFECTING_SAMPLES}
    shown["output"] = {name: value for name, value in job["output"].items() if name not in ("dir", "upload", "resume")}
    plain = _public(json.loads(json.dumps(shown)))  # converts tuples to lists
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _public(value: Any) -> Any:
    """Return a value of the job without the folders of local paths."""
    if isinstance(value, dict):
        return {name: _public(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    is_path = isinstance(value, str) and value.startswith(("/", "~")) and "\n" not in value and " " not in value
    return Path(value).name or value if is_path else value


def _filtered(filtered: dict[str, Any]) -> str:
    """Describe the source and the selection of a filtered dataset, indented so that no text can break out of it."""
    source = filtered["from"]
    if split := filtered.get("split"):
        shares = ",".join(f"{name}={share:g}" for name, share in split["shares"])
        command = f"split --shares {shares} --by {split['by']}"
        return f"""
The part {split["part"]} of the {source["samples"]} panoramas of {source["name"]} (fingerprint \
`{source["fingerprint"]}`), by

    madgen {command}
"""
    best = "" if filtered["best"] is None else f"--best {filtered['best']} --by {filtered['by']}"
    where = "" if filtered["where"] is None else f"--where {json.dumps(filtered['where'], ensure_ascii=False)}"
    return f"""
Selected from the {source["samples"]} panoramas of {source["name"]} (fingerprint `{source["fingerprint"]}`) by

    madgen filter {" ".join(filter(None, (where, best)))}
"""


def _merged(sources: Sequence[Manifest]) -> str:
    """Describe the datasets that were merged; the settings below are those of the first one."""
    if not sources:
        return ""
    lines = [
        f"| {escaped(source.name)} | {source.plan.samples} | `{source.fingerprint}` "
        f"| {escaped(_public(source.job['backbone']['pretrained']))} |"
        for source in sources
    ]
    table = "\n".join(["| dataset | panoramas | fingerprint | backbone |", "|---|---|---|---|", *lines])
    return f"""
Merged from these datasets; settings and job below are those of the first one.

{table}
"""


def _size_category(samples: int) -> str:
    bounds = (
        (1_000, "n<1K"),
        (10_000, "1K<n<10K"),
        (100_000, "10K<n<100K"),
        (1_000_000, "100K<n<1M"),
        (10_000_000, "1M<n<10M"),
    )
    return next((name for bound, name in bounds if samples < bound), "10M<n<100M")

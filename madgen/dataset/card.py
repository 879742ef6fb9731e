"""Write the dataset card: sample images, and a README.md with the YAML header of the Hugging Face hub."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from madgen.dataset.format import Manifest, SampleEntry
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_entry
from madgen.hub.license import TERMS, Licence
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
OWN_AFFAIR = ("trainer", "monitor", "retry", "quarantine")
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
    """Return the Markdown of the card."""
    job = manifest.job
    filtered = _filtered(manifest.filtered) if manifest.filtered else ""
    lost = f", {facts.quarantined} could not be made (`quarantine.jsonl`)" if facts.quarantined else ""
    return f"""---
pretty_name: {json.dumps(manifest.name)}
{_licence_header(manifest.licence or {})}
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

{facts.samples} of {manifest.plan.samples} synthetic panoramas ({facts.bytes / 1e6:.1f} MB){lost}, made by
madgen {manifest.versions.get("madgen") or ""} by joint diffusion over overlapping views.
{filtered}
{_gallery(facts)}
## How to read it
`datasets.load_dataset("this folder or hub id")`, or `webdataset.WebDataset` over `shards/*.tar`. A sample is a picture,
a JSON with everything that is needed to make it again, and its prompt as a text. `index.parquet` has a row for each:
prompt, seed, size, scores, and where its bytes lie.

## How it was made
{_table(manifest, facts)}

{_licence_text(manifest.licence or {}, job)}

The job:

{_job_yaml(job)}
"""


def _gallery(facts: Facts) -> str:
    return "\n".join(f"![]({file})\n\n*{escaped(prompt)}*\n" for file, prompt in facts.pictures)


def _table(manifest: Manifest, facts: Facts) -> str:
    job, identity = manifest.job, manifest.identity
    backbone, mad, sampling = identity["backbone"], job["method"]["mad"], job["sampling"]
    rows = {
        "prompts": manifest.plan.prompts,
        "backbone": f"{escaped(job['backbone']['pretrained'])}, {backbone['dtype']}, weights `{backbone['weights']}`",
        "method": f"{job['method']['views']['layout']} views, MAD in the first {mad['steps']} steps",
        **_operators(identity["method"]),
        "sampling": f"{sampling['num_inference_steps']} steps, guidance scale {sampling['guidance_scale']}",
        **{f"{name}, mean": f"{total / count:.4f} of {count}" for name, (count, total) in sorted(facts.scores.items())},
        "fingerprint": f"`{manifest.fingerprint}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


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


def _licence_header(licence: dict[str, Any]) -> str:
    """Return the lines of the card's YAML header; the hub has `other` for licences that it does not know."""
    name, source = licence.get("backbone"), (licence.get("terms") or {}).get("source")
    if name is None or name in HUB_LICENCES or source is None:
        return f"license: {name or 'unknown'}"
    return f"license: other\nlicense_name: {name}\nlicense_link: {source}"


def _licence_text(licence: dict[str, Any], job: dict[str, Any]) -> str:
    """Describe what the licences of the weights say about the pictures."""
    name = licence.get("backbone")
    own = Licence(**licence["terms"]) if "terms" in licence else TERMS.get(name, Licence(name))
    known = [own, *(Licence(**fields) for fields in licence.get("loras", ()))]
    known += [Licence()] * (1 + len(job["backbone"]["loras"]) - len(known))  # datasets of earlier versions
    lines = ["The use of the pictures depends on the licences of the weights:", ""]
    for number, each in enumerate(known):
        link = f", <{each.source}>" if each.source else ""
        lines.append(f"- {f'LoRA {number}' if number else 'backbone'}: {each.summary}{link}")
    return "\n".join(lines)


def _job_yaml(job: dict[str, Any]) -> str:
    """Return the job as an indented code block, which no value can break out of."""
    import yaml

    shown = {name: value for name, value in job.items() if name not in OWN_AFFAIR}
    shown["output"] = {name: value for name, value in job["output"].items() if name not in ("dir", "upload", "resume")}
    plain = json.loads(json.dumps(shown))  # converts tuples to lists
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _filtered(filtered: dict[str, Any]) -> str:
    """Describe the source and the selection of a filtered dataset, indented so that no text can break out of it."""
    source = filtered["from"]
    best = "" if filtered["best"] is None else f"--best {filtered['best']} --by {filtered['by']}"
    where = "" if filtered["where"] is None else f"--where {json.dumps(filtered['where'], ensure_ascii=False)}"
    return f"""
Chosen from the {source["samples"]} panoramas of {source["name"]} (fingerprint `{source["fingerprint"]}`) by

    madgen filter {" ".join(filter(None, (where, best)))}
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

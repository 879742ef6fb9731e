"""The dataset card: a README.md with the YAML header that the Hugging Face hub reads."""

from __future__ import annotations

import json
from typing import Any


def card(manifest: dict[str, Any], samples: int, total_bytes: int) -> str:
    """Markdown for a dataset of `samples` panoramas in `total_bytes`."""
    job, identity = manifest["job"], manifest["identity"]
    mad, sampling = job["method"]["mad"], job["sampling"]
    filtered = _filtered(manifest["filtered"]) if "filtered" in manifest else ""
    weights = f"({identity['backbone']['dtype']}), weights `{identity['backbone']['weights']}`"
    return f"""---
pretty_name: {json.dumps(job["name"])}
task_categories: [text-to-image]
tags: [synthetic, panorama, webdataset, madgen]
size_categories: [{_size_category(samples)}]
configs:
- config_name: default
  data_files: shards/*.tar
---
# {job["name"]}

{samples} of {manifest["plan"]["samples"]} synthetic panoramas ({total_bytes / 1e6:.1f} MB), made by
madgen {manifest["versions"]["madgen"] or ""} by joint diffusion over overlapping
views. Read them with `webdataset`, or with `datasets.load_dataset("webdataset", data_files="shards/*.tar")`.
{filtered}
| | |
|---|---|
| backbone | `{job["backbone"]["pretrained"]}` {weights} |
| method | {job["method"]["views"]["layout"]} views, MAD in the first {mad["steps"]} steps |
| sampling | {sampling["num_inference_steps"]} steps, guidance scale {sampling["guidance_scale"]} |
| fingerprint | `{manifest["fingerprint"]}` |

The licence of the pictures follows from that of the backbone's weights.
"""


def _filtered(filtered: dict[str, Any]) -> str:
    """Of what it is a part, and how that was chosen: indented, so that no prompt can break out of it."""
    source = filtered["from"]
    best = "" if filtered["best"] is None else f"--best {filtered['best']} --by {filtered['by']}"
    where = "" if filtered["where"] is None else f"--where {json.dumps(filtered['where'], ensure_ascii=False)}"
    return f"""
Chosen from the {source["samples"]} panoramas of {source["name"]} (fingerprint `{source["fingerprint"]}`) by

    madgen filter {" ".join(filter(None, (where, best)))}
"""


def _size_category(samples: int) -> str:
    bounds = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for bound, name in bounds if samples < bound), "n>1M")

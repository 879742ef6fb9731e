"""The square pictures that a dataset is compared with: made by a job of their own, and kept for other datasets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from madgen.config.loader import load_job
from madgen.config.schema import Job
from madgen.dataset.layout import DatasetDir, to_json
from madgen.dataset.reader import read_metadata
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError
from madgen.utils.seeding import derived_seed

BATCH = 4
"""Square pictures at once."""


def view_side(job: dict[str, Any]) -> int:
    """Pixels of a side of the views that a recorded job was sampled with; UserError if the backbone is not at hand."""
    from madgen.backbones import backbone_module
    from madgen.hub.weights import ModelFiles

    backbone = job["backbone"]
    describe = backbone_module(backbone["name"]).describe
    try:
        spec = describe(*ModelFiles.of(backbone["pretrained"], backbone["revision"], backbone["config"]))
    except UserError as error:
        raise UserError(f"how large the views are cannot be told ({error}); say it: --crop PIXELS") from error
    return (job["method"]["views"]["size"] or spec.view_size) * spec.factor


def reference_job(content: dict[str, Any], side: int, per_prompt: int, prompts: Path, folder: Path) -> dict[str, Any]:
    """The job of square pictures of a view's size, by the same backbone and sampler, without any joint diffusion."""
    job = content["job"]
    return {
        "name": "reference",
        "backbone": {**job["backbone"], "dtype": content["identity"]["backbone"]["dtype"]},
        "method": {"views": {"layout": "whole"}, "mad": {"steps": 0}},
        "sampling": {**job["sampling"], "height": side, "width": side, "loop": False, "batch_size": BATCH},
        "prompts": {
            "source": str(prompts.absolute()),
            "samples_per_prompt": per_prompt,
            "seed": derived_seed(job["prompts"]["seed"], "reference"),
        },
        "output": {"dir": str(folder.absolute()), "samples_per_shard": 100},
        "scores": {"enabled": []},
        "monitor": {"wandb": {"mode": "disabled"}},
        "trainer": {"accelerator": job["trainer"]["accelerator"]},
    }


def make_reference(directory: DatasetDir, side: int, per_prompt: int) -> DatasetDir:
    """The square pictures that go with a dataset, in a folder beside it that other datasets of its backbone share.

    An ordinary dataset, made by `generate`: it can be stopped, goes on, and is there for the next time.
    """
    from madgen.evaluation.partial_results import digest

    content = directory.read_manifest()
    lines = b"".join(to_json(line) for line in _prompts(directory))
    job = reference_job(content, side, per_prompt, Path("."), Path("."))
    same = {name: job[name] for name in ("backbone", "sampling")} | {
        "seed": job["prompts"]["seed"],
        "count": per_prompt,
    }
    same["weights"] = content["identity"]["backbone"]["weights"]
    folder = directory.root.absolute().parent / f"reference-{digest([same, lines.decode()])}"
    prompts, file = folder.with_suffix(".jsonl"), folder.with_suffix(".yaml")
    write_atomically(prompts, lines)
    write_atomically(file, to_json(reference_job(content, side, per_prompt, prompts, folder), indent=1))
    code = generate(load_job(file), file)
    if code not in (0, 4):
        sys.exit(code)
    return DatasetDir(folder)


def generate(job: Job, file: Path) -> int:
    """`madgen generate` of a job, which `file` holds; its exit status.

    In this process where it needs no other; else in one of its own, as Lightning starts the others by running the
    command line again. Of processes that were started together each runs one, alone on its device: they share the work
    by its claim files.
    """
    import torch

    several = torch.cuda.device_count() > 1 if job.trainer.devices == "auto" else job.trainer.devices != 1
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ or several:
        return _generate_apart(file)
    from madgen.generation.outcome import finished, report
    from madgen.generation.run import generate as run
    from madgen.planning.resolved_run import ResolvedRun

    resolved = ResolvedRun.of(job)
    outcome = finished(resolved) or run(resolved)
    report(outcome, resolved)
    return outcome.code


def _own_device(count: int) -> dict[str, str]:
    """Of processes that were started together: the one of `count` visible GPUs that is this one's."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if local is None or count == 0:
        return {}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    visible = visible or [str(number) for number in range(count)]
    return {"CUDA_VISIBLE_DEVICES": visible[int(local) % len(visible)]}


def _generate_apart(file: Path) -> int:
    import torch

    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= _own_device(torch.cuda.device_count())
    command = [sys.executable, "-m", "madgen", "generate", str(file)]
    return subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode


def _prompts(directory: DatasetDir) -> list[dict[str, Any]]:
    from madgen.evaluation.partial_results import prompt_of

    found: dict[str, dict[str, Any]] = {}
    for sidecar in directory.sidecars():
        for entry in sidecar["samples"]:
            if (prompt := prompt_of(entry["key"])) not in found:
                about = read_metadata(directory, sidecar["shard"], entry)
                found[prompt] = {"id": prompt, "prompt": about["prompt"], "negative_prompt": about["negative_prompt"]}
    if not found:
        raise UserError(f"{directory.root} has no finished shard yet; run generate first")
    return [found[prompt] for prompt in sorted(found)]

"""Generate the square reference images of a dataset, as an ordinary dataset that others of its backbone can share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from madgen.config.loader import load_job
from madgen.config.schema import Job
from madgen.dataset.format import Manifest, to_json
from madgen.dataset.layout import DatasetDir
from madgen.dataset.reader import read_metadata
from madgen.evaluation.partial_results import digest
from madgen.utils.atomic import write_atomically
from madgen.utils.errors import UserError
from madgen.utils.seeding import derived_seed

BATCH = 4
"""Square images per batch."""
LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_",
)  # fmt: skip
"""Prefixes of the variables of torchrun and SLURM."""


def view_side(job: dict[str, Any]) -> int:
    """Return the view size of a recorded job in pixels; raise UserError if its backbone is not available."""
    from madgen.backbones import backbone_module
    from madgen.hub.weights import ModelFiles

    backbone = job["backbone"]
    describe = backbone_module(backbone["name"]).describe
    try:
        spec = describe(ModelFiles.of(backbone["pretrained"], backbone["revision"], backbone["config"]))
    except UserError as error:
        raise UserError(f"cannot determine the view size ({error}); set it with --crop PIXELS") from error
    return (job["method"]["views"]["size"] or spec.view_size) * spec.factor


def reference_job(manifest: Manifest, side: int, per_prompt: int, prompts: Path, folder: Path) -> dict[str, Any]:
    """Return a job for square images the size of a view, by the same backbone and sampler without joint diffusion."""
    job = manifest.job
    adapters = ("controlnet", "ip_adapter")  # squares have no pictures to follow
    backbone = {name: value for name, value in job["backbone"].items() if name not in adapters}
    return {
        "name": "reference",
        "backbone": {**backbone, "dtype": manifest.identity["backbone"]["dtype"]},
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
    """Generate, resume or reuse the reference of a dataset, in a folder beside it; exit with generate's status."""
    manifest = directory.read_manifest()
    lines = b"".join(to_json(line) for line in _prompts(directory))
    job = reference_job(manifest, side, per_prompt, Path("."), Path("."))
    content = {
        **{name: job[name] for name in ("backbone", "sampling")},
        "seed": job["prompts"]["seed"],
        "count": per_prompt,
        "weights": manifest.identity["backbone"]["weights"],
    }
    folder = directory.root.absolute().parent / f"reference-{digest([content, lines.decode()])}"
    prompts, file = folder.with_suffix(".jsonl"), folder.with_suffix(".yaml")
    write_atomically(prompts, lines)
    write_atomically(file, to_json(reference_job(manifest, side, per_prompt, prompts, folder), indent=1))
    generate(load_job(file), file)
    return DatasetDir(folder)


def generate(job: Job, file: Path) -> None:
    """Run `madgen generate` on a job that is stored in `file`; exit with its status if the dataset is incomplete.

    Runs in this process unless several processes are needed: Lightning starts further ones by repeating the command
    line, and ranks that torchrun or srun has started each run their own single-device process on the shared work.
    """
    several = torch.cuda.device_count() > 1 if job.trainer.devices == "auto" else job.trainer.devices != 1
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ or several:
        code = _generate_in_subprocess(file)
    else:
        from madgen.generation.outcome import finished, report
        from madgen.generation.run import generate as run
        from madgen.planning.resolved_run import ResolvedRun

        resolved = ResolvedRun.of(job)
        outcome = finished(resolved) or run(resolved)
        report(outcome, resolved)
        code = outcome.code
    if code not in (0, 4):
        sys.exit(code)


def _own_device(count: int) -> dict[str, str]:
    """Select this local rank's GPU among `count` visible ones."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if local is None or count == 0:
        return {}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    visible = visible or [str(number) for number in range(count)]
    return {"CUDA_VISIBLE_DEVICES": visible[int(local) % len(visible)]}


def _generate_in_subprocess(file: Path) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    environment |= _own_device(torch.cuda.device_count())
    command = [sys.executable, "-m", "madgen", "generate", str(file)]
    return subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode


def _prompts(directory: DatasetDir) -> list[dict[str, Any]]:
    prompts: dict[str, dict[str, Any]] = {}
    for entry in directory.entries():
        if (prompt := entry.prompt_id) not in prompts:
            metadata = read_metadata(directory, entry)
            prompts[prompt] = {"id": prompt} | {name: metadata[name] for name in ("prompt", "negative_prompt")}
    if not prompts:
        raise UserError(f"{directory.root} has no finished shard yet; run generate first")
    return [prompts[prompt] for prompt in sorted(prompts)]

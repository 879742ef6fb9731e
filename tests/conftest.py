"""Shared by all tests: a tiny random pipeline in the diffusers layout, and the command line as a user calls it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one a core


def build_tiny_pipeline(folder: Path) -> Path:
    """Random weights, views of 8x8 latent cells, 4 pixels a cell, attention at 8x8 and 4x4: milliseconds a step."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from madgen.demo.scenes import vocabulary
    from madgen.demo.tokenizer import build_tokenizer
    from madgen.demo.train_unet import new_text_encoder

    torch.manual_seed(0)
    tokenizer = build_tokenizer(vocabulary(), folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=96, attention_head_dim=2, norm_num_groups=4, use_linear_projection=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=new_text_encoder(tokenizer), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of the tiny pipeline."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("backbone") / "tiny")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def environment(**extra: str | None) -> dict[str, str]:
    """This process's environment without what would steer a run; None removes a variable."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "SLURM_"))}
    merged = {**keep, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **extra}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.fixture
def madgen(tmp_path):
    """Runs the command line in `tmp_path`: `madgen("plan", "job.yaml", "--json")`."""

    def run(*arguments: object, timeout: float = 300, **env: str | None) -> Result:
        command = [sys.executable, "-m", "madgen", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def job_file(tmp_path, tiny) -> Path:
    """A job of 10 panoramas of 32x64 px in 4 shards on the tiny backbone."""
    (tmp_path / "prompts.txt").write_text("".join(f"mountains over a meadow at noon {i}\n" for i in range(5)))
    path = tmp_path / "job.yaml"
    path.write_text(
        f"""
backbone: {{pretrained: {json.dumps(str(tiny))}}}
method: {{mad: {{steps: 1}}}}
sampling: {{height: 32, width: 64, num_inference_steps: 2, guidance_scale: 2.0}}
prompts: {{source: prompts.txt, samples_per_prompt: 2}}
output: {{dir: out, samples_per_shard: 3}}
monitor: {{wandb: {{mode: disabled}}}}
trainer: {{accelerator: cpu, devices: 1}}
"""
    )
    return path

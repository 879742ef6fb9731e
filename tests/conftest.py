"""Fixtures of all tests: tiny random pipelines in the diffusers layout, and the command line."""

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import forks
import pytest
from browser import DESKTOP, MISSING, chromium_is_there, open_chromium, show_on
from forks import WAIT_S
from hypothesis import HealthCheck, settings
from processes import Started, begin, environment

from madgen.cluster.signals import STOP_SIGNALS
from madgen.utils.console import log_to_stderr

pytest_plugins = ["loaded_pipelines", "metric_fixtures", "tiers"]

# The same examples in each run, and no time limit: machines may be slow.
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
log_to_stderr()  # as the command line does
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel, one per core
os.fsync = lambda descriptor: None  # takes milliseconds, and matters only if the power fails


def build_tiny_pipeline(folder: Path) -> Path:
    """Save a Stable Diffusion of random weights: 8x8 latents, 4 pixels per cell, attention at 8x8 and 4x4."""
    import torch
    from demo_backbone.scenes import vocabulary
    from demo_backbone.tokenizer import build_tokenizer
    from demo_backbone.train_unet import new_text_encoder
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

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


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        forks.serve()  # for all xdist workers


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, pipelines_are_read_once) -> Path:
    """Return the folder of the tiny pipeline."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture(scope="session")
def one_block(tiny, tmp_path_factory) -> Path:
    """Return the tiny pipeline with a UNet of one level and one transformer block, which compiles faster."""
    import torch
    from diffusers import UNet2DConditionModel

    target = tmp_path_factory.mktemp("backbone") / "one-block"
    shutil.copytree(tiny, target)
    config = {**UNet2DConditionModel.load_config(tiny, subfolder="unet"), "block_out_channels": (8,)}
    config |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**config, "mid_block_type": "UNetMidBlock2D"}).save_pretrained(target / "unet")
    return target


def build_tiny_xl_pipeline(folder: Path) -> Path:
    """Save a small Stable Diffusion XL: two text encoders, size conditioning, no attention at the highest level."""
    import torch
    from demo_backbone.scenes import vocabulary
    from demo_backbone.tokenizer import build_tokenizer
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizers = [build_tokenizer(vocabulary(), folder / name) for name in ("tokenizer", "tokenizer_2")]

    def text_config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizers[0]), hidden_size=width, intermediate_size=2 * width, projection_dim=40,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=tokenizers[0].model_max_length,
            bos_token_id=tokenizers[0].bos_token_id, eos_token_id=tokenizers[0].eos_token_id,
            pad_token_id=tokenizers[0].pad_token_id,
        )  # fmt: skip

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), cross_attention_dim=24 + 40,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=40 + 6 * 8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=0.13025,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, unet=unet, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        text_encoder=CLIPTextModel(text_config(24)), text_encoder_2=CLIPTextModelWithProjection(text_config(40)),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory, pipelines_are_read_once) -> Path:
    """Return the folder of the tiny XL pipeline."""
    return build_tiny_xl_pipeline(tmp_path_factory.mktemp("backbone") / "tiny-xl")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def start(tmp_path):
    """Start the command line in `tmp_path` as a process that does not outlive the test."""
    started = []

    def run(*arguments: object, **env: str | None) -> Started:
        started.append(begin(arguments, tmp_path, environment(**env), env))
        return started[-1]

    yield run
    for process in started:
        process.kill()


@pytest.fixture
def madgen(start):
    """Run the command line in `tmp_path` as a process: `madgen("plan", "job.yaml", "--json")`."""

    def run(*arguments: object, timeout: float = WAIT_S, **env: str | None) -> Result:
        process = start(*arguments, **env)
        return Result(process.wait(timeout), *process.output())

    return run


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers that a command replaced in this process."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def madgen_here(tmp_path, monkeypatch, capfd):
    """Run the command line in this process: faster than `madgen`, for commands that need no process."""
    from madgen.cli.app import main

    def run(*arguments: object) -> Result:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["madgen", *map(str, arguments)])
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        code, printed = stopped.value.code, capfd.readouterr()
        assert code is None or isinstance(code, int)
        return Result(code or 0, printed.out, printed.err)

    return run


@pytest.fixture
def refused(madgen_here, tmp_path):
    """Run the command line in this process; it must exit with 2, one line on stderr and no change of any file.

    Returns the line.
    """

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = madgen_here(*arguments)
        assert (result.code, result.out) == (2, ""), result.err
        assert len(result.err.strip().splitlines()) == 1, result.err
        assert sorted(tmp_path.rglob("*")) == before
        return result.err

    return run


@pytest.fixture
def wandb_here(tmp_path, monkeypatch):
    """Let W&B in this process log to `tmp_path` instead of the folder of an earlier test."""
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def job_file(tmp_path, tiny) -> Path:
    """Write a job of 10 panoramas of 32x64 px in 4 shards on the tiny backbone."""
    return write_job(tmp_path, tiny)


@pytest.fixture(scope="module")
def job_file_of_module(tmp_path_factory, tiny) -> Path:
    """Write the job of `job_file` for a module whose tests share its dataset."""
    return write_job(tmp_path_factory.mktemp("job"), tiny)


@pytest.fixture(scope="session")
def complete_dataset(tmp_path_factory, tiny) -> Path:
    """Return the dataset of the job that `job_file` writes."""
    job = write_job(tmp_path_factory.mktemp("complete"), tiny)
    process = begin(("generate", job), job.parent, environment())
    assert process.wait() == 0, process.output()
    return job.parent / "out"


@pytest.fixture
def finished(complete_dataset, job_file) -> Path:
    """Return the complete dataset of `job_file`, a copy."""
    return Path(shutil.copytree(complete_dataset, job_file.with_name("out")))


def write_job(folder: Path, tiny: Path) -> Path:
    (folder / "prompts.txt").write_text(
        "".join(f"mountains over a meadow at noon {i}\n" for i in range(5)), encoding="utf-8"
    )
    path = folder / "job.yaml"
    path.write_text(
        f"""
backbone: {{pretrained: {json.dumps(str(tiny))}}}
method: {{mad: {{steps: 1}}}}
sampling: {{height: 32, width: 64, num_inference_steps: 2, guidance_scale: 2.0}}
prompts: {{source: prompts.txt, samples_per_prompt: 2}}
output: {{dir: out, samples_per_shard: 3}}
monitor: {{wandb: {{mode: disabled}}}}
trainer: {{accelerator: cpu, devices: 1}}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def chromium_of_module(tmp_path_factory):
    if not chromium_is_there():
        pytest.skip(MISSING)
    with open_chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def chromium(chromium_of_module):
    """Return the module's WebDriver of a headless Chromium, at a blank page of desktop size."""
    chromium_of_module.get("about:blank")
    show_on(chromium_of_module, DESKTOP)
    chromium_of_module.get_log("browser")
    return chromium_of_module

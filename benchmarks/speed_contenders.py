"""Contenders of the speed benchmark. Each runs some steps of one panorama and returns its latents."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from madgen import PanoramaSampler, Region
from madgen.config.schema import MadConfig, MethodConfig, ViewsConfig
from madgen.sampling.method import Method

GUIDANCE = 7.5
PROMPT = "mountains over the sea"
BLOCKS = ("down", "mid", "up")
Run = Callable[[int], Any]
"""Runs a number of steps of one panorama."""


@dataclass
class Timing:
    """Seconds per step of each round, and the peak memory of all rounds (bytes; 0 on a CPU)."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)


def sampler_of(backbone: Any, tau: int, stride: int | None = None, layout: str = "overlapping", **merging: Any) -> Any:
    """Return a sampler with the weights of `backbone`."""
    views, mad = ViewsConfig(layout=layout, stride=stride), MadConfig(**{"steps": tau, "blocks": BLOCKS, **merging})
    return PanoramaSampler(backbone, Method(MethodConfig(views=views, mad=mad)))


def madgen_run(
    backbone: Any,
    height: int,
    width: int,
    merged: float,
    compiled: bool = False,
    seed: int = 7,
    regions: Sequence[Region] = (),
    **method: Any,
) -> Run:
    """Return madgen as a contender; `merged` is the fraction of steps with merged attention."""

    def run(steps: int) -> Tensor:
        sampler = sampler_of(backbone, round(merged * steps), **method)
        sampler.warns = False
        graphs = backbone.compiled
        if not compiled:
            backbone.compiled = None
        try:
            return sampler.sample(
                [PROMPT], height=height, width=width, num_inference_steps=steps, guidance_scale=GUIDANCE,
                seeds=[seed], regions=[regions], output="latent",
            )  # fmt: skip
        finally:
            backbone.compiled = graphs

    return run


def reference_folder() -> str | None:
    """Return the folder with the released MAD code."""
    return os.environ.get("MAD_REFERENCE")


def released(pipeline: Any, height: int, width: int, merged: bool, exact: bool = False, seed: int = 7) -> Run:
    """Return the released MAD code's `sample` on the modules of `pipeline`, without decoding.

    It runs under `torch.autocast("cuda")`, as released; `exact` disables autocast.
    """
    sys.path.insert(0, str(reference_folder()))
    try:
        module = importlib.import_module("merge_attend_stable_diffusion")
    finally:
        sys.path.pop(0)
    mad = module.MergeAttendStableDiffusion.__new__(module.MergeAttendStableDiffusion)
    torch.nn.Module.__init__(mad)
    mad.device, mad.dtype = pipeline.unet.device, pipeline.unet.dtype
    mad.unet, mad.vae, mad.text_enc = pipeline.unet, pipeline.vae, pipeline.text_encoder
    mad.tokenizer, mad.scheduler = pipeline.tokenizer, pipeline.scheduler
    captured: dict[str, Tensor] = {}

    def capture(latents: Tensor) -> Tensor:
        captured["latents"] = latents
        return torch.zeros(1, 3, 8, 8)

    mad.decode_latents = capture

    def run(steps: int) -> Tensor:
        torch.manual_seed(seed)
        no_autocast = contextlib.nullcontext()
        with silenced(), mock.patch("torch.autocast", return_value=no_autocast) if exact else no_autocast:
            mad.sample(
                PROMPT, "", height=height, width=width, num_inference_steps=steps, guidance_scale=GUIDANCE,
                stride=16, mad_threshold=steps if merged else 0,
            )  # fmt: skip
        return captured["latents"].float()

    return run


def plain_attention(unet: Any) -> None:
    """Restore diffusers' attention processors."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor(AttnProcessor2_0())


def panorama_pipeline(pipeline: Any, height: int, width: int, view_batch_size: int, seed: int = 7) -> Run:
    """Return diffusers' StableDiffusionPanoramaPipeline: MultiDiffusion with a view every 8 latent cells."""
    from diffusers import StableDiffusionPanoramaPipeline

    theirs = StableDiffusionPanoramaPipeline(
        vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, unet=pipeline.unet,
        scheduler=copy.deepcopy(pipeline.scheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)

    def run(steps: int) -> Tensor:
        plain_attention(pipeline.unet)
        noise = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
        return theirs(
            PROMPT, height=height, width=width, num_inference_steps=steps, guidance_scale=GUIDANCE,
            latents=noise.to(pipeline.unet.device, pipeline.unet.dtype), view_batch_size=view_batch_size,
            output_type="latent",
        ).images.float()  # fmt: skip

    return run


def bare(backbone: Any, views: int, compiled: Any = None) -> Run:
    """Return the UNet alone on the same number of views, in one batch with diffusers' attention."""
    unet, spec = backbone.unet if compiled is None else compiled, backbone.spec
    conditioning = backbone.encode_prompts([PROMPT], [""], GUIDANCE)
    prompt = conditioning.embeddings_NTD.repeat_interleave(views, 0)
    more = backbone.view_conditions(conditioning, views, spec.view_size, spec.view_size)
    noise = torch.randn(2 * views, spec.channels, spec.view_size, spec.view_size)
    noise = noise.to(backbone.device, backbone.dtype)
    time_ = torch.tensor(500, device=backbone.device)

    @torch.no_grad()
    def run(steps: int) -> None:
        for _ in range(steps):
            unet(noise, time_, encoder_hidden_states=prompt, added_cond_kwargs=more, return_dict=False)

    return run


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Discard the output of other code."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        yield


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    contenders: Mapping[str, Run], steps: int | Mapping[str, int], rounds: int, warm: bool = True
) -> dict[str, Timing]:
    """Time contenders in turn, round by round; `warm` adds a first round that is not timed."""
    timings = {name: Timing() for name in contenders}
    for round_ in range(rounds + warm):
        for name, run in contenders.items():
            count = steps if isinstance(steps, int) else steps[name]
            seconds, peak = timed(run, count)
            if round_ >= warm:
                timings[name].seconds.append(seconds / count)
                timings[name].peak = max(timings[name].peak, peak)
    return timings


def timed(run: Run, steps: int) -> tuple[float, int]:
    """Return seconds and peak memory of a run, including the pools of CUDA graphs (bytes; 0 on a CPU).

    On one CPU thread these are CPU seconds, which do not include other processes on the machine.
    """
    single_thread = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if single_thread else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    started = clock()
    run(steps)
    synchronize()
    seconds = clock() - started
    return seconds, torch.cuda.max_memory_allocated() + held_by_graphs() if torch.cuda.is_available() else 0


def held_by_graphs() -> int:
    """Return the bytes that PyTorch's allocator reserves for CUDA graphs without counting them as allocated."""
    segments = [one for one in torch.cuda.memory_snapshot() if one["segment_pool_id"] != (0, 0)]
    return sum(one["total_size"] - one["allocated_size"] for one in segments)


def relative_error(one: Tensor, other: Tensor) -> float:
    """Return ‖one - other‖ / ‖other‖."""
    one, other = one.float().cpu(), other.float().cpu()
    return float((one - other).norm() / other.norm())

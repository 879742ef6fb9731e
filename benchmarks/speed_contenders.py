"""What the speed benchmark compares. Each contender runs some steps of one panorama and returns its latents."""

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
from madgen.backbones import Merging
from madgen.sampling.geometry import Geometry
from madgen.sampling.method import Method

GUIDANCE = 7.5
PROMPT = "mountains over the sea"
BLOCKS = ("down", "mid", "up")
Run = Callable[[int], Any]
"""Some steps of one panorama."""


@dataclass
class Timing:
    """Seconds a step of each round, and the most memory that a round took (bytes; 0 on a CPU)."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)


def sampler_of(backbone: Any, tau: int, stride: int | None = None, layout: str = "overlapping", **merging: Any) -> Any:
    """madgen with the weights of `backbone`."""
    how = Merging(tau, merging.get("blocks", BLOCKS), merging.get("cross_attention", "scheduled"))
    return PanoramaSampler(backbone, Geometry(backbone.spec, layout, None, stride, how), Method(how))


def madgen(
    backbone: Any,
    height: int,
    width: int,
    merged: float,
    compiled: bool = False,
    seed: int = 7,
    regions: Sequence[Region] = (),
    **method: Any,
) -> Run:
    """`merged`: the share of the steps in which attention merges."""

    def run(steps: int) -> Tensor:
        sampler = sampler_of(backbone, round(merged * steps), **method)
        sampler.warns_of_cuts = False
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
    """The checkout of the released MAD code."""
    return os.environ.get("MAD_REFERENCE")


def released(pipeline: Any, height: int, width: int, merged: bool, exact: bool = False, seed: int = 7) -> Run:
    """The released MAD code's own `sample` on the modules of `pipeline`, without its decoding.

    It runs under `torch.autocast("cuda")`, as released; `exact` leaves that out, so that float32 is float32.
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
    kept: dict[str, Tensor] = {}

    def keep(latents: Tensor) -> Tensor:
        kept["latents"] = latents
        return torch.zeros(1, 3, 8, 8)

    mad.decode_latents = keep

    def run(steps: int) -> Tensor:
        torch.manual_seed(seed)
        nothing = contextlib.nullcontext()
        with quiet(), mock.patch("torch.autocast", return_value=nothing) if exact else nothing:
            mad.sample(
                PROMPT, "", height=height, width=width, num_inference_steps=steps, guidance_scale=GUIDANCE,
                stride=16, mad_threshold=steps if merged else 0,
            )  # fmt: skip
        return kept["latents"].float()

    return run


def plain_attention(unet: Any) -> None:
    """diffusers' own processors, also where others were left behind."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor(AttnProcessor2_0())


def panorama_pipeline(pipeline: Any, height: int, width: int, view_batch_size: int, seed: int = 7) -> Run:
    """diffusers' StableDiffusionPanoramaPipeline: MultiDiffusion, a view every 8 latent cells."""
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
    """The UNet on as many views and nothing else: diffusers' own attention, all views in one batch."""
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
def quiet() -> Iterator[None]:
    """What others print goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(
    contenders: Mapping[str, Run], steps: int | Mapping[str, int], rounds: int, warm: bool = True
) -> dict[str, Timing]:
    """One after the other, round by round; the first round does not count where `warm`."""
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
    """Seconds of a run, and the most memory that it took, with what CUDA graphs hold (bytes; 0 on a CPU).

    On one thread of a CPU these are the processor's seconds, which do not count what others do on the same machine.
    """
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    started = clock()
    run(steps)
    synchronize()
    seconds = clock() - started
    return seconds, torch.cuda.max_memory_allocated() + held_by_graphs() if torch.cuda.is_available() else 0


def held_by_graphs() -> int:
    """Bytes that PyTorch's allocator keeps for CUDA graphs and does not count as allocated."""
    segments = [one for one in torch.cuda.memory_snapshot() if one["segment_pool_id"] != (0, 0)]
    return sum(one["total_size"] - one["allocated_size"] for one in segments)


def relative_error(one: Tensor, other: Tensor) -> float:
    """‖one - other‖ / ‖other‖."""
    one, other = one.float().cpu(), other.float().cpu()
    return float((one - other).norm() / other.norm())

"""From tasks to pictures when not all goes well: memory that runs out, numbers that overflow, pictures to hold back.

Knows the sampler and nothing of Lightning. The seed is never changed: what is tried again is the same panorama.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from madgen.config.schema import SamplingConfig
from madgen.dataset.sample_json import with_changes, with_scores
from madgen.generation.memory_fallback import Rung
from madgen.generation.safety import Safety
from madgen.generation.scoring import ClipScore
from madgen.sampling.postprocess import decodes_tiled, levels, to_uint8
from madgen.sampling.sampler import PanoramaSampler
from madgen.types import Attempt, Task
from madgen.utils.console import say

T = TypeVar("T")

OUT_OF_MEMORY, NOT_FINITE, CONSTANT, UNSAFE = "out_of_memory", "not_finite", "constant", "unsafe"
# PyTorch's allocator; and oneDNN, whose message does not say why (what it does not support is a "descriptor").
CPU_IS_FULL = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|could not (create|execute) a primitive$"
)
CUDA_IS_FULL = re.compile(r"(CUDA|cuDNN)\b.*(out of memory|ALLOC_FAILED|ALLOCATION_FAILED)")
"""Where not PyTorch's allocator asked for it: a graph's launch, cuBLAS, cuDNN, Triton."""
TILED, NO_GRAPHS = "decoding in tiles", "without CUDA graphs"
LEAST_RANGE = 4
"""A picture none of whose channels spans this many of the 256 values shows nothing."""


class Attempts:
    """Makes panoramas of tasks of one size: `attempts(tasks)` gives one `Attempt` a task, in their order.

    Where memory runs out, less is done at once; what worked is remembered for each size, so later batches begin there.
    """

    def __init__(
        self,
        sampler: PanoramaSampler,
        sampling: SamplingConfig,
        safety: Safety | None = None,
        clip: ClipScore | None = None,
    ):
        self.sampler, self.sampling, self.safety, self.clip = sampler, sampling, safety, clip
        self.seconds: dict[str, float] = {}
        """Wall time of what was done for the last tasks."""
        self._rungs: dict[tuple[int, int, int, torch.dtype], Rung] = {}
        self._tiled: set[tuple[int, int, torch.dtype]] = set()
        self._learned: list[str] = []
        self._dtype = sampler.dtype

    def __call__(self, tasks: Sequence[Task]) -> tuple[Attempt, ...]:
        """Nothing but a lack of memory is caught."""
        self.seconds, self._learned = {"sample": 0.0, "decode": 0.0}, []
        first = self._attempts(tasks)
        mended = [self._in_float32(task, attempt) for task, attempt in zip(tasks, first, strict=True)]
        checked = [self._checked(attempt) for attempt in mended]
        scored = [self._scored(task, attempt) for task, attempt in zip(tasks, checked, strict=True)]
        attempts = tuple(self._told_of_cuts(task, attempt) for task, attempt in zip(tasks, scored, strict=True))
        if self._learned:
            size = f"{tasks[0].prompt.height}x{tasks[0].prompt.width} px, batches of {len(tasks)}"
            say(f"madgen: out of memory at {size}; from now on {'; '.join(self._learned)}")
        return attempts

    def _attempts(self, tasks: Sequence[Task]) -> list[Attempt]:
        """One for each task, before anything is mended."""
        latents = self._sampled(tasks)
        return [self._picture(task, latents_1CHW) for task, latents_1CHW in zip(tasks, latents, strict=True)]

    def _sampled(self, tasks: Sequence[Task]) -> list[Tensor | None]:
        """Latents [1, C, h, w] of each task, from the first rung that has room for them; None where no rung has."""
        prompt = tasks[0].prompt
        prompts = 1 + max(len(task.prompt.regions) for task in tasks)
        size = prompt.height, prompt.width, prompts, self.sampler.dtype
        known = self._rungs.get(size, Rung(len(tasks)))
        begin = replace(known, panoramas=min(known.panoramas, len(tasks)))
        rungs = [begin, *begin.below()]
        for rung in rungs:
            found = self._sample_groups(rung.groups(tasks), rung.chunk_views, whatever_comes=rung == rungs[-1])
            if found is not None:
                break
        assert found is not None
        if rung != begin:
            self._rungs[size] = rung
            self._learn(str(rung))
        return found

    def _sample_groups(
        self, groups: Sequence[Sequence[Task]], chunk_views: int | None, whatever_comes: bool
    ) -> list[Tensor | None] | None:
        """Latents of each task; None where there is no room for a group, or for it alone with `whatever_comes`."""
        found: list[Tensor | None] = []
        for group in groups:
            latents = self._sample(group, chunk_views)
            if latents is None and not whatever_comes:
                return None
            found += latents or [None] * len(group)
        return found

    def _sample(self, tasks: Sequence[Task], chunk_views: int | None) -> list[Tensor] | None:
        sampling, prompts = self.sampling, [task.prompt for task in tasks]

        def sample() -> Any:
            latents = self.sampler.sample(
                [prompt.text for prompt in prompts],
                negative_prompts=[prompt.negative for prompt in prompts],
                height=prompts[0].height,
                width=prompts[0].width,
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
                guidance_steps=sampling.guidance_steps,
                seeds=[task.seed for task in tasks],
                loop=sampling.loop,
                regions=[prompt.regions for prompt in prompts],
                chunk_views=chunk_views,
                output="latent",
            )
            if isinstance(latents, Tensor) and latents.is_cuda:
                torch.cuda.synchronize(latents.device)
            return latents

        with self._timed("sample"):
            latents = self._within_memory(sample)
        return None if latents is None else list(latents.split(1))

    def _picture(self, task: Task, latents_1CHW: Tensor | None) -> Attempt:
        if latents_1CHW is None:
            return Attempt(None, {}, OUT_OF_MEMORY, f"sampling did not fit into memory, nor did it with {Rung(1, 1)}")
        if broken := _not_finite(latents_1CHW):
            return Attempt(None, {}, NOT_FINITE, f"{broken} of the latents are not finite")
        with self._timed("decode"):
            return self._decoded(task, latents_1CHW)

    def _decoded(self, task: Task, latents_1CHW: Tensor) -> Attempt:
        height, width = task.prompt.height, task.prompt.width
        size, asked = (height, width, self.sampler.dtype), self.sampling.decode
        modes = ["tiled"] if size in self._tiled or decodes_tiled(height, width, asked) else [asked, "tiled"]
        for mode in modes:
            attempt = self._within_memory(partial(self._decode, latents_1CHW, mode))
            if attempt is not None:
                break
        if attempt is None:
            return Attempt(None, {}, OUT_OF_MEMORY, "decoding did not fit into memory, nor did it in tiles")
        if mode == modes[0] and size not in self._tiled:
            return attempt
        if size not in self._tiled:
            self._tiled.add(size)
            self._learn(TILED)
        return replace(attempt, changes={"sampling": {"decode": "tiled"}})

    def _decode(self, latents_1CHW: Tensor, mode: str) -> Attempt:
        pixels_13HW = self.sampler.decode_pixels(latents_1CHW, self.sampling.loop, mode)
        lows, highs = pixels_13HW.flatten(2).aminmax(dim=2)  # of each channel; what is not a number passes through
        if not torch.isfinite(lows + highs).all():
            return Attempt(None, {}, NOT_FINITE, f"{_not_finite(pixels_13HW)} of the decoded values are not finite")
        if (span := int((levels(highs) - levels(lows)).max())) < LEAST_RANGE:
            return Attempt(None, {}, CONSTANT, f"the picture shows nothing: no channel spans more than {span} of 255")
        return Attempt(to_uint8(pixels_13HW)[0])

    def _in_float32(self, task: Task, attempt: Attempt) -> Attempt:
        """An attempt whose numbers went wrong, made again by itself in float32; others as they are."""
        if attempt.reason not in (NOT_FINITE, CONSTANT) or self.sampler.dtype == torch.float32:
            return attempt

        def again() -> Attempt:
            with self.sampler.in_float32():
                return self._attempts([task])[0]

        before = str(self.sampler.dtype).removeprefix("torch.")
        made = self._within_memory(again) or Attempt(None, {}, OUT_OF_MEMORY, "no memory for it")
        if made.reason is None:
            return replace(
                made,
                changes=with_changes(made.changes, {"backbone": {"dtype": "float32", "weights_dtype": before}}),
            )
        reason = attempt.reason if made.reason == OUT_OF_MEMORY else made.reason
        return Attempt(None, {}, reason, f"in {before}: {attempt.detail}; in float32: {made.detail}")

    def _checked(self, attempt: Attempt) -> Attempt:
        """What the safety checker finds is recorded, and done as the job says."""
        image = attempt.image_HWC
        if self.safety is None or image is None:
            return attempt
        safety = self.safety
        with self._timed("safety"):
            checked = self._within_memory(lambda: safety(image))
        if checked is None:
            return Attempt(None, attempt.changes, OUT_OF_MEMORY, "the safety checker did not fit into memory")
        changes = with_changes(attempt.changes, checked.changes)
        if checked.dropped:
            return Attempt(None, changes, UNSAFE, checked.summary)
        return Attempt(checked.image_HWC, changes)

    def _scored(self, task: Task, attempt: Attempt) -> Attempt:
        """The score that needs the device; those of the pixels are the writer's."""
        clip, image = self.clip, attempt.image_HWC
        if clip is None or image is None:
            return attempt
        with self._timed("score"):
            score = self._within_memory(lambda: clip(image, task.prompt.text))
        if score is None:
            return Attempt(None, attempt.changes, OUT_OF_MEMORY, "CLIP did not fit into memory")
        return replace(attempt, changes=with_scores(attempt.changes, {"clip": score}))

    def _told_of_cuts(self, task: Task, attempt: Attempt) -> Attempt:
        """The end of a prompt that no text encoder saw is recorded with the sample."""
        lost = self.sampler.cut_text(task.prompt.text)
        return attempt if lost is None else replace(attempt, changes=with_changes(attempt.changes, {"cut_text": lost}))

    def _within_memory(self, make: Callable[[], T]) -> T | None:
        """As `within_memory`; before a lack is believed, the sampler gives back what it holds for speed alone."""
        made = within_memory(make)
        if made is None and self.sampler.release_memory():
            made = within_memory(make)
            if made is not None:  # so that was what there was no room for
                self.sampler.forgo_graphs()
                self._learn(NO_GRAPHS)
        return made

    def _learn(self, what: str) -> None:
        self._learned.append(what if self.sampler.dtype == self._dtype else f"{what}, where float32 is needed")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def within_memory(make: Callable[[], T]) -> T | None:
    """What `make` gives, or None if there is no memory for it; then what it held is free again."""
    try:
        return make()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # The error is gone here, and with it the frames that held tensors.
    gc.collect()
    torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU, of PyTorch on the CPU, or of Python."""
    said = str(error)
    full = CUDA_IS_FULL.search(said) is not None or CPU_IS_FULL.search(said) is not None
    return full or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _not_finite(tensor: Tensor) -> str:
    """How much of it is not finite, in words; empty if nothing is."""
    share = 1 - float(torch.isfinite(tensor).float().mean())
    return "" if share == 0 else f"{share:.1%}"

"""Sample tasks with fallbacks: out of memory, non-finite values, blank images, safety checker.

Independent of Lightning. A retry never changes the seed: it samples the same panorama.
"""

from __future__ import annotations

import gc
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from madgen.config.schema import SamplingParams
from madgen.dataset.sample_json import with_changes, with_scores
from madgen.generation.batch_size import BatchSplit
from madgen.generation.safety import Safety
from madgen.sampling.inputs import PanoramaBatch
from madgen.sampling.pictures import keep_known, placed
from madgen.sampling.postprocess import decodes_tiled, levels, to_uint8
from madgen.sampling.sampler import PanoramaSampler
from madgen.types import Attempt, Prompt, Task

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUT_OF_MEMORY, NOT_FINITE, CONSTANT, UNSAFE = "out_of_memory", "not_finite", "constant", "unsafe"
CPU_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|could not (create|execute) a primitive$"
)
"""Messages of PyTorch's CPU allocator, and of oneDNN, which does not state the reason."""
CUDA_OUT_OF_MEMORY = re.compile(r"(CUDA|cuDNN)\b.*(out of memory|ALLOC_FAILED|ALLOCATION_FAILED)")
"""Messages of allocations outside PyTorch's allocator: graph launches, cuBLAS, cuDNN, Triton."""
TILED, NO_GRAPHS = "decoding in tiles", "without CUDA graphs"
MIN_CONTRAST = 4
"""An image is blank if each of its channels spans fewer than this many of the 256 levels."""


class RobustSampler:
    """Sample tasks of one size: `sampler(tasks)` returns one `Attempt` for each task, in their order.

    When memory runs out, batches are split. The split that worked is remembered for each size and used from then on.
    """

    def __init__(
        self,
        sampler: PanoramaSampler,
        params: SamplingParams | None = None,
        safety: Safety | None = None,
        clip: Callable[[np.ndarray, str], float] | None = None,
    ):
        self.sampler, self.params, self.safety, self.clip = sampler, params or sampler.params, safety, clip
        self.on_step: Callable[[int, int], None] = lambda step, steps: None
        """Called after each denoising step with its number, from 1, and the number of steps."""
        self.seconds: dict[str, float] = {}
        """Wall time of each stage of the last tasks."""
        self._splits: dict[tuple[int, int, int, torch.dtype], BatchSplit] = {}
        self._tiled: set[tuple[int, int, torch.dtype]] = set()
        self._fallbacks: list[str] = []
        self._dtype = sampler.dtype

    def __call__(self, tasks: Sequence[Task]) -> tuple[Attempt, ...]:
        """Sample, check and score the tasks. Only out-of-memory errors are caught."""
        self.seconds, self._fallbacks = {"sample": 0.0, "decode": 0.0}, []
        attempts = tuple(
            self._finished(task, self._retried_in_float32(task, attempt))
            for task, attempt in zip(tasks, self._attempts(tasks), strict=True)
        )
        if self._fallbacks:
            size = f"{tasks[0].prompt.height}x{tasks[0].prompt.width} px, batches of {len(tasks)}"
            logger.warning(f"out of memory at {size}; from now on {'; '.join(self._fallbacks)}")
        return attempts

    def keep_prompts(self, tasks: Sequence[Task]) -> None:
        """Encode the prompts of coming tasks; see `PanoramaSampler.keep_prompts`."""
        self.sampler.keep_prompts(tasks, self.params)

    def _finished(self, task: Task, attempt: Attempt) -> Attempt:
        attempt = self._scored(task, self._checked(attempt))
        cut = self.sampler.cut_text(task.prompt.text)
        return attempt if cut is None else replace(attempt, changes=with_changes(attempt.changes, {"cut_text": cut}))

    def _attempts(self, tasks: Sequence[Task]) -> list[Attempt]:
        latents = self._sample_with_splits(tasks)
        return [self._decode_latents(task, latents_1CHW) for task, latents_1CHW in zip(tasks, latents, strict=True)]

    def _sample_with_splits(self, tasks: Sequence[Task]) -> list[Tensor | None]:
        """Return latents [1, C, h, w] of each task, with the first split that fits; None for tasks that never fit."""
        prompt = tasks[0].prompt
        rows = 1 + max(len(task.prompt.regions) for task in tasks)
        size = prompt.height, prompt.width, rows, self.sampler.dtype
        known = self._splits.get(size, BatchSplit(len(tasks)))
        first = replace(known, panoramas=min(known.panoramas, len(tasks)))
        splits = [first, *first.smaller()]
        for split in splits:
            latents = self._sample_groups(split, tasks, allow_failures=split == splits[-1])
            if latents is not None:
                break
        assert latents is not None
        if split != first:
            self._splits[size] = split
            self._remember(str(split))
        return latents

    def _sample_groups(
        self, split: BatchSplit, tasks: Sequence[Task], allow_failures: bool
    ) -> list[Tensor | None] | None:
        """Return latents of each task; None if a group does not fit, or with `allow_failures` None for its tasks."""
        result: list[Tensor | None] = []
        for group in split.groups(tasks):
            latents = self._sample(group, split.chunk_views)
            if latents is None and not allow_failures:
                return None
            result += latents or [None] * len(group)
        return result

    def _sample(self, tasks: Sequence[Task], chunk_views: int | None) -> list[Tensor] | None:
        def sample() -> Tensor:
            latents = self.sampler.sample_latents(
                PanoramaBatch.from_tasks(tasks, self.params.init), self.params, chunk_views, self._step_done
            )
            if latents.is_cuda:
                torch.cuda.synchronize(latents.device)
            return latents

        with self._timed("sample"):
            latents = self._within_memory(sample)
        return None if latents is None else list(latents.split(1))

    def _step_done(self, step: int, timestep: Tensor, latents_BCHW: Tensor) -> Tensor:
        self.on_step(step + 1, self.params.denoising_steps(self.sampler.backbone.spec.joint_attention))
        return latents_BCHW

    def _decode_latents(self, task: Task, latents_1CHW: Tensor | None) -> Attempt:
        if latents_1CHW is None:
            return Attempt(None, {}, OUT_OF_MEMORY, f"sampling did not fit into memory with {BatchSplit(1, 1)}")
        if share := _non_finite_share(latents_1CHW):
            return Attempt(None, {}, NOT_FINITE, f"{share} of the latents are not finite")
        with self._timed("decode"):
            return self._decode_or_tile(task, latents_1CHW)

    def _decode_or_tile(self, task: Task, latents_1CHW: Tensor) -> Attempt:
        height, width = task.prompt.height, task.prompt.width
        size, requested = (height, width, self.sampler.dtype), self.params.decode
        modes = ["tiled"] if size in self._tiled or decodes_tiled(height, width, requested) else [requested, "tiled"]
        for mode in modes:
            attempt = self._within_memory(partial(self._decode, task.prompt, latents_1CHW, mode))
            if attempt is not None:
                break
        if attempt is None:
            return Attempt(None, {}, OUT_OF_MEMORY, "decoding did not fit into memory in tiles")
        if mode == modes[0] and size not in self._tiled:
            return attempt
        if size not in self._tiled:
            self._tiled.add(size)
            self._remember(TILED)
        return replace(attempt, changes={"sampling": {"decode": "tiled"}})

    def _decode(self, prompt: Prompt, latents_1CHW: Tensor, mode: str) -> Attempt:
        pixels_13HW = self.sampler.decode_pixels(latents_1CHW, self.params.loop, mode)
        lows, highs = pixels_13HW.flatten(2).aminmax(dim=2)  # for each channel; NaN propagates
        if not torch.isfinite(lows + highs).all():
            return Attempt(
                None, {}, NOT_FINITE, f"{_non_finite_share(pixels_13HW)} of the decoded values are not finite"
            )
        if (span := int((levels(highs) - levels(lows)).max())) < MIN_CONTRAST:
            return Attempt(None, {}, CONSTANT, f"the image is blank: no channel spans more than {span} of 255 levels")
        if prompt.keeps_pixels and (picture := placed(prompt, self.params.init)) is not None:
            pixels_13HW = keep_known(pixels_13HW, [picture], self.params)
        return Attempt(to_uint8(pixels_13HW)[0])

    def _retried_in_float32(self, task: Task, attempt: Attempt) -> Attempt:
        """Sample a task again in float32, alone, if its attempt has non-finite values or is blank."""
        if attempt.reason not in (NOT_FINITE, CONSTANT) or not self.sampler.has_lower_precision:
            return attempt

        def retry() -> Attempt:
            with self.sampler.backbone.in_float32():
                return self._attempts([task])[0]

        dtype = str(self.sampler.dtype).removeprefix("torch.")
        retried = self._within_memory(retry) or Attempt(None, {}, OUT_OF_MEMORY, "out of memory")
        if retried.reason is None:
            changes = with_changes(retried.changes, {"backbone": {"dtype": "float32", "weights_dtype": dtype}})
            return replace(retried, changes=changes)
        reason = attempt.reason if retried.reason == OUT_OF_MEMORY else retried.reason
        return Attempt(None, {}, reason, f"in {dtype}: {attempt.detail}; in float32: {retried.detail}")

    def _checked(self, attempt: Attempt) -> Attempt:
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
        """Add the CLIP score, which needs the device; the writer computes scores of pixels."""
        clip, image = self.clip, attempt.image_HWC
        if clip is None or image is None:
            return attempt
        with self._timed("score"):
            score = self._within_memory(lambda: clip(image, task.prompt.text))
        if score is None:
            return Attempt(None, attempt.changes, OUT_OF_MEMORY, "CLIP did not fit into memory")
        return replace(attempt, changes=with_scores(attempt.changes, {"clip": score}))

    def _within_memory(self, function: Callable[[], T]) -> T | None:
        """Like `within_memory`, but retries without the sampler's performance caches before giving up."""
        result = within_memory(function)
        if result is None and self.sampler.backbone.release_memory():
            result = within_memory(function)
            if result is not None:  # the caches were the cause
                self.sampler.backbone.disable_cuda_graphs()
                self._remember(NO_GRAPHS)
        return result

    def _remember(self, fallback: str) -> None:
        in_dtype = fallback if self.sampler.dtype == self._dtype else f"{fallback}, where float32 is needed"
        self._fallbacks.append(in_dtype)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def within_memory(function: Callable[[], T]) -> T | None:
    """Return the result of `function`, or None if memory runs out; then free what it allocated."""
    try:
        return function()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of `except`, so that the frames that hold tensors are freed.
    gc.collect()
    torch.cuda.empty_cache()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory of the GPU, of PyTorch on the CPU or of Python ran out."""
    message = str(error)
    matches = CUDA_OUT_OF_MEMORY.search(message) is not None or CPU_OUT_OF_MEMORY.search(message) is not None
    return matches or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _non_finite_share(tensor: Tensor) -> str:
    """Return the share of non-finite values as a percentage, empty if there are none."""
    share = 1 - float(torch.isfinite(tensor).float().mean())
    return "" if share == 0 else f"{share:.1%}"

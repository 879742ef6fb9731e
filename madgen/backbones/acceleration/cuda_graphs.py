"""CUDA graphs: launch all kernels of a pass at once, so that a fast GPU does not wait for the CPU.

The kernels, and therefore the bytes, are the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)


MAX_CELLS = 2 * 32 * 64**2
"""Largest pass in latent cells that is captured; larger ones take the GPU longer than the CPU needs to launch them.

An H200 waited for its CPU at 10 x 64^2 cells, and hardly at 26 x 64^2; the margin is for slower CPUs and faster GPUs.
"""
MAX_GRAPHS = 32
"""Graphs kept at once, two to four for each size: they share memory, except for their inputs."""
CAPTURING = threading.Lock()
"""Only one CUDA graph capture may run per process, and nothing may synchronize the device meanwhile."""

Run: TypeAlias = "Callable[[Any], Tensor]"


class Graphs:
    """Cache of graphs: `graphs(run, key, inputs)` is `run(inputs)`, replayed with one launch from the third call on.

    `inputs` are dataclasses, mappings and tuples of tensors and plain values. There is one graph for each `key` (what
    else `run` depends on), each set of tensor shapes and each set of plain values. A tensor that is passed again must
    not have changed in place. Gradients are not supported. If a capture fails, no further one is tried.
    """

    def __init__(self, capture: CudaCapture):
        self._capture = capture
        self._graphs: dict[Hashable, Run | None] = {}
        self._off = False

    def __call__(self, run: Run, key: Hashable, inputs: Any) -> Tensor:
        if self._off:
            return run(inputs)
        key = key, signature(inputs)
        if key not in self._graphs:  # warm-up: libraries load their kernels, which they cannot do during a capture
            if len(self._graphs) == MAX_GRAPHS:
                self.clear()  # all of them, because they share memory of cuBLAS and the allocator
            output = run(inputs)
            self._graphs[key] = None
            return output
        graph = self._graphs[key] or self._capture_or_disable(run, inputs)
        if not self._off:
            self._graphs[key] = graph
        return graph(inputs)

    def __len__(self) -> int:
        """Return the number of distinct passes so far."""
        return len(self._graphs)

    def clear(self) -> bool:
        """Free all graphs; return False if there were none. Must be called before weights move."""
        held = any(self._graphs.values())
        self._graphs.clear()
        if held:
            self._capture.forget()
        return held

    def _capture_or_disable(self, run: Run, inputs: Any) -> Run:
        try:
            return _Graph(self._capture, run, inputs)
        except RuntimeError as error:  # including out of memory: running uncaptured may still fit
            reason = str(error).partition("\n")[0]
        except BaseException:
            self._drop()
            raise
        # Outside of `except`, so that the frames that hold the graph and its tensors are freed.
        self._off = True
        self._drop()
        logger.warning(f"CUDA graphs are disabled, which may be slower: {reason}")
        return run

    def _drop(self) -> None:
        """Free all memory, even without other graphs: a failed capture leaves some."""
        self._graphs.clear()
        with suppress(RuntimeError):  # the device may be unusable; the next operation will raise
            self._capture.forget()


class CudaCapture:
    """Captures on a device. Graphs share one memory pool: none runs while another's output is read.

    Each capture object has its own stream: cuBLAS keeps one workspace per stream, in the pool of the first graph
    captured there. On PyTorch's default capture stream, freeing one sampler's pool would crash the graphs of another.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture `run`; return a function that replays it on the same tensors, and its output tensor."""
        # Restore the current stream: a failed capture may leave its own one current.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._stream = self._stream or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"  # other threads may use CUDA meanwhile
            with CAPTURING, torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                output = run()
        return graph.replay, output

    def forget(self) -> None:
        """Free the memory of all captured graphs: the pool, which later ones cannot reuse, and cuBLAS' share of it."""
        self._pool = None
        with CAPTURING, torch.cuda.device(self._device):
            torch.cuda.synchronize()  # a graph may still be running
            if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):  # as Lightning does
                clear()
            torch.cuda.empty_cache()  # for libraries with allocators other than PyTorch's


class _Graph:
    """A captured pass and its input tensors."""

    def __init__(self, capture: CudaCapture, run: Run, inputs: Any):
        own = mapped(inputs, torch.clone)
        self._replay, self._output = capture(lambda: run(own))
        self._own = list(tensors(own))
        self._given: list[Tensor] = list(tensors(inputs))

    def __call__(self, inputs: Any) -> Tensor:
        given = list(tensors(inputs))
        changed = [
            (own, now) for own, before, now in zip(self._own, self._given, given, strict=True) if now is not before
        ]
        if changed:
            torch._foreach_copy_([own for own, _ in changed], [now for _, now in changed])  # in a launch or two
        self._given = given
        self._replay()
        return self._output.clone()


def leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors and plain values of a nested structure in order."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield key
            yield from leaves(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from leaves(one)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))
    else:
        yield value


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested structure."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor))


def signature(value: Any) -> Hashable:
    """Return a key that is equal for structures that differ only in the contents of their tensors."""
    return tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves(value)
    )


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to all tensors of a nested structure."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(one, function) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return tuple(mapped(one, function) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: mapped(getattr(value, field.name), function) for field in fields(value)})
    return value

"""CUDA graphs of a network's passes: all kernels of a pass are launched at once, so that a GPU that is faster than the
CPU that launches them one by one does not wait for it. The kernels, and with them the bytes, are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from madgen.utils.console import say

MOST_CELLS = 2 * 32 * 64**2
"""Latent cells in a pass up to which it gets a graph: a larger one takes the GPU longer than the CPU its launches.

An H200 waited for its CPU at 10 x 64^2 cells, and hardly at 26; the rest is for slower CPUs and faster GPUs.
"""
MOST_GRAPHS = 32
"""Kept at once, some two to four a size: they share their memory, but each has some for its inputs."""
CAPTURING = threading.Lock()
"""PyTorch bears one capture at a time in a process, and CUDA nothing beside it that waits for the device."""

Run = Callable[[Any], Tensor]


class Capture(Protocol):
    """How graphs are made."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Of a function: what does the same again, on the same tensors, and the tensor that it writes."""

    def forget(self) -> None:
        """All that was captured is gone, and its memory free."""


class Graphs:
    """`graphs(run, key, inputs)` is `run(inputs)`, from the third time on with one launch.

    `inputs` are dataclasses, mappings and tuples of tensors and plain values; inputs whose tensors have other shapes,
    or whose plain values differ, have a graph of their own, and so has every `key`, which says what else `run` depends
    on. Tensors that stay the same objects must stay the same in value. Not for gradients. If one cannot be captured,
    no other is.
    """

    def __init__(self, capture: Capture):
        self._capture = capture
        self._graphs: dict[Hashable, Run | None] = {}
        self._off = False

    def __call__(self, run: Run, key: Hashable, inputs: Any) -> Tensor:
        if self._off:
            return run(inputs)
        key = key, signature(inputs)
        if key not in self._graphs:  # libraries choose and load their kernels now, which they cannot in a capture
            if len(self._graphs) == MOST_GRAPHS:
                self.clear()  # all of them, for they share what cuBLAS and the allocator keep
            output = run(inputs)
            self._graphs[key] = None
            return output
        graph = self._graphs[key] or self._made(run, inputs)
        if not self._off:
            self._graphs[key] = graph
        return graph(inputs)

    def __len__(self) -> int:
        """How many passes have been met."""
        return len(self._graphs)

    def clear(self) -> bool:
        """Forgets all graphs, whose memory is free then; False if there were none. To be called before weights move."""
        held = any(self._graphs.values())
        self._graphs.clear()
        if held:
            self._capture.forget()
        return held

    def _made(self, run: Run, inputs: Any) -> Run:
        try:
            return _Graph(self._capture, run, inputs)
        except RuntimeError as error:  # out of memory too: what needs less may still be possible
            why = str(error).partition("\n")[0]
        except BaseException:
            self._drop()
            raise
        # The error is gone here, and with it the frames that held the graph and what it made.
        self._off = True
        self._drop()
        say(f"madgen: goes on without CUDA graphs, which may take longer: {why}")
        return run

    def _drop(self) -> None:
        """Also where nothing else was captured: what a failed capture leaves is of no use."""
        self._graphs.clear()
        with suppress(RuntimeError):  # of a device that is beyond this; whatever comes next will say so
            self._capture.forget()


class CudaCapture:
    """Captures on a device. Graphs share one pool of memory: none runs while another's output is read.

    They also have a stream of their own: cuBLAS keeps its workspace by stream, in the pool of the graph that was
    captured there first. On PyTorch's one stream for all captures another sampler's graphs would lose theirs when that
    pool goes, and crash.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # The outer stream is the current one: a capture that fails may leave its own current.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._stream = self._stream or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"  # other threads may use CUDA meanwhile
            with CAPTURING, torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                output = run()
        return graph.replay, output

    def forget(self) -> None:
        """The pool of graphs that are gone cannot be used again, and cuBLAS would keep its part of it."""
        self._pool = None
        with CAPTURING, torch.cuda.device(self._device):
            torch.cuda.synchronize()  # a graph may still be running
            if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):  # as Lightning does
                clear()
            torch.cuda.empty_cache()  # for libraries, which do not ask PyTorch for what it keeps


class _Graph:
    """One captured pass and the tensors that it reads."""

    def __init__(self, capture: Capture, run: Run, inputs: Any):
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
    """Tensors and plain values, in the order in which they are held."""
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
    """The tensors in `value`."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))


def signature(value: Any) -> Hashable:
    """The same for values that differ in nothing but what is in their tensors."""
    return tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves(value)
    )


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: mapped(one, function) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return tuple(mapped(one, function) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: mapped(getattr(value, field.name), function) for field in fields(value)})
    return value

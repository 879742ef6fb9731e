"""Triton kernels of split and merge, run by Triton's interpreter on a CPU, in a separate process."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from madgen.diffusion.kernels import fused
from madgen.diffusion.merge import grid_of, with_kernels
from madgen.diffusion.views import build_layout

CPU = torch.device("cpu")
LAYOUTS = {
    "overlapping": (("overlapping", 8, 24, 8, 2), {}),
    "overlapping both ways": (("overlapping", 12, 20, 8, 2), {}),
    "a loop": (("overlapping", 8, 24, 8, 2), {"loop": True}),
    "shifted": (("shifted", 8, 24, 8, 2), {"merged_steps": 4}),
    "shifted both ways, a loop": (("shifted", 16, 24, 8, 2), {"merged_steps": 4, "loop": True}),
}
CASES = [
    (layout, step, dtype)
    for layout in LAYOUTS
    for step in ((0, 1) if layout.startswith("shifted") else (0,))  # overlapping views stay in place
    for dtype in (torch.float32, torch.bfloat16)
]


def views_of(layout, step=1):
    positional, named = LAYOUTS[layout]
    return build_layout(*positional, **named).at(step)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_hold_the_positions_of_views(layout):
    """By brute force: which cells of which views lie on a cell of the canvas."""
    views = views_of(layout)
    rows = fused.rows_of(views, CPU)
    cells = [
        (top + y) % views.rows.extent * views.columns.extent + (left + x) % views.columns.extent
        for top in views.rows.starts
        for left in views.columns.starts
        for y in range(views.rows.size)
        for x in range(views.columns.size)
    ]
    assert rows.cells.tolist() == cells
    for cell, (found, covers) in enumerate(zip(rows.positions.T.tolist(), rows.covers.tolist(), strict=True)):
        expected = [position for position, lies in enumerate(cells) if lies == cell]
        assert sorted(position for position in found if position >= 0) == expected
        assert covers == len(expected)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="PyTorch's build for this machine comes without Triton")
def test_kernels_equal_pytorch_operations():
    from processes import environment  # not to be found where this file is the program

    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, timeout=600,
        env=environment() | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, [str(len(CASES))]), done.stderr


def test_cpu_uses_pytorch():
    assert not fused.is_possible(CPU)
    assert with_kernels(views_of("overlapping"), CPU).fused is None


def test_gradients_and_other_memory_formats_use_pytorch(monkeypatch):
    monkeypatch.setattr(fused, "_works", lambda device, dtype: True)
    hidden = torch.zeros(2, 3, 4)
    assert fused.takes(hidden)
    assert not fused.takes(hidden.transpose(1, 2))
    assert not fused.takes(hidden.double())
    assert not fused.takes(hidden.requires_grad_())
    with torch.no_grad():
        assert fused.takes(hidden)


def test_broken_kernels_fall_back_to_pytorch_with_one_warning(capfd):
    """As on this CPU, where Triton finds no GPU; in the interpreter they do, see `compare`."""
    fused._works.cache_clear()
    try:
        assert [fused.takes(torch.zeros(2, 3, 4)) for _ in range(2)] == [False, False]
    finally:
        fused._works.cache_clear()
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("madgen: Triton kernels are disabled for torch.float32, which is slower: ")


def test_out_of_memory_does_not_disable_the_kernels(monkeypatch, capfd):
    full = [RuntimeError("Triton Error [CUDA]: out of memory")]

    def merge(views, rows):
        if full:
            raise full.pop()
        return views[:, [0, 1, 3]]

    monkeypatch.setattr(fused, "split", lambda canvas, rows: canvas[:, [0, 1, 1, 2]])
    monkeypatch.setattr(fused, "merge", merge)
    fused._works.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            fused.takes(torch.zeros(2, 3, 4))
        assert fused.takes(torch.zeros(2, 3, 4))
    finally:
        fused._works.cache_clear()
    assert capfd.readouterr().err == ""


def test_many_views_per_cell_use_pytorch(monkeypatch):
    monkeypatch.setattr(fused, "is_possible", lambda device: True)
    for height, size, stride, kernels in ((64, 64, 1, True), (65, 65, 1, False), (32, 16, 2, True), (32, 16, 1, False)):
        views = build_layout("overlapping", height, 2 * size, size, stride).at(0)
        assert (with_kernels(views, CPU).fused is not None) == kernels


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from madgen.diffusion.kernels import triton_kernels as kernels

plain = {name: "i32" for name in ("count", "length", "width")}
tile = {"CELLS": 32, "CHANNELS": 64}
for dtype in ("fp32", "bf16", "fp16"):
    for kernel, tables, options in (
        (kernels.split, {"canvas": f"*{dtype}", "table": "*i32"}, tile),
        (kernels.merge, {"views": f"*{dtype}", "table": "*i32", "covers": "*fp32"}, {**tile, "DEPTH": 4}),
    ):
        signature = {"output": f"*{dtype}", **tables, **plain, **dict.fromkeys(options, "constexpr")}
        made = compile(ASTSource(fn=kernel, signature=signature, constexprs=options), target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"]
        assert ("div.rn.f32" in made.asm["ptx"]) == (kernel is kernels.merge)
        assert "div.full" not in made.asm["ptx"]
        print(kernel.__name__)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="PyTorch's build for this machine comes without Triton")
def test_kernels_compile_for_a_gpu_and_divide_like_pytorch(tmp_path):
    """For an H100, by Triton's own compiler, which needs none; in a process of its own, which knows no interpreter."""
    from processes import environment

    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=600,
        env=environment() | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["split", "merge"] * 3


def compare(layout, step, dtype):
    """Whether both ways to split are equal, and both to merge as close as their precision allows."""
    from dataclasses import replace

    from madgen.diffusion.merge import merge_cells, split_cells

    assert fused.takes(torch.zeros(1, dtype=dtype))
    views = views_of(layout, step)
    plain = grid_of(views, CPU)
    rows = replace(plain, fused=fused.rows_of(views, CPU))
    torch.manual_seed(step)
    cells = torch.randn(2, views.count, 8, 8, 72).to(dtype)  # more than a program's channels, no multiple of them
    canvas = torch.randn(2, views.rows.extent, views.columns.extent, 72).to(dtype)
    assert torch.equal(split_cells(canvas, rows), split_cells(canvas, plain))
    merged, exact = merge_cells(cells, rows), merge_cells(cells.double(), plain)
    assert merged.dtype == dtype
    assert merged.shape == exact.shape
    error = float((merged.double() - exact).norm() / exact.norm())
    most = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]  # the interpreter cuts off what a GPU rounds
    assert error < most, (layout, step, dtype, error)


if __name__ == "__main__":
    print(len([compare(*case) for case in CASES]))

"""Triton kernels of `fused`. A program computes `CELLS` rows of `CHANNELS` channels of the output."""

# Triton compiles this file: annotations must not be strings, and only Triton's names are known.
import triton
import triton.language as tl


@triton.jit
def _tile(count, width, CELLS: tl.constexpr, CHANNELS: tl.constexpr):
    cells = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return cells, channels, (cells < count)[:, None] & (channels < width)[None, :]


@triton.jit
def split(output, canvas, table, count, length, width, CELLS: tl.constexpr, CHANNELS: tl.constexpr):
    """Copy row `table[i]` of the canvas to row `i` of the output."""
    cells, channels, inside = _tile(count, width, CELLS, CHANNELS)
    batch = tl.program_id(2).to(tl.int64)
    found = tl.load(table + cells, mask=cells < count, other=0)
    rows = tl.load(canvas + (batch * length + found)[:, None] * width + channels[None, :], mask=inside)
    tl.store(output + (batch * count + cells)[:, None] * width + channels[None, :], rows, mask=inside)


@triton.jit
def merge(
    output, views, table, covers, count, length, width, CELLS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr
):
    """Average the rows `table[:, i]` of the views, except -1, to row `i` of the output."""
    cells, channels, inside = _tile(count, width, CELLS, CHANNELS)
    batch = tl.program_id(2).to(tl.int64)
    total = tl.zeros((CELLS, CHANNELS), dtype=tl.float32)
    for depth in tl.static_range(DEPTH):
        found = tl.load(table + depth * count + cells, mask=cells < count, other=-1)
        here = inside & (found >= 0)[:, None]
        rows = tl.load(views + (batch * length + found)[:, None] * width + channels[None, :], mask=here, other=0.0)
        total += rows.to(tl.float32)
    # Rounds like PyTorch, unlike `/` on a GPU.
    total = tl.div_rn(total, tl.load(covers + cells, mask=cells < count, other=1.0)[:, None])
    total = total.to(output.dtype.element_ty)
    tl.store(output + (batch * count + cells)[:, None] * width + channels[None, :], total, mask=inside)

"""Fast implementations of single operations: Triton split and merge, oneDNN matrix products."""

from typing import TYPE_CHECKING

from madgen.utils.lazy import LazyModule

if TYPE_CHECKING:
    from madgen.diffusion.kernels import onednn as onednn
else:
    onednn = LazyModule("madgen.diffusion.kernels.onednn")  # it registers operations with torch

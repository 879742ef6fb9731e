"""Lazily imported modules: nothing is imported before its first use, then everything is the module itself."""

import subprocess
import sys

import pytest

PROBE = """
import sys
import {module}
assert "torch" not in sys.modules, "imported at once"
from madgen.diffusion import attention, denoise, merge
from madgen.diffusion.kernels import onednn
from madgen.utils import lazy
before = merge.torch, attention.F, attention.onednn
onednn.MIN_ROWS = 7  # also writes through
import torch
assert before[0] is not torch and merge.torch is lazy.torch is torch
assert attention.F is torch.nn.functional
assert attention.onednn is sys.modules["madgen.diffusion.kernels.onednn"] and attention.onednn.MIN_ROWS == 7
assert before[0].float32 is torch.float32  # references that were kept elsewhere
assert not torch.is_inference_mode_enabled()
with torch.inference_mode():
    assert lazy.no_inference_mode(torch.is_inference_mode_enabled)() is False
assert lazy.no_grad(torch.is_grad_enabled)() is False and torch.is_grad_enabled()
"""


@pytest.mark.parametrize("module", ["madgen.diffusion.reference"])
def test_torch_is_imported_on_first_use(module):
    """Afterwards no stand-in is left in madgen's modules, so that compilers see torch itself."""
    done = subprocess.run([sys.executable, "-c", PROBE.format(module=module)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

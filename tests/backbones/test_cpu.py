"""Chunked feed-forward layers on a CPU; `tests/diffusion/test_onednn.py` has the matrix products."""

import pytest
import torch
from diffusers.models.attention import FeedForward

from madgen import PanoramaSampler
from madgen.backbones.acceleration.cpu import ROWS, keep_in_cache


@pytest.mark.parametrize("shape", [(2, 3, 32), (3, ROWS, 32), (5, ROWS // 4 + 7, 32), (1, 2 * ROWS + 1, 32)])
def test_chunked_layers_equal_whole_layers(shape):
    torch.manual_seed(0)
    layer = FeedForward(32, activation_fn="geglu").eval()
    hidden = torch.randn(shape)
    whole = layer(hidden)
    seen = []
    layer.net[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:-1].numel()))
    keep_in_cache(layer)
    torch.testing.assert_close(layer(hidden), whole, rtol=1e-6, atol=1e-7)
    assert max(seen) <= ROWS
    assert max(seen) - min(seen) <= 1
    assert sum(seen) == hidden.shape[:-1].numel()


def test_gradients_flow_through_chunked_layers():
    torch.manual_seed(0)
    layer, hidden, gradients = FeedForward(16).eval(), torch.randn(3, ROWS, 16), []
    for prepare in (lambda layer: None, keep_in_cache):
        prepare(layer)
        leaf = hidden.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().sum(dim=2).min() > 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_unet_on_a_cpu_is_chunked(tiny):
    unet = PanoramaSampler.from_pretrained(str(tiny), dtype="float32").backbone.unet
    layers = [module for module in unet.modules() if isinstance(module, FeedForward)]
    assert layers
    assert all("forward" in vars(layer) for layer in layers)

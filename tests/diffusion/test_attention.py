from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from madgen.diffusion.attention import JointAttention, JointPass, grids_of, keys_values
from madgen.diffusion.merge import grid_of, merge_cells, split_cells
from madgen.diffusion.views import Axis, Views

VIEWS = Views(Axis(4, 4, (0,)), Axis(8, 4, (0, 2, 4)))
WIDTH, HEADS = 8, 2
DEVICE = torch.device("cpu")
GRIDS, GRID = grids_of(VIEWS, DEVICE), grid_of(VIEWS, DEVICE)


class Layer(nn.Module):
    """What diffusers' Attention offers to a processor."""

    def __init__(self):
        super().__init__()
        self.heads, self.scale = HEADS, (WIDTH // HEADS) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Identity()])


def plain_attention(layer, query, source):
    def heads(tensor):
        return tensor.view(len(tensor), -1, HEADS, WIDTH // HEADS).transpose(1, 2)

    q, k, v = heads(layer.to_q(query)), heads(layer.to_k(source)), heads(layer.to_v(source))
    return layer.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Layer().eval().requires_grad_(False)


@pytest.fixture
def hidden(layer):
    return torch.randn(2 * VIEWS.count, 16, WIDTH)


def test_merged_self_attention_equals_merge_attend_split(layer, hidden):
    joint = JointPass(len(hidden) // VIEWS.count, {}, frozenset({"attn1"}), GRIDS)
    ours = JointAttention("attn1")(layer, hidden, joint=joint)
    canvas = merge_cells(hidden.view(2, 3, 4, 4, WIDTH), GRID).flatten(1, 2)
    attended = plain_attention(layer, canvas, canvas).view(2, 4, 8, WIDTH)
    torch.testing.assert_close(ours, split_cells(attended, GRID).reshape(6, 16, WIDTH))


def test_unmerged_self_attention_keeps_views_apart(layer, hidden):
    ours = JointAttention("attn1")(layer, hidden, joint=JointPass(2, {}))
    torch.testing.assert_close(ours, plain_attention(layer, hidden, hidden))


def test_unmerged_cross_attention_equals_attention_per_view(layer, hidden):
    prompt = torch.randn(2, 5, WIDTH)
    joint = JointPass(2, {"attn2": keys_values(layer, prompt)})
    ours = JointAttention("attn2")(layer, hidden, prompt, joint=joint)
    torch.testing.assert_close(ours, plain_attention(layer, hidden, prompt.repeat_interleave(3, 0)))


def test_prompt_keys_and_values_are_computed_once(layer, hidden):
    calls, prompt = [], torch.ones(2, 5, WIDTH)
    layer.to_k.register_forward_hook(lambda *_: calls.append(1))
    passed = JointPass(2, {"attn2": keys_values(layer, prompt)}, grids=GRIDS)
    for merged in ({"attn2"}, {"attn2"}, set()):
        joint = replace(passed, merged=frozenset(merged))
        JointAttention("attn2")(layer, hidden, prompt, joint=joint)
    assert len(calls) == 1


def test_a_layer_at_half_resolution_merges_there(layer):
    hidden = torch.randn(3, 4, WIDTH)  # views of 2x2 cells
    joint = JointPass(len(hidden) // VIEWS.count, {}, frozenset({"attn1"}), GRIDS)
    ours = JointAttention("attn1")(layer, hidden, joint=joint)
    coarse = grid_of(VIEWS.scaled(2), DEVICE)
    canvas = merge_cells(hidden.view(1, 3, 2, 2, WIDTH), coarse).flatten(1, 2)
    attended = plain_attention(layer, canvas, canvas).view(1, 2, 4, WIDTH)
    torch.testing.assert_close(ours, split_cells(attended, coarse).reshape(3, 4, WIDTH))


def test_without_a_joint_pass_the_original_processor_runs(layer, hidden):
    def original(attn, *arguments):
        return attn, *arguments

    assert JointAttention("attn1", original)(layer, hidden, "prompt", "mask") == (layer, hidden, "prompt", "mask")

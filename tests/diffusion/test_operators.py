"""Laws of the merge operators: partition of unity, variance, and equality with stepping the views separately."""

import copy
import inspect
import itertools
import sys

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from view_axes import axes
from wave_denoiser import DDIM, Wave, of, wave

from madgen.backbones._schedulers import check_scheduler
from madgen.diffusion.denoise import joint_diffusion
from madgen.diffusion.merge import merge, split, total
from madgen.diffusion.noise import align
from madgen.diffusion.operators import WEIGHTS, MergeOperator
from madgen.diffusion.views import Axis, Layout, Views, build_layout, view_starts
from madgen.utils.errors import UserError

CPU = torch.device("cpu")
OPERATORS = [
    MergeOperator(),
    *(MergeOperator(weights=weights) for weights in WEIGHTS),
    MergeOperator("swap"),
    MergeOperator("swap", width=3),
]
operators = pytest.mark.parametrize(
    "operator", OPERATORS, ids=lambda each: f"{each.operator}-{each.weights}-{each.width}"
)


def names_of_schedulers():
    """Return the diffusers schedulers that can step a canvas, in each of their variants of interest."""
    names = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.endswith("Scheduler") and not name.startswith("Flax") else None
        if cls is None or vars(cls).get("_backends"):
            continue
        try:
            scheduler = cls.from_config(DDIM)
            check_scheduler(scheduler)
            scheduler.set_timesteps(5)
        except (UserError, TypeError, ValueError, ImportError, AttributeError):
            continue
        names.append(name)
    return names


SCHEDULERS = names_of_schedulers()


@operators
@settings(max_examples=40)
@given(rows=axes(), columns=axes(), seed=st.integers(0, 99))
def test_merge_undoes_split(operator, rows, columns, seed):
    views = Views(rows, columns)
    canvas = torch.randn(2, 3, rows.extent, columns.extent, generator=torch.Generator().manual_seed(seed))
    merged = operator.merge(operator.split(canvas, views, 0), views, 0)
    if operator.operator == "swap":
        assert torch.equal(merged, canvas)
    torch.testing.assert_close(merged, canvas)


@operators
@settings(max_examples=40)
@given(rows=axes(), columns=axes())
def test_shares_of_a_cell_add_up_to_one(operator, rows, columns):
    views = Views(rows, columns)
    if operator.is_mean:
        return
    shares = operator.shares(views, torch.float64, CPU)
    assert (shares >= 0).all()
    sums = total(shares[None, :, None], views)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
    if operator.operator == "swap":
        assert set(shares.unique().tolist()) <= {0.0, 1.0}


@settings(max_examples=40)
@given(rows=axes(), columns=axes(), width=st.integers(1, 4))
def test_swap_keeps_the_variance_of_white_noise_and_the_mean_divides_it_by_the_depth(rows, columns, width):
    """The variance of a sum of independent unit noises is the sum of the squared factors."""
    views = Views(rows, columns)
    shares = MergeOperator("swap", width=width).shares(views, torch.float64, CPU)
    assert (total(shares.square()[None, :, None], views) == 1).all()
    unit = torch.eye(views.count, dtype=torch.float64)  # the mean's shares, from its response to one view at a time
    ones = torch.ones(views.count, 1, rows.size, columns.size, dtype=torch.float64)
    means = merge(unit[:, :, None, None, None] * ones, views)[:, 0]
    depth = total(ones[None], views)[0, 0]
    torch.testing.assert_close(means.square().sum(0), 1 / depth)


def test_swap_keeps_the_variance_of_sampled_noise():
    views = build_layout("overlapping", 16, 64, 16, 4).at(0)
    noise = torch.randn(256, views.count, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    inner = slice(12, -12)  # where four views overlap
    swapped, mean = (each.merge(noise, views, 0)[..., inner] for each in (MergeOperator("swap"), MergeOperator()))
    assert float(swapped.var()) == pytest.approx(1, abs=0.01)
    assert float(mean.var()) == pytest.approx(1 / 4, abs=0.01)


def test_swap_takes_the_first_column_of_an_overlap_from_the_right_hand_view():
    views = Views(Axis(1, 1, (0,)), Axis(14, 6, (0, 4, 8)))  # overlaps of two columns: 4, 5 and 8, 9
    marked = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(1, 3, 1, 1, 6)
    assert MergeOperator("swap").merge(marked, views, 0).flatten().tolist() == [0] * 4 + [1, 0, 1, 1, 2, 1] + [2] * 4
    wide = MergeOperator("swap", width=2).merge(marked, views, 0).flatten().tolist()
    assert wide == [0] * 4 + [1, 1, 1, 1, 2, 2] + [2] * 4


def test_swap_takes_deeper_overlaps_in_turn_from_right_to_left():
    views = Views(Axis(1, 1, (0,)), Axis(12, 6, (0, 2, 4, 6)))  # three views on columns 4 to 7
    marked = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 1, 1, 6)
    assert MergeOperator("swap").merge(marked, views, 0).flatten().tolist() == [0, 0, 1, 0, 2, 1, 3, 2, 3, 2, 3, 3]


def test_swap_across_the_edge_of_a_loop_begins_with_the_view_that_starts_there():
    views = Views(Axis(1, 1, (0,)), Axis(8, 6, (0, 4)))  # overlaps: columns 4, 5 and around the edge 0, 1
    marked = torch.arange(2.0).view(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 6)
    assert MergeOperator("swap").merge(marked, views, 0).flatten().tolist() == [0, 1, 0, 0, 1, 0, 1, 1]


@settings(max_examples=30)
@given(extent=st.integers(2, 12), seed=st.integers(0, 9))
def test_swap_on_a_loop_commutes_with_rotation(extent, seed):
    size, stride = 4, 2
    columns = 2 * max(extent, 2)
    views = build_layout("overlapping", 4, columns, size, stride, loop=True).at(0)
    noise = torch.randn(1, views.count, 1, size, size, generator=torch.Generator().manual_seed(seed))
    swap = MergeOperator("swap")
    rotated = swap.merge(noise.roll(1, dims=1), views, 0)
    assert torch.equal(rotated, swap.merge(noise, views, 0).roll(stride, dims=-1))


@operators
def test_views_without_overlap_are_plain_tiles(operator):
    views = build_layout("overlapping", 8, 24, 4, 4).at(0)
    noise = torch.randn(2, views.count, 3, 4, 4)
    expected = torch.cat(
        [torch.cat(list(row), dim=-1) for row in noise.unflatten(1, (2, 6)).permute(1, 2, 0, 3, 4, 5)], -2
    )
    assert torch.equal(operator.merge(noise, views, 0), expected)


def test_radial_weights_are_not_a_product_of_rows_and_columns():
    views = build_layout("overlapping", 12, 12, 8, 4).at(0)
    shares = MergeOperator(weights="radial").shares(views, torch.float64, CPU)
    inner = shares[0, 4:, 4:]  # the corner that all four views cover
    assert float(torch.linalg.svdvals(inner)[1]) > 1e-3


@operators
def test_earlier_steps_take_the_mean(operator):
    views = build_layout("overlapping", 8, 24, 8, 2).at(0)
    noise = torch.randn(2, views.count, 3, 8, 8)
    late = MergeOperator(operator.operator, operator.weights, operator.width, first_step=2)
    assert torch.equal(late.merge(noise, views, 1), merge(noise, views))
    assert torch.equal(late.merge(noise, views, 2), operator.merge(noise, views, 0))


class CanvasNoise:
    """The noise of the canvas by draw; a view gets its part."""

    def __init__(self, views, shape):
        self.views, self.shape, self.generator = views, shape, torch.Generator().manual_seed(5)
        self.drawn, self.view, self.counts = [], None, {}

    def __call__(self, shape, *arguments, **options):
        draw = self.counts[self.view] = self.counts.get(self.view, -1) + 1
        while len(self.drawn) <= draw:
            self.drawn.append(torch.randn(self.shape, generator=self.generator, dtype=torch.float64))
        noise = self.drawn[draw]
        noise = noise if self.view is None else split(noise, self.views)[:, self.view]
        assert noise.shape == shape
        return noise.to(options.get("dtype") or torch.float64)


def swapped_by_hand(latents, scheduler, starts, size, overlap, noise, steps):
    """Step each view with its own scheduler, then swap the columns of neighbouring views, as in the paper."""
    view_latents = [latents[..., start : start + size] * scheduler.init_noise_sigma for start in starts]
    schedulers = [copy.deepcopy(scheduler) for _ in starts]
    right = torch.arange(overlap) % 2 == 0  # columns that both views take from the right-hand one
    for step, time in enumerate(scheduler.timesteps):
        for index, own in enumerate(schedulers):
            noise.view = index
            given = own.scale_model_input(view_latents[index], time)
            predicted = wave(given[:, None], None, steps[step], time)[:, 0]
            view_latents[index] = own.step(predicted, time, view_latents[index]).prev_sample
        for one, other in itertools.pairwise(view_latents):
            mixed = torch.where(right, other[..., :overlap], one[..., -overlap:])
            one[..., -overlap:], other[..., :overlap] = mixed, mixed
    canvas = torch.empty(latents.shape, dtype=latents.dtype)
    for start, view in zip(starts, view_latents, strict=True):
        canvas[..., start : start + size] = view
    return canvas


@pytest.mark.parametrize("name", SCHEDULERS)
def test_swap_equals_views_with_their_own_schedulers_exactly(name, monkeypatch):
    from madgen.diffusion.steps import steps_of

    size, stride, overlap = 8, 6, 2
    starts = view_starts(20, size, stride)
    views = Views(Axis(size, size, (0,)), Axis(20, size, tuple(starts)))
    latents = torch.randn(1, 4, size, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for by_hand in (True, False):
        scheduler, noise = of(name), CanvasNoise(views, (1, 4, size, 20))
        module = sys.modules[type(scheduler).__module__]
        monkeypatch.setattr(module, "randn_tensor", noise, raising=False)
        if by_hand:
            results.append(swapped_by_hand(latents, scheduler, starts, size, overlap, noise, steps_of(scheduler)))
        else:
            layout = Layout(lambda step: views)
            results.append(
                joint_diffusion(latents, scheduler, layout, Wave(), [torch.Generator()], merger=MergeOperator("swap"))
            )
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_schedulers_of_the_exact_test_cover_the_usual_ones():
    usual = {"DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete", "PNDM", "LCM"}
    usual |= {"DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "TCD", "SASolver", "KDPM2AncestralDiscrete"}
    assert {f"{name}Scheduler" for name in usual} <= set(SCHEDULERS)


class Stepped(Exception):
    def __init__(self, latents):
        self.latents = latents


class FirstStep:
    """Merges like an operator, and stops after the first step."""

    def __init__(self, operator):
        self.split, self.merge = operator.split, operator.merge

    def after_step(self, latents, views, step):
        raise Stepped(latents)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("operator", [MergeOperator(), MergeOperator(weights="radial")], ids=["uniform", "radial"])
def test_ancestral_noise_keeps_its_mean_and_variance(name, operator):
    """Variance-corrected fusion: averaging views with noise of their own would divide the variance by the overlap."""
    views = build_layout("overlapping", 8, 16, 8, 4).at(0)
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    draws = 400
    scheduler = of(name, 4)
    many = noise.expand(draws, -1, -1, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(draws)]
    layout = Layout(lambda step: views)
    with pytest.raises(Stepped) as first:
        joint_diffusion(many, copy.deepcopy(scheduler), layout, Wave(), generators, merger=FirstStep(operator))
    stepped = first.value.latents
    means, variances = [], []
    for index in range(views.count):  # each view by itself
        own = copy.deepcopy(scheduler)
        view = split(noise * own.init_noise_sigma, views)[:, index].expand(draws, -1, -1, -1)
        predicted = wave(own.scale_model_input(view, own.timesteps[0])[:, None], views, 0, None)[:, 0]
        result = own.step(predicted, own.timesteps[0], view, generator=generators).prev_sample
        variances.append(result.var(0).mean())
        means.append(result.mean(0))
    sigma2 = torch.stack(variances).mean()
    expected = operator.merge(torch.stack(means)[None], views, 0)[0]
    assert float((stepped.mean(0) - expected).square().mean() / sigma2) < 3 / draws
    for depth in (1, 2):
        columns = slice(0, 4) if depth == 1 else slice(4, 12)
        ratio = stepped[..., columns].var(0).mean() / sigma2
        assert float(ratio) == pytest.approx(1, abs=0.05), depth


def test_aligned_noise_is_unit_noise_between_its_ends():
    generator = torch.Generator().manual_seed(0)
    noise, view = (torch.randn(2, 4, 64, width, generator=generator) for width in (160, 64))
    assert align(noise, view, 0.0) is noise
    tiles = align(noise, view, 1.0)
    assert torch.equal(tiles, torch.cat([view, view, view[..., :32]], dim=-1))
    for share in (0.1, 0.5, 0.9):
        aligned = align(noise, view, share)
        assert float(aligned.var()) == pytest.approx(1, abs=0.02)
        together = align(noise[:1], view[:1], share)
        assert torch.equal(together, aligned[:1]), "independent of the batch"


class Traffic(TorchDispatchMode):
    """Count the elements that operations read and write, except views of memory."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and func not in FREE:
            tensors = [each for each in (*args, result) if isinstance(each, torch.Tensor)]
            self.elements += sum(each.numel() for each in tensors)
        return result


FREE = {
    getattr(torch.ops.aten, name).default
    for name in ("view", "permute", "expand", "unsqueeze", "_unsafe_view", "detach", "alias", "as_strided", "squeeze")
} | {torch.ops.aten.transpose.int, torch.ops.aten.select.int, torch.ops.aten.slice.Tensor}


@operators
@pytest.mark.parametrize("layout", [("overlapping", 16, 64, 16, 4), ("overlapping", 32, 32, 16, 8)])
def test_shares_take_no_further_pass_over_the_memory(operator, layout):
    """Beyond the mean, only the shares are read, once: one channel for all prompts and channels."""
    views = build_layout(*layout).at(0)
    noise = torch.randn(8, views.count, 4, 16, 16)
    operator.merge(noise, views, 0)  # builds the tables
    with Traffic() as plain:
        MergeOperator().merge(noise, views, 0)
    with Traffic() as shared:
        operator.merge(noise, views, 0)
    assert shared.elements <= plain.elements + noise[:1, :, :1].numel()


def test_denoising_loop_stays_an_algorithm_box():
    source = inspect.getsource(joint_diffusion)
    assert "isinstance" not in source
    assert len(source.split("for step")[1].splitlines()) < 15

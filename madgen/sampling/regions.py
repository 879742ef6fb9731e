"""Convert the regions of a batch of panoramas to masks on latent cells and background colors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from madgen.backbones import Backbone
from madgen.diffusion.regions import Bootstrap, Regions, with_background
from madgen.images.masks import cell_weights
from madgen.sampling.scheduler_checks import any_cut_out
from madgen.types import Region
from madgen.utils.seeding import derived_seed

PanoramaRegions = Sequence[Sequence[Region]]
"""The regions of each panorama of a batch."""


def build_composition(
    regions: PanoramaRegions,
    backbone: Backbone,
    noise_BCHW: Tensor,
    size: tuple[int, int],
    seeds: Sequence[int],
    loop: bool,
    bootstrapping: int,
) -> Regions | None:
    """Build the masks of a batch's canvases of `size` (height, width in pixels); None if there are no regions.

    `bootstrapping`: number of steps in which regions see plain colors outside their masks. Raises UserError for a
    mask that does not match the canvas.
    """
    if not any(regions):
        return None
    masks = []
    for parts in regions:
        weights = [torch.from_numpy(cell_weights(part.mask, *size, backbone.spec.factor, loop)) for part in parts]
        masks.append(
            with_background(torch.stack(weights))
            if parts
            else torch.ones(1, *noise_BCHW.shape[-2:], dtype=torch.float32)
        )
    needed = bootstrapping and any_cut_out(regions)
    bootstrap = _bootstrap(regions, backbone, noise_BCHW, seeds, bootstrapping) if needed else None
    return Regions(torch.cat(masks).to(noise_BCHW.device), [len(mask) for mask in masks], bootstrap)


def flatten_rows(backgrounds: Sequence[str], regions: Sequence[Sequence[str]]) -> list[str]:
    """Return the texts of all rows: each panorama's own text, then those of its regions."""
    return [text for background, parts in zip(backgrounds, regions, strict=True) for text in (background, *parts)]


def row_view_ids(regions: Iterable[Sequence[Region]], bootstrapped: bool) -> list[Hashable]:
    """Return equal ids for rows with equal views: those of a canvas, except masked regions while `bootstrapped`."""
    return [
        (canvas, index if bootstrapped and index and parts[index - 1].is_cut_out else 0)
        for canvas, parts in enumerate(regions)
        for index in range(1 + len(parts))
    ]


def _bootstrap(
    regions: PanoramaRegions, backbone: Backbone, noise_BCHW: Tensor, seeds: Sequence[int], steps: int
) -> Bootstrap:
    """Encode random colors, different for each step and row."""
    colors = []
    for parts, seed in zip(regions, seeds, strict=True):
        generator = torch.Generator("cpu").manual_seed(derived_seed(seed, "regions"))
        colors.append(torch.rand(steps, 1 + len(parts), 3, generator=generator, dtype=torch.float32))
    counts = torch.tensor([1 + len(parts) for parts in regions], device=noise_BCHW.device)
    active = torch.tensor([cut for parts in regions for cut in (False, *(part.is_cut_out for part in parts))])
    rgb_KR3 = torch.cat(colors, dim=1)
    latents_KRC = torch.zeros(*rgb_KR3.shape[:2], noise_BCHW.shape[1], dtype=torch.float32, device=noise_BCHW.device)
    latents_KRC[:, active] = _encode_colors(rgb_KR3[:, active].to(noise_BCHW.device), backbone)
    return Bootstrap(steps, latents_KRC, noise_BCHW.repeat_interleave(counts, 0), active.to(noise_BCHW.device))


@torch.no_grad()
def _encode_colors(colors_KR3: Tensor, backbone: Backbone) -> Tensor:
    """Encode views of one color; return the middle cell, which padding does not affect: [K, R, C]."""
    pixels, middle = backbone.spec.view_size * backbone.spec.factor, backbone.spec.view_size // 2
    images = (color[None, :, None, None].expand(1, 3, pixels, pixels) for color in colors_KR3.flatten(0, 1))
    latents = torch.cat([backbone.encode(image)[..., middle, middle] for image in images])
    return latents.unflatten(0, colors_KR3.shape[:2])

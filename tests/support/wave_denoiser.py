"""A denoiser whose predictions are waves, and schedulers with Stable Diffusion's config."""

import diffusers
import torch

DDIM = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}


def of(name, steps=5):
    scheduler = getattr(diffusers, name).from_config(DDIM)
    scheduler.set_timesteps(steps)
    return scheduler


def wave(views_BVChw, views, step, timestep):
    """Return noise that differs from view to view and depends on the whole view, as a network's does."""
    mixed = views_BVChw + views_BVChw.roll(1, dims=-1) - views_BVChw.mean(dim=(-2, -1), keepdim=True)
    return torch.tanh(1.7 * mixed + 0.1 * step)


class Wave:
    predict = staticmethod(wave)

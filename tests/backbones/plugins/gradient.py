"""A backbone in one file, from the protocols of `madgen.backbones` alone: it paints a color for each prompt.

Its "network" predicts the noise that leads to the prompt's color. Its one attention layer replaces each view by its
mean, or where it merges, by the mean of the canvas.
"""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from diffusers import DDIMScheduler

from madgen import UserError
from madgen.backbones import BackboneSpec
from madgen.diffusion.merge import merge, split

SPEC = BackboneSpec(channels=3, factor=4, view_size=8, coarsest=1, guidance="cfg")
LAYER = "attention"


@dataclass(frozen=True)
class Colors:
    """The color of each prompt [B, 3], guided away from the one of its negative prompt."""

    prompts: torch.Tensor
    negatives: torch.Tensor
    guidance_scale: float

    @property
    def guided(self):
        return self.negatives + self.guidance_scale * (self.prompts - self.negatives)

    def regrouped(self, view_ids):
        return self

    def unguided(self):
        return replace(self, guidance_scale=1.0)


class Gradient:
    spec, device, dtype = SPEC, torch.device("cpu"), torch.float32

    def encode_prompts(self, prompts, negative_prompts, guidance_scale, view_ids=None):
        return Colors(color(prompts), color(negative_prompts), guidance_scale)

    def keep_prompts(self, prompts):
        pass

    def cut_text(self, prompt):
        return None

    def merged_layers(self, merging):
        return select(merging.blocks)

    def predict_noise(self, views_BVChw, timestep, conditioning, joint=None, chunk_views=None):
        hidden = views_BVChw
        if joint is not None and select(joint.merging.blocks) and joint.merging.applies(joint.step, crosses=False):
            canvas = merge(hidden, joint.views)
            hidden = split(canvas.mean((2, 3), keepdim=True).expand_as(canvas), joint.views)
        else:
            hidden = hidden.mean((3, 4), keepdim=True)
        return views_BVChw - (conditioning.guided[:, None, :, None, None] + hidden) / 2

    def encode(self, pixels_B3HW):
        return torch.nn.functional.avg_pool2d(pixels_B3HW, SPEC.factor) * 2 - 1

    def decode(self, latents_BCHW, wrap=0, tiled=False):
        return (torch.nn.functional.interpolate(latents_BCHW, scale_factor=SPEC.factor) / 2 + 0.5).clamp(0, 1)

    def new_scheduler(self, settings, view_cells=None):
        scheduler = scheduler_class(settings.scheduler or "DDIMScheduler")(clip_sample=False)
        scheduler.set_timesteps(settings.num_inference_steps)
        return scheduler

    def compile(self):
        raise UserError("backbone.compile: this backbone has no network to compile; set it to false")

    def in_float32(self):
        return nullcontext()

    def release_memory(self):
        return False

    def disable_cuda_graphs(self):
        pass


def color(prompts):
    return torch.tensor([list(hashlib.sha256(prompt.encode()).digest()[:3]) for prompt in prompts]) / 127.5 - 1


def select(blocks):
    unknown = set(blocks) - {"all", LAYER}
    if unknown:
        raise UserError(f"method.mad.blocks: unknown block {unknown.pop()!r}; use {LAYER!r}")
    return frozenset({LAYER})


def load(pretrained, **checkpoint):
    return Gradient()


def download(files):
    return []


def describe(files):
    return SPEC


def family_spec(pretrained):
    return SPEC


def check_blocks(blocks, files):
    select(blocks)


def text_limit(files, max_sequence_length=None):
    return None


def scheduler_class(name):
    if name != "DDIMScheduler":
        raise UserError(f"sampling.scheduler={name!r}: this backbone has DDIMScheduler only")
    return DDIMScheduler


def own_scheduler(files, prediction_type=None):
    return {"_class_name": "DDIMScheduler"}


def evaluated_steps(own, settings):
    return list(range(settings.num_inference_steps))

"""Joint diffusion with diffusers' transformers in a plain loop, without madgen: one view, prompt and path at a time."""

import numpy as np
import torch


def guided_scheduler(pipe, steps, view_tokens, scheduler=None):
    """Return a scheduler with its timesteps set as the pipeline sets them for an image of `view_tokens` tokens."""
    scheduler = scheduler or type(pipe.scheduler).from_config(pipe.scheduler.config)
    options, config = {}, scheduler.config
    if config.get("use_dynamic_shifting"):
        slope = (config["max_shift"] - config["base_shift"]) / (
            config["max_image_seq_len"] - config["base_image_seq_len"]
        )
        options["mu"] = config["base_shift"] + slope * (view_tokens - config["base_image_seq_len"])
    if type(pipe).__name__ == "FluxPipeline":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **options)
    else:
        scheduler.set_timesteps(steps, **options)
    return scheduler


class Velocity:
    """Guided prediction of a diffusers pipeline's transformer for one prompt."""

    def __init__(self, pipe, prompt, negative, guidance_scale, length):
        self.pipe, self.net, self.scale = pipe, pipe.transformer, guidance_scale
        self.flux = type(pipe).__name__ == "FluxPipeline"
        if self.flux:
            self.hidden, self.pooled, self.text_ids = pipe.encode_prompt(prompt, None, max_sequence_length=length)
        else:
            self.hidden, self.negative, self.pooled, self.negative_pooled = pipe.encode_prompt(
                prompt, None, None, negative_prompt=negative, max_sequence_length=length
            )

    def __call__(self, cells, time):
        height, width = cells.shape[-2:]
        if not self.flux:
            run = lambda hidden, pooled: self.net(  # noqa: E731
                hidden_states=cells, timestep=time.expand(1), encoder_hidden_states=hidden,
                pooled_projections=pooled, return_dict=False,
            )[0]  # fmt: skip
            conditional = run(self.hidden, self.pooled)
            if self.scale <= 1:
                return conditional
            unconditional = run(self.negative, self.negative_pooled)
            return unconditional + self.scale * (conditional - unconditional)
        factor = self.pipe.vae_scale_factor
        packed = self.pipe._pack_latents(cells.contiguous(), 1, cells.shape[1], height, width)
        out = self.net(
            hidden_states=packed, timestep=time.expand(1) / 1000, pooled_projections=self.pooled,
            guidance=torch.full([1], self.scale) if self.net.config.guidance_embeds else None,
            encoder_hidden_states=self.hidden, txt_ids=self.text_ids, return_dict=False,
            img_ids=self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
        )[0]  # fmt: skip
        return self.pipe._unpack_latents(out, height * factor, width * factor, factor)


@torch.no_grad()
def sample(
    pipe, prompt, seed, height, width, *, steps, guidance_scale, length, negative="", view=None, stride=4,
    direct_steps=0, loop=False, prepared=None,
):  # fmt: skip
    """Return the latents [1, C, height, width]; sizes in latent cells.

    `prepared`: a scheduler with its timesteps set. In the first `direct_steps` the transformer sees the whole canvas at
    once: MAD in all layers with canvas positions.
    """
    channels = pipe.vae.config.latent_channels
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, channels, height, width, generator=generator)
    view = (view, view) if view else (height, width)
    velocity = Velocity(pipe, prompt, negative, guidance_scale, length)
    scheduler = prepared or guided_scheduler(pipe, steps, view[0] * view[1] // 4)
    across = range(0, width, stride) if loop else range(0, width - view[1] + 1, stride)
    starts = [(y, x) for y in range(0, height - view[0] + 1, stride) for x in across]
    for step, time in enumerate(scheduler.timesteps):
        places, (tall, wide) = ([(0, 0)], (height, width)) if step < direct_steps else (starts, view)
        total, count = torch.zeros_like(latents), torch.zeros(height, width)
        for y, x in places:
            columns = [(x + i) % width for i in range(wide)]
            out = velocity(latents[:, :, y : y + tall][..., columns], time)
            for i, column in enumerate(columns):
                total[:, :, y : y + tall, column] += out[..., i]
                count[y : y + tall, column] += 1
        options = {"generator": generator} if "LCM" in type(scheduler).__name__ else {}
        latents = scheduler.step(total / count, time, latents, return_dict=False, **options)[0]
    return latents

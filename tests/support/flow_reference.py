"""Joint diffusion with diffusers' transformers in a plain loop, without madgen: one view, prompt and path at a time."""

import numpy as np
import torch


def guided_scheduler(pipe, steps, view_tokens, scheduler=None):
    """Return a scheduler with its timesteps set as the pipeline sets them for an image of `view_tokens` tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    scheduler = scheduler or type(pipe.scheduler).from_config(pipe.scheduler.config)
    options, config = {}, scheduler.config
    if config.get("use_dynamic_shifting"):
        if type(pipe).__name__ == "Flux2KleinPipeline":
            options["mu"] = compute_empirical_mu(view_tokens, steps)
        else:
            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            options["mu"] = calculate_shift(view_tokens, *(config[name] for name in names))
    if type(pipe).__name__ == "StableDiffusion3Pipeline":
        scheduler.set_timesteps(steps, **options)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **options)
    return scheduler


class Velocity:
    """Guided prediction of a diffusers pipeline's transformer for one prompt."""

    def __init__(self, pipe, prompt, negative, guidance_scale, length):
        self.pipe, self.net, self.scale, self.length = pipe, pipe.transformer, guidance_scale, length
        self.factor = pipe.vae_scale_factor
        self.positive, self.negative = self.encode(prompt), self.encode(negative)

    def encode(self, text):
        return self.pipe.encode_prompt(text, max_sequence_length=self.length)

    def __call__(self, cells, time):
        conditional = self.predict(cells.contiguous(), time.expand(1), self.positive)
        if not self.guided:
            return conditional
        return self.combine(self.predict(cells.contiguous(), time.expand(1), self.negative), conditional)

    @property
    def guided(self):
        return self.scale > 1

    def combine(self, unconditional, conditional):
        return unconditional + self.scale * (conditional - unconditional)


class StableDiffusion3(Velocity):
    def encode(self, text):
        return self.pipe.encode_prompt(text, None, None, max_sequence_length=self.length)

    def predict(self, cells, time, encoded):
        hidden, _, pooled, _ = encoded
        return self.net(
            hidden_states=cells, timestep=time, encoder_hidden_states=hidden, pooled_projections=pooled,
            return_dict=False,
        )[0]  # fmt: skip


class Flux(Velocity):
    guided = False

    def encode(self, text):
        return self.pipe.encode_prompt(text, None, max_sequence_length=self.length)

    def predict(self, cells, time, encoded):
        hidden, pooled, text_ids = encoded
        height, width = cells.shape[-2:]
        out = self.net(
            hidden_states=self.pipe._pack_latents(cells, 1, cells.shape[1], height, width), timestep=time / 1000,
            guidance=torch.full([1], self.scale) if self.net.config.guidance_embeds else None,
            pooled_projections=pooled, encoder_hidden_states=hidden, txt_ids=text_ids, return_dict=False,
            img_ids=self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32),
        )[0]  # fmt: skip
        return self.pipe._unpack_latents(out, height * self.factor, width * self.factor, self.factor)


class Flux2(Velocity):
    @property
    def guided(self):
        return self.scale > 1 and not self.pipe.config.is_distilled

    def predict(self, cells, time, encoded):
        hidden, text_ids = encoded
        patches = self.pipe._patchify_latents(cells)
        ids = self.pipe._prepare_latent_ids(patches)
        out = self.net(
            hidden_states=self.pipe._pack_latents(patches), timestep=time / 1000, encoder_hidden_states=hidden,
            txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        return self.pipe._unpatchify_latents(self.pipe._unpack_latents_with_ids(out, ids))


class ZImage(Velocity):
    def encode(self, text):
        return self.pipe.encode_prompt(
            text, do_classifier_free_guidance=False, max_sequence_length=self.length
        )[0]  # fmt: skip

    @property
    def guided(self):
        return self.scale > 0

    def combine(self, unconditional, conditional):
        return conditional + self.scale * (conditional - unconditional)

    def predict(self, cells, time, encoded):
        return -self.net([cells[0, :, None]], (1000 - time) / 1000, encoded, return_dict=False)[0][0].movedim(1, 0)


class QwenImage(Velocity):
    def predict(self, cells, time, encoded):
        height, width = cells.shape[-2:]
        out = self.net(
            hidden_states=self.pipe._pack_latents(cells, 1, cells.shape[1], height, width), timestep=time / 1000,
            encoder_hidden_states=encoded[0], encoder_hidden_states_mask=encoded[1],
            img_shapes=[[(1, height // 2, width // 2)]], return_dict=False,
        )[0]  # fmt: skip
        return self.pipe._unpack_latents(out, height * self.factor, width * self.factor, self.factor)[:, :, 0]

    def combine(self, unconditional, conditional):
        guided, norms = super().combine(unconditional, conditional), []
        for prediction in (conditional, guided):
            tokens = torch.nn.functional.pixel_unshuffle(prediction, 2)
            norms.append(torch.nn.functional.interpolate(tokens.norm(dim=1, keepdim=True), scale_factor=2))
        return guided * norms[0] / norms[1]


VELOCITIES = {
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2,
    "ZImagePipeline": ZImage,
    "QwenImagePipeline": QwenImage,
}


@torch.no_grad()
def sample(
    pipe, prompt, seed, height, width, *, steps, guidance_scale, length, negative="", view=None, stride=4,
    direct_steps=0, loop=False, prepared=None,
):  # fmt: skip
    """Return the latents [1, C, height, width]; sizes in latent cells.

    `prepared`: a scheduler with its timesteps set. In the first `direct_steps` the transformer sees the whole canvas at
    once: MAD in all layers with canvas positions.
    """
    generator = torch.Generator().manual_seed(seed)
    velocity = VELOCITIES[type(pipe).__name__](pipe, prompt, negative, guidance_scale, length)
    if isinstance(velocity, Flux2):  # its pipeline draws the noise of patches
        patches = torch.randn(1, 4 * pipe.vae.config.latent_channels, height // 2, width // 2, generator=generator)
        latents = pipe._unpatchify_latents(patches)
    else:
        channels = getattr(pipe.vae.config, "latent_channels", None) or pipe.vae.config.z_dim
        latents = torch.randn(1, channels, height, width, generator=generator)
    view = (view, view) if view else (height, width)
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

"""Train the demo autoencoder: an `AutoencoderKL` of 1.6 M parameters, 8 pixels per latent cell, 4 channels."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from demo_backbone.pace import Pace

KL_WEIGHT = 2e-5
GRADIENT_WEIGHT = 0.5
LEARNING_RATE = 1.5e-3
CROP = 64  # pixels; cheap crops in most steps, whole images in the last quarter


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder, without attention so that decoding is linear in the width."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def to_tensor(images: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Convert uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1, channels last."""
    batch = torch.as_tensor(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


class _Loss(nn.Module):
    """L1 loss of pixels and of their gradients, plus a small KL term."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> Tensor:
        posterior = self.vae.encode(pictures).latent_dist
        latents = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        output = self.vae.decode(latents).sample.float()
        error = output - pictures
        pixels = error.abs().mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return pixels + GRADIENT_WEIGHT * edges + KL_WEIGHT * divergence


def train_autoencoder(
    images: np.ndarray, pace: Pace, batch: int, device: torch.device, seed: int, start: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train on uint8 images [N, 128, 128, 3] with `batch` crops or half as many whole images, optionally from `start`.

    The `scaling_factor` of the result gives latents unit variance.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 1))
    pictures = torch.from_numpy(images).to(device)
    vae = (start or new_autoencoder()).train().to(device=device, memory_format=torch.channels_last)
    objective = _Loss(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), LEARNING_RATE, weight_decay=1e-4, fused=device.type == "cuda")
    for step in pace:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * pace.rate()
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(_batch(pictures, rng, batch, whole=pace.done >= 0.75))
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            pace.report("autoencoder", f"loss {loss.item():.4f}")
    vae.eval()
    latents = encode(vae, images[:2048], device, scaled=False)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


def _batch(pictures: Tensor, rng: np.random.Generator, batch: int, whole: bool) -> Tensor:
    """Draw a batch: crops, or half as many whole images (twice the pixels)."""
    chosen = pictures[torch.from_numpy(rng.integers(0, len(pictures), max(1, batch // 2) if whole else batch))]
    if not whole:
        top, left = rng.integers(0, chosen.shape[1] - CROP + 1, 2)
        chosen = chosen[:, top : top + CROP, left : left + CROP]
    return to_tensor(chosen, pictures.device)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, device: torch.device, scaled: bool = True) -> Tensor:
    """Return posterior means [N, 4, 16, 16] of uint8 images, float32 on the CPU; `scaled` to unit variance."""
    factor = vae.config["scaling_factor"] if scaled else 1.0
    batches = []
    for start in range(0, len(images), 64):
        batches.append((vae.encode(to_tensor(images[start : start + 64], device)).latent_dist.mean * factor).cpu())
    return torch.cat(batches)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray, device: torch.device) -> float:
    """Return the mean peak signal-to-noise ratio of reconstructions of uint8 images, in dB."""
    values = []
    for start in range(0, len(images), 32):
        batch = to_tensor(images[start : start + 32], device)
        output = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        error = ((output - batch) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(error))
    return float(torch.cat(values).mean())

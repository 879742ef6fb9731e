"""Parameters of published models, counted with diffusers and transformers: for planning without their files."""

from __future__ import annotations

from madgen.hub.model_size import Parameters

CLIP_L = Parameters(123_060_480)
CLIP_H = Parameters(340_387_840)
CLIP_G = Parameters(694_659_840)
T5_XXL = Parameters(4_762_310_656, float32=24 * 10_240 * 4096)
QWEN3_4B = Parameters(4_022_468_096)
QWEN25_VL_7B = Parameters(8_292_166_656)
KL_VAE = Parameters(83_653_863)
KL_VAE_16 = Parameters(83_819_683)
FLUX2_VAE = Parameters(84_046_115)
QWEN_VAE = Parameters(126_892_531)
KL_PIXEL, QWEN_PIXEL = 4.8 * 256, 11.0 * 192
"""Activations per pixel of the decoders; see `_vae.decoder_activations`."""

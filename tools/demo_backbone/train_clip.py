"""Train the demo extractor, a small CLIP model, on scenes and all captions that match them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from demo_backbone.data import Pictures, draw_captions
from demo_backbone.scenes import WORDS, Scene
from demo_backbone.train_unet import tokenize
from demo_backbone.train_vae import to_tensor

SIDE = 64  # pixels, image input
WIDTH = 128
BATCH = 192
CAPTIONS = 12  # per scene
LEARNING_RATE = 1e-3
MEAN = STD = (0.5, 0.5, 0.5)
ATTRIBUTES = {word: name for name, words in WORDS.items() for word in words}
"""Attribute of each word in captions."""
BITS = {name: 1 << bit for bit, name in enumerate([*WORDS, "clouds", "stars", "trees", "sun", "moon"])}


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained model: 64 patches of 8x8 px, 4 layers of width 128; 2 text layers."""
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    text = {
        **tower,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "num_hidden_layers": 4, "image_size": SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def new_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Return a processor that resizes squares to 64x64 px."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=MEAN, image_std=STD
    )
    return CLIPProcessor(images, tokenizer)


def shows(scene: Scene, text: str) -> bool:
    """Return whether a scene contains everything in a caption."""
    return not _named(text) & ~_contents(scene)


def fitting(scenes: list[Scene], texts: list[str]) -> Tensor:
    """Return which captions match which scenes, [scenes, texts] of 0 and 1."""
    there, named = np.array([_contents(scene) for scene in scenes]), np.array([_named(text) for text in texts])
    return torch.from_numpy(((named[None] & ~there[:, None]) == 0).astype(np.float32))


def _contents(scene: Scene) -> int:
    """Return a bit mask of the attributes of a scene."""
    things = {"clouds": scene.clouds, "stars": scene.stars, "trees": scene.trees}
    things["moon" if scene.time == "night" else "sun"] = scene.sun
    names = [scene.time, scene.far, scene.ground, scene.horizon, *(name for name, there in things.items() if there)]
    return sum(BITS[name] for name in names)


def _named(text: str) -> int:
    """Return a bit mask of the attributes in a caption."""
    words = text.replace(",", "").split()
    return sum({BITS[ATTRIBUTES.get(word, word)] for word in words if ATTRIBUTES.get(word, word) in BITS})


@torch.no_grad()
def shrunk(images: np.ndarray, vae: AutoencoderKL | None, device: torch.device) -> Tensor:
    """Resize images for the model, [N, 3, 64, 64] in -1..1, after a pass through the autoencoder if given."""
    parts = []
    for start in track(range(0, len(images), 64), description="resizing images"):
        part = images[start : start + 64]
        if vae is not None:
            decoded = vae(to_tensor(part, device)).sample.clamp(-1, 1).permute(0, 2, 3, 1)
            part = ((decoded + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in part]
        parts.append(np.stack([np.asarray(image) for image in small]))
    return to_tensor(np.concatenate(parts), torch.device("cpu")).contiguous()


def contrast(image_embeds: Tensor, text_embeds: Tensor, fits: Tensor, scale: Tensor) -> Tensor:
    """Return the cross entropy in both directions; embeddings [B, D], `fits` [B, B] image to matching captions."""
    logits = scale.exp().clamp(max=100) * nn.functional.normalize(image_embeds) @ nn.functional.normalize(text_embeds).T

    def one_way(logits: Tensor, fits: Tensor) -> Tensor:
        targets = fits / fits.sum(1, keepdim=True)
        return -(targets * logits.log_softmax(1)).sum(1).mean()

    return (one_way(logits, fits) + one_way(logits.T, fits.T)) / 2


def train_clip(
    pictures: Pictures, vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int, device: torch.device, seed: int
) -> CLIPModel:
    """Trains on drawn pictures, half of them as the autoencoder shows them, with fresh captions of their scenes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 3))
    seen = torch.cat((shrunk(pictures.images, None, device), shrunk(pictures.images, vae, device)))
    captions = draw_captions(pictures.scenes, CAPTIONS, seed, corrupt=False)
    model = new_clip(tokenizer).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    for step in track(range(steps), description="CLIP"):
        rate = min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * max(rate, 0.01)
        chosen = rng.integers(0, len(pictures.scenes), BATCH)
        scenes = [pictures.scenes[index] for index in chosen]
        texts = [captions[index][int(rng.integers(CAPTIONS))] for index in chosen]
        fits = fitting(scenes, texts).to(device)
        images = seen[chosen + len(pictures.scenes) * rng.integers(0, 2, BATCH)].to(device)
        images = images + 0.02 * torch.randn_like(images)
        image_embeds = model.visual_projection(model.vision_model(images).pooler_output)
        text_embeds = model.text_projection(model.text_model(tokenize(tokenizer, texts).to(device)).pooler_output)
        loss = contrast(image_embeds, text_embeds, fits, model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"CLIP step {step + 1}: loss {float(loss.detach()):.3f}", flush=True)
    return model.eval()


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save in transformers layout, in float16 (half the file size; it is loaded in float32)."""
    model.half().save_pretrained(folder)
    new_processor(tokenizer).save_pretrained(folder)
    model.float()


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures, table: dict, name: str) -> float:
    """Return the accuracy of zero-shot classification of attribute `name` with the values in `table`."""
    texts = [{"ground": f"a {value}", "time": f"a landscape at {value}", "horizon": f"a landscape, {value} horizon"}
             .get(name, value) for value in table]  # fmt: skip
    device = model.device
    words = model.text_projection(model.text_model(tokenize(tokenizer, texts).to(device)).pooler_output)
    seen = shrunk(pictures.images, None, device).to(device)
    shown = model.visual_projection(model.vision_model(seen).pooler_output)
    nearest = (nn.functional.normalize(shown) @ nn.functional.normalize(words).T).argmax(1).tolist()
    return float(np.mean([list(table)[at] == getattr(s, name) for at, s in zip(nearest, pictures.scenes, strict=True)]))

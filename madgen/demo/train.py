"""Trains the demo backbone from nothing: `python -m madgen.demo.train FOLDER`.

Draws the scenes, fits the autoencoder, caches the latents, then fits UNet and text encoder on them. FOLDER becomes an
ordinary diffusers pipeline folder. `--clip` names a folder for a small CLIP, which scores what the backbone draws.
Seeded; hours on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from madgen.demo.data import Pictures, render
from madgen.demo.scenes import FARS, GROUNDS, HORIZONS, TIMES, vocabulary
from madgen.demo.tokenizer import build_tokenizer
from madgen.demo.train_clip import retrieval, save_clip, train_clip
from madgen.demo.train_unet import new_scheduler, train_denoiser
from madgen.demo.train_vae import encode, psnr, train_autoencoder


def main(arguments: list[str] | None = None) -> None:
    """Command line: see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m madgen.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the diffusers pipeline goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenes", type=int, default=12000, help="training pictures")
    parser.add_argument("--vae-steps", type=int, default=6600)
    parser.add_argument("--unet-steps", type=int, default=4400)
    parser.add_argument("--keep-vae", action="store_true", help="use the autoencoder that is in FOLDER already")
    parser.add_argument("--improve-vae", action="store_true", help="go on with the autoencoder in FOLDER")
    parser.add_argument("--clip", type=Path, help="where a small CLIP goes; none is trained without")
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--keep-backbone", action="store_true", help="train nothing but the CLIP")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute to start, then faster")
    options = parser.parse_args(arguments)
    pictures = render(options.scenes, options.seed)
    if not options.keep_backbone:
        _train_backbone(options, pictures)
    if options.clip is not None:
        _train_extractor(options, pictures)


def _train_backbone(options: argparse.Namespace, pictures: Pictures) -> None:
    device, start = torch.device(options.device), None
    if options.keep_vae or options.improve_vae:
        start = AutoencoderKL.from_pretrained(options.folder / "vae", use_safetensors=True).to(device)
    if start is None or options.improve_vae:
        start = train_autoencoder(pictures.images, options.vae_steps, device, options.seed, options.compile, start)
        start.save_pretrained(options.folder / "vae")
    vae = start.eval()
    held_out = render(256, options.seed, held_out=True)
    print(f"autoencoder: PSNR {psnr(vae, held_out.images, device):.2f} dB on 256 held-out scenes", flush=True)

    tokenizer = build_tokenizer(vocabulary(), options.folder / "tokenizer")
    latents = encode(vae, pictures.images, device)
    unet, text_encoder = train_denoiser(
        latents, pictures.scenes, tokenizer, options.unet_steps, device, options.seed, options.compile
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half(),  # halves the file; it is loaded in float32 all the same
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(options.folder, safe_serialization=True)
    _forget_paths(options.folder)


def _train_extractor(options: argparse.Namespace, pictures: Pictures) -> None:
    device = torch.device(options.device)
    vae = AutoencoderKL.from_pretrained(options.folder / "vae", use_safetensors=True).to(device).eval()
    options.clip.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocabulary(), options.clip)
    clip = train_clip(pictures, vae, tokenizer, options.clip_steps, device, options.seed)
    held_out = render(256, options.seed, held_out=True)
    tables: dict[str, dict] = {"time": TIMES, "far": FARS, "ground": GROUNDS, "horizon": HORIZONS}
    for name, table in tables.items():
        print(f"CLIP: {100 * retrieval(clip, tokenizer, held_out, table, name):.0f} % of held-out scenes: {name}")
    save_clip(clip, tokenizer, options.clip)
    _forget_paths(options.clip)


def _forget_paths(folder: Path) -> None:
    """diffusers notes where a part was loaded from: a path of the machine that trained it."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()

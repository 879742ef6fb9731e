"""Train the demo backbone from scratch: `PYTHONPATH=tools python -m demo_backbone.train FOLDER --device cuda`.

Renders scenes, trains the autoencoder, caches latents, then trains UNet and text encoder. FOLDER becomes a diffusers
pipeline folder. `--clip` is a folder for a small CLIP model, for scores. Seeded; takes minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from demo_backbone.arguments import new_parser
from demo_backbone.data import Pictures, draw_captions, render
from demo_backbone.pace import Pace
from demo_backbone.scenes import FARS, GROUNDS, HORIZONS, TIMES, vocabulary
from demo_backbone.tokenizer import build_tokenizer
from demo_backbone.train_clip import retrieval, save_clip, train_clip
from demo_backbone.train_unet import new_scheduler, tokenize, train_denoiser
from demo_backbone.train_vae import encode, psnr, train_autoencoder

CAPTIONS = 12  # per scene
CLIP_SCENES = 16_384


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    pictures = render(options.scenes, options.seed)
    if not options.keep_backbone:
        _train_backbone(options, pictures)
    if options.clip is not None:
        _train_extractor(options, pictures)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--held-out", type=int, default=256, help="scenes to evaluate the models on")
    for part, steps, batch in (("vae", 12_000, 192), ("unet", 12_000, 1024)):
        parser.add_argument(f"--{part}-steps", type=int, default=steps)
        parser.add_argument(f"--{part}-batch", type=int, default=batch)
        parser.add_argument(f"--{part}-seconds", type=float, default=math.inf)
    parser.add_argument("--keep-vae", action="store_true", help="use the autoencoder in FOLDER")
    parser.add_argument("--improve-vae", action="store_true", help="continue training the autoencoder in FOLDER")
    parser.add_argument("--clip", type=Path, help="folder for a small CLIP model (default: not trained)")
    parser.add_argument("--clip-steps", type=int, default=1500)
    parser.add_argument("--keep-backbone", action="store_true", help="train only the CLIP model")
    return parser.parse_args(arguments)


def _train_backbone(options: argparse.Namespace, pictures: Pictures) -> None:
    device, start = torch.device(options.device), None
    if options.keep_vae or options.improve_vae:
        start = AutoencoderKL.from_pretrained(options.folder / "vae", use_safetensors=True).to(device)
    if start is None or options.improve_vae:
        pace = Pace(options.vae_steps, options.vae_seconds)
        start = train_autoencoder(pictures.images, pace, options.vae_batch, device, options.seed, start)
        start.save_pretrained(options.folder / "vae")
    vae = start.eval()
    held_out = render(options.held_out, options.seed, held_out=True)
    quality = psnr(vae, held_out.images, device)
    print(f"autoencoder: PSNR {quality:.2f} dB on {options.held_out} held-out scenes", flush=True)

    tokenizer = build_tokenizer(vocabulary(), options.folder / "tokenizer")
    latents = encode(vae, pictures.images, device)
    token_ids = _token_ids(tokenizer, draw_captions(pictures.scenes, CAPTIONS, options.seed, corrupt=True))
    pace = Pace(options.unet_steps, options.unet_seconds)
    unet, text_encoder = train_denoiser(latents, token_ids, tokenizer, pace, options.unet_batch, device, options.seed)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(vocabulary(), options.folder / "tokenizer"),  # the one in use has a padding state
        unet=unet.half(),  # half the file size; it is loaded in float32
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(options.folder, safe_serialization=True)
    _remove_paths(options.folder)


def _token_ids(tokenizer: CLIPTokenizer, captions: list[list[str]]) -> torch.Tensor:
    """Tokenize K captions of each of N scenes, [N, K, model_max_length]."""
    flat = tokenize(tokenizer, [text for texts in captions for text in texts])
    return flat.reshape(len(captions), -1, flat.shape[-1])


def _train_extractor(options: argparse.Namespace, pictures: Pictures) -> None:
    device = torch.device(options.device)
    vae = AutoencoderKL.from_pretrained(options.folder / "vae", use_safetensors=True).to(device).eval()
    options.clip.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocabulary(), options.clip)
    clip = train_clip(
        Pictures(pictures.images[:CLIP_SCENES], pictures.scenes[:CLIP_SCENES]),
        vae,
        tokenizer,
        options.clip_steps,
        device,
        options.seed,
    )
    held_out = render(options.held_out, options.seed, held_out=True)
    tables: dict[str, dict] = {"time": TIMES, "far": FARS, "ground": GROUNDS, "horizon": HORIZONS}
    for name, table in tables.items():
        print(f"CLIP: {100 * retrieval(clip, tokenizer, held_out, table, name):.0f} % of held-out scenes: {name}")
    save_clip(clip, build_tokenizer(vocabulary(), options.clip), options.clip)  # without padding state
    _remove_paths(options.clip)


def _remove_paths(folder: Path) -> None:
    """Remove the paths that diffusers records in configs."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Train the demo transformer: `PYTHONPATH=tools python -m demo_backbone.train_transformer FOLDER --device cuda`.

A small FLUX.1 transformer on the autoencoder and the text encoder of the packaged demo backbone: flow matching first,
then distillation of classifier-free guidance into the embedded guidance scale, as in FLUX.1 [dev]. FOLDER becomes a
`FluxPipeline` folder. The same command resumes an interrupted training.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from demo_backbone.arguments import new_parser
from demo_backbone.data import draw_captions, render
from demo_backbone.pace import Pace
from demo_backbone.train_unet import tokenize
from demo_backbone.train_vae import encode
from madgen.demo import WEIGHTS

CAPTIONS = 8  # per scene
TEXT_TOKENS = 24
"""Tokens of a prompt; the longest caption has 22."""
ADAM_RATE, MUON_RATE = 2e-3, 3e-3
EMA_DECAY = 0.999
GUIDANCE = (1.0, 5.0)
"""Guidance scales to distill."""
LOCAL_KEYS = ("_name_or_path", "is_local", "local_files_only")
"""Keys of saved configs that tell where the parts were loaded from."""
SAVE_SECONDS = 120.0


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    parts = Parts(device)
    data = Data(*cached_data(options, parts), parts.text_encoder, device)
    torch.manual_seed(options.seed)
    training = Training(new_transformer().to(device), options.folder / "training.pt")
    print(f"transformer: {sum(p.numel() for p in training.model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(training, data, options)
    training.save()
    save_pipeline(options.folder, training.average, parts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--distill", type=float, default=0.15, help="share of the steps that distill guidance")
    parser.add_argument("--compile", action="store_true", help="torch.compile the single stream blocks")
    return parser.parse_args(arguments)


class Parts:
    """The frozen parts of the demo backbone."""

    def __init__(self, device: torch.device):
        self.vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae").to(device).eval()
        self.text_encoder = CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder").to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")


def cached_data(options: argparse.Namespace, parts: Parts) -> tuple[Tensor, Tensor]:
    """Return latents [N, 4, 16, 16] and token ids [N, K, L], from FOLDER if an earlier run left them there."""
    path = options.folder / "data.safetensors"
    if not path.exists():
        pictures = render(options.scenes, options.seed)
        captions = draw_captions(pictures.scenes, CAPTIONS, options.seed, corrupt=True)
        tokens = tokenize(parts.tokenizer, [text for texts in captions for text in texts])
        latents = encode(parts.vae, pictures.images, parts.vae.device)
        tokens = tokens.reshape(len(captions), CAPTIONS, -1).to(torch.int16)
        save_file({"latents": latents.contiguous(), "tokens": tokens}, path)
    stored = load_file(path)
    return stored["latents"], stored["tokens"]


def new_transformer() -> FluxTransformer2DModel:
    """Return an untrained transformer of 2 double and 4 single blocks; blocks start as the identity."""
    model = FluxTransformer2DModel(
        in_channels=16,  # 2x2 cells of 4 channels
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        pooled_projection_dim=96,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (name == "proj_out" or "norm" in name):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


@dataclass
class Batch:
    """Noisy packed latents [B, 64, 16], sigmas [B], velocities, and the prompts' embeddings."""

    noisy: Tensor
    sigma: Tensor
    velocity: Tensor
    hidden: Tensor
    pooled: Tensor


class Data:
    """Draw training batches; all data stays on the device."""

    def __init__(self, latents: Tensor, tokens: Tensor, text_encoder: CLIPTextModel, device: torch.device):
        self.latents = FluxPipeline._pack_latents(latents, len(latents), *latents.shape[1:]).to(device)
        self.tokens, self.text_encoder = tokens[..., :TEXT_TOKENS].to(device), text_encoder
        side = latents.shape[-1] // 2
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
        self.text_ids = torch.zeros(TEXT_TOKENS, 3, device=device)
        config = text_encoder.config
        empty = torch.tensor([[config.bos_token_id] + [config.eos_token_id] * (TEXT_TOKENS - 1)], device=device)
        self.empty = self.embed(empty)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states and pooled embeddings of token ids [B, L]."""
        output = self.text_encoder(tokens.int())
        return output.last_hidden_state, output.pooler_output

    def draw(self, batch: int) -> Batch:
        """Draw `batch` latents with captions, noise and logit-normal sigmas."""
        device = self.latents.device
        chosen = torch.randint(len(self.latents), (batch,), device=device)
        clean = self.latents[chosen]
        noise, sigma = torch.randn_like(clean), torch.sigmoid(torch.randn(batch, device=device))
        caption = torch.randint(self.tokens.shape[1], (batch,), device=device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        return Batch(noisy, sigma, noise - clean, *self.embed(self.tokens[chosen, caption]))

    def predict(self, model: nn.Module, batch: Batch, guidance: Tensor, *, empty: bool = False) -> Tensor:
        """Return the predicted velocity, for the captions or for the `empty` prompt."""
        hidden, pooled = batch.hidden, batch.pooled
        if empty:
            hidden, pooled = (each.expand(len(hidden), *each.shape[1:]) for each in self.empty)
        with torch.autocast(hidden.device.type, torch.bfloat16), attention_for(hidden.device):
            velocity: Tensor = model(
                hidden_states=batch.noisy,
                timestep=batch.sigma,
                guidance=guidance,
                pooled_projections=pooled.contiguous(),
                encoder_hidden_states=hidden.contiguous(),
                txt_ids=self.text_ids,
                img_ids=self.image_ids,
                return_dict=False,
            )[0]
        return velocity.float()


def attention_for(device: torch.device) -> object:
    """Return the context of the fastest attention: fused attention trains slowly on CPUs in bfloat16."""
    return sdpa_kernel([SDPBackend.MATH] if device.type == "cpu" else list(SDPBackend.__members__.values()))


def flow_loss(model: nn.Module, data: Data, size: int) -> Tensor:
    """Return the flow-matching loss at guidance scale 1."""
    batch = data.draw(size)
    return (data.predict(model, batch, torch.ones_like(batch.sigma)) - batch.velocity).square().mean()


def distillation_loss(model: nn.Module, teacher: nn.Module, data: Data, size: int) -> Tensor:
    """Return the distance to the teacher's velocity under classifier-free guidance, for random scales."""
    batch = data.draw(size)
    one = torch.ones_like(batch.sigma)
    guidance = torch.empty_like(one).uniform_(*GUIDANCE)
    with torch.no_grad():
        text, empty = data.predict(teacher, batch, one), data.predict(teacher, batch, one, empty=True)
        target = torch.lerp(empty, text, guidance[:, None, None])
    return (data.predict(model, batch, guidance) - target).square().mean()


class Training:
    """Model, average, teacher and optimizers, resumed from `path` if it exists."""

    def __init__(self, model: FluxTransformer2DModel, path: Path):
        self.model, self.path, self.step = model, path, 0
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.teacher: FluxTransformer2DModel | None = None
        blocks = {id(p) for name, p in model.named_parameters() if "transformer_blocks" in name and p.ndim == 2}
        matrices = [p for p in model.parameters() if id(p) in blocks]
        others = [p for p in model.parameters() if id(p) not in blocks]
        self.optimizers = {
            MUON_RATE: torch.optim.Muon(matrices, MUON_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            ADAM_RATE: torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.99), weight_decay=0.0),
        }
        if path.exists():
            self._load(torch.load(path, map_location=next(model.parameters()).device, weights_only=True))

    def update(self, loss: Tensor, rate: float) -> None:
        """Take a step with learning rates times `rate`, and move the average."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, error_if_nonfinite=True)
        for learning_rate, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def start_distillation(self) -> None:
        """Freeze a copy of the average as the teacher."""
        self.teacher = copy.deepcopy(self.average)

    def save(self) -> None:
        """Write a checkpoint; an interrupted write leaves the previous one."""
        state = {"step": self.step, "model": self.model.state_dict(), "average": self.average.state_dict()}
        state["teacher"] = None if self.teacher is None else self.teacher.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers.values()]
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def _load(self, state: dict) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        if state["teacher"] is not None:
            self.start_distillation()
            self.teacher.load_state_dict(state["teacher"])
        for optimizer, stored in zip(self.optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)


def train(training: Training, data: Data, options: argparse.Namespace) -> None:
    """Train until `--steps`; the last `--distill` of them distill guidance."""
    if options.compile:
        # Gradients of compiled double blocks are not finite on CPUs in bfloat16 (PyTorch 2.15, keys of the image).
        for block in training.model.single_transformer_blocks:
            block.compile()
    pace = Pace(options.steps, step=training.step)
    distilled = round(options.steps * (1 - options.distill))
    saved, losses = time.monotonic(), []
    torch.manual_seed(options.seed + 1 + training.step)
    for step in pace:
        if step >= distilled and training.teacher is None:
            training.start_distillation()
        if training.teacher is None:
            loss = flow_loss(training.model, data, options.batch)
        else:
            loss = distillation_loss(training.model, training.teacher, data, options.batch)
        training.update(loss, pace.rate(hold=0.5))
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"transformer step {step + 1}, {time.monotonic() - pace.started:.0f} s: "
                  f"loss {sum(losses) / len(losses):.4f}", flush=True)  # fmt: skip
            losses.clear()
        if time.monotonic() - saved > SAVE_SECONDS:
            training.save()
            saved = time.monotonic()


def save_pipeline(folder: Path, transformer: FluxTransformer2DModel, parts: Parts) -> None:
    """Write a `FluxPipeline` folder in half precision, half the file size."""
    short = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", model_max_length=TEXT_TOKENS)
    text_encoder, vae = copy.deepcopy(parts.text_encoder).half(), copy.deepcopy(parts.vae).half()
    vae.register_to_config(shift_factor=0.0)  # as FluxPipeline expects
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=parts.tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=short,
        transformer=copy.deepcopy(transformer).half(),
    ).save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in LOCAL_KEYS}
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

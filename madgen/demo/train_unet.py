"""The demo UNet and its text encoder: trained together on cached latents, with v-prediction and EMA."""

from __future__ import annotations

import copy
import math
import string

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from madgen.demo.scenes import Scene, caption

LEARNING_RATE = 1e-3
BATCH = 32
EMA_DECAY = 0.999
EMPTY_CAPTIONS = 0.1  # share of captions dropped, for classifier-free guidance
UNKNOWN_WORDS = 0.15  # share of captions with a meaningless word, so that free prompts do no harm
TEXT_WIDTH = 96


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model of 2 layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Untrained; attention at 16x16 and 8x8 cells, a plain block at 4x4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def new_scheduler() -> DDIMScheduler:
    """The linear schedule ends in almost pure noise, so that night pictures become as dark as they should."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


class _Loss(nn.Module):
    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, token_ids: Tensor, velocity: Tensor) -> Tensor:
        hidden = self.text_encoder(token_ids)[0]
        predicted = self.unet(noisy, timesteps, encoder_hidden_states=hidden, return_dict=False)[0]
        return (predicted.float() - velocity).square().mean()


def train_denoiser(
    latents: Tensor,
    scenes: list[Scene],
    tokenizer: CLIPTokenizer,
    steps: int,
    device: torch.device,
    seed: int,
    compiled: bool = False,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Trains on scaled latents [N, 4, 16, 16] and fresh captions of their scenes; returns the averaged weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 2))
    noise_generator = torch.Generator().manual_seed(seed)
    scheduler = new_scheduler()
    text_encoder = new_text_encoder(tokenizer)
    model = _Loss(new_unet(), text_encoder).to(device).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    objective = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    running = 1.0
    for step in track(range(steps), description="denoiser"):
        decay = 0.5 * (1 + math.cos(math.pi * max(0.0, step / steps - 0.3) / 0.7))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 200) * max(decay, 0.01)
        chosen = rng.integers(0, len(latents), BATCH)
        clean = latents[chosen]
        token_ids = tokenize(tokenizer, [training_caption(scenes[index], rng) for index in chosen])
        timesteps = torch.randint(0, 1000, (BATCH,), generator=noise_generator)
        noise = torch.randn(clean.shape, generator=noise_generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        velocity = scheduler.get_velocity(clean, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(*(tensor.to(device) for tensor in (noisy, timesteps, token_ids, velocity)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _move_average(average, model, min(EMA_DECAY, (1 + step) / (10 + step)))
        running += 0.02 * (loss.item() - running)
        if step % 100 == 0:
            print(f"denoiser step {step} loss {running:.4f}", flush=True)
    return average.unet.eval(), average.text_encoder.eval()


@torch.no_grad()
def _move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - decay)


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of the scene, now and then empty, or with a word that means nothing."""
    if rng.random() < EMPTY_CAPTIONS:
        return ""
    words = caption(scene, rng).split(" ")
    if rng.random() < UNKNOWN_WORDS:
        nonsense = "".join(rng.choice(list(string.ascii_lowercase), int(rng.integers(3, 9))))
        words.insert(int(rng.integers(0, len(words) + 1)), nonsense)
    return " ".join(words)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, model_max_length]."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids

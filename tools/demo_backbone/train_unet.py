"""Train the demo UNet and text encoder jointly on cached latents, with v-prediction and EMA."""

from __future__ import annotations

import copy
from functools import partial

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo_backbone.pace import Pace

LEARNING_RATE = 1.2e-3
EMA_DECAY = 0.999
TEXT_WIDTH = 96


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIP text model of 2 layers."""
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
    """Return an untrained UNet with attention at 16x16 and 8x8 cells."""
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
    """Return a linear schedule; it ends in almost pure noise, which dark images such as nights need."""
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
    token_ids: Tensor,
    tokenizer: CLIPTokenizer,
    pace: Pace,
    batch: int,
    device: torch.device,
    seed: int,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train on scaled latents [N, 4, 16, 16] and K tokenized captions of each [N, K, L]; return averaged weights.

    All data stays on the device, so that steps never wait for transfers.
    """
    torch.manual_seed(seed)
    scheduler = new_scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    model = _Loss(new_unet(), new_text_encoder(tokenizer)).to(device)
    model = model.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    latents, token_ids = latents.to(device), token_ids.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=device.type == "cuda"
    )
    draw = partial(torch.randint, generator=generator, device=device)
    for step in pace:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * pace.rate(hold=0.3)
        chosen, which = draw(len(latents), (batch,)), draw(token_ids.shape[1], (batch,))
        clean, timesteps = latents[chosen], draw(1000, (batch,))
        noise = torch.randn(clean.shape, generator=generator, device=device)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        velocity = scheduler.get_velocity(clean, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(noisy, timesteps, token_ids[chosen, which], velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _move_average(average, model, min(EMA_DECAY, (1 + step) / (10 + step)))
        if step % 200 == 0:
            pace.report("denoiser", f"loss {loss.item():.4f}")
    return average.unet.eval(), average.text_encoder.eval()


@torch.no_grad()
def _move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token ids [B, model_max_length]."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids

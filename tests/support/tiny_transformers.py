"""Tiny pipelines of diffusers' own classes with random weights: FLUX.2 [klein], Z-Image and Qwen-Image."""

import json
import shutil
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "user assistant system mountains over the sea a city skyline at night forest blurry describe image by"


def qwen_tokenizer():
    """Return a byte-level tokenizer of a few words with Qwen's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([WORDS, *(f" {word}" for word in WORDS.split()), *WORDS.split()] * 4, trainer)
    tokenizer = Qwen2TokenizerFast(tokenizer_object=raw, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(tokenizer, layers: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=12, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def lively(network):
    """Make weights of attention and modulation large, so that attention and positions matter."""
    generator = torch.Generator().manual_seed(1)
    for name, value in network.named_parameters():
        if "norm" in name and value.ndim == 1:
            value.data = 1 + 0.3 * torch.randn(value.shape, generator=generator)
        elif (value.ndim > 1 and ".attn" in name) or "attention.to" in name or "mod" in name:
            value.data *= 3
        elif "pad_token" in name or value.abs().max() == 0:
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    return network.eval()


def kl_vae(channels: int):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=channels, sample_size=32,
        scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def build_flux2(folder: Path, distilled: bool = False) -> Path:
    """Save a FLUX.2 [klein]: 2 double and 2 single blocks, 4 latent channels of 2 px, packed 2x2."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.randn(16) * 0.5)
    vae.bn.running_var.copy_(torch.rand(16) * 2 + 0.5)
    network = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=36, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False, timestep_guidance_channels=32,
    )  # fmt: skip
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae.eval(), tokenizer=tokenizer,
        text_encoder=qwen3(tokenizer, 27).eval(), transformer=lively(network), is_distilled=distilled,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_z_image(folder: Path) -> Path:
    """Save a Z-Image: a refiner of the noise, one of the prompt, and 3 layers; 4 latent channels of 2 px."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    network = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[8, 8, 8], axes_lens=[256, 64, 64],
    )  # fmt: skip
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_vae(4).eval(), tokenizer=tokenizer,
        text_encoder=qwen3(tokenizer, 2).eval(), transformer=lively(network),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def build_qwen_image(folder: Path) -> Path:
    """Save a Qwen-Image: 3 double blocks, a video VAE of 4 latent channels of 2 px."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.2, 0.8, 2.0, 1.5],
    )  # fmt: skip
    network = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    text = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
                "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16,
            },
        )
    )  # fmt: skip
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
        ),
        vae=vae.eval(), tokenizer=tokenizer, text_encoder=text.eval(), transformer=lively(network),
    ).save_pretrained(folder)  # fmt: skip
    return folder


GOLDEN = Path(__file__).parents[1] / "parity" / "golden" / "dit"
BUILDERS = {
    "flux2": build_flux2,
    "flux2-distilled": lambda folder: build_flux2(folder, distilled=True),
    "z_image": build_z_image,
    "qwen_image": build_qwen_image,
}
FAMILIES = ["flux", "sd3", "flux2", "z_image", "qwen_image"]
FOLDERS = TemporaryDirectory(prefix="tiny-transformers-")


@lru_cache
def folder_of(name: str) -> Path:
    """Return the folder of a tiny pipeline, which is built when it is first needed."""
    if name in ("flux", "sd3"):
        return GOLDEN / {"flux": "tiny-flux-dev", "sd3": "tiny-sd3"}[name]
    return BUILDERS[name](Path(FOLDERS.name) / name)


@lru_cache
def pipeline_of(name: str):
    """Return a tiny pipeline in diffusers."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder_of(name))


RUN = {"height": 32, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.0, "seeds": [5]}


SAMPLERS = {}


def sampler(name, **options):
    """Return a sampler; those with the same options are loaded once."""
    key = f"{name} {sorted(options.items())}"
    if key not in SAMPLERS:
        SAMPLERS[key] = load(name, **options)
    return SAMPLERS[key]


def load(name, *, mad_steps=2, view_size=16, stride=4, **options):
    from madgen import PanoramaSampler

    loaded = PanoramaSampler.from_pretrained(
        str(folder_of(name)),
        name=name,
        view_size=view_size,
        stride=stride,
        mad_steps=mad_steps,
        dtype="float32",
        **options,
    )
    loaded.backbone.max_sequence_length = 256 if name == "qwen_image" else 16  # faster; Qwen-Image's template is long
    return loaded


def latents(made, prompts=("mountains over the sea",), **options):
    return made.sample(list(prompts), output="latent", **{**RUN, **options})


def error(ours, reference):
    return float((ours - reference).norm() / reference.norm())


def without_guidance(folder):
    shutil.copytree(folder_of("flux"), folder)
    config = folder / "transformer/config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"guidance_embeds": False}), encoding="utf-8"
    )
    return folder

"""`backbone`: the pretrained diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, field

from madgen.config.schema.checks import check, check_one_of

UNETS = ("sd", "sdxl")
"""Backbones that predict noise with a UNet; the others are flow-matching transformers."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter to fuse into the weights."""

    weights: str
    """A `.safetensors` file, a folder that contains one, or a Hugging Face Hub id."""
    scale: float = 1.0
    """Factor of the LoRA's weights: 1 is full strength, 0 has no effect, negative values invert it."""

    def __post_init__(self) -> None:
        check(self.weights != "", "backbone.loras: weights is empty")
        check(abs(self.scale) < float("inf"), f"backbone.loras: scale must be a finite number, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The pretrained diffusion model."""

    name: str = "sd"
    """Model family, a module of `madgen/backbones/`: `sd` (Stable Diffusion 1.x and 2.x, latent consistency models),
    `sdxl` (Stable Diffusion XL), `sd3` (Stable Diffusion 3 and 3.5), `flux` (FLUX.1),
    `flux2` (FLUX.2 [klein]), `z_image` (Z-Image) or `qwen_image` (Qwen-Image)."""
    pretrained: str = "demo"
    """Weights: `demo` (a small model that is part of madgen), a diffusers folder, a Hugging Face Hub id, or a single
    `.safetensors` file in the original layout."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository; null is its default branch."""
    variant: str | None = None
    """Variant of the weight files, such as `fp16`; null is the files without a variant."""
    config: str | None = None
    """For a single `.safetensors` file: folder or Hub id of a pipeline that provides the model configs and tokenizers.
    null lets diffusers infer it from the file, which needs the Hub or its local cache."""
    loras: list[LoraConfig] = field(default_factory=list)  # OmegaConf does not validate the items of a tuple
    """LoRAs to fuse into the weights, each multiplied by its scale."""
    prediction_type: str | None = None
    """What the network predicts: `epsilon`, `v_prediction` or `sample`. null is what the scheduler's config and the
    marks of a single file say; if they contradict each other, the job is refused until it is set."""
    accept_licence: bool = False
    """Set to true if you comply with the licence of weights that restricts training on their pictures, such as FLUX.1
    [dev]; such weights are refused otherwise."""
    dtype: str = "auto"
    """Precision: `float32`, `bfloat16` or `float16`; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    compile: bool = False
    """Compile the UNet and the decoder with `torch.compile`. Sampling is faster after a warm-up of some minutes for
    each panorama size; pixels may differ in the last bits."""
    cuda_graphs: bool = True
    """Replay UNet passes over few views (up to 32 views of 64x64 latent cells, with guidance) as CUDA graphs on NVIDIA
    GPUs. Faster, at the cost of memory; pixels do not change."""
    offload: str = "none"
    """Models of a transformer that leave the GPU while they are not used: `none`; `text_encoders`, which run once for
    the distinct prompts of a shard and then make room; `model`: only the model that runs is on the GPU (diffusers' CPU
    offload, slower). Pixels do not change."""
    max_sequence_length: int | None = None
    """Number of tokens that the text encoder of a transformer reads, > 0; longer prompts are truncated. null is
    the default of the diffusers pipeline: 256 for Stable Diffusion 3, 512 for others. Must be null for UNets."""
    quantization: str | None = None
    """Precision of a transformer's weights, to save memory: `int8` or `fp8` (torchao), or `nf4` (bitsandbytes, 4 bits,
    NVIDIA GPUs); null is `dtype`. Pixels change. Needs `pip install 'madgen[quant]'`; not possible with LoRAs or single
    files."""

    def __post_init__(self) -> None:
        check_one_of("backbone.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        check_one_of("backbone.offload", self.offload, ("none", "text_encoders", "model"))
        length = self.max_sequence_length
        check(length is None or length > 0, f"backbone.max_sequence_length must be > 0 tokens or null, got {length}")
        if self.quantization is not None:
            check_one_of("backbone.quantization", self.quantization, ("nf4", "int8", "fp8"))
            check(
                not self.loras,
                f"backbone.quantization={self.quantization} is not possible with backbone.loras, which cannot be fused "
                "into quantized weights; set it to null",
            )
        if self.prediction_type is not None:
            check_one_of("backbone.prediction_type", self.prediction_type, ("epsilon", "v_prediction", "sample"))

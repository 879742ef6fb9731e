"""`backbone`: the pretrained diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, field

from madgen.config.schema.checks import changed, check, check_one_of

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
class ControlNetConfig:
    """A ControlNet, which makes panoramas follow control pictures, such as edges or depth. For `sd` and `sdxl`. Each
    row of the prompts names its picture in the column `control`; it is resized to the panorama, and each view sees its
    part of it. Attention merges in the ControlNet as in the UNet."""

    weights: str | None = None
    """A diffusers folder, a Hugging Face Hub id or a single `.safetensors` file. null: no ControlNet."""
    scale: float = 1.0
    """Factor of what the ControlNet adds to the UNet: 1 is full strength, 0 has no effect."""
    start: float = 0.0
    """Share of the denoising steps before which the ControlNet does not act, 0..1."""
    end: float = 1.0
    """Share of the denoising steps after which the ControlNet does not act, `start` < `end` <= 1."""

    def __post_init__(self) -> None:
        check(self.weights != "", "backbone.controlnet.weights is empty; set it to null for no ControlNet")
        check(abs(self.scale) < float("inf"), f"backbone.controlnet.scale must be a finite number, got {self.scale}")
        check(
            0 <= self.start < self.end <= 1,
            f"backbone.controlnet: need 0 <= start < end <= 1 of the steps, got start={self.start}, end={self.end}",
        )

    def active_steps(self, steps: int) -> frozenset[int]:
        """Return those of the denoising steps in which it acts, as in diffusers; UserError if there are none."""
        inside = (step for step in range(steps) if step / steps >= self.start and (step + 1) / steps <= self.end)
        active = frozenset(inside)
        check(
            bool(active) or steps == 0,
            f"backbone.controlnet.start={self.start:g} and end={self.end:g} include none of {steps} steps; widen them, "
            "or remove the ControlNet",
        )
        return active


@dataclass(frozen=True, kw_only=True)
class IpAdapterConfig:
    """An IP-Adapter, which gives panoramas the style and content of a picture. For `sd` and `sdxl`. Each row of the
    prompts names its picture in the column `style`; all views of its panorama attend to the whole picture."""

    weights: str | None = None
    """A folder, a Hugging Face Hub id such as `h94/IP-Adapter`, or a `.safetensors` file. null: no IP-Adapter."""
    subfolder: str = ""
    """Folder of the file in `weights`, such as `models` or `sdxl_models`."""
    weight_name: str | None = None
    """Name of the `.safetensors` file in `subfolder`; null is the only one there. Needed for a Hub id."""
    image_encoder: str = "image_encoder"
    """Folder of the image encoder: its name in `subfolder`, or its path in `weights` with a `/`, such as
    `models/image_encoder`."""
    scale: float = 1.0
    """Weight of the picture beside the prompt: 0 has no effect."""

    def __post_init__(self) -> None:
        name = "backbone.ip_adapter"
        check(self.weights != "", f"{name}.weights is empty; set it to null for no IP-Adapter")
        check(self.image_encoder != "", f"{name}.image_encoder is empty; use for example image_encoder")
        check(abs(self.scale) < float("inf"), f"{name}.scale must be a finite number, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The pretrained diffusion model."""

    name: str = "sd"
    """Model family, a module of `madgen/backbones/`: `sd` (Stable Diffusion 1.x and 2.x, latent consistency models),
    `sdxl` (Stable Diffusion XL), `sd3` (Stable Diffusion 3 and 3.5), `flux` (FLUX.1),
    `flux2` (FLUX.2 [klein]), `z_image` (Z-Image) or `qwen_image` (Qwen-Image)."""
    pretrained: str = "demo"
    """Weights: a diffusers folder, a Hugging Face Hub id, a single `.safetensors` file in the original layout, or a
    small model that is part of madgen: `demo` (`name: sd`) or `demo-dit` (`name: flux`)."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository; null is its default branch."""
    variant: str | None = None
    """Variant of the weight files, such as `fp16`; null is the files without a variant."""
    config: str | None = None
    """For a single `.safetensors` file: folder or Hub id of a pipeline that provides the model configs and tokenizers.
    null lets diffusers infer it from the file, which needs the Hub or its local cache."""
    loras: list[LoraConfig] = field(default_factory=list)  # OmegaConf does not validate the items of a tuple
    """LoRAs to fuse into the weights, each multiplied by its scale."""
    controlnet: ControlNetConfig = field(default_factory=ControlNetConfig)
    ip_adapter: IpAdapterConfig = field(default_factory=IpAdapterConfig)
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
    gpu_memory: float | None = None
    """Memory of the GPU in GiB, > 0, such as 24 or 80. A job that needs more, with the smallest possible batches,
    is refused before anything is loaded. null, and on a CPU: not checked. Pixels do not change."""
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
        memory = self.gpu_memory
        check(
            memory is None or 0 < memory < float("inf"),
            f"backbone.gpu_memory must be a finite number > 0 (GiB) or null, got {memory}",
        )
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

    def check_adapters(self) -> None:
        """Raise UserError for a ControlNet or an IP-Adapter on a transformer, or with settings but no weights."""
        self.check_adapters_of_family()
        for key, adapter in self._adapters.items():
            for name, value in changed(adapter).items():
                check(
                    adapter.weights is not None,
                    f"backbone.{key}.{name}={value} has no effect; set backbone.{key}.weights",
                )

    def check_adapters_of_family(self) -> None:
        """Raise UserError for a ControlNet or an IP-Adapter on a transformer."""
        for key, adapter in self._adapters.items():
            check(
                adapter.weights is None or self.name in UNETS,
                f"backbone.{key} is not supported for backbone.name={self.name}; use {' or '.join(UNETS)}, "
                "or remove it",
            )

    @property
    def _adapters(self) -> dict[str, ControlNetConfig | IpAdapterConfig]:
        return {"controlnet": self.controlnet, "ip_adapter": self.ip_adapter}

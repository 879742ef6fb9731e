"""Shared by Stable Diffusion models with a UNet: joint attention and noise prediction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch

from madgen.backbones import BackboneSpec, Checkpoint
from madgen.backbones._backbone import PipelineBackbone
from madgen.backbones._conditioning import Conditioning, Control, Embedded
from madgen.backbones._controlnet import check_controlnet, load_controlnet
from madgen.backbones._ip_adapter import load_style_adapter
from madgen.backbones._loaded_pipeline import is_offloaded
from madgen.backbones._unet_family import UNetFamily, attention_of
from madgen.backbones.acceleration import cpu
from madgen.backbones.acceleration.cuda_graphs import MAX_CELLS, CudaCapture, Graphs
from madgen.backbones.acceleration.shared_prefix import SharedPrefix
from madgen.diffusion.attention import JointAttention, JointPass, JointStep, KeysValues, grids_of, keys_values
from madgen.diffusion.guidance import guidance_embedding
from madgen.diffusion.kernels import onednn
from madgen.utils.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


PLAIN_ATTENTION = {
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
}
"""Attention processors of UNets that compute the same function, each in its own way."""


@dataclass(frozen=True)
class _ControlInputs:
    """The inputs of a ControlNet's pass that the UNet does not have."""

    pixels: Tensor
    """Crops of the control pictures in 0..1, [N * V, 3, h * f, w * f]."""
    scale: float
    prompt: Mapping[str, KeysValues]
    """Keys and values of the prompts for each cross-attention layer."""


@dataclass(frozen=True)
class _Inputs:
    """All inputs of a UNet pass besides its weights."""

    views: Tensor
    timestep: Tensor
    hidden: Tensor
    embedded_guidance: Tensor | None
    conditions: dict[str, Tensor] | None
    joint: JointPass | None
    """None: the network's own attention."""
    control: _ControlInputs | None = None
    """Inputs of the ControlNet; None: it does not act."""


class UNetBackbone(UNetFamily, PipelineBackbone):
    """A Stable Diffusion model with a UNet. Subclasses embed prompts and provide further conditions of the UNet."""

    text_width_key = "cross_attention_dim"

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        # Such a VAE overflows in float16.
        upcast = dtype == torch.float16 and pipeline.vae.config.get("force_upcast", True)
        self.upcasts_vae = upcast and self.borrowed
        if upcast and not self.borrowed:
            pipeline.vae.float()
        super().__init__(pipeline, spec, dtype, device)
        self.unet = self.network
        self.tokenizers = tuple(getattr(pipeline, part) for part in self.tokenizer_parts)
        self.text_encoders = [self._frozen(getattr(pipeline, part)) for part in self.text_encoder_parts]
        self._convert = pipeline.maybe_convert_prompt
        self.attention = self._attending_jointly(self.unet)
        self.shared_prefix = SharedPrefix(self.unet, self.attention)
        self._negative: tuple[Any, Embedded] | None = None
        self.control_attention: dict[str, Any] = {}
        """Attention layers of the ControlNet, by name."""
        if (controlnet := pipeline.components.get("controlnet")) is not None:
            self.add_controlnet(controlnet)
        captures = self.device.type == "cuda" and not self.borrowed  # a borrowed model's weights may move
        self.graphs = Graphs(CudaCapture(self.device)) if captures else None

    @classmethod
    def load(cls, pretrained: str, **checkpoint: Unpack[Checkpoint]) -> Self:
        """Load a diffusers folder, a Hub id or a single file, and the ControlNet and the IP-Adapter."""
        backbone = super().load(pretrained, **checkpoint)
        if (weights := checkpoint.get("controlnet")) is not None:
            unet, factor = backbone.unet, backbone.spec.factor
            backbone.add_controlnet(load_controlnet(weights, unet, factor, backbone.dtype))
        if (files := checkpoint.get("ip_adapter")) is not None:
            adapter = load_style_adapter(backbone.pipeline, backbone.attention, files, backbone.dtype)
            for model in adapter.models:
                backbone._frozen(model)
            backbone.style_adapter = adapter
        return backbone

    def add_controlnet(self, network: Any) -> None:
        """Run a ControlNet beside the UNet in passes with control pictures. Raises UserError if it does not fit."""
        check_controlnet(network.config, self.unet.config, self.spec.factor, "the ControlNet")
        self.controlnet = self._frozen(network)
        self.control_attention = self._attending_jointly(network)

    @classmethod
    def check_quantization(cls, kind: str, pretrained: str) -> None:
        """Raise UserError: UNets are small."""
        raise UserError(f"backbone.quantization={kind} is not supported for UNets; set it to null")

    @classmethod
    def check_pipeline(cls, pipeline: Any) -> None:
        """Raise UserError for parts of a loaded pipeline that joint attention does not support."""
        unet, vae = pipeline.unet, pipeline.vae
        if unet.config.in_channels != vae.config.latent_channels:
            raise UserError(
                f"pipe: a UNet of {unet.config.in_channels} input channels is for inpainting or editing; load a "
                f"text-to-image checkpoint of {vae.config.latent_channels} channels"
            )
        if getattr(unet, "encoder_hid_proj", None) is not None:
            raise UserError("pipe: IP-Adapters are not supported; call pipe.unload_ip_adapter() first")
        _check_attention("unet", unet)
        controlnet = pipeline.components.get("controlnet")
        if controlnet is not None:
            if type(controlnet).__name__ != "ControlNetModel":
                raise UserError(f"pipe: {type(controlnet).__name__} is not supported; use a single ControlNetModel")
            if controlnet.dtype != unet.dtype:
                raise UserError(
                    f"pipe: the controlnet is in {controlnet.dtype}, the unet in {unet.dtype}; use one precision"
                )
            _check_attention("controlnet", controlnet)
        super().check_pipeline(pipeline)

    def _attending_jointly(self, network: Any) -> dict[str, Any]:
        """Install `JointAttention` in all attention layers; return them by name. UserError for unsupported ones."""
        for name, module in network.named_modules():
            extras = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "residual_connection")
            if hasattr(module, "to_q") and any(getattr(module, extra, None) for extra in extras):
                raise UserError(f"attention layer {name} normalises its inputs in a way that is not supported")
        if self.device.type == "cpu":
            cpu.prepare(network)
        layers = attention_of(network)
        for name, layer in layers.items():
            layer.processor = JointAttention(name, layer.processor)
        return layers

    @abstractmethod
    def embed(self, prompts: list[str]) -> Embedded:
        """Encode prompts in the UNet's dtype."""

    def embed_negative(self, prompts: list[str]) -> Embedded:
        """Encode negative prompts, including the empty one."""
        return self.embed(prompts)

    def view_conditions(
        self, conditioning: Conditioning, count: int, height: int, width: int
    ) -> dict[str, Tensor] | None:
        """Return additional conditions for [N * `count`] views of `height` x `width` cells."""
        return None

    def embed_paths(self, texts: Sequence[str], negative: bool) -> list[Embedded]:
        """Encode the prompts, or negative prompts, of a batch together."""
        return [self._embedded_negative(list(texts)) if negative else self.embed(list(texts))]

    def embedded_guidance(self, scales_B: Tensor) -> Tensor:
        """Return sinusoids of the guidance weight; diffusers' convention: a guidance scale of 1 is no guidance."""
        return guidance_embedding(scales_B - 1, self.unet.config.time_cond_proj_dim).to(self.device, self.dtype)

    def keys_values(self, hidden_NTD: Tensor) -> dict[str, KeysValues]:
        """Project the prompts; none if hooks load the weights of the layers when the UNet runs."""
        return self._projected(self.unet, self.attention, hidden_NTD)

    def _projected(self, network: Any, attention: Mapping[str, Any], hidden_NTD: Tensor) -> dict[str, KeysValues]:
        if self.borrowed and is_offloaded(network):
            return {}
        return {name: keys_values(layer, hidden_NTD) for name, layer in attention.items() if self.crosses(name)}

    def controlled(
        self,
        conditioning: Conditioning,
        canvases_P3HW: Tensor,
        panoramas: Sequence[int],
        scale: float,
        steps: Container[int],
    ) -> Conditioning:
        with torch.no_grad():
            projected = self._projected(self.controlnet, self.control_attention, conditioning.embeddings_NTD)
            canvases = canvases_P3HW.to(self.device, self.dtype)
            panoramas_N = conditioning.views(torch.tensor(panoramas, device=self.device))
            return replace(conditioning, control=Control(canvases, panoramas_N, scale, steps, projected))

    def styled(
        self, conditioning: Conditioning, pictures: Sequence[Any], panoramas: Sequence[int], scale: float
    ) -> Conditioning:
        with torch.no_grad():
            tokens_PTD, nothing_1TD = self.style_adapter.tokens(pictures)
            tokens_NTD = torch.cat([nothing_1TD.expand(conditioning.negatives, -1, -1), tokens_PTD[list(panoramas)]])
            style = self.style_adapter.project(tokens_NTD, self.attention)
            return replace(conditioning, style=style, style_scale=scale)

    def _embedded_negative(self, prompts: list[str]) -> Embedded:
        """Encode negative prompts, cached because most jobs use the same ones for all panoramas."""
        if self.borrowed:  # the caller may change the text encoder
            return self.embed_negative(prompts)
        key = (tuple(prompts), self.dtype)
        if self._negative is None or self._negative[0] != key:
            self._negative = key, self.embed_negative(prompts)
        return self._negative[1]

    def token_ids(self, tokenizer: Any, prompts: list[str]) -> Any:
        """Tokenize prompts, padded or truncated to full length; see `cut_text`."""
        length, prompts = tokenizer.model_max_length, self._convert(prompts, tokenizer)
        return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    def predict_noise(
        self,
        views_BVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        joint: JointStep | None = None,
        chunk_views: int | None = None,
    ) -> Tensor:
        """Predict the noise with guidance, float32 [B, V, C, h, w], in one UNet pass over all views of all paths."""
        views, run = conditioning.views(views_BVChw.to(self.dtype)), partial(self._pass, capture=chunk_views is None)
        return conditioning.guided(self.run_paths(run, views, timestep, conditioning, joint, chunk_views))

    @staticmethod
    def crosses(layer: str) -> bool:
        """Return whether a layer attends to the prompts; diffusers names the cross-attention of a block `attn2`."""
        return ".attn2." in layer

    def _pass(
        self,
        views_NVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        joint: JointStep | None,
        capture: bool,
    ) -> Tensor:
        """Run the UNet on some views of the conditioning's paths, float32 [N, V, C, h, w].

        `capture`: CUDA graphs are allowed.
        """
        paths, count, _, height, width = views_NVChw.shape
        embedded, size = conditioning.embedded_guidance_BD, (count, height, width)
        if size not in conditioning.conditions:
            conditioning.conditions[size] = self.view_conditions(conditioning, *size)
        inputs = _Inputs(
            views_NVChw.flatten(0, 1),
            timestep,
            conditioning.embeddings_NTD,
            None if embedded is None else embedded.repeat_interleave(count, 0),
            conditioning.conditions[size],
            None if joint is None else self._joint_pass(joint, conditioning),
            None if joint is None else self._control_inputs(joint, conditioning.control, count),
        )
        # Gradients and a temporary float32 need the network as it is, and so do passes without a step.
        as_loaded = joint is not None and self.dtype == self.loaded_dtype and not torch.is_grad_enabled()
        network = self.compiled if as_loaded and self.compiled is not None else self.unet
        if as_loaded and capture and self.graphs is not None and paths * count * height * width <= MAX_CELLS:
            noise = self.graphs(partial(self._run, network), network, inputs)
        else:
            noise = self._run(network, inputs)
        return noise.unflatten(0, (paths, count))

    def _joint_pass(self, joint: JointStep, conditioning: Conditioning) -> JointPass:
        merged = self.merged_at(joint)
        halved = conditioning.paths == 2 * conditioning.negatives  # each prompt has a negative one, on the same views
        return JointPass(
            conditioning.paths,
            conditioning.keys_values,
            merged,
            grids_of(joint.views, self.device) if merged else {},
            self.shared_prefix.layer if halved else None,
            conditioning.style,
            conditioning.style_scale,
            self.device.type == "cpu" and onednn.is_faster_in_attention(),
        )

    def _control_inputs(self, joint: JointStep, control: Control | None, count: int) -> _ControlInputs | None:
        """Return what the ControlNet needs for `count` views; None in steps in which it does not act."""
        if control is None or joint.step not in control.steps:
            return None
        crops = control.crops(joint.views, self.spec.factor)
        chosen = crops if count == crops.shape[1] else crops.narrow(1, joint.first, count)
        return _ControlInputs(chosen.flatten(0, 1), control.scale, control.keys_values)

    def _run(self, network: Any, inputs: _Inputs) -> Tensor:
        """Run `network`, after the ControlNet, on all views, float32 [N * V, C, h, w]."""
        joint, residuals = inputs.joint, {}
        if joint is not None and inputs.control is not None:
            residuals = self._residuals(inputs, inputs.control, joint)
        with self.shared_prefix.halved(joint is not None and joint.halved is not None):
            noise: Tensor = network(
                inputs.views,
                inputs.timestep,
                encoder_hidden_states=inputs.hidden,
                timestep_cond=inputs.embedded_guidance,
                added_cond_kwargs=inputs.conditions,
                cross_attention_kwargs=None if joint is None else {"joint": joint},
                return_dict=False,
                **residuals,
            )[0]
        return noise.float()

    def _residuals(self, inputs: _Inputs, control: _ControlInputs, joint: JointPass) -> dict[str, Any]:
        """Run the ControlNet; return what it adds to the UNet's skip connections and middle, as arguments."""
        down, middle = self.controlnet(
            inputs.views,
            inputs.timestep,
            encoder_hidden_states=inputs.hidden,
            controlnet_cond=control.pixels,
            conditioning_scale=control.scale,
            added_cond_kwargs=inputs.conditions,
            cross_attention_kwargs={"joint": replace(joint, prompt=control.prompt, halved=None, style={})},
            return_dict=False,
        )
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def _check_attention(part: str, network: Any) -> None:
    for name, processor in network.attn_processors.items():
        if type(processor).__name__ not in PLAIN_ATTENTION:
            raise UserError(
                f"pipe: the attention processor {type(processor).__name__} of {name} is not supported; call "
                f"pipe.{part}.set_default_attn_processor() first"
            )

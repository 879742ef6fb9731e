"""Shared by Stable Diffusion models with a UNet: joint attention, noise prediction, guidance and decoding."""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from madgen.backbones import (
    TEXTS_ONLY,
    BackboneSpec,
    Guidance,
    PromptEmbeddings,
    _precision,
    _schedulers,
    _vae,
    silence_model_libraries,
)
from madgen.backbones._blocks import ALL, select_layers
from madgen.backbones._borrowed import is_offloaded
from madgen.backbones._conditioning import Conditioning, Embedded, SharedNegatives, stack
from madgen.backbones.acceleration import cpu
from madgen.backbones.acceleration.compilation import check_compiler, compiled, replaced_forward
from madgen.backbones.acceleration.cuda_graphs import MAX_CELLS, CudaCapture, Graphs
from madgen.backbones.acceleration.shared_prefix import SharedPrefix
from madgen.diffusion.attention import JointAttention, JointPass, JointStep, KeysValues, Merging, grids_of, keys_values
from madgen.diffusion.guidance import guidance_embedding
from madgen.diffusion.kernels import onednn
from madgen.hub import tokenizers
from madgen.hub.model_configs import read_configs
from madgen.utils.errors import UserError

BLOCK_PATTERNS = {"down": "down_blocks.*", "mid": "mid_block.*", "up": "up_blocks.*"}


def unet_spec(unet: dict[str, Any], vae: dict[str, Any]) -> BackboneSpec:
    """Read the shapes from the configs of a UNet and its VAE."""
    return BackboneSpec(
        channels=unet["in_channels"],
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        view_size=unet["sample_size"],
        coarsest=2 ** (len(unet["block_out_channels"]) - 1),
        guidance="cfg" if unet.get("time_cond_proj_dim") is None else "embedded",
    )


def assumed_guidance(pretrained: str) -> Guidance:
    """Guess the guidance of a checkpoint from its name, for planning without config files."""
    return "embedded" if "lcm" in pretrained.lower() else "cfg"


def refuse_offload(offload: str) -> None:
    """Raise UserError for `backbone.offload`, which UNets do not support."""
    if offload != "none":
        raise UserError(f"backbone.offload={offload} is not supported for UNets; set it to none")


def refuse_sequence_length(max_sequence_length: int | None) -> None:
    """Raise UserError unless `backbone.max_sequence_length` is None: CLIP's text encoders have a fixed length."""
    if max_sequence_length is not None:
        raise UserError(
            f"backbone.max_sequence_length={max_sequence_length} has no effect: this backbone's text encoders have "
            "a fixed length; set it to null"
        )


def attention_of(unet: torch.nn.Module) -> dict[str, Any]:
    """Return the attention layers by the names of diffusers' processors."""
    return {f"{name}.processor": module for name, module in sorted(unet.named_modules()) if hasattr(module, "to_q")}


def _groups(layers: Sequence[str]) -> dict[str, list[str]]:
    return {name: fnmatch.filter(layers, pattern) for name, pattern in BLOCK_PATTERNS.items()}


def select_unet_layers(layers: Sequence[str], blocks: Sequence[str]) -> frozenset[str]:
    """Return the layers that `blocks` (all, down, mid, up, or patterns) select; UserError if one selects none."""
    return select_layers(layers, _groups(layers), blocks)


def check_blocks(
    blocks: Sequence[str], pretrained: str, revision: str | None = None, config: str | None = None
) -> None:
    """Raise UserError like `select_layers`, from the config files alone."""
    _, unet, _ = read_configs(pretrained, revision, config)
    attend = {
        "down": any("CrossAttn" in name for name in unet.get("down_block_types", ())),
        "mid": "CrossAttn" in str(unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")),
        "up": any("CrossAttn" in name for name in unet.get("up_block_types", ())),
    }
    if all(block == ALL or attend.get(block) for block in blocks):
        return  # without importing diffusers
    from diffusers import UNet2DConditionModel

    silence_model_libraries()
    with torch.device("meta"):
        select_unet_layers(list(attention_of(UNet2DConditionModel.from_config(unet))), blocks)


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


class UNetBackbone:
    """UNet, VAE, text encoders and tokenizers of one checkpoint; see `madgen.backbones.Backbone`.

    Subclasses embed prompts and provide additional conditions of the UNet.
    """

    tokenizers: tuple[Any, ...]
    borrowed = False
    """The models belong to a pipeline of the caller; see `_borrowed`."""

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        self.spec, self.dtype, self.device = spec, dtype, device
        self.loaded_dtype = dtype
        self.scheduler = pipeline.scheduler
        self.models: list[torch.nn.Module] = []
        self.unet = self._frozen(pipeline.unet)
        if self.device.type == "cpu":
            cpu.prepare(self.unet)
        # Such a VAE overflows in float16.
        upcast = dtype == torch.float16 and pipeline.vae.config.get("force_upcast", True)
        self._upcasts_vae = upcast and self.borrowed
        self.vae = self._frozen(pipeline.vae.float() if upcast and not self.borrowed else pipeline.vae)
        self._convert = pipeline.maybe_convert_prompt
        self.attention = attention_of(self.unet)
        self._refuse_unknown_attention()
        for name, layer in self.attention.items():
            layer.processor = JointAttention(name, layer.processor)
        self.shared_prefix = SharedPrefix(self.unet, self.attention)
        self.compiled: Any = None
        """The compiled UNet; see `compile`."""
        self._compiled_decoder: Any = None
        self._negative: tuple[Any, Embedded] | None = None
        captures = self.device.type == "cuda" and not self.borrowed  # a borrowed model's weights may move
        self.graphs = Graphs(CudaCapture(self.device)) if captures else None
        """CUDA graphs of passes over few views; None: kernels are launched one by one."""

    def _frozen(self, model: Any) -> Any:
        """Move a model to the device, weights contiguous: channels last is 1.18 times slower (H200, bfloat16)."""
        self.models.append(model)
        return model.eval() if self.borrowed else model.to(self.device).eval().requires_grad_(False)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Run all models in float32 within this context, then restore their precision."""
        before = self.dtype
        if self.graphs is not None:
            self.graphs.clear()  # they hold addresses of the current weights
        with _precision.in_float32(self.models):
            try:
                self.dtype = torch.float32
                yield
            finally:
                self.dtype = before

    def release_memory(self) -> bool:
        """Free the CUDA graphs; return False if there are none."""
        return self.graphs is not None and self.graphs.clear()

    def disable_cuda_graphs(self) -> None:
        """Free CUDA graphs and launch kernels one by one from now on."""
        self.release_memory()
        self.graphs = None

    def compile(self, backend: str = "inductor") -> None:
        """Run joint denoising and decoding in compiled graphs, one for each shape and set of merged layers.

        Shapes are static, so a panorama's graph, and with it the last bit, does not depend on what was sampled before.
        Raises UserError if PyTorch cannot compile on this machine.
        """
        check_compiler(backend, self.device)
        self.compiled = compiled(self.unet, backend)
        self._compiled_decoder = compiled(self.vae.decoder.forward, backend)

    def _runs_compiled(self) -> bool:
        """Return whether compiled graphs apply: not to gradients, nor to temporary float32."""
        return self.compiled is not None and not torch.is_grad_enabled() and self.dtype == self.loaded_dtype

    def _refuse_unknown_attention(self) -> None:
        for name, module in self.unet.named_modules():
            extras = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "residual_connection")
            if hasattr(module, "to_q") and any(getattr(module, extra, None) for extra in extras):
                raise UserError(f"attention layer {name} normalises its inputs in a way that is not supported")

    def embed(self, prompts: list[str]) -> Embedded:
        """Encode prompts in the UNet's dtype."""
        raise NotImplementedError

    def embed_negative(self, prompts: list[str]) -> Embedded:
        """Encode negative prompts, including the empty one."""
        return self.embed(prompts)

    def view_conditions(
        self, conditioning: Conditioning, count: int, height: int, width: int
    ) -> dict[str, Tensor] | None:
        """Return additional conditions for [N * `count`] views of `height` x `width` cells."""
        return None

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        guidance_scale: float,
        view_ids: Sequence[Hashable] | None = None,
        embeddings: PromptEmbeddings = TEXTS_ONLY,
    ) -> Conditioning:
        """Encode each prompt, and each negative prompt if guidance needs a second pass.

        Prompts with equal `view_ids` and negative prompts share the unconditional pass.
        """
        embedded, negatives, shared = None, 0, None
        given = self._given(embeddings.prompt_embeds, embeddings.pooled_prompt_embeds, "prompt_embeds")
        paths = [self.embed(prompts) if given is None else given]
        if self.spec.guidance == "embedded":
            # diffusers' convention: a guidance scale of 1 is no guidance
            weights = torch.full((len(prompts),), guidance_scale - 1, dtype=torch.float32)
            embedded = guidance_embedding(weights, self.unet.config.time_cond_proj_dim).to(self.device, self.dtype)
        elif guidance_scale > 1:
            name, pooled_ND = "negative_prompt_embeds", embeddings.negative_pooled_prompt_embeds
            given = self._given(embeddings.negative_prompt_embeds, pooled_ND, name)
            keys: Sequence[Hashable] = negative_prompts if given is None else range(len(prompts))
            shared = SharedNegatives(view_ids or range(len(prompts)), keys, self.device)
            distinct = [negative_prompts[first] for first in shared.firsts]
            negatives = len(distinct)
            paths.insert(0, self._embedded_negative(distinct) if given is None else given)
        hidden, pooled = stack(paths)
        return Conditioning(
            hidden,
            guidance_scale,
            embedded,
            pooled,
            self._keys_values(hidden),
            negatives,
            shared or None,
        )

    def _keys_values(self, hidden_NTD: Tensor) -> dict[str, KeysValues]:
        """Project the prompts; none if hooks load the weights of the layers when the UNet runs."""
        if self.borrowed and is_offloaded(self.unet):
            return {}
        return {name: keys_values(layer, hidden_NTD) for name, layer in self.attention.items() if crosses(name)}

    def _given(self, hidden_NTD: Tensor | None, pooled_ND: Tensor | None, name: str) -> Embedded | None:
        """Return embeddings that replace texts, the argument `name` of the call. Raises UserError for other shapes."""
        if hidden_NTD is None:
            return None
        width, pools = self.unet.config.cross_attention_dim, self.unet.config.get("addition_embed_type") == "text_time"
        if hidden_NTD.shape[-1] != width:
            raise UserError(f"{name} must be of width {width} for this backbone, got {tuple(hidden_NTD.shape)}")
        if pools != (pooled_ND is not None):
            pooled = name.replace("prompt", "pooled_prompt")
            raise UserError(
                f"this backbone needs {pooled} with {name}" if pools else f"this backbone takes no {pooled}"
            )
        pooled_ND = None if pooled_ND is None else pooled_ND.to(self.device, self.dtype)
        return Embedded(hidden_NTD.to(self.device, self.dtype), pooled_ND)

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

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Do nothing: these text encoders are small."""

    def cut_text(self, prompt: str) -> str | None:
        """Return the end of a prompt that a text encoder truncates, None if the prompt fits."""
        return tokenizers.cut_texts(self.tokenizers, [prompt])[0]

    def merged_layers(self, merging: Merging) -> frozenset[str]:
        """Return the attention layers that `merging.blocks` selects; UserError if an entry selects none."""
        return select_unet_layers(list(self.attention), merging.blocks)

    def predict_noise(
        self,
        views_BVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        joint: JointStep | None = None,
        chunk_views: int | None = None,
    ) -> Tensor:
        """Predict the noise with guidance, float32 [B, V, C, h, w], in one UNet pass over all views of all paths.

        `chunk_views` takes more passes and less memory: path after path, `chunk_views` views at a time, or all of a
        path's views where attention merges them. The graph of a gradient then holds one pass, the others run again.
        """
        views = conditioning.views(views_BVChw.to(self.dtype))
        if chunk_views is None:
            halved = joint is not None and conditioning.negatives == len(views_BVChw)
            noise = self._pass(views, timestep, conditioning, joint, halved, capture=self.dtype == self.loaded_dtype)
        else:
            noise = self._chunked(views, timestep, conditioning, joint, chunk_views)
        return conditioning.guided(noise)

    def _merged(self, joint: JointStep) -> frozenset[str]:
        """Return the names of the layers that merge at this step."""
        if joint.views.count == 1:  # merging one view changes nothing
            return frozenset()
        chosen = self.merged_layers(joint.merging)
        return frozenset(name for name in chosen if joint.merging.applies(joint.step, crosses(name)))

    def _pass(
        self,
        views_NVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        joint: JointStep | None,
        halved: bool = False,
        capture: bool = False,
    ) -> Tensor:
        """Run the UNet on some views of the conditioning's paths, float32 [N, V, C, h, w].

        `halved`: the second half of the views is the first again. `capture`: CUDA graphs are allowed.
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
            None if joint is None else self._joint_pass(joint, conditioning, halved),
        )
        network = self.unet if joint is None else self._network()
        captures = capture and joint is not None and self.graphs is not None and not torch.is_grad_enabled()
        if captures and paths * count * height * width <= MAX_CELLS:
            assert self.graphs is not None
            noise = self.graphs(partial(self._run, network), network, inputs)
        else:
            noise = self._run(network, inputs)
        return noise.unflatten(0, (paths, count))

    def _joint_pass(self, joint: JointStep, conditioning: Conditioning, halved: bool) -> JointPass:
        merged = self._merged(joint)
        return JointPass(
            conditioning.paths,
            conditioning.keys_values,
            merged,
            grids_of(joint.views, self.device) if merged else {},
            self.shared_prefix.layer if halved else None,
            self.device.type == "cpu" and onednn.is_faster_in_attention(),
        )

    def _run(self, network: Any, inputs: _Inputs) -> Tensor:
        """Run `network` on all views, float32 [N * V, C, h, w]."""
        joint = inputs.joint
        with self.shared_prefix.halved(joint is not None and joint.halved is not None):
            noise: Tensor = network(
                inputs.views,
                inputs.timestep,
                encoder_hidden_states=inputs.hidden,
                timestep_cond=inputs.embedded_guidance,
                added_cond_kwargs=inputs.conditions,
                cross_attention_kwargs=None if joint is None else {"joint": joint},
                return_dict=False,
            )[0]
        return noise.float()

    def _network(self) -> Any:
        """Return the network of joint passes: compiled, unless gradients or a temporary float32 need it as it is."""
        return self.compiled if self._runs_compiled() else self.unet

    def _chunked(
        self, views_NVChw: Tensor, timestep: Tensor, conditioning: Conditioning, joint: JointStep | None, size: int
    ) -> Tensor:
        run: Any = self._pass
        if joint is not None and self._merged(joint):
            size = views_NVChw.shape[1]
        elif joint is None and torch.is_grad_enabled():
            run = partial(checkpoint, self._pass, use_reentrant=False)
        paths = []
        for path, views in enumerate(views_NVChw.split(1)):
            one = conditioning.select(slice(path, path + 1))
            paths.append(torch.cat([run(chunk, timestep, one, joint) for chunk in views.split(size, dim=1)], dim=1))
        return torch.cat(paths)

    def decode(self, latents_BCHW: Tensor, wrap: int = 0, tiled: bool = False) -> Tensor:
        """Decode to pixels in 0..1, float32; `tiled`: in tiles of two views' side. See `_vae.decode`."""
        tile = 2 * self.spec.view_size if tiled else None
        upcast = _precision.in_float32([self.vae]) if self._upcasts_vae else nullcontext()
        with upcast, replaced_forward(self.vae.decoder, self._compiled_decoder if self._runs_compiled() else None):
            return _vae.decode(self.vae, self.spec.factor, latents_BCHW, wrap, tile)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Encode pixels in 0..1 to latents, float32 [B, C, H / factor, W / factor]."""
        return _vae.encode(self.vae, pixels_B3HW)

    def new_scheduler(
        self,
        name: str | None,
        num_inference_steps: int,
        original_inference_steps: int | None = None,
        view_cells: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Create the checkpoint's own scheduler, or the diffusers class `name` from its config."""
        return _schedulers.new_scheduler(
            self.scheduler, name, num_inference_steps, original_inference_steps, self.device, options
        )


def crosses(layer: str) -> bool:
    """Return whether a layer attends to the prompts; diffusers names the cross-attention of a block `attn2`."""
    return ".attn2." in layer

"""What Stable Diffusion models with a UNet share: joint attention, noise prediction, guidance and decoding."""

from __future__ import annotations

import fnmatch
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from madgen.backbones import BackboneSpec, Merging, _precision, _schedulers, _vae, quieten
from madgen.backbones._conditioning import Conditioning, Embedded, Shared
from madgen.backbones.acceleration import cpu as _cpu
from madgen.backbones.acceleration.compilation import check_compiler, compiled, instead
from madgen.backbones.acceleration.cuda_graphs import MOST_CELLS, CudaCapture, Graphs
from madgen.backbones.acceleration.shared_prefix import Once
from madgen.diffusion.attention import Grids, JointAttention, KeysValues, grids_of, joint_attention, keys_values
from madgen.diffusion.guidance import guidance_embedding
from madgen.diffusion.kernels import onednn
from madgen.diffusion.views import Views
from madgen.hub import tokenizers as _tokens
from madgen.hub.model_configs import read_configs
from madgen.utils.errors import UserError

BLOCK_PATTERNS = {"down": "down_blocks.*", "mid": "mid_block.*", "up": "up_blocks.*"}


def unet_spec(unet: dict[str, Any], vae: dict[str, Any]) -> BackboneSpec:
    """The shapes that the config files of a UNet and its VAE tell."""
    return BackboneSpec(
        channels=unet["in_channels"],
        factor=2 ** (len(vae["block_out_channels"]) - 1),
        view_size=unet["sample_size"],
        coarsest=2 ** (len(unet["block_out_channels"]) - 1),
        guidance_embedded=unet.get("time_cond_proj_dim") is not None,
    )


def attention_of(unet: torch.nn.Module) -> dict[str, Any]:
    """The attention layers, by the names of diffusers' processors."""
    return {f"{name}.processor": module for name, module in sorted(unet.named_modules()) if hasattr(module, "to_q")}


def select_layers(layers: Sequence[str], blocks: Sequence[str]) -> set[str]:
    """Those that `blocks` (down, mid, up, or patterns of names) select; UserError if an entry selects none."""
    chosen: set[str] = set()
    for block in blocks:
        found = fnmatch.filter(layers, BLOCK_PATTERNS.get(block, block))
        if not found and block in BLOCK_PATTERNS:
            raise UserError(f"method.mad.blocks: {block!r} of this backbone has no attention layers; leave it out")
        if not found:
            raise UserError(
                f"method.mad.blocks: {block!r} is neither down, mid, up nor a pattern of a layer such as {layers[0]!r}"
            )
        chosen.update(found)
    return chosen


def check_blocks(
    blocks: Sequence[str], pretrained: str, revision: str | None = None, config: str | None = None
) -> None:
    """As `select_layers`, of the config files alone: no weights are read."""
    _, unet, _ = read_configs(pretrained, revision, config)
    attend = {
        "down": any("CrossAttn" in name for name in unet.get("down_block_types", ())),
        "mid": "CrossAttn" in str(unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")),
        "up": any("CrossAttn" in name for name in unet.get("up_block_types", ())),
    }
    if all(attend.get(block) for block in blocks):
        return  # without the import of diffusers
    from diffusers import UNet2DConditionModel

    quieten()
    with torch.device("meta"):
        select_layers(list(attention_of(UNet2DConditionModel.from_config(unet))), blocks)


@dataclass(frozen=True)
class _Inputs:
    """All tensors that a pass of the UNet reads besides its weights."""

    views: Tensor
    timestep: Tensor
    hidden: Tensor
    embedded_guidance: Tensor | None
    conditions: dict[str, Tensor] | None
    keys_values: Mapping[str, KeysValues]
    grids: Grids | None
    """Of the layers that merge."""
    twice: bool
    """The second half of the views is the first again."""


class UNetBackbone:
    """UNet, VAE, text encoders and tokenizers of one checkpoint; see `madgen.backbones.Backbone`.

    A subclass says how prompts are embedded, and what else the UNet is told of a view.
    """

    tokenizers: tuple[Any, ...]

    def __init__(self, pipeline: Any, spec: BackboneSpec, dtype: torch.dtype, device: torch.device):
        self.spec, self.dtype, self.device = spec, dtype, device
        self.loaded_dtype = dtype
        self.scheduler = pipeline.scheduler
        self.models: list[torch.nn.Module] = []
        self.unet = self._frozen(pipeline.unet)
        if self.device.type == "cpu":
            _cpu.prepare(self.unet)
        # An fp16 VAE overflows where its config says so.
        upcast = dtype == torch.float16 and pipeline.vae.config.get("force_upcast", True)
        self.vae = self._frozen(pipeline.vae.float() if upcast else pipeline.vae)
        self.attention = attention_of(self.unet)
        self.layers = list(self.attention)
        self.processors = {name: JointAttention(name) for name in self.layers}
        self.once = Once(self.unet, self.processors)
        self.compiled: Any = None
        """The UNet with `torch.compile`; see `compile`."""
        self._compiled_decoder: Any = None
        self._negative: tuple[Any, Embedded] | None = None
        self.graphs = Graphs(CudaCapture(self.device)) if self.device.type == "cuda" else None
        """Of passes that are launched faster so; None: launched kernel by kernel."""
        self._refuse_unknown_attention()

    def _frozen(self, model: Any) -> Any:
        """On the device, weights contiguous: with channels last a step takes 1.18 times as long (H200, bfloat16)."""
        self.models.append(model.to(self.device).eval().requires_grad_(False))
        return model

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Within it all models compute in float32, on the weights as they are; then in the precision of before."""
        before = self.dtype
        if self.graphs is not None:
            self.graphs.clear()  # they read the weights where they are now
        with _precision.in_float32(self.models):
            try:
                self.dtype = torch.float32
                yield
            finally:
                self.dtype = before

    def release_memory(self) -> bool:
        """Gives back what is held for speed alone; False if there is nothing."""
        return self.graphs is not None and self.graphs.clear()

    def forgo_graphs(self) -> None:
        """From now on passes are launched kernel by kernel."""
        self.release_memory()
        self.graphs = None

    def compile(self, backend: str = "inductor") -> None:
        """From now on joint denoising and decoding run in compiled graphs, one for each shape and each set of merged
        layers.

        Shapes are static, so that a panorama's graph, and with it the last bit, does not depend on what was sampled
        before it. UserError if PyTorch cannot compile here.
        """
        check_compiler(backend, self.device)
        self.compiled = compiled(self.unet, backend)
        self._compiled_decoder = compiled(self.vae.decoder.forward, backend)

    def _runs_compiled(self) -> bool:
        """Gradients, and float32 for a while, go without."""
        return self.compiled is not None and not torch.is_grad_enabled() and self.dtype == self.loaded_dtype

    def _refuse_unknown_attention(self) -> None:
        for name, module in self.unet.named_modules():
            extras = ("norm_q", "norm_k", "norm_cross", "group_norm", "spatial_norm", "residual_connection")
            if hasattr(module, "to_q") and any(getattr(module, extra, None) for extra in extras):
                raise UserError(f"attention layer {name} normalises its inputs in a way that is not known here")

    def embed(self, prompts: list[str]) -> Embedded:
        """The prompts in the UNet's dtype."""
        raise NotImplementedError

    def embed_negative(self, prompts: list[str]) -> Embedded:
        """Negative prompts, the empty one included."""
        return self.embed(prompts)

    def view_conditions(
        self, conditioning: Conditioning, count: int, height: int, width: int
    ) -> dict[str, Tensor] | None:
        """What the UNet is told beside the prompt of each of [N * `count`] views of `height` x `width` cells."""
        return None

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: list[str],
        negative_prompts: list[str],
        guidance_scale: float,
        seen: Sequence[Hashable] | None = None,
    ) -> Conditioning:
        """Embeddings of each prompt, and of each negative prompt where guidance takes a second pass.

        `seen` names the views of each prompt: those of one name share their negative prompt where that is the same.
        """
        paths, embedded, negatives, shared = [self.embed(prompts)], None, 0, None
        if self.spec.guidance_embedded:
            # diffusers' convention: a guidance scale of 1 is no guidance
            weights = torch.full((len(prompts),), guidance_scale - 1, dtype=torch.float32)
            embedded = guidance_embedding(weights, self.unet.config.time_cond_proj_dim).to(self.device, self.dtype)
        elif guidance_scale > 1:
            shared = Shared(range(len(prompts)) if seen is None else seen, negative_prompts, self.device)
            distinct = [negative_prompts[first] for first in shared.firsts]
            negatives = len(distinct)
            paths.insert(0, self._embedded_negative(distinct))
        hidden = torch.cat([path.hidden_NTD for path in paths])
        pooled = [path.pooled_ND for path in paths if path.pooled_ND is not None]
        return Conditioning(
            hidden,
            guidance_scale,
            embedded,
            torch.cat(pooled) if pooled else None,
            {name: keys_values(layer, hidden) for name, layer in self.attention.items() if crosses(name)},
            negatives,
            shared or None,
        )

    def _embedded_negative(self, prompts: list[str]) -> Embedded:
        """Kept until others are asked for: in most jobs they are the same for all panoramas."""
        key = (tuple(prompts), self.dtype)
        if self._negative is None or self._negative[0] != key:
            self._negative = key, self.embed_negative(prompts)
        return self._negative[1]

    def token_ids(self, tokenizer: Any, prompts: list[str]) -> Any:
        """The tokenizer's output for prompts of full length; `cut_text` tells what that leaves out."""
        most = tokenizer.model_max_length
        return tokenizer(prompts, padding="max_length", max_length=most, truncation=True, return_tensors="pt")

    def cut_text(self, prompt: str) -> str | None:
        """The end of a prompt that a text encoder never sees, None if it sees all of it."""
        return _tokens.cut_texts(self.tokenizers, [prompt])[0]

    @contextmanager
    def merged_attention(self, views: Views, step: int, merging: Merging, conditioning: Conditioning) -> Iterator[None]:
        """Installs one processor a layer for this step and restores the others after it."""
        chosen = self.merged_layers(merging) if views.count > 1 else set()  # merging one view changes nothing
        merged = {name for name in chosen if merges(name, step, merging)}
        grids = grids_of(views, self.device) if merged else None
        for name, processor in self.processors.items():
            processor.grids = grids if name in merged else None
        with joint_attention(self.attention, self.processors):
            yield

    def merged_layers(self, merging: Merging) -> set[str]:
        """The attention layers that `merging.blocks` selects; UserError if an entry selects none."""
        return select_layers(self.layers, merging.blocks)

    def predict_noise(
        self, views_BVChw: Tensor, timestep: Tensor, conditioning: Conditioning, chunk_views: int | None = None
    ) -> Tensor:
        """Guidance applied, float32 [B, V, C, h, w]; one UNet pass over all views of all paths.

        `chunk_views` takes more passes and less memory: path after path, `chunk_views` views at a time, or all of a
        path's views where attention merges them. The graph of a gradient then holds one pass, the others run again.
        """
        views = conditioning.views(views_BVChw.to(self.dtype))
        if chunk_views is None:
            joint = self._joint and self.dtype == self.loaded_dtype
            twice = self._joint and conditioning.negatives == len(views_BVChw)
            noise = self._pass(views, timestep, conditioning, self.graphs if joint else None, twice)
        else:
            noise = self._chunked(views, timestep, conditioning, chunk_views)
        return conditioning.guided(noise)

    def _pass(
        self,
        views_NVChw: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        graphs: Graphs | None = None,
        twice: bool = False,
    ) -> Tensor:
        """The UNet on some views of the conditioning's paths, float32 [N, V, C, h, w]; `twice`: N / 2 of them twice."""
        paths, count, _, height, width = views_NVChw.shape
        embedded, size = conditioning.embedded_guidance_BD, (count, height, width)
        if size not in conditioning.conditions:
            conditioning.conditions[size] = self.view_conditions(conditioning, *size)
        merged = tuple(name for name, processor in self.processors.items() if processor.merged)
        inputs = _Inputs(
            views_NVChw.flatten(0, 1),
            timestep,
            conditioning.embeddings_NTD,
            None if embedded is None else embedded.repeat_interleave(count, 0),
            conditioning.conditions[size],
            conditioning.keys_values,
            self.processors[merged[0]].grids if merged else None,
            twice,
        )
        network = self._network()
        if graphs is None or torch.is_grad_enabled() or paths * count * height * width > MOST_CELLS:
            noise = self._run(network, merged, inputs)
        else:
            noise = graphs(partial(self._run, network, merged), (merged, network), inputs)
        return noise.unflatten(0, (paths, count))

    def _run(self, network: Any, merged: Sequence[str], inputs: _Inputs) -> Tensor:
        """The UNet on all views, float32 [N * V, C, h, w]; the layers are told whose views come."""
        by_onednn = self.device.type == "cpu" and onednn.is_faster_in_attention()
        for name, processor in self.processors.items():
            processor.paths, processor.prompt = len(inputs.hidden), inputs.keys_values.get(name)
            processor.by_onednn = by_onednn
        for name in merged:
            self.processors[name].grids = inputs.grids
        with self.once.switched(inputs.twice):
            noise: Tensor = network(
                inputs.views,
                inputs.timestep,
                encoder_hidden_states=inputs.hidden,
                timestep_cond=inputs.embedded_guidance,
                added_cond_kwargs=inputs.conditions,
                return_dict=False,
            )[0]
        return noise.float()

    def _network(self) -> Any:
        """Compiled where views are denoised together; elsewhere (gradients, float32 for a while) the UNet as it is."""
        return self.compiled if self._runs_compiled() and self._joint else self.unet

    @property
    def _joint(self) -> bool:
        return all(layer.processor is self.processors[name] for name, layer in self.attention.items())

    def _chunked(self, views_NVChw: Tensor, timestep: Tensor, conditioning: Conditioning, size: int) -> Tensor:
        if joint := self._joint:
            size = views_NVChw.shape[1] if any(one.merged for one in self.processors.values()) else size
        run: Any = self._pass
        if torch.is_grad_enabled() and not joint:  # what joint attention keeps of a prompt is not made twice
            run = partial(checkpoint, self._pass, use_reentrant=False)
        paths = []
        for path, views in enumerate(views_NVChw.split(1)):
            one = conditioning.picked(slice(path, path + 1))
            paths.append(torch.cat([run(chunk, timestep, one) for chunk in views.split(size, dim=1)], dim=1))
        return torch.cat(paths)

    def decode(self, latents_BCHW: Tensor, wrap: int = 0, tiled: bool = False) -> Tensor:
        """Pixels in 0..1, float32; `tiled` in tiles of at most two views' cells a side. See `_vae.decode`."""
        tile = 2 * self.spec.view_size if tiled else None
        with instead(self.vae.decoder, self._compiled_decoder if self._runs_compiled() else None):
            return _vae.decode(self.vae, self.spec.factor, latents_BCHW, wrap, tile)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Latents float32 [B, C, H / factor, W / factor] of pixels in 0..1."""
        return _vae.encode(self.vae, pixels_B3HW)

    def new_scheduler(
        self, name: str | None, num_inference_steps: int, original_inference_steps: int | None = None
    ) -> Any:
        """The checkpoint's own scheduler, or the diffusers class `name` made from its config."""
        return _schedulers.new_scheduler(
            self.scheduler, name, num_inference_steps, original_inference_steps, self.device
        )


def crosses(layer: str) -> bool:
    """Whether a layer attends to the prompts; diffusers calls the cross-attention of a block `attn2`."""
    return ".attn2." in layer


def merges(layer: str, step: int, merging: Merging) -> bool:
    """Whether a chosen layer merges at `step`."""
    if merging.cross_attention == "always" and crosses(layer):
        return True
    return step < merging.steps

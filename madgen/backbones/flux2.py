"""FLUX.2 [klein], base and distilled: rotary positions of four axes, latents normalized by statistics of the VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from madgen.backbones import BackboneSpec, Guidance
from madgen.backbones._conditioning import Conditioning
from madgen.backbones._flow import FlowSchedule
from madgen.backbones._sizes import FLUX2_VAE, QWEN3_4B
from madgen.backbones._tokens import canvas_ids, token_ids
from madgen.backbones._transformer import PackedTransformerBackbone
from madgen.backbones._transformer_family import VIEW_SIZE, stream_layers, transformer_size, transformer_spec
from madgen.diffusion.token_attention import TokenAttention
from madgen.diffusion.views import Views
from madgen.hub.model_size import Parameters

if TYPE_CHECKING:
    from torch import Tensor


def empirical_mu(tokens: int, steps: int, config: Mapping[str, Any]) -> float:
    """Return the shift for an image of `tokens` tokens, as fitted by the authors of FLUX.2 for 10 and 200 steps."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190.0
    return slope * steps + many - 200.0 * slope


class Flux2(PackedTransformerBackbone):
    """FLUX.2 [klein]: hidden states of three layers of Qwen3; classifier-free guidance (base) or none (distilled)."""

    name = "flux2"
    pipelines = ("Flux2KleinPipeline",)
    sequence_length = 512
    template_tokens = 3
    flow = FlowSchedule(linear_sigmas=True, mu=empirical_mu)
    widths_alive = 24.0
    assumed_specs = {
        "base": transformer_spec(32, VIEW_SIZE, "cfg", noise_patch=2),
        "": transformer_spec(32, VIEW_SIZE, "none", noise_patch=2),
    }
    assumed_sizes = {
        "": transformer_size(
            Parameters(3_875_544_576, 3_875_536_896, 1_016_960), (QWEN3_4B,), 3072, widths_alive, FLUX2_VAE
        )
    }

    @staticmethod
    def spec_of(index: Mapping[str, Any], network: Mapping[str, Any], vae: Mapping[str, Any]) -> BackboneSpec:
        guidance: Guidance = "none" if index.get("is_distilled") else "cfg"
        return transformer_spec(network["in_channels"] // 4, VIEW_SIZE, guidance, vae, noise_patch=2)

    layer_names = staticmethod(stream_layers)

    def processor(self, name: str, original: Any) -> Any:
        """Return the attention processor of a layer; that of single stream blocks leaves the feed-forward layer out."""
        cls = ParallelTokenAttention if name.startswith("single_") else TokenAttention
        return cls(name, original, self.context)

    def inputs(self, conditioning: Conditioning, views: int, height: int, width: int) -> dict[str, Any]:
        """Return the positions."""
        ids = token_ids(height, width, self.device)
        return {"txt_ids": self._text_ids(conditioning), "img_ids": _with_fourth_axis(ids)}

    def place(self, tokens: Views, positions: str, conditioning: Conditioning) -> dict[str, Any]:
        """Return the rotations of prompt and canvas; see `canvas_ids`."""
        ids = _with_fourth_axis(canvas_ids(tokens, positions, self.device))
        return {"rotary": self.transformer.pos_embed(torch.cat([self._text_ids(conditioning), ids]))}

    def _text_ids(self, conditioning: Conditioning) -> Tensor:
        """Return ids (0, 0, 0, number) of the tokens of the prompt."""
        numbers = torch.arange(conditioning.embeddings_NTD.shape[1], device=self.device, dtype=torch.float32)
        return torch.nn.functional.pad(numbers[:, None], (3, 0))


def _with_fourth_axis(ids_L3: Tensor) -> Tensor:
    return torch.nn.functional.pad(ids_L3, (0, 1))


class ParallelTokenAttention(TokenAttention):
    """Processor of a layer that runs attention and feed-forward in parallel, with shared projections.

    Attention merges; the feed-forward part stays per view.
    """

    def __call__(  # type: ignore[override]
        self, attn: Any, hidden_states: Tensor, attention_mask: Any = None, image_rotary_emb: Any = None
    ) -> Any:
        """Run the layer."""
        token_pass = self.context.current
        if token_pass is None or self.name not in token_pass.merged:
            return self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        attended = self._one_stream(
            hidden_states, token_pass, lambda hidden: self._attend(attn, hidden, token_pass.rotary)
        )
        feed_forward = attn.mlp_act_fn(attn.to_qkv_mlp_proj(hidden_states)[..., 3 * attn.inner_dim :])
        return attn.to_out(torch.cat([attended, feed_forward], dim=-1))

    def _attend(self, attn: Any, hidden_PLD: Tensor, rotary: Any) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb

        projected = attn.to_qkv_mlp_proj(hidden_PLD)[..., : 3 * attn.inner_dim]
        query, key, value = (each.unflatten(-1, (-1, attn.head_dim)) for each in projected.chunk(3, dim=-1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = (apply_rotary_emb(each, rotary, sequence_dim=1) for each in (query, key))
        output: Tensor = dispatch_attention_fn(query, key, value, backend=self.original._attention_backend)
        return output.flatten(2, 3)


BACKBONE = Flux2

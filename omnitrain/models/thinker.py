"""Thinker: the mixture-of-experts decoder that reads text, sound and pictures and writes text (report section 2.1,
2.3).

All documents of a batch stand end to end, [N, D] with `cu_seqlens`. What a position *is* (word, sound, picture) was
decided before: its embedding is in `inputs_embeds`, its place in `position_ids`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omnitrain.models.layers.attention import documents
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.decoder import DecoderLayer, DecoderOutput, DenseMLP, KVCache, SparseMLP
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.layers.precision import residual
from omnitrain.models.layers.rope import tm_rope
from omnitrain.models.layers.transfer import sent
from omnitrain.models.sizes import ThinkerConfig


@dataclass(frozen=True, kw_only=True)
class ThinkerOutput(DecoderOutput):
    """hidden times `lm_head.weight.T` = logits.  accept_hidden [N, D]: residual stream after `accept_hidden_layer`
    layers, for the Talker."""

    accept_hidden: Tensor


class Thinker(nn.Module):
    """Decoder-only transformer with experts, TM-RoPE and deepstack (report section 2.1; Qwen3-VL's deepstack).

    After each of the first layers, one more level of the vision encoder's features is added at the visual positions:
    shallow layers of the encoder see edges and glyphs that its last layer no longer carries.
    """

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            DecoderLayer(i, config, SparseMLP(config) if config.is_sparse(i) else DenseMLP(config.d_model, config.ffn))
            for i in range(config.layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.activation_checkpointing = False
        self.kept_activations: Collection[str] = ()

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        visual_mask: Tensor | None = None,
        deepstack: list[Tensor] | None = None,
        cache: KVCache | None = None,
    ) -> ThinkerOutput:
        """Run the decoder over packed documents.

        Args:
            inputs_embeds: [N, D].  position_ids: int64 [3, N].  cu_seqlens: int32 [B + 1], best on the host.
            visual_mask: bool [N], where `deepstack` goes; best on the host.
            deepstack: per level [visual_mask.sum(), D].
            cache: keys and values of earlier calls; `inputs_embeds` are then the new positions only.

        Raises ValueError: if deepstack has more levels than there are layers, or not one row per visual position.
        """
        config = self.config
        visual = _visual_rows(visual_mask, deepstack, config.layers, inputs_embeds.device)
        borders, longest = documents(cu_seqlens, inputs_embeds.device)
        rope = tm_rope(position_ids, config.mrope_sections, config.rope_theta)
        x = accept_hidden = residual(inputs_embeds, self.norm)
        counts, prob_sums = [], []
        checkpointed = self.activation_checkpointing and cache is None  # a second run would grow the cache again
        for i, layer in enumerate(self.layers):
            x, count, prob_sum = run(
                layer, x, rope, borders, longest, cache, checkpointed=checkpointed, kept=self.kept_activations
            )
            if i + 1 == config.accept_hidden_layer:
                accept_hidden = x
            if deepstack is not None and visual is not None and i < len(deepstack):
                x = x.index_add(0, visual, deepstack[i].to(x.dtype))
            if count is not None:
                counts.append(count)
                prob_sums.append(prob_sum)
        none = x.new_zeros(0, config.n_experts, dtype=torch.float32)
        return ThinkerOutput(
            hidden=self.norm(x),
            accept_hidden=accept_hidden,
            router_counts=torch.stack(counts) if counts else none,
            router_prob_sums=torch.stack(prob_sums) if prob_sums else none,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] after the final norm -> [N, V]"""
        return self.lm_head(hidden)


def _visual_rows(
    mask: Tensor | None, deepstack: list[Tensor] | None, layers: int, device: torch.device
) -> Tensor | None:
    if not deepstack:
        return None
    if mask is None:
        raise ValueError("deepstack features were given without visual_mask")
    if len(deepstack) > layers:
        raise ValueError(f"{len(deepstack)} deepstack levels for {layers} decoder layers: lower the number of levels")
    rows = mask.nonzero().squeeze(1)
    for level, features in enumerate(deepstack):
        if len(features) != len(rows):
            raise ValueError(f"deepstack level {level} has {len(features)} rows for {len(rows)} visual positions")
    return sent(rows, device)

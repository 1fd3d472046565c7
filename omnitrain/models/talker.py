"""Talker: the mixture-of-experts decoder that turns the answer's text into codec frames, 80 ms each (report section
2.4).

It does not read the Thinker's hidden states of text. Text reaches it as word embeddings through `text_projection`; only
at the user's sound and pictures it reads the Thinker's hidden states, through `hidden_projection`. So what it says is
the text that it is given, whoever wrote or edited it. Each step predicts codebook 0 of the next frame; MTP completes
the frame. What stands where is data (`TalkerInputs`, made by `data/talker_layout.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnitrain.models.layers.attention import documents
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.decoder import DecoderLayer, DecoderOutput, KVCache, SparseMLP
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.layers.precision import residual
from omnitrain.models.layers.rope import tm_rope
from omnitrain.models.layers.transfer import sent
from omnitrain.models.mtp import MTP
from omnitrain.models.sizes import TalkerConfig


@dataclass(frozen=True, kw_only=True)
class TalkerInputs:
    """What stands at each of the T positions of a pack of spoken answers, one document each. An embedding is the sum of
    what a position names; -1 names nothing.

    Attributes:
        text_ids: int64 [T], word whose embedding goes through `text_projection`
        hidden_rows: int64 [T], row of the Thinker's `accept_hidden` that goes through `hidden_projection`
        codec_ids: int64 [T], special code or voice
        frame_rows: int64 [T], row of `codes` whose Q embeddings are added
        labels: int64 [T], code of codebook 0 to predict here, `codec_eos` at the last frame, or -100
        position_ids: float32 [3, T], TM-RoPE ids.  cu_seqlens: int32 [S + 1], document borders
        codes: int64 [F, Q].  frame_sources: int64 [F], the position whose hidden state predicts the frame

    All but `position_ids` is best on the host: how many positions name something decides shapes.
    """

    text_ids: Tensor
    hidden_rows: Tensor
    codec_ids: Tensor
    frame_rows: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    codes: Tensor
    frame_sources: Tensor


class Projection(nn.Module):
    """Two linear layers with SiLU between them: [n, D_thinker] -> [n, D]."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.thinker_dim, config.projection_width)
        self.linear_fc2 = nn.Linear(config.projection_width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.silu(self.linear_fc1(x)))


class Talker(nn.Module):
    """Decoder with routed and shared experts and TM-RoPE, its codec vocabulary, and MTP."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.config = config
        self.text_projection = Projection(config)
        self.hidden_projection = Projection(config)
        self.codec_embedding = nn.Embedding(config.codec_vocab, config.d_model)
        self.layers = nn.ModuleList(
            DecoderLayer(i, config, SparseMLP(config, shared_width=config.shared_expert_width))
            for i in range(config.layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.codec_head = nn.Linear(config.d_model, config.codec_vocab, bias=False)
        self.mtp = MTP(config.mtp)
        self.activation_checkpointing = False
        self.kept_activations: Collection[str] = ()

    def embed_frames(self, codes: Tensor) -> Tensor:
        """Sum of the embeddings of a frame's codes, int64 [F, Q] -> [F, D]. Raises as `MTP.forward`."""
        first = sent(codes[:, 0], self.codec_embedding.weight.device)
        return self.codec_embedding(first) + self.mtp.embed_sum(codes[:, 1:])

    def embed(
        self,
        inputs: TalkerInputs,
        thinker_embedding: Callable[[Tensor], Tensor],
        accept_hidden: Tensor | None = None,
    ) -> Tensor:
        """What the Talker reads before its first layer, [T, D]. ValueError for impossible codes.

        Args:
            thinker_embedding: the Thinker's word embeddings of ids [n], [n, D_thinker].
            accept_hidden: [N, D_thinker], see `ThinkerOutput`; ValueError if positions name rows of it and it is None.
                Gradients flow into both: detach them if the Thinker is not to learn from speech.
        """
        weight = self.codec_embedding.weight
        device = weight.device
        x = torch.zeros(len(inputs.text_ids), weight.shape[1], dtype=weight.dtype, device=device)

        # Most frames come after the text has ended and carry the same filler: each word is projected once.
        rows, ids = _named(inputs.text_ids)
        words, which = (sent(part, device) for part in ids.unique(return_inverse=True))
        spoken = self.text_projection(thinker_embedding(words))[which]
        x = x.index_add(0, sent(rows, device), spoken.to(x.dtype))

        rows, heard = _named(inputs.hidden_rows)
        if accept_hidden is None:
            if len(rows):
                raise ValueError("hidden_rows names rows of accept_hidden, which was not given")
            accept_hidden = weight.new_zeros(0, self.config.thinker_dim)
        # Of no rows too: its gradient is then zero, as it is on a process whose neighbours have some.
        hidden = self.hidden_projection(accept_hidden[sent(heard, device)])
        x = x.index_add(0, sent(rows, device), hidden.to(x.dtype))

        rows, codes = _named(inputs.codec_ids)
        x = x.index_add(0, sent(rows, device), self.codec_embedding(sent(codes, device)))

        rows, frames = _named(inputs.frame_rows)
        embedded = self.embed_frames(inputs.codes)[sent(frames, device)]
        return x.index_add(0, sent(rows, device), embedded.to(x.dtype))

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, cu_seqlens: Tensor, cache: KVCache | None = None
    ) -> DecoderOutput:
        """Run the decoder over packed documents, [T, D] with position_ids [3, T] and cu_seqlens int32 [S + 1]; with a
        `cache` of earlier positions, over the new ones only. `codec_head` reads the output's `hidden`, and so does
        MTP."""
        borders, longest = documents(cu_seqlens, inputs_embeds.device)
        rope = tm_rope(position_ids, self.config.mrope_sections, self.config.rope_theta)
        x, counts, prob_sums = residual(inputs_embeds, self.norm), [], []
        checkpointed = self.activation_checkpointing and cache is None
        for layer in self.layers:
            x, count, prob_sum = run(
                layer, x, rope, borders, longest, cache, checkpointed=checkpointed, kept=self.kept_activations
            )
            counts.append(count)
            prob_sums.append(prob_sum)
        counts, prob_sums = torch.stack(counts), torch.stack(prob_sums)
        return DecoderOutput(hidden=self.norm(x), router_counts=counts, router_prob_sums=prob_sums)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] after the final norm -> [n, codec_vocab], for codebook 0"""
        return self.codec_head(hidden)

    def residual_hidden(self, hidden: Tensor, inputs: TalkerInputs) -> Tensor:
        """`MTP.forward` for all frames of the pack: hidden [T, D] -> [F, Q - 1, D]."""
        first = self.codec_embedding(sent(inputs.codes[:, 0], hidden.device))
        return self.mtp(hidden[sent(inputs.frame_sources, hidden.device)], first, inputs.codes)


def _named(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that name something, and what they name, int64 [n] each."""
    rows = (ids >= 0).nonzero().squeeze(1)
    return rows, ids[rows]

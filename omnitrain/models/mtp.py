"""MTP: the small decoder that completes one codec frame (report section 2.4; the public layout's "code predictor").

The Talker decides codebook 0 of a frame; MTP then predicts codebooks 1 .. Q - 1, each from those before it. Its
sequence is one frame long and always the same:

    position    0                 1           2             ...    Q - 1
    input       Talker's hidden   code 0      code 1        ...    code Q - 2
    predicts    -                 code 1      code 2        ...    code Q - 1

So many frames are a batch without padding, and generation is Q - 1 steps of fixed shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import cast

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.decoder import Attention, DenseMLP
from omnitrain.models.layers.int8 import Int8Matrices
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.layers.rope import Rotation, per_head, tm_rope
from omnitrain.models.layers.transfer import sent
from omnitrain.models.sizes import MTPConfig


class MTPLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), for sequences of one length."""

    def __init__(self, c: MTPConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = DenseMLP(c.d_model, c.ffn)

    def forward(self, x: Tensor, rope: Rotation) -> Tensor:
        """Whole sequences: x [B, Q, D] -> [B, Q, D]; rope = cos and sin, each [B * Q, head_dim / 2]."""
        batch, n, _ = x.shape
        projected = self.attention.project(self.attention_norm(x).flatten(0, 1), rope)
        q, k, v = (t.view(batch, n, *t.shape[1:]).transpose(1, 2) for t in projected)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.attention.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))

    def turns(self, rope: Rotation) -> Tensor:
        """What normed query and key heads are multiplied by to be weighed and turned: fp32 [Q, 2, H + H_kv, head_dim].

        With the norm's weight w and n = [a, b] in halves, rotating w n by (cos, sin) is
        n * w [cos, cos] + [b, a] * w' [-sin, sin], where w' are w's halves exchanged.
        """
        attention, (cos, sin) = self.attention, rope
        weight = per_head(attention.q_norm.weight, attention.k_norm.weight, attention.heads, self._turned)
        exchanged = weight.roll(attention.head_dim // 2, -1)
        straight, crossed = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return torch.stack([weight * straight[:, None], exchanged * crossed[:, None]], dim=1)

    def next(self, x: Tensor, turns: Tensor, mask: Tensor, past: Tensor, at: Tensor) -> Tensor:
        """The next n positions of sequences whose first ones are known, in as few kernels as there are: this runs
        Q - 1 times a frame.

        Args:
            x: [B, n, D].  turns: [n, 2, H + H_kv, head_dim].  at: int64 [n], which positions these are.
            mask: [n, Q], -inf where a position does not see another, else 0.
            past: [2, B, Q, H_kv, head_dim], keys and values of the positions before; those of x are written to it.

        Returns:
            [B, n, D]
        """
        attention, (batch, n, _) = self.attention, x.shape
        qkv = attention.qkv(self.attention_norm(x)).view(batch, n, -1, attention.head_dim)
        normed = F.rms_norm(qkv[:, :, : self._turned].float(), (attention.head_dim,), None, attention.q_norm.eps)
        crossed = normed.roll(attention.head_dim // 2, -1).mul_(turns[:, 1])
        qk = crossed.addcmul_(normed, turns[:, 0]).to(x.dtype)
        past[0].index_copy_(1, at, qk[:, :, attention.heads :])
        past[1].index_copy_(1, at, qkv[:, :, self._turned :])
        q, k, v = (t.transpose(1, 2) for t in (qk[:, :, : attention.heads], past[0], past[1]))
        gqa = attention.heads != attention.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        x = x + attention.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))

    @property
    def _turned(self) -> int:
        """Heads that have a place: of queries and keys."""
        return self.attention.heads + self.attention.kv_heads


class MTP(nn.Module):
    """Dense decoder over the codes of one frame.

    code_embedding, code_head: [Q - 1, K, D], one matrix per codebook from 1 on. `code_head[q - 1]` is the weight that
    codebook q's cross-entropy needs.
    """

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.config = config
        residuals = config.codebooks - 1
        self.code_embedding = nn.Parameter(torch.empty(residuals, config.codebook_size, config.d_model))
        self.layers = nn.ModuleList([MTPLayer(config) for _ in range(config.layers)])
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.code_head = nn.Parameter(torch.empty(residuals, config.codebook_size, config.d_model))
        self.int8_heads: Int8Matrices | None = None
        self.activation_checkpointing = False
        self.kept_activations: Collection[str] = ()

    def forward(self, talker_hidden: Tensor, first: Tensor, codes: Tensor) -> Tensor:
        """All codebooks of all frames at once, from the true codes before them.

        Args:
            talker_hidden: [F, D], the Talker's hidden states that predicted the frames' codebook 0.
            first: [F, D], embeddings of the codes of codebook 0 (`Talker.codec_embedding`).
            codes: int64 [F, Q], best on the host, where they are checked; codebook 0 and the last one are not read.
                ValueError if they are of another number of codebooks, or a code lies outside its codebook.

        Returns:
            [F, Q - 1, D] after the final norm; row q - 1 predicts codebook q (times `code_head[q - 1].T` = logits).
        """
        self._check(codes, self.config.codebooks)
        known = F.embedding(self._rows(codes[:, 1:-1]), self.code_embedding.flatten(0, 1))  # [F, Q - 2, D]
        x = torch.cat([talker_hidden.to(first.dtype)[:, None], first[:, None], known.to(first.dtype)], dim=1)
        cos, sin = self._rope(x.device)
        rope = cos.repeat(len(x), 1), sin.repeat(len(x), 1)
        for layer in self.layers:
            x = run(layer, x, rope, checkpointed=self.activation_checkpointing, kept=self.kept_activations)
        return self.norm(x[:, 1:])

    def logits(self, hidden: Tensor) -> Tensor:
        """[F, Q - 1, D] after the final norm -> [F, Q - 1, K]"""
        return einsum(hidden, self.code_head, "f q d, q k d -> f q k")

    def embed_sum(self, residuals: Tensor) -> Tensor:
        """The sum of the embeddings of codebooks 1 .. Q - 1: int64 [F, Q - 1] -> [F, D]. Raises as `forward`."""
        self._check(residuals, self.config.codebooks - 1)
        return F.embedding_bag(self._rows(residuals), self.code_embedding.flatten(0, 1), mode="sum")

    @torch.no_grad()
    def generate(
        self,
        talker_hidden: Tensor,
        first: Tensor,
        sample: Callable[[Tensor], Tensor],
        through: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codebooks 1 .. Q - 1 of one frame per document.

        Every step has the same shapes for the same B, and nothing is read back, so that the whole of it can be captured
        in one CUDA graph if `sample` can.

        Args:
            talker_hidden: [B, D].  first: [B, D], embedding of the frame's code of codebook 0.
            sample: logits [B, K] -> chosen codes int64 [B].
            through: `self.through`, compiled.

        Returns:
            codes: int64 [B, Q - 1].  embedding: [B, D], the sum of their embeddings (what the Talker reads next,
            without codebook 0 and text).
        """
        through = through or self.through
        c, batch, device = self.config, len(first), first.device
        past = first.new_zeros(c.layers, 2, batch, c.codebooks, c.kv_heads, c.head_dim)
        rope = self._rope(device)  # [Q, head_dim / 2]
        turns = torch.stack([layer.turns(rope) for layer in self._layers()], dim=1)  # [Q, L, 2, H + H_kv, head_dim]
        place = torch.arange(c.codebooks, device=device)
        mask = first.new_zeros(c.codebooks, c.codebooks).masked_fill_(place[:, None] < place, -torch.inf)
        codes = torch.empty(batch, c.codebooks - 1, dtype=torch.int64, device=device)
        total = torch.zeros_like(first)
        x, start = torch.stack([talker_hidden.to(first.dtype), first], dim=1), 0  # [B, 2, D], then [B, 1, D]
        # The first step reads two positions, the Talker's state and code 0; every later one the code just chosen.
        for q in range(c.codebooks - 1):
            now = slice(start, start + x.shape[1])
            hidden = through(x, turns[now], mask[now], past, place[now])
            chosen = sample(self._head(hidden, q))
            embedding = F.embedding(chosen, self.code_embedding[q])
            codes[:, q] = chosen
            total += embedding
            x, start = embedding[:, None], now.stop
        return codes, total

    def through(self, x: Tensor, turns: Tensor, mask: Tensor, past: Tensor, at: Tensor) -> Tensor:
        """All layers for the next positions: x [B, n, D] (see `MTPLayer.next`; `turns` have an axis of layers behind
        their first, `past` before its first) -> [B, D], the last one after the final norm."""
        for i, layer in enumerate(self._layers()):
            x = layer.next(x, turns[:, i], mask, past[i], at)
        return self.norm(x[:, -1])

    def heads_in_int8(self) -> None:
        """Keep `code_head` in 8 bits (see `generation.decoding`)."""
        self.int8_heads = Int8Matrices(self.code_head)
        del self.code_head

    def _head(self, hidden: Tensor, q: int) -> Tensor:
        """Logits of codebook q + 1."""
        return F.linear(hidden, self.code_head[q]) if self.int8_heads is None else self.int8_heads.product(hidden, q)

    def _layers(self) -> list[MTPLayer]:
        return cast(list[MTPLayer], list(self.layers))

    def _rows(self, residuals: Tensor) -> Tensor:
        """Codes of the first n codebooks from 1 on, int64 [F, n] -> their rows in all tables laid end to end, where the
        tables are."""
        residuals = sent(residuals, self.code_embedding.device)
        return residuals + torch.arange(residuals.shape[1], device=residuals.device) * self.config.codebook_size

    def _rope(self, device: torch.device) -> Rotation:
        """cos and sin, each [Q, head_dim / 2]"""
        position = torch.arange(self.config.codebooks, device=device).expand(3, -1)
        return tm_rope(position, (self.config.head_dim // 2, 0, 0), self.config.rope_theta)

    def _check(self, codes: Tensor, width: int) -> None:
        # A code beyond its codebook would silently read the next codebook's row.
        if codes.ndim != 2 or codes.shape[1] != width:
            raise ValueError(f"codes must be [F, {width}], found {list(codes.shape)}")
        if len(codes) and not (int(codes.min()) >= 0 and int(codes.max()) < self.config.codebook_size):
            raise ValueError(
                f"codes must lie in 0..{self.config.codebook_size - 1} (codebook_size - 1), "
                f"found {int(codes.min())} to {int(codes.max())}"
            )

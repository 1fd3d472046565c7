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

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn

from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.decoder import Attention, DenseMLP
from omnitrain.models.layers.norms import RMSNorm
from omnitrain.models.layers.rope import Rotation, tm_rope
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

    def forward(self, x: Tensor, rope: Rotation, past: Tensor | None = None, start: int = 0) -> Tensor:
        """Whole sequences, or with `past` the next positions of sequences whose first ones are known.

        Args:
            x: [B, n, D], positions start .. start + n; n is 1 unless start is 0.
            rope: cos and sin, each [B * n, head_dim / 2].
            past: [2, B, H_kv, Q, head_dim], keys and values of the positions before; those of x are written to it.

        Returns:
            [B, n, D]
        """
        batch, n, _ = x.shape
        projected = self.attention.project(self.attention_norm(x).flatten(0, 1), rope)
        q, k, v = (t.view(batch, n, *t.shape[1:]).transpose(1, 2) for t in projected)  # no einops: 15 steps a frame
        if past is not None:
            past[0, :, :, start : start + n], past[1, :, :, start : start + n] = k, v
            k, v = past[0, :, :, : start + n], past[1, :, :, : start + n]
        causal = past is None or n > 1
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        x = x + self.attention.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


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
        through: Callable[[Tensor, Rotation, Tensor, int], Tensor] | None = None,
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
        c, batch = self.config, len(first)
        past = first.new_empty(c.layers, 2, batch, c.kv_heads, c.codebooks, c.head_dim)
        cos, sin = self._rope(first.device)  # [Q, head_dim / 2]
        codes = torch.empty(batch, c.codebooks - 1, dtype=torch.int64, device=first.device)
        total = torch.zeros_like(first)
        x, start = torch.stack([talker_hidden.to(first.dtype), first], dim=1), 0  # [B, 2, D], then [B, 1, D]
        # The first step reads two positions, the Talker's state and code 0; every later one the code just chosen.
        for q in range(c.codebooks - 1):
            end = start + x.shape[1]
            rope = cos[start:end].repeat(batch, 1), sin[start:end].repeat(batch, 1)
            hidden = (through or self.through)(x, rope, past, start)
            codes[:, q] = sample(F.linear(hidden, self.code_head[q]))
            embedding = F.embedding(codes[:, q], self.code_embedding[q])
            total += embedding
            x, start = embedding[:, None], end
        return codes, total

    def through(self, x: Tensor, rope: Rotation, past: Tensor, start: int) -> Tensor:
        """All layers for the next positions: x [B, n, D] (see `MTPLayer`; past has a layer axis before its others)
        -> [B, D], the last one after the final norm."""
        for layer, known in zip(self.layers, past, strict=True):
            x = layer(x, rope, known, start)
        return self.norm(x[:, -1])

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

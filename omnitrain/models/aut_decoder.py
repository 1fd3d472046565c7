"""AuT as it is trained: the audio encoder with a text decoder that listens to it (Qwen3-Omni report section 2.2).

An attention encoder-decoder. What is to be done (transcribe, translate, name the sound) and in which language is said
in words, by the prompt that the decoder reads before it writes. Of the trained model only the encoder is kept.

Names of the decoder's parameters are those of Whisper's decoder in `transformers`, with whose numbers it is compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omnitrain.models.aut import AuTEncoder, sinusoids
from omnitrain.models.layers.attention import documents, varlen_attention
from omnitrain.models.layers.checkpointing import run
from omnitrain.models.layers.ctc import ByteHead
from omnitrain.models.layers.decoder import KVCache
from omnitrain.models.layers.precision import residual
from omnitrain.models.layers.transfer import sent
from omnitrain.models.sizes import AuTDecoderConfig, AuTModelConfig
from omnitrain.vocabulary import AUDIO, TEXT


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the decoder listens to, of B documents end to end.

    keys, values: of each layer, [T, heads, head_dim].  cu_seqlens: int32 [B + 1], the documents' borders in them.
    longest: no document has more features than that; None: not known (see `varlen_attention`).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cu_seqlens: Tensor
    longest: int | None = None


@dataclass(frozen=True, kw_only=True)
class AuTOutput:
    """hidden [N, D]: after the final norm, 0 where a recording stands.  encoded [T, D]: the encoder's features, of
    which document b has the rows from cu_seqlens_audio[b] to cu_seqlens_audio[b + 1], int32 [B + 1]."""

    hidden: Tensor
    encoded: Tensor
    cu_seqlens_audio: Tensor


class Borders(NamedTuple):
    """Of documents in queries and in keys: `cu_seqlens` and how long the longest one is (see `varlen_attention`)."""

    queries: Tensor
    longest: int | None
    keys: Tensor
    longest_key: int | None


class DecoderAttention(nn.Module):
    """Multi-head attention of the decoder. Keys have no bias: it would add the same to all scores of a query."""

    def __init__(self, c: AuTDecoderConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.d_model, c.d_model)
        self.k_proj = nn.Linear(c.d_model, c.d_model, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.d_model)
        self.out_proj = nn.Linear(c.d_model, c.d_model)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> keys and values, each [T, heads, head_dim]"""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, borders: Borders, *, causal: bool) -> Tensor:
        """Queries x [N, D], keys and values [M, heads, head_dim] -> [N, D]"""
        q = self._heads(self.q_proj(x))
        y = varlen_attention(
            q, keys, values, borders.queries, causal=causal, longest=borders.longest,
            cu_seqlens_key=borders.keys, longest_key=borders.longest_key,
        )  # fmt: skip
        return self.out_proj(rearrange(y, "n h d -> n (h d)"))

    def weights(self, x: Tensor, keys: Tensor) -> Tensor:
        """What `forward` multiplies the values with, of one document and without a mask: how much each of the queries x
        [n, D] looks at each of the keys [T, heads, head_dim], fp32 [heads, n, T]."""
        scores = torch.einsum("nhd,thd->hnt", self._heads(self.q_proj(x)).float(), keys.float())
        return (scores / math.sqrt(keys.shape[-1])).softmax(dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "n (h d) -> n h d", h=self.heads)


class AuTDecoderLayer(nn.Module):
    """x + self-attention(norm x), then x + cross-attention(norm x), then x + mlp(norm x)."""

    def __init__(self, layer: int, c: AuTDecoderConfig) -> None:
        super().__init__()
        self.layer = layer  # its index, from 0: its place in the cache and in the memory
        self.self_attn_layer_norm = nn.LayerNorm(c.d_model)
        self.self_attn = DecoderAttention(c)
        self.encoder_attn_layer_norm = nn.LayerNorm(c.d_model)
        self.encoder_attn = DecoderAttention(c)
        self.final_layer_norm = nn.LayerNorm(c.d_model)
        self.fc1 = nn.Linear(c.d_model, c.ffn)
        self.fc2 = nn.Linear(c.ffn, c.d_model)

    def keys_values(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """What cross-attention looks at: [T, D] -> keys and values, each [T, heads, head_dim]"""
        return self.encoder_attn.keys_values(encoded)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        longest: int | None,
        memory: Memory,
        listeners: tuple[Tensor, int | None],
        cache: KVCache | None,
    ) -> Tensor:
        """[N, D] -> [N, D]; see `AuTDecoder.forward`"""
        normed = self.self_attn_layer_norm(x)
        keys, values = self.self_attn.keys_values(normed)
        borders = Borders(cu_seqlens, longest, cu_seqlens, longest)
        if cache is not None:
            keys, values, borders_key = cache.append(self.layer, keys, values, cu_seqlens)
            borders = Borders(cu_seqlens, longest, borders_key, cache.longest)
        x = x + self.self_attn(normed, keys, values, borders, causal=True)
        heard = memory.keys[self.layer], memory.values[self.layer]
        across = Borders(*listeners, memory.cu_seqlens, memory.longest)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), *heard, across, causal=False)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class AuTDecoder(nn.Module):
    """Text, token by token, over the features of recordings: a pre-norm transformer (Vaswani et al. 2017, arXiv
    1706.03762) with sinusoid positions and one matrix for the embeddings and the output."""

    def __init__(self, config: AuTDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([AuTDecoderLayer(i, config) for i in range(config.layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.activation_checkpointing = False
        self.kept_activations: Collection[str] = ()

    def memory(self, encoded: Tensor, cu_seqlens: Tensor) -> Memory:
        """The keys and values that all layers will look at, made once for a recording: encoded [T, D], the documents'
        borders in it int32 [B + 1], best on the host.

        The encoder's positions begin anew in each second. Here each feature is told its place in the document, without
        which the decoder could not know what was said first.
        """
        starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long(), output_size=len(encoded))
        place = torch.arange(len(encoded), device=encoded.device) - sent(starts, encoded.device)
        encoded = encoded + sinusoids(place, encoded.shape[1]).to(encoded.dtype)
        borders, longest = documents(cu_seqlens, encoded.device)
        keys, values = zip(*(cast(AuTDecoderLayer, layer).keys_values(encoded) for layer in self.layers), strict=True)
        return Memory(keys=keys, values=values, cu_seqlens=borders, longest=longest)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        memory: Memory,
        *,
        listeners: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states [N, D] after the final norm.

        Args:
            input_ids: int64 [N].  positions: int64 [N], each token's place in its document, from 0.
            cu_seqlens: int32 [B + 1], the documents among them; best on the host.
            listeners: int32 [M + 1], which tokens listen to which of the M documents of `memory`: several texts about
                one recording (the beams of a search) stand next to each other in one span. Default: `cu_seqlens`.
            cache: keys and values of the tokens before; the inputs are then the new ones only.
        """
        width = self.config.d_model
        x = self.embed_tokens(input_ids) * math.sqrt(width)
        x = residual(x + sinusoids(positions, width).to(x.dtype), self.layer_norm)
        borders, longest = documents(cu_seqlens, x.device)
        spans = (borders, longest) if listeners is None else (listeners, None)
        for layer in self.layers:
            x = run(
                layer, x, borders, longest, memory, spans, cache,
                checkpointed=self.activation_checkpointing, kept=self.kept_activations,
            )  # fmt: skip
        return self.layer_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[B, D] -> fp32 [B, vocabulary]"""
        return F.linear(hidden, self.embed_tokens.weight).float()


class AuT(nn.Module):
    """Encoder and decoder, and where the configuration says so a CTC head on the encoder.

    It reads the same batches as `OmniModel`: the places of audio features among the tokens are left out of what the
    decoder reads, and their document is what it listens to. The encoder has no projection to a Thinker here.
    """

    def __init__(self, config: AuTModelConfig) -> None:
        super().__init__()
        self.config = config
        self.aut = AuTEncoder(config.encoder)
        del self.aut.proj1, self.aut.proj2  # the Thinker's adapter
        self.decoder = AuTDecoder(config.decoder)
        self.ctc = ByteHead(config.encoder.d_model, config.ctc_slots) if config.ctc_slots else None

    def set_activation_checkpointing(self, parts: Collection[str], kept: Collection[str] = ()) -> None:
        """In which parts (`aut`, `decoder`) activations are computed again in the backward pass, but for what is `kept`
        (`attention`)."""
        self.aut.activation_checkpointing = "aut" in parts
        self.decoder.activation_checkpointing = "decoder" in parts
        self.aut.kept_activations = self.decoder.kept_activations = kept

    def ctc_log_probs(self, encoded: Tensor, cu_seqlens_audio: Tensor) -> list[Tensor]:
        """What `ByteHead` says of each document's features: [T, D] with the documents' borders -> fp32 [slots * T_b,
        257] each. Raises ValueError without a CTC head."""
        if self.ctc is None:
            raise ValueError("the model has no CTC head (model.ctc_slots=0): take timestamps by attention instead")
        return list(self.ctc(encoded).split((cu_seqlens_audio.diff() * self.ctc.slots).tolist()))

    @property
    def output_embedding(self) -> Tensor:
        """[vocabulary, D]: hidden states times it are logits."""
        return self.decoder.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        token_types: Tensor,
        mel: Tensor | None = None,
        mel_lengths: Tensor | None = None,
        patches: Tensor | None = None,
        grid_thw: Tensor | None = None,
        *,
        aut_window_frames: int | None = None,
    ) -> AuTOutput:
        """Hidden states of packed documents; the arguments are `PackedBatch.model_inputs()`, of which TM-RoPE's ids are
        not read. With `cu_seqlens`, `token_types` and `mel_lengths` on the host, nothing is read back from the device.
        Raises ValueError as `listen`."""
        encoded, cu_seqlens_audio = self.listen(
            cu_seqlens, token_types, mel, mel_lengths, grid_thw, aut_window_frames=aut_window_frames
        )
        rows, positions, borders = text_of(cu_seqlens, token_types)
        memory = self.decoder.memory(encoded, cu_seqlens_audio)
        rows, positions = sent(rows, input_ids.device), sent(positions, input_ids.device)
        text = self.decoder(input_ids[rows], positions, borders, memory)
        hidden = text.new_zeros(len(input_ids), text.shape[1]).index_copy(0, rows, text)
        return AuTOutput(hidden=hidden, encoded=encoded, cu_seqlens_audio=cu_seqlens_audio)

    def listen(
        self,
        cu_seqlens: Tensor,
        token_types: Tensor,
        mel: Tensor | None,
        mel_lengths: Tensor | None,
        grid_thw: Tensor | None = None,
        *,
        aut_window_frames: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The encoder's features [T, D] of packed documents, and the documents' borders among them, int32 [B + 1].

        Raises ValueError: a document has no recording, or pictures; the features are not as many as `token_types` has
        places for.
        """
        if grid_thw is not None and len(grid_thw):
            raise ValueError("AuT only hears: choose samples with recordings, as with where={modality: [audio]}")
        counts = _counts(cu_seqlens, token_types == AUDIO)
        deaf = (counts == 0).nonzero()
        if len(deaf) or mel is None or mel_lengths is None:
            raise ValueError(
                f"document {int(deaf[0]) if len(deaf) else 0} of the batch has no recording, and AuT only hears: "
                "choose samples with recordings, as with where={modality: [audio]}"
            )
        encoded = self.aut.encode(mel, mel_lengths, aut_window_frames)
        if int(counts.sum()) != len(encoded):
            raise ValueError(f"token_types has {int(counts.sum())} audio positions for {len(encoded)} features")
        return encoded, _borders(counts)


def text_of(cu_seqlens: Tensor, token_types: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the decoder reads of packed documents: the rows int64 [N], their places in their documents int64 [N] and the
    documents' borders among them int32 [B + 1]."""
    is_text = token_types == TEXT
    counts = _counts(cu_seqlens, is_text)
    borders = _borders(counts)
    rows = is_text.nonzero().squeeze(1)
    starts = borders[:-1].long().repeat_interleave(counts)
    return rows, torch.arange(len(rows), device=rows.device) - starts, borders


def _counts(cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    """How many of each document's positions are in `mask`: int64 [B]."""
    running = F.pad(mask.long().cumsum(0), (1, 0))
    return running[cu_seqlens.long()].diff()


def _borders(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)

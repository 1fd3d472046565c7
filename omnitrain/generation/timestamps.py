"""When each word of a transcript was said: by CTC or by the decoder's cross-attention.

    transcribe(...) -> tokens -> the encoder's features that each belongs to -> seconds -> words

CTC: the likeliest path through the CTC head's symbols that spells the tokens (forced alignment: Graves et al. 2006).
Attention: the likeliest monotonic path through the cross-attention weights of chosen heads (dynamic time warping, as
Whisper does it: Radford et al. 2022).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import forced_align, merge_tokens

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.generation.transcribe import listen
from omnitrain.models.aut_decoder import AuT, AuTDecoderLayer, text_of
from omnitrain.models.layers.ctc import shortest_path
from omnitrain.models.sizes import AuTConfig
from omnitrain.vocabulary import TEXT

Spans = list[tuple[int, int]]
"""Of each token, its first feature and the one after its last. With CTC, of each byte."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word of a transcript, said from `start` to `end` (seconds)."""

    text: str
    start: float
    end: float


@torch.no_grad()
def word_times(
    model: AuT,
    batch: PackedBatch,
    texts: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    *,
    by: Literal["ctc", "attention"] = "ctc",
) -> list[list[Word] | None]:
    """The words of texts about the documents of `batch`, with their times in the documents' recordings; None for a text
    that CTC cannot align, since its recording has fewer slots than the text has bytes.

    Args:
        batch: prompts, as for `transcribe`.
        texts: their tokens, without those that stand for no text.
        decode: tokens to text (`ChatTokenizer.decode`).
        by: the way; "ctc" needs a model with a CTC head.

    Raises ValueError: "ctc" without such a head.
    """
    batch = batch.to(model.output_embedding.device)
    if by == "ctc":
        encoded, borders = listen(model, batch)
        heard = model.ctc_log_probs(encoded, borders)
        texts, decode = [list(decode(text).encode()) for text in texts], _of_bytes
        spans = [
            _of_features(ctc_spans(log_probs, text), model.config.ctc_slots)
            for log_probs, text in zip(heard, texts, strict=True)
        ]
    else:
        maps = cross_attention_maps(model, with_texts(batch, texts))
        spans = [attention_spans(_of_tokens(m, len(text))) for m, text in zip(maps, texts, strict=True)]
    times = document_times(model, batch)
    return [
        None if of_text is None else words(text, of_text, seconds, decode)
        for text, of_text, seconds in zip(texts, spans, times, strict=True)
    ]


# --- features to time -------------------------------------------------------------------------------------------------


def feature_times(config: AuTConfig, mel_lengths: Sequence[int]) -> Tensor:
    """When the features of recordings, heard one after another, begin and end: seconds, float64 [T, 2].

    Three convolutions of kernel 3 and stride 2 let feature j of a chunk see the frames 8 j - 7 to 8 j + 7 of the chunk,
    so its centre is frame 8 j, whose own centre is 80 j ms. The border between two features lies half-way between their
    centres; a chunk's first feature begins with the chunk and its last one ends with it. So of the 13 features of a
    second the first takes 40 ms and the others 80 ms.
    """
    times, begin = [], 0
    for frames in mel_lengths:
        for start in range(0, frames, config.chunk_frames):
            size = min(config.chunk_frames, frames - start)
            borders = [0, *(8 * j - 4 for j in range(1, -(-size // 8))), size]
            times += [(begin + start + a, begin + start + b) for a, b in pairwise(borders)]
        begin += frames
    return torch.tensor(times, dtype=torch.float64) / 100


def document_times(model: AuT, batch: PackedBatch) -> list[Tensor]:
    """`feature_times` of each document of `batch`, in whose recordings time starts at 0."""
    assert batch.mel_lengths is not None
    lengths, features = batch.mel_lengths.tolist(), model.aut.output_lengths(batch.mel_lengths).tolist()
    is_audio = (batch.token_types != TEXT).split(batch.cu_seqlens.diff().tolist())
    times, recording = [], 0
    for missing in (int(mask.sum()) for mask in is_audio):
        first = recording
        while missing > 0:
            missing -= features[recording]
            recording += 1
        times.append(feature_times(model.config.encoder, lengths[first:recording]))
    return times


# --- CTC --------------------------------------------------------------------------------------------------------------


def ctc_spans(log_probs: Tensor, tokens: Sequence[int]) -> Spans | None:
    """The features of each token on the likeliest path of CTC: log_probs [T, vocabulary + 1], the blank last. None if
    there is no path, since tokens (and the blanks between equal ones) are more than features."""
    if not tokens:
        return []
    if shortest_path(tokens) > len(log_probs):
        return None
    blank = log_probs.shape[1] - 1
    path, scores = forced_align(log_probs[None], torch.tensor([tokens], device=log_probs.device), blank=blank)
    return [(span.start, span.end) for span in merge_tokens(path[0], scores[0], blank=blank)]


def _of_features(spans: Spans | None, slots: int) -> Spans | None:
    """Spans of slots as spans of the features that these belong to."""
    return spans and [(start // slots, -(-end // slots)) for start, end in spans]


def _of_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode(errors="replace")


# --- cross-attention --------------------------------------------------------------------------------------------------


def with_texts(batch: PackedBatch, texts: Sequence[Sequence[int]]) -> PackedBatch:
    """`batch` with the tokens of `texts` behind its documents; nothing in it is to be predicted."""
    device = batch.input_ids.device
    lengths = batch.cu_seqlens.diff().tolist()

    def joined(parts: Sequence[Tensor], added: Sequence[Tensor]) -> Tensor:
        return torch.cat([part for pair in zip(parts, added, strict=True) for part in pair], dim=-1)

    tokens = [torch.tensor(text, dtype=torch.int64, device=device) for text in texts]
    sizes = torch.tensor([0, *(n + len(text) for n, text in zip(lengths, texts, strict=True))])
    input_ids = joined(batch.input_ids.split(lengths), tokens)
    places = [
        torch.arange(n, n + len(text), device=device).expand(3, -1) for n, text in zip(lengths, texts, strict=True)
    ]
    return replace(
        batch,
        input_ids=input_ids,
        token_types=joined(
            batch.token_types.split(lengths), [torch.full_like(t, TEXT).to(batch.token_types) for t in tokens]
        ),
        position_ids=joined(batch.position_ids.split(lengths, dim=1), places),
        labels=torch.full_like(input_ids, IGNORE),
        cu_seqlens=sizes.cumsum(0).to(batch.cu_seqlens),
    )


@torch.no_grad()
def cross_attention_maps(model: AuT, batch: PackedBatch, *, aut_window_frames: int | None = None) -> list[Tensor]:
    """How the text tokens of each document look at its features: fp32 [layers, heads, text tokens, features] of each.

    Row i is what token i looks at while token i + 1 is predicted. The fused attention kernels tell no weights: these
    are computed beside them.
    """
    batch = batch.to(model.output_embedding.device)
    encoded, heard = model.listen(
        batch.cu_seqlens, batch.token_types, batch.mel, batch.mel_lengths, aut_window_frames=aut_window_frames
    )
    rows, positions, cu_seqlens = text_of(batch.cu_seqlens, batch.token_types)
    layers = [cast(AuTDecoderLayer, layer) for layer in model.decoder.layers]
    queries: list[Tensor] = []  # [N, D] of each layer
    hooks = [
        layer.encoder_attn.register_forward_pre_hook(lambda _, inputs: queries.append(inputs[0])) for layer in layers
    ]
    memory = model.decoder.memory(encoded, heard)
    try:
        model.decoder(batch.input_ids[rows], positions, cu_seqlens, memory)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [
        [
            layer.encoder_attn.weights(x, key)
            for x, key in zip(q.split(cu_seqlens.diff().tolist()), keys.split(heard.diff().tolist()), strict=True)
        ]
        for layer, q, keys in zip(layers, queries, memory.keys, strict=True)
    ]
    return [torch.stack(of_layers) for of_layers in zip(*maps, strict=True)]


def _of_tokens(attention: Tensor, tokens: int) -> Tensor:
    """Of `cross_attention_maps`, the rows that predict the last `tokens` tokens, and the row of the last one, which
    predicts the end."""
    return attention[:, :, attention.shape[2] - tokens - 1 :]


def attention_spans(attention: Tensor, heads: Sequence[tuple[int, int]] | None = None) -> Spans:
    """The features of each of n tokens, from the attention [layers, heads, n + 1, T] of the steps that predict them and
    the end of the text.

    Each head's weights are normalised over the steps (mean 0, deviation 1), so that features that all steps look at
    count for nothing, and the heads' mean is the gain of a feature for a step. `heads`: (layer, head) of those that
    count; default: all of the upper half of the layers. Consecutive tokens may share a feature.
    """
    chosen = attention[len(attention) // 2 :].flatten(0, 1)
    if heads is not None:
        chosen = torch.stack([attention[layer, head] for layer, head in heads])
    deviation, mean = torch.std_mean(chosen, dim=1, keepdim=True, unbiased=False)
    gain = ((chosen - mean) / deviation.clamp(min=1e-6)).mean(dim=0)
    steps, features = time_warping(-gain.double().cpu().numpy())
    return [(int(features[steps == i][0]), int(features[steps == i][-1]) + 1) for i in range(len(gain) - 1)]


def time_warping(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dynamic time warping (Sakoe and Chiba 1978): the cheapest path through cost [n, m] from its first to its last
    entry, by steps of (1, 1), (1, 0) and (0, 1). Returns its rows and columns, int64 [length] each."""
    n, m = cost.shape
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for i in range(n):
        before = np.minimum(total[i, :-1], total[i, 1:])  # the step from the row above, straight or aslant
        for j in range(m):
            total[i + 1, j + 1] = cost[i, j] + min(before[j], total[i + 1, j])
    i, j, path = n, m, []
    while i and j:
        path.append((i - 1, j - 1))
        steps = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        i, j = min(steps, key=lambda place: total[place])
    rows, columns = np.array(path[::-1], dtype=np.int64).T
    return rows, columns


# --- words ------------------------------------------------------------------------------------------------------------


def words(tokens: Sequence[int], spans: Spans, times: Tensor, decode: Callable[[Sequence[int]], str]) -> list[Word]:
    """Tokens with the features of each, whose times are [T, 2] seconds, as words: what stands between spaces, and of
    scripts that write none, every character."""
    found: list[Word] = []
    before = " "  # the character before
    for text, first, last in _pieces(tokens, decode):
        start, end = float(times[spans[first][0], 0]), float(times[spans[last][1] - 1, 1])
        begins = _stands_alone(text[0]) or (_stands_alone(before) and text[0].isalnum())
        if begins or before.isspace() or text[0].isspace():
            found += [Word(text=text.strip(), start=start, end=end)] if text.strip() else []
        else:
            found[-1] = Word(text=found[-1].text + text.rstrip(), start=found[-1].start, end=end)
        before = text[-1]
    return found


def _pieces(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[tuple[str, int, int]]:
    """Text, first and last token of the shortest runs of `tokens` that are whole characters."""
    pieces, first = [], 0
    for last in range(len(tokens)):
        text = decode(tokens[first : last + 1])
        if text and ("\ufffd" not in text or last + 1 == len(tokens)):
            pieces.append((text, first, last))
            first = last + 1
    return pieces


def _stands_alone(character: str) -> bool:
    """Whether it is a letter of a script without spaces."""
    return character.isalnum() and unicodedata.name(character, "").startswith(
        ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
    )

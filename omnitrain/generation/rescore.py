"""Transcripts by both halves of an AuT: the CTC head proposes texts, the decoder says how likely they are.

    encoder -> CTC -> prefix beam search: n texts -> the best of  w log p(text; CTC) + (1 - w) log p(text; decoder)

CTC cannot make up words that nobody said, and the decoder knows how words are spelled: hybrid decoding (Watanabe et al.
2017, IEEE JSTSP 11(8)) in two passes (attention rescoring: Zhang et al. 2020, arXiv 2012.05481).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.transcribe import listen
from omnitrain.models.aut_decoder import AuT, text_of
from omnitrain.models.layers.cross_entropy import chunked_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Rescoring:
    """Attributes:
    ctc_weight: w; 1: the decoder is not asked.
    width: texts that CTC keeps, and proposes.
    symbols: of each step, so many of the likeliest are tried.
    """

    ctc_weight: float = 0.5
    width: int = 8
    symbols: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.ctc_weight <= 1:
            raise ValueError(f"ctc_weight is {self.ctc_weight}: must lie between 0 and 1")
        if self.width < 1 or self.symbols < 1:
            raise ValueError(f"width is {self.width} and symbols {self.symbols}: both must be at least 1")


def prefix_beam_search(log_probs: Tensor, width: int, symbols: int) -> list[tuple[tuple[int, ...], float]]:
    """The likeliest texts, best first, with log p of all their paths that the search has seen (Graves 2012, section
    7.5.3; Hannun et al. 2014, arXiv 1408.2873, algorithm 1): log_probs [T, V + 1] with the blank last."""
    blank = log_probs.shape[-1] - 1
    top = log_probs.topk(min(symbols, blank + 1), dim=-1)
    never = -math.inf
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, never)}  # log p: ends with a blank, with a symbol
    for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        found: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [never, never])
        for text, (in_blank, in_symbol) in beams.items():
            either = _log_add(in_blank, in_symbol)
            for symbol, log_p in zip(ids, values, strict=True):
                if symbol == blank:
                    found[text][0] = _log_add(found[text][0], either + log_p)
                elif text and text[-1] == symbol:
                    found[text][1] = _log_add(found[text][1], in_symbol + log_p)  # the same one, longer
                    longer = found[*text, symbol]
                    longer[1] = _log_add(longer[1], in_blank + log_p)
                else:
                    longer = found[*text, symbol]
                    longer[1] = _log_add(longer[1], either + log_p)
        best = sorted(found.items(), key=lambda one: _log_add(*one[1]), reverse=True)[:width]
        beams = {
            text: (in_blank, in_symbol) for text, (in_blank, in_symbol) in best if max(in_blank, in_symbol) > never
        }
    return [(text, _log_add(*parts)) for text, parts in beams.items()]


def _log_add(a: float, b: float) -> float:
    """log(exp a + exp b)"""
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


@torch.no_grad()
def rescored(
    model: AuT,
    batch: PackedBatch,
    encode: Callable[[str], list[int]],
    stop_id: int,
    rescoring: Rescoring,
    *,
    aut_window_frames: int | None = None,
) -> list[str]:
    """The transcript of every document of `batch`, which is a prompt about a recording.

    Args:
        encode: text to tokens (`ChatTokenizer.encode`).  stop_id: the token that ends an answer.
        aut_window_frames: attention window of the encoder, default the configuration's.

    Raises ValueError: a model without a CTC head, a document without a recording (`AuT.listen`) or without text.
    """
    batch = batch.to(model.output_embedding.device)
    encoded, borders = listen(model, batch, aut_window_frames)
    proposed = []
    for log_probs in model.ctc_log_probs(encoded, borders):
        texts: dict[str, float] = {}  # bytes that are no UTF-8 are left out, which may make two texts one
        for symbols, log_p in prefix_beam_search(log_probs.cpu(), rescoring.width, rescoring.symbols):
            texts.setdefault(bytes(symbols).decode(errors="ignore"), log_p)
        proposed.append(texts)
    if rescoring.ctc_weight == 1:
        return [next(iter(texts)) for texts in proposed]
    answers = [[[*encode(text), stop_id] for text in texts] for texts in proposed]
    judged = _decoder_log_probs(model, batch, encoded, borders, answers)
    w = rescoring.ctc_weight
    return [
        max(zip(texts, log_probs, strict=True), key=lambda one: w * texts[one[0]] + (1 - w) * one[1])[0]
        for texts, log_probs in zip(proposed, judged, strict=True)
    ]


def _decoder_log_probs(
    model: AuT, batch: PackedBatch, encoded: Tensor, borders: Tensor, answers: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """log p of each of the `answers` to each document of `batch`, by the decoder."""
    device = encoded.device
    rows, _, cu_seqlens = text_of(batch.cu_seqlens, batch.token_types)
    prompts = [part.tolist() for part in batch.input_ids[rows].split(cu_seqlens.diff().tolist())]
    if not all(prompts):
        raise ValueError(f"document {prompts.index([])} has no text; a prompt needs at least one token")
    ids, labels, positions, lengths, listeners = [], [], [], [], [0]
    for prompt, of_document in zip(prompts, answers, strict=True):
        for answer in of_document:
            read = [*prompt, *answer[:-1]]
            ids += read
            labels += [-100] * (len(prompt) - 1) + list(answer)
            positions += range(len(read))
            lengths.append(len(read))
        listeners.append(len(ids))
    starts = torch.tensor([0, *lengths], device=device).cumsum(0)
    spans = (starts.to(torch.int32), torch.tensor(listeners, dtype=torch.int32, device=device))
    hidden = model.decoder(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        spans[0],
        model.decoder.memory(encoded, borders),
        listeners=spans[1],
    )
    nll = chunked_cross_entropy(hidden, model.output_embedding, torch.tensor(labels)).nll
    found = iter([-float(part.sum()) for part in nll.detach().split(lengths)])
    return [[next(found) for _ in of_document] for of_document in answers]

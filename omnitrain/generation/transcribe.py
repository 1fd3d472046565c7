"""What AuT writes about recordings: greedily, by sampling, or by a beam search.

    batch of prompts -> encoder, once -> texts that listen to their recordings, one token per text and step

All texts about a recording (the hypotheses of a search) share its keys and values. A text that is done leaves the
batch; nothing is padded, so a recording's tokens do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.cache import PackedKVCache
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.text import GREEDY, seeded, write
from omnitrain.models.aut_decoder import AuT, AuTDecoder, Memory, text_of
from omnitrain.models.layers.ctc import best_path


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """The likeliest text that a beam search finds.

    Attributes:
        width: hypotheses that are kept of each recording.
        length_penalty: of a text of n tokens, log p / n^length_penalty counts, as in `transformers`. A sum of
            logarithms falls with every token, so 0 prefers short texts, 1 counts the mean, more prefers long ones.
        max_new_tokens: at most this many tokens per text.
    """

    width: int = 4
    length_penalty: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}; a beam holds at least 1 hypothesis")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


def listen(model: AuT, batch: PackedBatch, aut_window_frames: int | None = None) -> tuple[Tensor, Tensor]:
    """`AuT.listen` to the recordings of `batch`, which is on the model's device."""
    media = batch.mel, batch.mel_lengths, batch.grid_thw
    return model.listen(batch.cu_seqlens, batch.token_types, *media, aut_window_frames=aut_window_frames)


@torch.no_grad()
def transcribe(
    model: AuT,
    batch: PackedBatch,
    decoding: Decoding | BeamSearch = GREEDY,
    *,
    stop_ids: Iterable[int] = (),
    seeds: Sequence[int] | None = None,
    aut_window_frames: int | None = None,
) -> list[list[int]]:
    """Continue the text of every document of `batch`, which is a prompt about a recording. Returns the new tokens of
    every document, a stop token included.

    Args:
        model: text is written on the model's device, in its precision.
        batch: prompts (`SampleEncoder.encode_prompt`) packed end to end.
        decoding: of which a `BeamSearch` draws nothing at random.
        stop_ids: a text ends after one of these.
        seeds: one for each document, instead of those that `decoding.seed` gives.
        aut_window_frames: attention window of the encoder, default the configuration's.

    Raises ValueError: a document without a recording (`AuT.listen`) or without text.
    """
    batch = batch.to(model.output_embedding.device)
    encoded, borders = listen(model, batch, aut_window_frames)
    rows, positions, cu_seqlens = text_of(batch.cu_seqlens, batch.token_types)
    prompts = batch.input_ids[rows]
    texts = Transcripts(model.decoder, model.decoder.memory(encoded, borders), prompts, positions, cu_seqlens)
    stop = frozenset(stop_ids)
    if isinstance(decoding, BeamSearch):
        return beam_search(texts, len(cu_seqlens) - 1, decoding, stop)
    generators = seeded(decoding, seeds, len(cu_seqlens) - 1)
    return write(texts, prompts.split(cu_seqlens.diff().tolist()), decoding, generators, stop)


@torch.no_grad()
def ctc_transcribe(model: AuT, batch: PackedBatch, *, aut_window_frames: int | None = None) -> list[str]:
    """What the encoder's CTC head alone hears in every document of `batch`: its best path (Graves et al. 2006). Prompts
    are not read, so it is always the transcript. Raises ValueError without such a head, or as `AuT.listen`."""
    batch = batch.to(model.output_embedding.device)
    encoded, borders = listen(model, batch, aut_window_frames)
    heard = model.ctc_log_probs(encoded, borders)
    return [bytes(best_path(log_probs)).decode(errors="ignore") for log_probs in heard]


class Transcripts:
    """Texts about the recordings of `memory`, of each one to begin with (protocol `generation.text.Texts`).

    Args:
        input_ids, positions: int64 [N], what is written so far.  cu_seqlens: int32 [B + 1], the texts among them.

    Raises ValueError: a text of no token.
    """

    def __init__(
        self, decoder: AuTDecoder, memory: Memory, input_ids: Tensor, positions: Tensor, cu_seqlens: Tensor
    ) -> None:
        lengths = cu_seqlens.diff().long()
        if bool((lengths == 0).any()):
            raise ValueError(f"document {lengths.tolist().index(0)} has no text; a prompt needs at least one token")
        self.decoder, self.memory, self.cache = decoder, memory, PackedKVCache()
        self.position = lengths  # [B], of each text's next token
        self.recording = torch.arange(len(lengths), device=lengths.device)  # [B], which each text is about, rising
        hidden = decoder(input_ids, positions, cu_seqlens, memory, cache=self.cache)
        self.logits = decoder.logits(hidden[cu_seqlens[1:].long() - 1])  # [B, V]

    def keep(self, texts: list[int]) -> None:
        """Go on with these texts (indices, in the order of their recordings; any number of copies)."""
        self.cache.keep(texts)
        self.position, self.recording = self.position[texts], self.recording[texts]

    def step(self, token: Tensor) -> None:
        """Read each text's next token, int64 [B]."""
        borders = torch.arange(len(token) + 1, dtype=torch.int32, device=token.device)
        texts_of = torch.bincount(self.recording, minlength=len(self.memory.cu_seqlens) - 1)
        listeners = F.pad(texts_of.cumsum(0), (1, 0)).to(torch.int32)
        hidden = self.decoder(token, self.position, borders, self.memory, listeners=listeners, cache=self.cache)
        self.logits = self.decoder.logits(hidden)
        self.position = self.position + 1


@dataclass
class _Beam:
    """The hypotheses about one recording: `texts` that go on, all of one length, with their log p, likeliest first, and
    up to `width` that `ended`, with log p / n^length_penalty, best first."""

    search: BeamSearch
    stop: frozenset[int]
    texts: list[list[int]] = field(default_factory=lambda: [[]])
    log_p: list[float] = field(default_factory=lambda: [0.0])
    ended: list[tuple[float, list[int]]] = field(default_factory=list)

    def extend(self, log_probs: Tensor) -> list[int]:
        """Read log p of the next token of each text, [texts, V], and choose those that go on. Returns which text each
        of them extends; the search is over when there is none.

        As in `transformers`: of the likeliest extensions, enough are looked at that `width` of them go on even if all
        stop tokens of all texts are among them. One that ends counts only where it is among the first `width`. Once
        `width` have ended, the search is over when the likeliest that goes on, penalised as it stands, is no better
        than the worst of them.
        """
        width, length = self.search.width, len(self.texts[0]) + 1
        divisor = length**self.search.length_penalty
        total = log_probs + torch.tensor(self.log_p, device=log_probs.device)[:, None]
        likeliest = total.flatten().topk(min(max(2, 1 + len(self.stop)) * width, total.numel()))
        going: list[tuple[int, float, list[int]]] = []
        for rank, (log_p, index) in enumerate(zip(*(x.tolist() for x in likeliest), strict=True)):
            parent, token = divmod(index, log_probs.shape[1])
            text = [*self.texts[parent], token]
            if token not in self.stop and length < self.search.max_new_tokens:
                going.append((parent, log_p, text))
            elif rank < width:
                self.ended.append((log_p / divisor, text))
        self.ended = sorted(self.ended, key=lambda hypothesis: hypothesis[0], reverse=True)[:width]
        going = going[:width]
        if going and len(self.ended) == width and going[0][1] / divisor <= self.ended[-1][0]:
            going = []
        self.log_p, self.texts = [log_p for _, log_p, _ in going], [text for *_, text in going]
        return [parent for parent, *_ in going]


def beam_search(texts: Transcripts, recordings: int, search: BeamSearch, stop: frozenset[int]) -> list[list[int]]:
    """The best text about each of the recordings that `texts` begin: its new tokens, a stop token included."""
    beams = [_Beam(search, stop) for _ in range(recordings)]
    alive = beams
    while alive:
        kept, first = [], 0
        rows = texts.logits.log_softmax(dim=-1).split([len(beam.texts) for beam in alive])
        for beam, log_probs in zip(alive, rows, strict=True):
            kept += [first + parent for parent in beam.extend(log_probs)]
            first += len(log_probs)
        alive = [beam for beam in alive if beam.texts]
        if alive:
            texts.keep(kept)
            token = [text[-1] for beam in alive for text in beam.texts]
            texts.step(torch.tensor(token, device=texts.logits.device))
    return [beam.ended[0][1] for beam in beams]

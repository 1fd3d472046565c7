"""Text generation: several prompts at once, packed, with a key/value cache.

    batch of prompts -> encoders -> prefill (in one piece or several) -> one token per document and step

A document that is done leaves the batch; nothing is padded, so a document's tokens do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.cache import PackedKVCache
from omnitrain.generation.guides import Guide, guided
from omnitrain.generation.sampling import Decoding
from omnitrain.models.layers.decoder import KVCache
from omnitrain.models.omni import OmniModel

GREEDY = Decoding()


@torch.no_grad()
def generate(
    model: OmniModel,
    batch: PackedBatch,
    decoding: Decoding = GREEDY,
    *,
    seeds: Sequence[int] | None = None,
    stop_ids: Iterable[int] = (),
    on_token: Callable[[int, int], None] | None = None,
    prefill_chunk: int | None = None,
    aut_window_frames: int | None = None,
    on_read: Callable[[int], None] | None = None,
    guides: Sequence[Guide | None] | None = None,
) -> list[list[int]]:
    """Continue every document of `batch`; greedily equal to the greedy `generate` of transformers. Returns the new
    tokens of every document, a stop token included.

    Args:
        model: text is generated on the model's device, in its precision.
        batch: prompts (`SampleEncoder.encode_prompt`) packed end to end.
        seeds: one for each document, instead of those that `decoding.seed` gives.
        stop_ids: a document ends after one of these.
        on_token: called as on_token(document, token) as soon as a token is chosen.
        prefill_chunk: prompts are read at most so many tokens per document at a time, which bounds the memory of
            long ones; default: in one piece. The result is the same.
        aut_window_frames: attention window of the audio encoder; default: the configuration's.
        on_read: called with the number of prompt tokens that were read, after each such piece.
        guides: of each document, what its next tokens can be.

    Raises ValueError: for a nonsensical option or an empty prompt, naming it.
    """
    generators = seeded(decoding, seeds, len(batch.cu_seqlens) - 1)
    batch = batch.to(model.thinker.embed_tokens.weight.device)
    reading = {"chunk": prefill_chunk, "aut_window_frames": aut_window_frames, "on_read": on_read}
    texts = Answers(model, batch, reading)
    prompts = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
    return write(texts, prompts, decoding, generators, frozenset(stop_ids), on_token, guides)


class Texts(Protocol):
    """Texts that a model is writing, with what it has read of each."""

    logits: Tensor
    """[B, V], of each text's next token."""

    def keep(self, texts: list[int]) -> None:
        """Go on with these texts (indices) alone, in this order."""
        ...

    def step(self, token: Tensor) -> None:
        """Read each text's next token, int64 [B]."""
        ...


class Answers:
    """Of a Thinker (protocol `Texts`). `reading`: options of `read_prompts`."""

    def __init__(self, model: OmniModel, batch: PackedBatch, reading: Mapping[str, Any]) -> None:
        self.model, self.cache = model, PackedKVCache()
        hidden, _ = read_prompts(model, batch, self.cache, **reading)  # [B, D]
        self.logits = model.thinker.logits(hidden)
        self.position = next_positions(batch)  # [B]

    def keep(self, texts: list[int]) -> None:
        self.cache.keep(texts)
        self.position = self.position[texts]

    def step(self, token: Tensor) -> None:
        hidden = step(self.model, token, self.position, self.cache)
        self.logits = self.model.thinker.logits(hidden)
        self.position = self.position + 1


def seeded(decoding: Decoding, seeds: Sequence[int] | None, documents: int) -> list[torch.Generator]:
    """Each document's generator, from its seed or from `decoding.seed`. Raises ValueError: not a seed for each."""
    seeds = [decoding.seed + i for i in range(documents)] if seeds is None else seeds
    if len(seeds) != documents:
        raise ValueError(f"{len(seeds)} seeds for {documents} prompts; give one for each")
    return [torch.Generator().manual_seed(s) for s in seeds]


def write(
    texts: Texts,
    prompts: Sequence[Tensor],
    decoding: Decoding,
    generators: Sequence[torch.Generator],
    stop: frozenset[int],
    on_token: Callable[[int, int], None] | None = None,
    guides: Sequence[Guide | None] | None = None,
) -> list[list[int]]:
    """Write `texts` token by token; what of `generate` this is for, is explained there. `prompts`: int64 [n] of each,
    whose tokens count as repeated."""
    occurred = None  # bool [B, V], tokens of each document so far
    if decoding.repetition_penalty != 1:
        occurred = torch.stack([occurring(prompt, texts.logits.shape[1]) for prompt in prompts])
    new: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    while alive:
        logits = texts.logits if guides is None else guided(texts.logits, [guides[b] for b in alive])
        token = decoding.choose(logits, occurred, [generators[b] for b in alive])  # [B]
        for document, index in zip(alive, token.tolist(), strict=True):
            new[document].append(index)
            if guides is not None and (guide := guides[document]) is not None:
                guide.wrote(index)
            if on_token is not None:
                on_token(document, index)
        going = [i for i, b in enumerate(alive) if new[b][-1] not in stop and len(new[b]) < decoding.max_new_tokens]
        if occurred is not None:
            occurred.scatter_(1, token[:, None], True)
        if len(going) < len(alive):
            alive = [alive[i] for i in going]
            if not alive:
                break
            texts.keep(going)
            token = token[going]
            occurred = None if occurred is None else occurred[going]
        texts.step(token)
    return new


@torch.no_grad()
def read_prompts(
    model: OmniModel,
    batch: PackedBatch,
    cache: KVCache,
    *,
    chunk: int | None = None,
    aut_window_frames: int | None = None,
    on_read: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the prompts into `cache`, at most `chunk` tokens of each document per pass. Returns hidden [B, D], of each
    document's last token (times the head = logits of its next one), and accept_hidden [N, D], what the Talker hears.
    Raises ValueError if a document has no tokens, or `chunk` is not positive."""
    lengths = batch.cu_seqlens.diff().tolist()
    if 0 in lengths:
        raise ValueError(f"document {lengths.index(0)} has no tokens; a prompt needs at least one")
    media = batch.mel, batch.mel_lengths, batch.patches, batch.grid_thw
    x, visual_mask, deepstack = model.embed(
        batch.input_ids, batch.token_types, *media, aut_window_frames=aut_window_frames
    )
    accept_hidden = torch.empty_like(x)
    visual_index = None if visual_mask is None else visual_mask.long().cumsum(0) - 1  # row in the deepstack features
    for rows, borders in passes(batch.cu_seqlens, chunk):
        mask, levels = None, None
        if visual_mask is not None and visual_index is not None and deepstack is not None:
            mask = visual_mask[rows]
            levels = [level[visual_index[rows[mask]]] for level in deepstack]
        out = model.thinker(x[rows], batch.position_ids[:, rows], borders, mask, levels, cache)
        x[rows], accept_hidden[rows] = out.hidden, out.accept_hidden  # what was read of x is not read again
        if on_read is not None:
            on_read(len(rows))
    return x[batch.cu_seqlens[1:] - 1], accept_hidden


def passes(cu_seqlens: Tensor, chunk: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut packed documents so that each gives at most `chunk` positions to a pass (None: all of them). Raises
    ValueError if `chunk` is not positive.

    Yields:
        rows: int64 [n], the positions of this pass.  borders: int32 [B + 1]; a document that has given all is empty.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"prefill_chunk is {chunk}; it must be positive, or None for one piece")
    starts, lengths = cu_seqlens[:-1].tolist(), cu_seqlens.diff().tolist()
    for done in range(0, max(lengths), chunk or max(lengths)):
        sizes = [max(min(chunk or n, n - done), 0) for n in lengths]
        rows = [torch.arange(s + done, s + done + n) for s, n in zip(starts, sizes, strict=True)]
        borders = torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32)
        yield torch.cat(rows).to(cu_seqlens.device), borders.to(cu_seqlens.device)


@torch.no_grad()
def step(model: OmniModel, token: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """One more token per document: token int64 [B], position [B] (the three ids of text are equal) -> hidden [B, D]."""
    borders = torch.arange(len(token) + 1, dtype=torch.int32, device=token.device)
    x = model.thinker.embed_tokens(token)
    return model.thinker(x, position.expand(3, -1), borders, cache=cache).hidden


def next_positions(batch: PackedBatch) -> Tensor:
    """The id of each document's next token, [B]: one after its largest so far."""
    parts = batch.position_ids.split(batch.cu_seqlens.diff().tolist(), dim=1)
    return torch.stack([part.max() + 1 for part in parts])


def occurring(ids: Tensor, vocab_size: int) -> Tensor:
    """Which tokens occur in ids [n]: bool [V]."""
    occurred = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
    occurred[ids] = True
    return occurred

"""Text generation: several prompts at once, packed, with a key/value cache.

    batch of prompts -> encoders -> prefill (in one piece or several) -> one token per document and step

A document that is done leaves the batch; nothing is padded, so a document's tokens do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.cache import PackedKVCache
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
    on_read: Callable[[int], None] | None = None,
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
        on_read: called with the number of prompt tokens that were read, after each such piece.

    Raises ValueError: for a nonsensical option or an empty prompt, naming it.
    """
    documents = len(batch.cu_seqlens) - 1
    seeds = [decoding.seed + i for i in range(documents)] if seeds is None else seeds
    if len(seeds) != documents:
        raise ValueError(f"{len(seeds)} seeds for {documents} prompts; give one for each")
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    stop = frozenset(stop_ids)

    batch = batch.to(model.thinker.embed_tokens.weight.device)
    cache = PackedKVCache()
    hidden, _ = read_prompts(model, batch, cache, chunk=prefill_chunk, on_read=on_read)  # [B, D]
    position = next_positions(batch)  # [B]
    occurred = None  # bool [B, V], tokens of each document so far
    if decoding.repetition_penalty != 1:
        prompts = batch.input_ids.split(batch.cu_seqlens.diff().tolist())
        occurred = torch.stack([occurring(prompt, model.config.thinker.vocab_size) for prompt in prompts])

    new: list[list[int]] = [[] for _ in range(documents)]
    alive = list(range(documents))
    while alive:
        token = decoding.choose(model.thinker.logits(hidden), occurred, [generators[b] for b in alive])  # [B]
        for document, index in zip(alive, token.tolist(), strict=True):
            new[document].append(index)
            if on_token is not None:
                on_token(document, index)
        going = [i for i, b in enumerate(alive) if new[b][-1] not in stop and len(new[b]) < decoding.max_new_tokens]
        if occurred is not None:
            occurred.scatter_(1, token[:, None], True)
        if len(going) < len(alive):
            alive = [alive[i] for i in going]
            if not alive:
                break
            cache.keep(going)
            token, position = token[going], position[going]
            occurred = None if occurred is None else occurred[going]
        hidden = step(model, token, position, cache)
        position = position + 1
    return new


@torch.no_grad()
def read_prompts(
    model: OmniModel,
    batch: PackedBatch,
    cache: KVCache,
    *,
    chunk: int | None = None,
    on_read: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the prompts into `cache`, at most `chunk` tokens of each document per pass. Returns hidden [B, D], of each
    document's last token (times the head = logits of its next one), and accept_hidden [N, D], what the Talker hears.
    Raises ValueError if a document has no tokens, or `chunk` is not positive."""
    lengths = batch.cu_seqlens.diff().tolist()
    if 0 in lengths:
        raise ValueError(f"document {lengths.index(0)} has no tokens; a prompt needs at least one")
    media = batch.mel, batch.mel_lengths, batch.patches, batch.grid_thw
    x, visual_mask, deepstack = model.embed(batch.input_ids, batch.token_types, *media)
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

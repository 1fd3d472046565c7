"""Keys and values of what the Thinker has read, for documents of any lengths, without padding.

Each layer has one growing table of rows. New rows are written at its end in the order in which they come; which
document a row belongs to is kept beside the table, and reading puts the rows of each document together. So prefill in
pieces, single steps and documents that end at different times all are the same operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class PackedKVCache:
    """The cache that `Thinker.forward(..., cache=...)` fills and reads (protocol `models.layers.decoder.KVCache`).

    All layers must be called once per forward pass, with the same `cu_seqlens`. Not differentiable.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []  # per layer [capacity, H_kv, head_dim]
        self._values: list[Tensor] = []
        self._filled: list[int] = []  # rows per layer; during a forward pass the first layers are ahead
        self._rows = 0
        self._document = torch.zeros(0, dtype=torch.int64)  # [rows], on the CPU
        self._order: Tensor | None = None  # rows document by document; None where they already lie so
        self._cu_seqlens = torch.zeros(1, dtype=torch.int32)

    @property
    def lengths(self) -> list[int]:
        """Positions cached per document."""
        return self._cu_seqlens.diff().tolist()

    def append(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add the new positions of every document and return all of them.

        Args:
            layer: index of the decoder layer, from 0.
            key, value: [N, H_kv, head_dim], new positions, documents end to end; keys are already rotated.
            cu_seqlens: int32 [B + 1], borders of the new positions; a document may have none.

        Returns:
            keys, values: [M, H_kv, head_dim], documents end to end; int32 [B + 1], their borders.
        """
        while layer >= len(self._filled):
            self._keys.append(key.new_empty(0, *key.shape[1:]))
            self._values.append(value.new_empty(0, *value.shape[1:]))
            self._filled.append(0)
        start = self._filled[layer]
        if start == self._rows:  # the first layer of a forward pass
            self._begin(cu_seqlens)
        end = start + len(key)
        self._keys[layer] = _write(self._keys[layer], start, key)
        self._values[layer] = _write(self._values[layer], start, value)
        self._filled[layer] = end
        keys, values = self._keys[layer][:end], self._values[layer][:end]
        if self._order is not None:
            keys, values = keys.index_select(0, self._order), values.index_select(0, self._order)
        return keys, values, self._cu_seqlens

    def keep(self, documents: list[int]) -> None:
        """Forget all documents but these (indices, rising); they are numbered anew from 0."""
        renumbered = torch.full((len(self._cu_seqlens) - 1,), -1, dtype=torch.int64)
        renumbered[documents] = torch.arange(len(documents))
        document = renumbered[self._document]
        kept = (document >= 0).nonzero().squeeze(1)
        for tables in (self._keys, self._values):
            for i, table in enumerate(tables):
                tables[i] = table.index_select(0, kept.to(table.device))
        self._filled = [len(kept)] * len(self._filled)
        self._place(document[kept], len(documents), self._cu_seqlens.device)

    def _begin(self, cu_seqlens: Tensor) -> None:
        new = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff().cpu())
        if self._rows and len(cu_seqlens) != len(self._cu_seqlens):
            raise ValueError(
                f"the cache holds {len(self._cu_seqlens) - 1} documents, cu_seqlens has {len(cu_seqlens) - 1}; give "
                "every document a (possibly empty) span, or call keep() first"
            )
        self._place(torch.cat([self._document, new]), len(cu_seqlens) - 1, cu_seqlens.device)

    def _place(self, document: Tensor, documents: int, device: torch.device) -> None:
        self._document, self._rows = document, len(document)
        in_order = bool((document.diff() >= 0).all())
        self._order = None if in_order else document.argsort(stable=True).to(device)
        counts = torch.bincount(document, minlength=documents)
        self._cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device, torch.int32)


class DocumentKVCache:
    """Keys and values of one document, in tables that are allocated ahead and double when they are full.

    Args:
        capacity: positions that fit before the first doubling.
    """

    def __init__(self, capacity: int = 256) -> None:
        self.capacity = capacity
        self.length = 0  # positions of all layers; set once a pass has begun
        self.keys: list[Tensor] = []  # per layer [capacity, H_kv, head_dim]
        self.values: list[Tensor] = []

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [n, H_kv, head_dim] from position `start` on; all keys and values up to their end, as views."""
        if layer == len(self.keys):
            rows = max(self.capacity, start + len(key))
            self.keys.append(key.new_empty(rows, *key.shape[1:]))
            self.values.append(value.new_empty(rows, *value.shape[1:]))
        end = start + len(key)
        self.keys[layer] = _write(self.keys[layer], start, key)
        self.values[layer] = _write(self.values[layer], start, value)
        return self.keys[layer][:end], self.values[layer][:end]


class JoinedKVCache:
    """Documents with a cache each, read and written together (protocol `models.layers.decoder.KVCache`).

    Documents can so be joined anew for every pass. For one document nothing is copied.
    """

    def __init__(self, caches: Sequence[DocumentKVCache]) -> None:
        self.caches = caches
        self._borders: list[int] = []  # of the new positions of this pass
        self._starts: list[int] = []
        self._cu_seqlens = torch.zeros(1, dtype=torch.int32)

    def append(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `PackedKVCache.append`."""
        if layer == 0:
            self._begin(cu_seqlens)
        if len(self.caches) == 1:
            return *self.caches[0].write(layer, self._starts[0], key, value), self._cu_seqlens
        parts = [
            cache.write(layer, start, key[a:b], value[a:b])
            for cache, start, (a, b) in zip(self.caches, self._starts, pairwise(self._borders), strict=True)
        ]
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys), torch.cat(values), self._cu_seqlens

    def _begin(self, cu_seqlens: Tensor) -> None:
        self._borders = cu_seqlens.tolist()
        if len(self._borders) != len(self.caches) + 1:
            raise ValueError(f"{len(self.caches)} caches for {len(self._borders) - 1} documents; give one to each")
        self._starts = [cache.length for cache in self.caches]
        ends = [0]
        for cache, (a, b) in zip(self.caches, pairwise(self._borders), strict=True):
            cache.length += b - a
            ends.append(ends[-1] + cache.length)
        self._cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(cu_seqlens.device)


def _write(table: Tensor, start: int, rows: Tensor) -> Tensor:
    """`rows` written from row `start` on; the table doubles when it is full, so n steps copy O(n) rows."""
    end = start + len(rows)
    if end > len(table):
        grown = table.new_empty(max(end, 2 * len(table)), *table.shape[1:])
        grown[:start] = table[:start]
        table = grown
    table[start:end] = rows
    return table

"""Keys and values of what the Thinker has read, for documents of any lengths, without padding.

Each layer has one growing table of rows. New rows are written at its end in the order in which they come; which
document a row belongs to is kept beside the table, and reading puts the rows of each document together. So prefill in
pieces, single steps and documents that end at different times all are the same operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


class DocumentKVCache:
    """Keys and values of one document, in tables that are allocated ahead and double when they are full.

    Args:
        capacity: positions that fit before the first doubling.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0  # positions of all layers; set once a pass has begun
        self.keys: list[Tensor] = []  # per layer [capacity, H_kv, head_dim]
        self.values: list[Tensor] = []

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [n, H_kv, head_dim] from position `start` on; all keys and values up to their end, as views."""
        end, read = start + len(key), []
        for tables, rows in ((self.keys, key), (self.values, value)):
            if layer == len(tables):
                tables.append(rows.new_empty(max(self.capacity, end), *rows.shape[1:]))
            table = tables[layer]
            if end > len(table):  # so n steps copy O(n) rows
                table = table.new_empty(max(end, 2 * len(table)), *table.shape[1:])
                table[:start] = tables[layer][:start]
                tables[layer] = table
            table[start:end] = rows
            read.append(table[:end])
        return read[0], read[1]


class PackedKVCache:
    """The cache that `Thinker.forward(..., cache=...)` fills and reads (protocol `models.layers.decoder.KVCache`).

    All layers must be called once per forward pass, in order and with the same `cu_seqlens`. Not differentiable.
    """

    def __init__(self) -> None:
        self._tables = DocumentKVCache()  # of all documents, in the order in which rows came
        self._start = 0  # the first row of this pass
        self._document = torch.zeros(0, dtype=torch.int64)  # [rows], on the CPU
        self.longest = 0
        self._order: Tensor | None = None  # rows document by document; None where they already lie so
        self._cu_seqlens = torch.zeros(1, dtype=torch.int32)

    @property
    def lengths(self) -> list[int]:
        """Positions cached per document."""
        return self._cu_seqlens.diff().tolist()

    def append(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `KVCache.append`; a document may have no new positions."""
        if layer == 0:
            self._begin(cu_seqlens)
        keys, values = self._tables.write(layer, self._start, key, value)
        if self._order is not None:
            keys, values = keys.index_select(0, self._order), values.index_select(0, self._order)
        return keys, values, self._cu_seqlens

    def keep(self, documents: list[int]) -> None:
        """These documents (indices) become the documents of the cache, in this order. The others are forgotten; one
        that is named several times, as by a search that goes on from it in several ways, is copied."""
        if documents == list(range(len(self._cu_seqlens) - 1)):
            return
        rows = self._document.argsort(stable=True).split(self.lengths)  # of each document
        kept = torch.cat([rows[i] for i in documents])
        for tables in (self._tables.keys, self._tables.values):
            for layer, table in enumerate(tables):
                tables[layer] = table.index_select(0, kept.to(table.device))
        lengths = torch.tensor([len(rows[i]) for i in documents])
        numbers = torch.arange(len(documents)).repeat_interleave(lengths)
        self._place(numbers, len(documents), self._cu_seqlens.device)

    def _begin(self, cu_seqlens: Tensor) -> None:
        self._start = len(self._document)
        new = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff().cpu())
        if self._start and len(cu_seqlens) != len(self._cu_seqlens):
            raise ValueError(
                f"the cache holds {len(self._cu_seqlens) - 1} documents, cu_seqlens has {len(cu_seqlens) - 1}; give "
                "every document a (possibly empty) span, or call keep() first"
            )
        self._place(torch.cat([self._document, new]), len(cu_seqlens) - 1, cu_seqlens.device)

    def _place(self, document: Tensor, documents: int, device: torch.device) -> None:
        self._document = document
        in_order = bool((document.diff() >= 0).all())
        self._order = None if in_order else document.argsort(stable=True).to(device)
        counts = torch.bincount(document, minlength=documents)
        self._cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(device, torch.int32)
        self.longest = int(counts.max()) if documents else 0


class JoinedKVCache:
    """Documents with a cache each, read and written together (protocol `models.layers.decoder.KVCache`).

    Documents can so be joined anew for every pass. For one document nothing is copied.
    """

    def __init__(self, caches: Sequence[DocumentKVCache]) -> None:
        self.caches = caches
        self._borders: list[int] = []  # of the new positions of this pass
        self._starts: list[int] = []
        self.longest = 0
        self._cu_seqlens = torch.zeros(1, dtype=torch.int32)

    def append(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `KVCache.append`."""
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
        for cache, (a, b) in zip(self.caches, pairwise(self._borders), strict=True):
            cache.length += b - a
        self.longest = max((cache.length for cache in self.caches), default=0)
        ends = [0, *accumulate(cache.length for cache in self.caches)]
        self._cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(cu_seqlens.device)

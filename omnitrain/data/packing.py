"""Whole samples into packs, end to end, within budgets of tokens, mel frames, patches and codec frames at once.

First-fit over a small window of open packs: a sample goes into the oldest open pack that has room for all it brings.
If none has and the window is full, the fullest pack is closed and handed out (docs/mixing.md). Where packs are
balanced, the work of training on them is bounded too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from omnitrain.data.batch import IGNORE, EncodedSample
from omnitrain.data.settings import Budget
from omnitrain.data.work import PARTS, Balance, Work
from omnitrain.vocabulary import TEXT


@dataclass(frozen=True)
class Item:
    """Tokens `start` to `end` (excluded) of the sample at `position` in the order of source number `source`. The three
    numbers and the source are all that the stream's state keeps of it."""

    source: int
    position: int
    start: int
    end: int
    sample: EncodedSample

    def key(self) -> list[int]:
        return [self.source, self.position, self.start, self.end]


class _Pack:
    def __init__(self, budget: Budget) -> None:
        self.items: list[Item] = []
        self.work = (0.0,) * len(PARTS)
        self._budget, self._used = budget, (0, 0, 0, 0)

    def add(self, item: Item, work: Sequence[float]) -> None:
        self._used = self._with(item.sample)
        self.work = tuple(map(sum, zip(self.work, work, strict=True)))
        self.items.append(item)

    def has_room(self, sample: EncodedSample, work: Sequence[float], most: Sequence[float]) -> bool:
        fits = all(more == 0 or used + more <= bound for used, more, bound in zip(self.work, work, most, strict=True))
        return fits and self._budget.filling(self._with(sample)) <= 1

    def _with(self, sample: EncodedSample) -> tuple[int, ...]:
        return tuple(map(sum, zip(self._used, sample.sizes, strict=True)))

    @property
    def filling(self) -> float:
        return self._budget.filling(self._used)


class FirstFit:
    """Packs of `budget`, at most `window` of them open.

    With `work`, a pack holds no more of it, of any of `PARTS`, than `bounds` says when a sample comes, unless one
    sample alone does: then nothing is added that brings more of the same.
    """

    def __init__(self, budget: Budget, window: int, work: Work | None = None) -> None:
        if window < 1:
            raise ValueError(f"the packing window is {window}; at least one pack must be open")
        self.budget, self.window, self.work = budget, window, work
        self.bounds: tuple[float, ...] = (math.inf,) * len(PARTS)
        self._open: list[_Pack] = []

    def add(self, item: Item) -> list[Item] | None:
        """Place `item`; a pack that had to be closed for it is returned. Raises ValueError: it fits no empty pack."""
        if excess := self.budget.excess(item.sample.sizes):
            raise ValueError(f"sample {item.sample.id!r} fits no pack: {excess}")
        work = self._work(item)
        for pack in self._open:
            if pack.has_room(item.sample, work, self.bounds):
                pack.add(item, work)
                return None
        closed = self.close_fullest() if len(self._open) == self.window else None
        self._open.append(_Pack(self.budget))
        self._open[-1].add(item, work)
        return closed

    def close_fullest(self) -> list[Item] | None:
        """Hand out the fullest open pack (the oldest of equals); None when none is open."""
        if not self._open:
            return None
        fullest = max(self._open, key=self._filling)
        self._open.remove(fullest)
        return fullest.items

    def _filling(self, pack: _Pack) -> float:
        return pack.work[0] / self.bounds[0] if self.work is not None and self.bounds[0] else pack.filling

    def _work(self, item: Item) -> tuple[float, ...]:
        return (0.0,) * len(PARTS) if self.work is None else self.work.of(item.sample)

    def waiting(self) -> list[list[Item]]:
        """What lies in the open packs, oldest pack first."""
        return [list(pack.items) for pack in self._open]

    def restore(self, packs: list[list[Item]]) -> None:
        """Open packs with these contents."""
        self._open = []
        for items in packs:
            self._open.append(_Pack(self.budget))
            for item in items:
                self._open[-1].add(item, self._work(item))


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How samples become packs.

    Attributes:
        window: packs kept open.
        n_bytes: UTF-8 bytes that token ids stand for (`ChatTokenizer.n_bytes`).
        balance: how much work a pack may hold; None: any.
    """

    budget: Budget
    window: int = 8
    n_bytes: Callable[[np.ndarray], int]
    balance: Balance | None = None

    def packer(self) -> FirstFit:
        """An empty one."""
        return FirstFit(self.budget, self.window, None if self.balance is None else self.balance.work)

    def parts(
        self, sample: EncodedSample, start: int = 0, end: int | None = None
    ) -> list[tuple[int, int, EncodedSample]]:
        """Tokens `start` to `end` of `sample` as they are packed: (first token, end, those tokens as a sample), several
        of a document that is too long for a pack, none of anything else that is."""
        end = len(sample) if end is None else end
        whole = cut(sample, start, end, self.n_bytes)
        if not self.budget.excess(whole.sizes):
            return [(start, end, whole)]
        if not is_document(sample):
            return []
        return [(a, b, cut(sample, a, b, self.n_bytes)) for a, b in pieces(start, end, self.budget.tokens)]


def is_document(sample: EncodedSample) -> bool:
    """Text alone, and every token after the first is a target: such a sample may be cut anywhere."""
    return bool((sample.token_types == TEXT).all() and (sample.labels[:-1] != IGNORE).all())


def cut(sample: EncodedSample, start: int, end: int, n_bytes: Callable[[np.ndarray], int]) -> EncodedSample:
    """Tokens `start` to `end` of a document as a sample of its own, with positions from 0. The last token of a piece
    still predicts the first of the next, so that cutting loses no target. `n_bytes`: see `Packing`."""
    if (start, end) == (0, len(sample)):
        return sample
    labels = sample.labels[start:end]
    return replace(
        sample,
        id=f"{sample.id}@{start}:{end}",
        input_ids=sample.input_ids[start:end],
        labels=labels,
        token_types=sample.token_types[start:end],
        position_ids=sample.position_ids[:, : end - start],  # text alone: the three ids count up from 0
        target_bytes=n_bytes(labels[labels != IGNORE]),
    )


def pieces(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """Borders of the pieces, at most `most` tokens each, of tokens `start` to `end` of a document. A last piece of one
    token is left out: the piece before it predicts that token, and it predicts nothing itself."""
    borders = [(a, min(a + most, end)) for a in range(start, end, most)]
    return borders if len(borders) == 1 or borders[-1][1] - borders[-1][0] > 1 else borders[:-1]

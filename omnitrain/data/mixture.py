"""Which sample comes next: order within a source, weights between sources, ranks, worker processes.

Each source is shuffled anew every epoch; rank r of R takes places r, r + R, r + 2R, ... of that endless order. Order
and interleaving are functions of counts: a position in the stream is the number of samples drawn per source, and
resuming is counting on (docs/mixing.md).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import grain
import torch

from omnitrain.data.batch import EncodedSample
from omnitrain.data.sample import BadSample, Sample, Segment
from omnitrain.data.shards import Source
from omnitrain.data.workers import Workers

Encode = Callable[[Sample, Callable[[Segment], bytes]], EncodedSample]
"""Turns a sample and what gives the bytes of its media into numbers (`SampleEncoder`, or its `encode_prompt`)."""


@runtime_checkable
class PlacedEncode(Protocol):
    """Encodes a sample differently at each place of the stream (`augment.AugmentingEncoder`)."""

    def at(self, source: int, position: int) -> Encode: ...


class Schedule(Iterator[int]):
    """Which source gives the next sample, for ever. Integers only, no randomness.

    Tijdeman's solution of the chairman assignment problem ("The chairman assignment problem", Discrete Mathematics 32,
    1980): with n sources of shares w_i, after any k draws source i has given c_i samples with
    |c_i - k w_i| <= 1 - 1 / (2n - 2) < 1, hence less than 2 off in any window.

    Args:
        weights: relative, >= 0 and not all 0. They are read as the decimals they are written as, so 0.1 is a tenth.
        drawn: how often each source was drawn so far under these weights.
    """

    def __init__(self, weights: Sequence[float], drawn: Sequence[int] | None = None) -> None:
        fractions = [Fraction(str(weight)) for weight in weights]
        if not any(fractions) or min(fractions) < 0:
            raise ValueError(f"weights must be >= 0 and not all 0, not {list(weights)}")
        scale = math.lcm(*(fraction.denominator for fraction in fractions))
        self._weights = [int(fraction * scale) for fraction in fractions]
        self._total = sum(self._weights)
        self._active = [i for i, weight in enumerate(self._weights) if weight]
        self.drawn = list(drawn) if drawn is not None else [0] * len(self._weights)
        self._step = sum(self.drawn)

    @property
    def shares(self) -> list[float]:
        return [weight / self._total for weight in self._weights]

    def __next__(self) -> int:
        self._step += 1
        margin = 2 * len(self._active) - 2
        # lag_i = k w_i - c_i in units of 1 / total. Among those that may be drawn (lag >= 1 / margin), take the one
        # whose lag would first reach the bound: the least (1 - 1 / margin - lag_i) / w_i.
        slacks: dict[int, Fraction] = {}
        for i in self._active:
            lag = self._step * self._weights[i] - self.drawn[i] * self._total
            if margin * lag >= self._total:
                slacks[i] = Fraction((margin - 1) * self._total - margin * lag, self._weights[i])
        chosen = min(slacks, key=slacks.__getitem__, default=self._active[0])
        self.drawn[chosen] += 1
        return chosen


@dataclass(frozen=True)
class Pick:
    """Place `position` in the endless shuffled order of source number `source`, which is its sample `index`."""

    source: int
    position: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A pick, fetched: an encoded sample, or why there is none (`bad`: shard, row, id, reason, detail)."""

    pick: Pick
    sample: EncodedSample | None
    bad: dict[str, Any] = field(default_factory=dict)


class Mixture:
    """The endless stream of draws of one rank.

    Args:
        sources: opened sources with unique names.
        seed: of the shuffles.
        rank, world_size: this process of how many.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        encode: Encode | PlacedEncode,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one data source")
        self.names, self.rank, self.world_size = list(sources), rank, world_size
        orders = tuple(_order(name, len(source), seed) for name, source in sources.items())
        self._fetch = _Fetch(tuple(sources.values()), encode, orders)

    def draws(
        self,
        weights: Sequence[float],
        drawn: Sequence[int],
        before: Sequence[int],
        num_workers: int = 0,
        ahead: int = 4,
    ) -> Workers[Draw] | Generator[Draw]:
        """Draws from here on. Call `.close()` on the iterator when done with it: it ends the workers.

        Args:
            drawn: samples drawn per source so far under these `weights`.
            before: samples drawn per source before they came into force.
            num_workers: processes that decode and encode; 0: this one.
            ahead: samples that each worker keeps ready.
        """
        places = _Places(tuple(weights), tuple(drawn), tuple(before), self.rank, self.world_size)
        if num_workers:
            return Workers(self._fetch, places, num_workers, ahead)
        return (self._fetch(place) for place in places)

    def row(self, source: int, position: int, sample_id: str) -> dict[str, Any]:
        """Where the sample at a place lies: source, shard, row, id."""
        return self._fetch.row(Pick(source, position, self.index(source, position)), sample_id)

    def index(self, source: int, position: int) -> int:
        """The sample at place `position` of the source's endless shuffled order."""
        return self._fetch.index(source, position)

    def fetch(self, source: int, position: int) -> Draw:
        """One draw again, in this process."""
        return self._fetch((source, position))

    def once(self) -> Iterator[Draw]:
        """This rank's share of all samples, once, source after source, not shuffled."""
        sizes = map(len, self._fetch.sources)
        everything = (Pick(source, index, index) for source, size in enumerate(sizes) for index in range(size))
        return map(self._fetch.at, islice(everything, self.rank, None, self.world_size))


def _order(name: str, size: int, seed: int) -> Any:
    """A source's endless shuffled order: permutations that are computed, not stored, from seed, name and epoch."""
    seed = zlib.crc32(f"{seed}:{name}".encode())  # sources of equal size differ in order
    return grain.MapDataset.range(size).seed(seed).shuffle().repeat(None)


@dataclass(frozen=True)
class _Places:
    """The places (source, position) that one rank draws from here on, for ever."""

    weights: tuple[float, ...]
    drawn: tuple[int, ...]
    before: tuple[int, ...]
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        schedule = Schedule(self.weights, self.drawn)
        for source in schedule:
            count = self.before[source] + schedule.drawn[source] - 1  # samples of this source drawn before this one
            yield source, self.rank + self.world_size * count


@dataclass(frozen=True)
class _Fetch:
    sources: tuple[Source, ...]
    encode: Encode | PlacedEncode
    orders: tuple[Any, ...]

    def __call__(self, place: tuple[int, int]) -> Draw:
        return self.at(Pick(*place, self.index(*place)))

    def index(self, source: int, position: int) -> int:
        return int(self.orders[source][position])

    def row(self, pick: Pick, sample_id: str) -> dict[str, Any]:
        source = self.sources[pick.source]
        shard, row = source.locate(pick.index)
        return {"source": source.name, "shard": shard, "row": row, "id": sample_id}

    def at(self, pick: Pick) -> Draw:
        source = self.sources[pick.source]
        sample_id = ""
        try:
            sample = source[pick.index]
            sample_id = sample.id
            encode = self.encode
            if isinstance(encode, PlacedEncode):
                encode = encode.at(pick.source, pick.position)
            with one_thread():
                return Draw(pick=pick, sample=encode(sample, source.media_bytes))
        except BadSample as error:
            bad = self.row(pick, sample_id) | {"reason": error.reason, "detail": error.detail}
            return Draw(pick=pick, sample=None, bad=bad)
        except Exception as error:
            error.add_note("while encoding sample {id!r}, row {row} of {shard}".format_map(self.row(pick, sample_id)))
            raise


@contextmanager
def one_thread() -> Generator[None]:
    """Matrix products may round differently on another number of threads; samples must come out the same, bit for bit,
    from a worker and from the main process (which fetches waiting samples again on resume)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

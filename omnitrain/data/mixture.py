"""Which sample comes next: order within a source, weights between sources, ranks, worker processes.

1. Each source is shuffled anew every epoch (Grain's index shuffle: a permutation computed, not stored, from seed and
   epoch). Rank r of R takes places r, r + R, r + 2R, ... of that endless order, so ranks never share a sample within
   an epoch.
2. Sources are interleaved by Tijdeman's solution of the chairman assignment problem ("The chairman assignment problem",
   Discrete Mathematics 32, 1980): with n sources of shares w_i, after any k samples source i has given c_i with
   |c_i - k w_i| <= 1 - 1 / (2n - 2) < 1, hence less than 2 off in any window. Integers only, no randomness.
3. Both are functions of counts. A position in the stream is therefore the number of samples drawn per source, and
   resuming is counting on.
4. Decoding and encoding run in worker processes, which take turns (`workers`). The order is that of zero workers, so
   their number may change between runs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import grain
import torch

from omnitrain.data.batch import EncodedSample
from omnitrain.data.sample import BadSample, Sample, Segment
from omnitrain.data.settings import SourceConfig as SourceConfig
from omnitrain.data.shards import Source
from omnitrain.data.workers import Workers

if TYPE_CHECKING:
    from omnitrain.data.encode import SampleEncoder


class Schedule(Iterator[int]):
    """Which source gives the next sample, for ever.

    After any k draws, |drawn[i] - k * share[i]| < 1 for every source i; in any window of draws, < 2 (module docstring).

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
        chosen, chosen_slack = self._active[0], 0
        if margin:
            # lag_i = k w_i - c_i in units of 1 / total. Among those that may be drawn (lag >= 1 / margin), take the one
            # whose lag would first reach the bound: the least (1 - 1 / margin - lag_i) / w_i.
            best = False
            for i in self._active:
                lag = self._step * self._weights[i] - self.drawn[i] * self._total
                if margin * lag < self._total:
                    continue
                slack = (margin - 1) * self._total - margin * lag
                if not best or slack * self._weights[chosen] < chosen_slack * self._weights[i]:
                    best, chosen, chosen_slack = True, i, slack
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
    bad: dict[str, Any] | None = None


class Mixture:
    """The endless stream of draws of one rank.

    Args:
        sources: opened sources with unique names.
        encode: turns a sample into numbers (`SampleEncoder`, or its `encode_prompt`).
        seed: of the shuffles.
        rank, world_size: this process of how many.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        encode: SampleEncoder | Callable[[Sample, Callable[[Segment], bytes]], EncodedSample],
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not sources:
            raise ValueError("a mixture needs at least one data source")
        self.names = list(sources)
        self.sizes = [len(source) for source in sources.values()]
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._order = _Order(self.names, self.sizes, seed)
        self._fetch = _Fetch(tuple(sources.values()), encode, self._order)

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
            weights: one per source.
            drawn: samples drawn per source so far under these weights.
            before: samples drawn per source before these weights came into force.
            num_workers: processes that decode and encode; 0: this one.
            ahead: samples that each worker keeps ready.
        """
        places = _Places(tuple(weights), tuple(drawn), tuple(before), self.rank, self.world_size)
        if num_workers:
            return Workers(self._fetch, places, num_workers, ahead)
        return (self._fetch(place) for place in places)

    def source(self, source: int) -> Source:
        """Source number `source`."""
        return self._fetch.sources[source]

    def index(self, source: int, position: int) -> int:
        """The sample at place `position` of the source's endless shuffled order."""
        return self._order(source, position)

    def fetch(self, source: int, position: int) -> Draw:
        """One draw again, in this process."""
        return self._fetch((source, position))

    def once(self) -> Iterator[Draw]:
        """This rank's share of all samples, once, source after source, not shuffled."""
        everything = ((source, index) for source, size in enumerate(self.sizes) for index in range(size))
        for number, (source, index) in enumerate(everything):
            if number % self.world_size == self.rank:
                yield self._fetch.at(Pick(source, index, index))


class _Order:
    """Sample index at place `position` of a source's endless shuffled order."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> None:
        self.names, self.sizes, self.seed = tuple(names), tuple(sizes), seed
        self._orders: dict[int, Any] = {}

    def __call__(self, source: int, position: int) -> int:
        if source not in self._orders:
            seed = zlib.crc32(f"{self.seed}:{self.names[source]}".encode())  # sources of equal size differ in order
            self._orders[source] = grain.MapDataset.range(self.sizes[source]).seed(seed).shuffle().repeat(None)
        return int(self._orders[source][position])

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.names, self.sizes, self.seed))


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
    encode: Callable[[Sample, Callable[[Segment], bytes]], EncodedSample]
    order: _Order

    def __call__(self, place: tuple[int, int]) -> Draw:
        return self.at(Pick(*place, self.order(*place)))

    def at(self, pick: Pick) -> Draw:
        source = self.sources[pick.source]
        sample_id = ""
        try:
            sample = source[pick.index]
            sample_id = sample.id
            with one_thread():
                return Draw(pick=pick, sample=self.encode(sample, source.media_bytes))
        except BadSample as error:
            shard, row = source.locate(pick.index)
            bad = {"source": source.name, "shard": shard, "row": row, "id": sample_id}
            return Draw(pick=pick, sample=None, bad=bad | {"reason": error.reason, "detail": error.detail})
        except Exception as error:
            shard, row = source.locate(pick.index)
            error.add_note(f"while encoding sample {sample_id!r}, row {row} of {shard}")
            raise


@contextmanager
def one_thread() -> Generator[None]:
    """Matrix products may round differently on another number of threads; samples must come out the same, bit for bit,
    from a worker and from the main process (which fetches waiting samples again on resume)."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

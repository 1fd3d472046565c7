"""Weights hold in every window, ranks share nothing, and order is a function of counts."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from omnitrain.data.batch import EncodedSample
from omnitrain.data.mixture import Mixture, Schedule
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.settings import SourceConfig


class Memory:
    """A source in memory. Samples whose number is in `bad` cannot be read."""

    def __init__(self, name, n, bad=()):
        self.name, self.n, self.bad = name, n, set(bad)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample("row_invalid", "made to be bad")
        message = Message(role="document", segments=(Segment(type="text", text=f"{self.name} {index}"),))
        return Sample(id=f"{self.name}/{index}", source=self.name, messages=(message,))

    def locate(self, index):
        return f"{self.name}.parquet", index

    def media_bytes(self, segment):
        return b""


def encode(sample, media_bytes):
    n = 4 + sum(sample.id.encode()) % 13
    ids = np.arange(n, dtype=np.int64)
    return EncodedSample(
        id=sample.id,
        source=sample.source,
        task=sample.task,
        modality=sample.modality,
        languages=sample.languages,
        input_ids=ids,
        labels=np.append(ids[1:], -100),
        token_types=np.zeros(n, dtype=np.uint8),
        position_ids=np.broadcast_to(np.arange(n, dtype=np.float32), (3, n)).copy(),
        target_bytes=n - 1,
    )


WEIGHTS = [
    [1],
    [1, 1],
    [0.57, 0.77, 0.82, 0.05, 0.05],  # the general stage of the report
    [0.1, 0.2, 0.7],
    [1 / 3, 2 / 3],
    [1000, 1, 1, 1],
    [3, 0, 2],
    *np.random.default_rng(0).random((4, 7)).tolist(),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: f"{len(weights)}")
def test_weights_hold_on_every_prefix_and_in_every_window(weights):
    total = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / total for weight in weights]
    n, steps = sum(weight > 0 for weight in weights), 3000
    bound = 1 - Fraction(1, 2 * n - 2) if n > 1 else 0
    schedule = Schedule(weights)
    lowest, highest = [Fraction(0)] * len(weights), [Fraction(0)] * len(weights)
    for k in range(1, steps + 1):
        next(schedule)
        for i, share in enumerate(shares):
            off = schedule.drawn[i] - k * share
            assert abs(off) <= bound  # < 1: any prefix
            lowest[i], highest[i] = min(lowest[i], off), max(highest[i], off)
    assert all(high - low < 2 for low, high in zip(lowest, highest, strict=True))  # any window
    assert sum(schedule.drawn) == steps


def test_schedule_continues_from_counts():
    whole = Schedule(WEIGHTS[2])
    picks = [next(whole) for _ in range(500)]
    for stop in (0, 1, 77, 499):
        drawn = [picks[:stop].count(i) for i in range(5)]
        rest = Schedule(WEIGHTS[2], drawn)
        assert [next(rest) for _ in range(500 - stop)] == picks[stop:]


def test_weights_must_make_sense():
    for weights in ([], [0, 0], [1, -1]):
        with pytest.raises(ValueError, match="weights must"):
            Schedule(weights)


def take(mixture, n, weights, num_workers=0):
    nothing = [0] * len(mixture.names)
    draws = mixture.draws(weights, nothing, nothing, num_workers)
    try:
        return [next(draws) for _ in range(n)]
    finally:
        draws.close()


def test_ranks_are_disjoint_and_together_cover_an_epoch():
    sources = {"a": Memory("a", 30), "b": Memory("b", 20)}
    ranks = [take(Mixture(sources, encode, rank=r, world_size=4), 50, [3, 2]) for r in range(4)]
    # 4 x 50 draws: four epochs of 50 samples
    for source, size in enumerate((30, 20)):
        by_place = {d.pick.position: d.pick.index for draws in ranks for d in draws if d.pick.source == source}
        assert sorted(by_place) == list(range(4 * size))
        for epoch in range(4):
            assert sorted(by_place[p] for p in range(epoch * size, (epoch + 1) * size)) == list(range(size))
    counts = [Counter(draw.pick.source for draw in draws) for draws in ranks]
    assert all(count == Counter({0: 30, 1: 20}) for count in counts)


def test_order_depends_on_seed_epoch_and_name():
    def order(seed, name="a"):
        return [d.pick.index for d in take(Mixture({name: Memory(name, 40)}, encode, seed=seed), 80, [1])]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, "b")
    assert order(0)[:40] != order(0)[40:]
    assert order(0)[:40] != sorted(order(0)[:40])


def test_bad_samples_are_told_with_their_place():
    draws = take(Mixture({"a": Memory("a", 5, bad=[3])}, encode), 5, [1])
    (bad,) = [draw.bad for draw in draws if draw.bad]
    assert bad == {
        "source": "a",
        "shard": "a.parquet",
        "row": 3,
        "id": "",
        "reason": "row_invalid",
        "detail": "made to be bad",
    }


def test_other_errors_stop_and_name_the_sample():
    def broken(sample, media_bytes):
        raise FileNotFoundError("media.parquet is missing")

    with pytest.raises(FileNotFoundError) as error:
        take(Mixture({"a": Memory("a", 5)}, broken), 1, [1])
    assert any("a.parquet" in note for note in error.value.__notes__)


def test_limit_spaces_samples_evenly():
    source = SourceConfig(name="a", samples=Memory("a", 10), limit=5).open()
    assert [source[i].id for i in range(len(source))] == ["a/0", "a/2", "a/4", "a/6", "a/8"]
    assert source.locate(1) == ("a.parquet", 2)
    with pytest.raises(ValueError, match="no samples"):
        SourceConfig(name="a", samples=Memory("a", 0)).open()
    with pytest.raises(ValueError, match="needs a path"):
        SourceConfig(name="a").open()

"""The packed stream: resumed equals uninterrupted at every batch, stages, bad samples, splitting."""

from __future__ import annotations

import json
import sys

import cloudpickle
import numpy as np
import pytest
import torch

from omnitrain.data.batch import IGNORE, EncodedSample, PackedBatch
from omnitrain.data.mixture import Mixture
from omnitrain.data.packing import Budget, Packing
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.stream import (
    BadSampleLog,
    FinitePacks,
    PackedStream,
    Stage,
    TooManyBadSamples,
    check_stages,
    planned_mixture,
)
from omnitrain.data.work import Balance, Work

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # worker processes cannot import test modules


class Memory:
    """A source in memory; the text of a sample is its length in tokens and its kind."""

    def __init__(self, name, n, *, kind="chat", lengths=(4, 30), bad=()):
        self.name, self.n, self.kind, self.lengths, self.bad = name, n, kind, lengths, frozenset(bad)

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"reason_{index % 2}", "made to be bad")
        length = int(np.random.default_rng([index, len(self.name)]).integers(*self.lengths))
        message = Message(role="document", segments=(Segment(type="text", text=f"{length} {self.kind}"),))
        return Sample(id=f"{self.name}/{index}", source=self.name, messages=(message,), languages=("en", "fr"))

    def locate(self, index):
        return f"{self.name}.parquet", index

    def media_bytes(self, segment):
        return b""


def encode(sample, media_bytes):
    length, kind = sample.messages[0].segments[0].text.split()
    n = int(length)
    rng = np.random.default_rng(list(sample.id.encode()))
    ids = rng.integers(0, 1000, n)
    return EncodedSample(
        id=sample.id,
        source=sample.source,
        task=sample.task,
        modality="audio" if kind == "sound" else "text",
        languages=sample.languages,
        input_ids=ids,
        labels=np.append(ids[1:], IGNORE) if kind == "document" else np.where(np.arange(n) == n - 2, ids, IGNORE),
        token_types=np.zeros(n, dtype=np.uint8),
        position_ids=np.broadcast_to(np.arange(n, dtype=np.float32), (3, n)).copy(),
        mel=(rng.random((2 * n, 3), dtype=np.float32),) if kind == "sound" else (),
        target_bytes=n - 1,
    )


SOURCES = {
    "chat": Memory("chat", 40, bad=[7]),
    "sound": Memory("sound", 25, kind="sound"),
    "books": Memory("books", 10, kind="document", lengths=(50, 200)),
}
STAGES = [
    Stage(until_tokens=400, weights={"chat": 1, "sound": 1}, max_tokens=48),
    Stage(until_tokens=1200, max_tokens=32),  # smaller: waiting samples are packed, cut or skipped anew
    Stage(),
]


def stream(num_workers=0, state=None, sources=SOURCES, rank=0, world_size=1, **changes):
    budget, window = changes.pop("budget", Budget(tokens=64, mel_frames=90)), changes.pop("window", 3)
    return PackedStream(
        Mixture(sources, encode, seed=3, rank=rank, world_size=world_size),
        **{
            "weights": {"chat": 3, "sound": 2, "books": 0.5},
            "packing": Packing(budget=budget, window=window, n_bytes=len, balance=changes.pop("balance", None)),
            "max_bad_fraction": 0.2,
            "stages": STAGES,
            "num_workers": num_workers,
            "ahead": 2,
            "state": state,
            **changes,
        },
    )


def take(packed, n):
    try:
        return [next(packed) for _ in range(n)]
    finally:
        packed.close()


def assert_equal(a: PackedBatch, b: PackedBatch):
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name
        else:
            assert value == other, name


@pytest.fixture(scope="module")
def uninterrupted():
    return take(stream(), 45)


def test_resumed_equals_uninterrupted_at_every_batch(uninterrupted):
    assert {batch.stream_state["stage"] for batch in uninterrupted} == {0, 1, 2}
    for stop, batch in enumerate(uninterrupted[:-4]):
        state = json.loads(json.dumps(batch.stream_state))  # plain values only
        for a, b in zip(uninterrupted[stop + 1 : stop + 4], take(stream(state=state), 3), strict=True):
            assert_equal(a, b)


def test_balanced_packs_resume_at_every_batch(uninterrupted):
    """Over all stages, whose packs differ in length; some samples alone cost more than a pack of the second may."""
    balance = Balance(work=Work(token=1.0, target=1.0, mel_frame=0.7), most=0.8)
    whole = take(stream(balance=balance), 60)
    assert [b.sample_ids for b in whole[:45]] != [b.sample_ids for b in uninterrupted]
    assert {batch.stream_state["stage"] for batch in whole} == {0, 1, 2}
    for stop in range(0, 58, 3):
        state = json.loads(json.dumps(whole[stop].stream_state))
        for a, b in zip(whole[stop + 1 : stop + 3], take(stream(balance=balance, state=state), 2), strict=True):
            assert_equal(a, b)


def test_resumed_at_one_batch_runs_on_as_long_as_you_like(uninterrupted):
    for a, b in zip(uninterrupted[11:], take(stream(state=uninterrupted[10].stream_state), 34), strict=True):
        assert_equal(a, b)


@pytest.mark.slow
def test_batches_do_not_depend_on_workers(uninterrupted):
    """Two spawned workers from the middle of a stage on, across its end: same tensors, and same states, so a resume
    from any of these batches is one of those tested above."""
    start = next(i for i, batch in enumerate(uninterrupted) if batch.stream_state["stage"] == 1) + 3
    resumed = take(stream(num_workers=2, state=uninterrupted[start].stream_state), 44 - start)
    assert {batch.stream_state["stage"] for batch in resumed} == {1, 2}
    for a, b in zip(uninterrupted[start + 1 :], resumed, strict=True):
        assert_equal(a, b)


def test_ranks_resume_and_share_no_sample():
    runs = [take(stream(rank=r, world_size=2, stages=()), 12) for r in range(2)]
    ids = [[name for batch in run for name in batch.sample_ids if name.startswith("chat")][:19] for run in runs]
    assert not set(ids[0]) & set(ids[1])  # 38 of 40: within the first epoch
    resumed = take(stream(rank=1, world_size=2, stages=(), state=runs[1][5].stream_state), 3)
    for a, b in zip(runs[1][6:], resumed, strict=False):
        assert_equal(a, b)
    with pytest.raises(ValueError, match="rank 1 given to rank 0"):
        stream(state=runs[1][5].stream_state, world_size=2)


def test_state_is_small(uninterrupted):
    assert max(len(json.dumps(batch.stream_state)) for batch in uninterrupted) < 2000


def test_stages_change_weights_and_lengths_at_their_token_count(uninterrupted):
    tokens, longest = 0, {0: 0, 1: 0, 2: 0}
    stage = 0
    for batch in uninterrupted:
        longest[stage] = max(longest[stage], batch.n_tokens)
        tokens += batch.n_tokens
        stage = (tokens >= 400) + (tokens >= 1200)
        assert batch.stream_state["stage"] == stage
        assert batch.stream_state["tokens"] == tokens
    assert longest[0] <= 48
    assert longest[1] <= 32
    assert 32 < longest[2] <= 64
    before = [batch.stream_state for batch in uninterrupted if batch.stream_state["stage"] == 0][-1]
    assert before["drawn"][2] == 0  # no books in the first stage
    assert abs(before["drawn"][0] - before["drawn"][1]) <= 1
    last = uninterrupted[-1].stream_state
    n = sum(last["drawn"])
    assert all(abs(c - n * w / 5.5) < 1 for c, w in zip(last["drawn"], (3, 2, 0.5), strict=True))


def test_global_token_count_ends_a_stage_on_every_rank():
    batches = take(stream(world_size=4, stages=[Stage(until_tokens=800), Stage(max_tokens=40)]), 10)
    for batch in batches:
        assert batch.stream_state["stage"] == int(4 * batch.stream_state["tokens"] >= 800)


def test_stages_must_make_sense():
    for stages, message in [
        ([Stage(until_tokens=5)], "last data stage"),
        ([Stage(), Stage()], "rise"),
        ([Stage(until_tokens=5), Stage(until_tokens=5), Stage()], "rise"),
        ([Stage(weights={"chta": 1})], "chta"),
        ([Stage(samples={"chta": 1})], "chta"),
        ([Stage(samples={"chat": 1}, weights={"chat": 1})], "leave out its weights"),
        ([Stage(samples={"chat": 1}, until_tokens=5), Stage()], "leave out its weights"),
        ([Stage(samples={"chat": 0})], "at least one"),
        ([Stage(samples={})], "at least one"),
        ([Stage(samples={"chat": 1}), Stage(), Stage()], "rise"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_stages(stages, list(SOURCES))
    plan = planned_mixture(STAGES, {"chat": 3, "sound": 2, "books": 0.5})
    assert plan[0] == {"until_tokens": 400, "shares": {"chat": 0.5, "sound": 0.5, "books": 0}}
    assert plan[2]["shares"]["books"] == pytest.approx(1 / 11)


COUNTED = [Stage(samples={"chat": 30, "sound": 7}), Stage(samples={"chat": 25, "books": 4, "sound": 0}, max_tokens=48)]


def test_stages_of_counted_samples_hand_out_all_of_them_and_end():
    batches = list(stream(stages=COUNTED))
    first = [batch for batch in batches if batch.stream_state["stage"] == 0]
    assert first[-1].stream_state["drawn"] == [30, 7, 0]
    assert first[-1].stream_state["waiting"] == []  # nothing is carried into the next stage
    last = batches[-1].stream_state
    assert (last["before"], last["drawn"], last["waiting"]) == ([30, 7, 0], [25, 0, 4], [])
    # The places of each source's endless order, one after another, without a gap: all but the bad one are trained on.
    order = Mixture(SOURCES, encode, seed=3)
    for number, (name, count) in enumerate({"chat": 55, "sound": 7, "books": 4}.items()):
        wanted = [f"{name}/{order.index(number, i)}" for i in range(count)]
        trained = {i.partition("@")[0] for batch in batches for i in batch.sample_ids if i.startswith(name)}
        assert trained == set(wanted) - {"chat/7"}
    trained = sum(i.startswith("chat/") for batch in batches for i in batch.sample_ids)
    assert trained == 55 - [order.index(0, i) for i in range(55)].count(7)
    with pytest.raises(StopIteration):
        next(stream(stages=COUNTED, state=last))


def test_a_window_of_one_keeps_the_order_of_the_draws():
    order = Mixture(SOURCES, encode, seed=3)
    batches = list(stream(stages=[Stage(samples={"chat": 60, "sound": 20})], window=1))
    for number, (name, count) in enumerate({"chat": 60, "sound": 20}.items()):
        trained = [i for batch in batches for i in batch.sample_ids if i.startswith(name)]
        drawn = [f"{name}/{order.index(number, i)}" for i in range(count)]
        assert trained == [i for i in drawn if i != "chat/7"]


def test_counted_samples_resume_at_every_batch():
    whole = list(stream(stages=COUNTED))
    for stop, batch in enumerate(whole):
        rest = list(stream(stages=COUNTED, state=json.loads(json.dumps(batch.stream_state))))
        assert len(rest) == len(whole) - stop - 1
        for a, b in zip(whole[stop + 1 : stop + 4], rest, strict=False):
            assert_equal(a, b)


def test_counted_samples_need_one_process():
    with pytest.raises(ValueError, match=r"trainer\.devices=1"):
        stream(world_size=2, stages=COUNTED)


def test_documents_are_split_and_lose_no_target():
    books = {"books": SOURCES["books"]}
    batches = take(stream(sources=books, weights={"books": 1}, stages=(), budget=Budget(tokens=32)), 60)
    assert all(batch.n_tokens <= 32 for batch in batches)
    assert batches[-1].skipped == {}
    targets: dict[str, dict[int, np.ndarray]] = {}
    for batch in batches:
        for k, name in enumerate(batch.sample_ids):
            a, b = batch.cu_seqlens[k : k + 2].tolist()
            labels = batch.labels[a:b].numpy()
            book, _, borders = name.partition("@")
            targets.setdefault(book, {})[int(borders.partition(":")[0])] = labels[labels != IGNORE]
            assert batch.position_ids[:, a].tolist() == [0, 0, 0]
    source = books["books"]
    complete = 0
    for index in range(len(source)):
        whole = encode(source[index], None)
        parts = targets.get(whole.id, {})
        if sum(len(part) for part in parts.values()) == len(whole) - 1:
            complete += 1
            assert (np.concatenate([parts[start] for start in sorted(parts)]) == whole.labels[:-1]).all()
    assert complete >= 5


def test_too_long_samples_are_skipped_counted_and_named(tmp_path):
    log = BadSampleLog(tmp_path / "bad_samples.jsonl")
    sources = {"chat": Memory("chat", 50, lengths=(4, 60))}
    batches = take(
        stream(sources=sources, weights={"chat": 1}, stages=(), budget=Budget(tokens=40), max_bad_fraction=0, log=log),
        40,
    )
    skipped = batches[-1].skipped["too_long"]
    records = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert len(records) == skipped > 20  # more than max_bad_fraction, and the run goes on
    row = records[0]["row"]
    assert records[0] | {"detail": ""} == {
        "source": "chat",
        "shard": "chat.parquet",
        "row": row,
        "id": f"chat/{row}",
        "reason": "too_long",
        "detail": "",
    }
    assert "tokens > 40" in records[0]["detail"]


def test_bad_samples_are_skipped_counted_and_logged_once(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    sources = {"chat": Memory("chat", 200, bad=range(0, 20))}
    settings = {"sources": sources, "weights": {"chat": 1}, "stages": (), "budget": Budget(tokens=64)}
    batches = take(stream(**settings, log=BadSampleLog(path)), 60)
    skipped = batches[-1].skipped
    assert set(skipped) == {"reason_0", "reason_1"}
    whole = path.read_text()
    assert whole.count("\n") == sum(skipped.values())
    # a run killed in the middle of a line, resumed from an earlier batch, ends with the same log
    path.write_text(whole + '{"source": "ch')
    rest = take(stream(**settings, log=BadSampleLog(path), state=batches[20].stream_state), 39)
    assert rest[-1].skipped == skipped
    assert path.read_text() == whole


def test_too_many_bad_samples_stop_the_run():
    sources = {"chat": Memory("chat", 200, bad=range(0, 20))}
    packed = stream(sources=sources, weights={"chat": 1}, stages=(), max_bad_fraction=0.01)
    with pytest.raises(TooManyBadSamples, match=r"of \d{3} samples are bad .*max_bad_fraction allows 1.0%.*reason_0"):
        take(packed, 100)
    # exactly as many as allowed is no reason to stop
    take(stream(sources=sources, weights={"chat": 1}, stages=(), max_bad_fraction=0.25), 60)


def test_nothing_usable_stops_the_run(monkeypatch):
    monkeypatch.setattr("omnitrain.data.stream.MAX_WITHOUT_BATCH", 50)
    sources = {"chat": Memory("chat", 20, lengths=(50, 60))}
    with pytest.raises(RuntimeError, match=r"none of the last 50 samples.*too_long"):
        next(stream(sources=sources, weights={"chat": 1}, stages=(), budget=Budget(tokens=40)))


def test_what_was_seen(uninterrupted):
    state = uninterrupted[-1].stream_state
    tokens = sum(batch.n_tokens for batch in uninterrupted)
    for kind in ("source", "modality", "languages"):
        assert sum(state["seen"][kind]["tokens"].values()) == tokens
    assert set(state["seen"]["source"]["samples"]) == {"chat", "sound", "books"}
    assert set(state["seen"]["modality"]["samples"]) == {"text", "audio"}
    assert set(state["seen"]["languages"]["samples"]) == {"en>fr"}
    chats = [name for batch in uninterrupted for name in batch.sample_ids if name.startswith("chat")]
    assert state["seen"]["source"]["samples"]["chat"] == len(chats)


def finite(sources=SOURCES, **kwargs):
    budget = Budget(tokens=64, mel_frames=200)
    mixture = Mixture(sources, encode, **kwargs)
    return FinitePacks(mixture, packing=Packing(budget=budget, window=1, n_bytes=len), max_bad_fraction=0.2)


def test_finite_packs_hold_everything_once_in_order():
    packs = list(finite())
    for a, b in zip(packs, finite(), strict=True):
        assert_equal(a, b)
    whole = [name.partition("@")[0] for batch in packs for name in batch.sample_ids]
    expected = [f"{s.name}/{i}" for s in SOURCES.values() for i in range(len(s)) if i not in s.bad]
    assert list(dict.fromkeys(whole)) == expected
    assert packs[-1].skipped == {"reason_1": 1}
    parts = [{n.partition("@")[0] for b in finite(rank=r, world_size=2) for n in b.sample_ids} for r in range(2)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(expected)


def test_finite_packs_of_nothing_stop():
    with pytest.raises(TooManyBadSamples, match="none of the 3"):
        list(finite({"chat": Memory("chat", 3, bad=range(3))}))

"""Packs hold whole samples within every budget, and documents are cut without losing a target."""

from __future__ import annotations

import numpy as np
import pytest

from omnitrain.data.batch import IGNORE, EncodedSample, PackedBatch
from omnitrain.data.packing import Budget, FirstFit, Item, cut, is_document, pieces
from omnitrain.data.work import Balance, Seen, Work
from omnitrain.vocabulary import AUDIO, TEXT


def encoded(name, n, *, mel_frames=0, n_patches=0, document=True):
    ids = np.arange(n, dtype=np.int64) % 97
    labels = np.append(ids[1:], IGNORE) if document else np.where(np.arange(n) == n - 2, ids, IGNORE)
    types = np.full(n, AUDIO if mel_frames and not document else TEXT, dtype=np.uint8)
    return EncodedSample(
        id=name,
        source="s",
        task="text",
        modality="text",
        languages=("en",),
        input_ids=ids,
        labels=labels,
        token_types=types,
        position_ids=np.broadcast_to(np.arange(n, dtype=np.float32), (3, n)),
        mel=(np.zeros((mel_frames, 4), dtype=np.float32),) if mel_frames else (),
        patches=(np.zeros((n_patches, 6), dtype=np.float32),) if n_patches else (),
        grid_thw=np.array([[1, 2, n_patches // 2]]) if n_patches else np.zeros((0, 3), dtype=np.int64),
        target_bytes=n - 1,
    )


def pack_all(samples, budget, window):
    packer = FirstFit(budget, window)
    packs = []
    for i, sample in enumerate(samples):
        closed = packer.add(Item(0, i, 0, len(sample), sample))
        assert len(packer.waiting()) <= window
        packs += [closed] if closed else []
    while closed := packer.close_fullest():
        packs.append(closed)
    return packs


def test_a_pack_is_filled_to_the_last_token():
    samples = [encoded(str(i), 16) for i in range(6)]
    assert [len(pack) for pack in pack_all(samples, Budget(tokens=48), window=1)] == [3, 3]


def test_every_sample_once_and_no_budget_broken():
    rng = np.random.default_rng(0)
    samples = [
        encoded(str(i), int(n), mel_frames=int(m), n_patches=2 * int(p))
        for i, (n, m, p) in enumerate(rng.integers([2, 0, 0], [90, 60, 30], (500, 3)))
    ]
    budget = Budget(tokens=256, mel_frames=150, patches=140)
    packs = pack_all(samples, budget, window=6)
    for pack in packs:
        assert sum(len(item.sample) for item in pack) <= 256
        assert sum(item.sample.mel_frames for item in pack) <= 150
        assert sum(item.sample.n_patches for item in pack) <= 140
    assert sorted(item.position for pack in packs for item in pack) == list(range(500))


def test_packs_hold_no_more_work_than_they_may():
    """Patches and long documents are dear, in squares too. One sample in fifty alone has more patches than a pack may
    hold: no other patch is with it."""
    rng = np.random.default_rng(0)
    sizes = rng.integers([2, 0], [90, 20], (1000, 2))
    sizes[::50, 1] = 60
    samples = [encoded(str(i), int(n), n_patches=2 * int(p), document=p < 10) for i, (n, p) in enumerate(sizes)]
    work = Work(token=3.0, pair=0.01, target=1.0, patch=20.0, patch_pair=0.02)
    seeing = np.array([20 * 2 * p + 0.02 * (2 * p) ** 2 for _, p in sizes])
    whole = seeing + [3 * n + 0.01 * n * (n + 1) / 2 + (n - 1 if p < 10 else 1) for n, p in sizes]
    assert [work.of(sample)[0] for sample in samples] == pytest.approx(whole)
    assert [work.of(sample)[3] for sample in samples] == pytest.approx(seeing)
    bounds = (5000.0, 2000.0, 0.0, 2500.0, 0.0)
    assert (seeing > bounds[3]).sum() == 20
    packer, packs = FirstFit(Budget(tokens=512), 4, work), []
    packer.bounds = bounds
    for i, sample in enumerate(samples):
        packs += filter(None, [packer.add(Item(0, i, 0, len(sample), sample))])
    while closed := packer.close_fullest():
        packs.append(closed)
    places = [[item.position for item in pack] for pack in packs]
    assert sorted(place for pack in places for place in pack) == list(range(1000))
    for pack in places:
        heavy = [place for place in pack if seeing[place] > bounds[3]]
        if heavy:
            assert seeing[pack].sum() == seeing[heavy].sum()
            assert len(heavy) == 1
        else:
            assert seeing[pack].sum() <= bounds[3]
            assert whole[pack].sum() <= bounds[0]


def test_bounds_are_those_of_a_pack_like_the_mixture():
    """Of three texts for a picture: 100 and 50 tokens, in packs of 1,000."""
    balance = Balance(work=Work(token=2.0, patch=3.0), most=0.9)
    seen = [Seen(samples=4, sizes=[400, 0, 0, 0], work=[800.0, 800.0, 0.0, 0.0, 0.0]), Seen()]
    for _ in range(2):
        seen[1].samples += 1
        seen[1].sizes = [50 * seen[1].samples, 0, 64 * seen[1].samples, 0]
        seen[1].work = [seen[1].samples * each for each in (292.0, 100.0, 0.0, 192.0, 0.0)]
        count = 1000 / 350  # of three texts and a picture, in a pack
        expected = 0.9 * count * np.array([892, 1.1 * 700, 0, 1.1 * 192, 0])
        assert balance.bounds(seen, [3.0, 1.0], Budget(tokens=1000)) == pytest.approx(expected)
    count = 20 / 64
    expected = 0.9 * count * np.array([892, 1.1 * 700, 0, 1.1 * 192, 0])
    assert balance.bounds(seen, [3, 1], Budget(tokens=1000, patches=20)) == pytest.approx(expected)
    assert balance.bounds([Seen()], [1.0], Budget()) == (float("inf"),) * 5


def test_a_wide_mix_of_lengths_fills_packs():
    """Lengths as in captions, speech and documents: log-normal around 90 tokens, the longest cut to the budget."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(4.5, 0.8, 4000)), 8, 2048).astype(int)
    packs = pack_all([encoded(str(i), n) for i, n in enumerate(lengths)], Budget(tokens=2048), window=8)
    filled = [sum(len(item.sample) for item in pack) / 2048 for pack in packs[:-8]]
    assert np.mean(filled) > 0.985


def test_a_sample_that_fits_no_pack_is_named():
    with pytest.raises(ValueError, match=r"'long'.*30 tokens > 20.*8 mel frames > 5"):
        FirstFit(Budget(tokens=20, mel_frames=5), 2).add(Item(0, 0, 0, 30, encoded("long", 30, mel_frames=8)))
    with pytest.raises(ValueError, match="tokens is 0"):
        Budget(tokens=0)
    with pytest.raises(ValueError, match="window"):
        FirstFit(Budget(tokens=1), 0)


def test_packed_equals_alone():
    samples = [encoded("a", 7), encoded("b", 5, mel_frames=3), encoded("c", 9, n_patches=8)]
    batch = PackedBatch.pack(samples)
    for k, sample in enumerate(samples):
        a, b = batch.cu_seqlens[k : k + 2].tolist()
        assert (batch.position_ids[:, a:b].numpy() == sample.position_ids).all()
        assert (batch.input_ids[a:b].numpy() == sample.input_ids).all()
        assert (batch.labels[a:b].numpy() == sample.labels).all()
    assert batch.mel_lengths.tolist() == [3]
    assert batch.grid_thw.tolist() == [[1, 2, 4]]


def n_bytes(ids):
    return len(ids)


@pytest.mark.parametrize("n", [2, 19, 20, 21, 40, 41, 42, 100])
def test_cut_documents_lose_no_target(n):
    whole = encoded("d", n)
    assert is_document(whole)
    parts = [cut(whole, a, b, n_bytes) for a, b in pieces(0, n, 20)]
    assert all(2 <= len(part) <= 20 for part in parts)
    targets = np.concatenate([part.labels[part.labels != IGNORE] for part in parts])
    assert (targets == whole.labels[whole.labels != IGNORE]).all()
    assert sum(part.target_bytes for part in parts) == whole.target_bytes
    assert all(part.position_ids[:, 0].tolist() == [0, 0, 0] for part in parts)
    if n > 21:
        assert parts[1].id.startswith("d@20:")


def test_only_documents_are_cut():
    assert not is_document(encoded("chat", 10, document=False))
    assert not is_document(encoded("spoken", 10, mel_frames=3, document=False))

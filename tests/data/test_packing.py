"""Packs hold whole samples within every budget, and documents are cut without losing a target."""

from __future__ import annotations

import numpy as np
import pytest

from omnitrain.data.batch import IGNORE, EncodedSample, PackedBatch
from omnitrain.data.packing import Budget, FirstFit, Item, cut, is_document, pieces
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

"""Preferences of takes: their log-probabilities, the loss, what it does to them, and resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from test_talker_module import SPEECH, data, speech_sample, talking_model
from torch.nn import functional as F

from omnitrain.config.run_config import CheckpointConfig, OptimConfig, TalkerDpoModuleConfig, TalkerModuleConfig
from omnitrain.data.batch import PackedBatch
from omnitrain.data.codec_frames import decode_codes, encode_codes
from omnitrain.data.media import encode_audio
from omnitrain.data.sample import BadSample, Sample
from omnitrain.data.shards import write_shards
from omnitrain.models.omni import OmniModel
from omnitrain.models.talker import TalkerInputs
from omnitrain.training.callbacks import AtomicCheckpoint
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.other_weights import trained_weights
from omnitrain.training.post_losses import dpo_loss
from omnitrain.training.talker import TalkerModule
from omnitrain.training.talker_dpo import TalkerDpoModule

PAIRS = replace(SPEECH, pairs=True)


def takes(i: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(100 + i)
    return drawn.integers(0, 16, (6 + 2 * (i % 3), 3)), drawn.integers(0, 16, (3 + i % 4, 3))


def pair(i: int, **changes: Any) -> Sample:
    better, worse = takes(i)
    return speech_sample(i, media=encode_codes(better, "c0ffee00", rejected=worse), **changes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    wave = encode_audio(np.sin(np.arange(16_000) / 10).astype(np.float32) * 0.3, 16_000, "flac")
    write_shards([pair(i, heard=wave if i % 4 == 0 else None) for i in range(12)], folder, "pairs", progress=False)
    return folder


def a_batch(shards: Path, count: int = 4) -> PackedBatch:
    module = data(shards, speech=PAIRS)
    source = module.opened("sources")["speech"]
    return PackedBatch.pack([module.encoder(source[i], source.media_bytes) for i in range(count)])


def log_probs(model: OmniModel, batch: PackedBatch) -> torch.Tensor:
    """Of each take, by the softmax of whole logits."""
    assert model.talker is not None
    assert batch.spoken is not None
    inputs = TalkerInputs(**batch.spoken.inputs())
    accept = model(**batch.model_inputs()).accept_hidden
    x = model.talker.embed(inputs, model.thinker.embed_tokens, accept)
    hidden = model.talker(x, inputs.position_ids, inputs.cu_seqlens).hidden
    documents = torch.repeat_interleave(inputs.cu_seqlens.diff().long())
    first = -F.cross_entropy(model.talker.logits(hidden), inputs.labels, reduction="none")
    logits = model.talker.mtp.logits(model.talker.residual_hidden(hidden, inputs))  # [F, Q - 1, K]
    rest = logits.log_softmax(-1).gather(2, inputs.codes[:, 1:, None]).sum((1, 2))
    found = first.new_zeros(len(inputs.cu_seqlens) - 1).index_add(0, documents, first)
    return found.index_add(0, documents[inputs.frame_sources], rest)


def fitting(model: OmniModel, **config: Any) -> TalkerDpoModule:
    """A module at the start of `fit`."""
    module = TalkerDpoModule(model, TalkerDpoModuleConfig(**config)).train()
    module._reference = trained_weights(model)
    return module


# ----------------------------------------------------------------------------------------------------------- the data


def test_both_takes_follow_the_same_question(shards: Path) -> None:
    spoken = a_batch(shards).spoken
    assert spoken is not None
    assert spoken.samples.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i in range(4):
        better, worse = takes(i)
        frames = [spoken.codes[(spoken.frame_sources >= a) & (spoken.frame_sources < b)] for a, b in zip(
            spoken.cu_seqlens[2 * i : 2 * i + 2], spoken.cu_seqlens[2 * i + 1 : 2 * i + 3], strict=True)]  # fmt: skip
        assert [part.tolist() for part in frames] == [better.tolist(), worse.tolist()]
    alone = data(shards).encoder(pair(1), lambda s: s.media or b"").spoken  # the same shards, without pairs
    assert [document.codes.tolist() for document in alone] == [takes(1)[0].tolist()]


def test_a_take_may_be_cut_off_amid_its_text(shards: Path) -> None:
    better, _ = takes(2)
    cut = speech_sample(2, media=encode_codes(better, "c0ffee00", rejected=better[:1]))
    chosen, rejected = data(shards, speech=PAIRS).encoder(cut, lambda s: s.media or b"").spoken
    assert len(rejected.codes) == 1
    assert rejected.text_ids[:-1].tolist() == chosen.text_ids[: len(rejected) - 1].tolist()
    with pytest.raises(BadSample, match="no_pair: the codec frames are one take"):
        data(shards, speech=PAIRS).encoder(speech_sample(2), lambda s: s.media or b"")
    assert np.array_equal(decode_codes(cut.messages[-1].segments[0].media or b"", "c0ffee00"), better)


# ----------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("chosen", [0.0, 0.3])
def test_the_loss_is_that_of_whole_takes(shards: Path, chosen: float) -> None:
    """Log-probabilities and gradients as from the logits of everything, against a model that has changed since."""
    batch, model = a_batch(shards), talking_model()
    module = fitting(model, beta=0.05, chosen=chosen)
    reference = log_probs(talking_model(), batch).detach()
    assert model.talker is not None
    assert batch.spoken is not None
    with torch.no_grad():
        for p in model.talker.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    found = log_probs(model, batch)
    expected = dpo_loss(found[0::2], found[1::2], reference[0::2], reference[1::2], 0.05)
    lengths = torch.bincount(torch.repeat_interleave(batch.spoken.cu_seqlens.diff().long())[batch.spoken.labels >= 0])
    whole = expected.sum() - chosen * (found / lengths)[0::2].sum()
    losses = module.losses(batch)
    torch.testing.assert_close(losses.total, whole, rtol=1e-4, atol=1e-4)
    assert float(losses.weight) == 4
    [(_, (nats, pairs, _, _))] = losses.groups
    assert (nats, pairs) == (pytest.approx(float(expected.sum()), rel=1e-4), 4)
    trained = [p for p in model.talker.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, trained, allow_unused=True) for x in (losses.total, whole))
    assert sum(g is not None for g in ours) > 20
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_it_begins_at_log_two_and_learns_the_preference(shards: Path) -> None:
    batch, model = a_batch(shards), talking_model()
    module = fitting(model, beta=0.1)
    before = log_probs(model, batch).detach()
    assert float(module.losses(batch).total) == pytest.approx(4 * math.log(2), rel=1e-5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        module.losses(batch).total.backward()
        optimizer.step()
    gains = log_probs(model, batch).detach() - before
    assert (gains[0::2] > gains[1::2]).all()
    assert float(module.losses(batch).total) < 2.5
    assert module._notes["accuracy"] == (12 * 4, 14 * 4)  # at first, twice, nothing had been won
    thinker = talking_model().thinker.state_dict()
    assert all(torch.equal(value, thinker[name]) for name, value in model.thinker.state_dict().items())


def test_what_it_does_not_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"module\.frame_dropout=0\.5.*compares whole takes"):
        TalkerDpoModuleConfig(frame_dropout=0.5)
    with pytest.raises(ValueError, match=r"module\.beta=0: must be a number above 0"):
        TalkerDpoModuleConfig(beta=0)
    with pytest.raises(ValueError, match=r"module\.chosen=-1: must be a number >= 0"):
        TalkerDpoModuleConfig(chosen=-1)
    with pytest.raises(ValueError, match="the Thinker is frozen"):
        TalkerDpoModule(talking_model(), TalkerDpoModuleConfig(train=["thinker", "talker"]))


# ------------------------------------------------------------------------------------------------------- the training


def fit(folder: Path, shards: Path, steps: int, *, resume: bool = False) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    optim = OptimConfig(lr=1e-3, schedule="constant", warmup_steps=0)
    module = TalkerDpoModule(talking_model(), TalkerDpoModuleConfig(beta=0.1), optim)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, log_every_n_steps=1, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=[ExactCsvLogger(run_dir=folder)],
        callbacks=[AtomicCheckpoint(CheckpointConfig(every_n_steps=1), run_dir=folder)],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    last = folder / "checkpoints/last.ckpt"
    trainer.fit(module, data(shards, speech=PAIRS), ckpt_path=str(last) if resume else None)
    return torch.load(last, weights_only=False)


def test_resume_is_exact(shards: Path, tmp_path: Path) -> None:
    """Its reference is what training began with, not what it goes on from."""
    whole = fit(tmp_path / "whole", shards, 6)
    fit(tmp_path / "parts", shards, 3)
    parts = fit(tmp_path / "parts", shards, 6, resume=True)
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    metrics = [(tmp_path / run / "metrics.csv").read_text() for run in ("whole", "parts")]
    assert metrics[0] == metrics[1]
    assert "preference/accuracy" in metrics[0].splitlines()[0]
    assert "validation/loss_by_task/preference" in metrics[0].splitlines()[0]


def test_better_takes_alone_are_what_the_talker_learns_from(shards: Path) -> None:
    module = data(shards)
    source = module.opened("sources")["speech"]
    batch = PackedBatch.pack([module.encoder(source[i], source.media_bytes) for i in range(2)])
    assert torch.isfinite(TalkerModule(talking_model(), TalkerModuleConfig()).losses(batch).total)

"""The Talker's training: from shards with codec frames to its loss, what learns, and resume to the last bit."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from omnitrain.config.run_config import CheckpointConfig, OptimConfig, TalkerLossConfig, TalkerModuleConfig
from omnitrain.config.typed import typed
from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.codec_frames import SpeechCodes, decode_codes, encode_codes, heard_rows
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.media import encode_audio
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.settings import DataConfig
from omnitrain.data.shards import write_shards
from omnitrain.models.omni import OmniModel, thinker_fingerprint
from omnitrain.models.presets import build, init_weights
from omnitrain.models.talker import TalkerInputs
from omnitrain.training.callbacks import AtomicCheckpoint
from omnitrain.training.logging import ExactCsvLogger
from omnitrain.training.talker import TalkerModule, hide_frames

PACK = Path(__file__).parents[2] / "omnitrain/pack"
TOKENIZER = ChatTokenizer.from_file(PACK / "tokenizer.json")
SPEECH = SpeechCodes(
    codec_pad=116,
    codec_bos=117,
    codec_eos=118,
    codec_nothink=123,
    codec_think_bos=124,
    codec_think_eos=125,
    codebook_size=16,
    codebooks=3,
    speakers={"ann": 200, "ben": 201},
    codec="c0ffee00",
)
TEXTS = ("a red cat", "two dogs sleep", "the bird sings again")


def talking_model(seed: int = 0) -> OmniModel:
    model = build(
        "tiny",
        vocab_size=TOKENIZER.vocab_size,
        thinker={"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mrope_sections": [4, 2, 2],
                 "n_experts": 2, "top_k": 1, "expert_width": 16},
        aut={"d_model": 16, "layers": 1, "heads": 2, "ffn": 16, "conv_hidden": 4},
        vision={"d_model": 16, "layers": 2, "heads": 2, "ffn": 16, "deepstack_layers": [0, 1]},
        speech=True,
        talker={"d_model": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mrope_sections": [4, 2, 2],
                "n_experts": 2, "top_k": 1, "expert_width": 16, "shared_expert_width": 16, "projection_width": 32,
                "codebooks": 3, "codebook_size": 16, "speakers": dict(SPEECH.speakers),
                "mtp": {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 16}},
        code2wav={"d_model": 16, "layers": 1, "heads": 2, "kv_heads": 2, "ffn": 16, "decoder_dim": 16},
    )  # fmt: skip
    init_weights(model, seed)
    return model


def speech_sample(i: int, **changes: Any) -> Sample:
    codes = np.random.default_rng(i).integers(0, 16, (6 + 2 * (i % 3), 3))
    recording = changes.pop("media", encode_codes(codes, "c0ffee00"))
    heard = changes.pop("heard", None)
    asked = [Segment(type="text", text=f"Say {TEXTS[i % 3]}.")]
    if heard is not None:
        asked.insert(0, Segment(type="audio", media=heard))
    sample = Sample(
        id=f"speech/{i}",
        source="test",
        task="tts",
        languages=("en",),
        meta={"voice": ("ann", "ben")[i % 2]},
        messages=(
            Message(role="system", segments=(Segment(type="text", text="You speak."),)),
            Message(role="user", segments=tuple(asked)),
            Message(role="assistant", segments=(Segment(type="speech", text=TEXTS[i % 3], media=recording),)),
        ),
    )
    return replace(sample, **changes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    wave = encode_audio(np.sin(np.arange(16_000) / 10).astype(np.float32) * 0.3, 16_000, "flac")
    write_shards([speech_sample(i, heard=wave if i % 4 == 0 else None) for i in range(12)], folder, "codes")
    return folder


def data(shards: Path, **changes: Any) -> OmniDataModule:
    options: dict[str, Any] = {"sources": {"speech": {"path": shards}}, "tokenizer": "", "max_tokens": 256}
    speech = changes.pop("speech", SPEECH)
    options |= {"validation_sources": {"v": {"path": shards}}, "num_workers": 0} | changes
    return OmniDataModule(typed(DataConfig, options, "data"), speech=speech, tokenizer=TOKENIZER)


def a_batch(shards: Path) -> PackedBatch:
    module = data(shards)
    source = module.opened("sources")["speech"]
    return PackedBatch.pack([module.encoder(source[i], source.media_bytes) for i in range(4)])


# ----------------------------------------------------------------------------------------------------------- the data


def test_answers_are_laid_out_within_the_pack(shards: Path) -> None:
    batch = a_batch(shards)
    spoken = batch.spoken
    assert spoken is not None
    assert spoken.samples.tolist() == [0, 1, 2, 3]
    assert spoken.cu_seqlens.diff().sum() == len(spoken.labels)
    # Each frame is predicted by the position before its own, and its codebook 0 is that position's label.
    assert torch.equal(spoken.labels[spoken.frame_sources], spoken.codes[:, 0])
    ends = (spoken.labels == SPEECH.codec_eos).nonzero().squeeze(1)
    assert torch.equal(ends, spoken.cu_seqlens[1:] - 1)
    # Rows of the Thinker's hidden states are where this pack has sound (samples 0 and 4 of 12 hear something).
    rows = spoken.hidden_rows[spoken.hidden_rows >= 0]
    assert len(rows) == 13
    assert (batch.token_types[rows] == 3).all()
    voices = [int(i) for i in spoken.codec_ids if int(i) in SPEECH.speakers.values()]
    assert voices == [200, 201, 200, 201]
    # All of the answer's words are given, in order, and the system prompt is not.
    words = [spoken.text_ids[a:b] for a, b in zip(spoken.cu_seqlens[:-1], spoken.cu_seqlens[1:], strict=True)]
    for i, ids in enumerate(words):
        text = TOKENIZER.decode(ids[ids >= 0].tolist())
        assert "You speak" not in text
        assert text.endswith(TEXTS[i % 3])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"meta": {"voice": "zoe"}}, "unknown_voice"),
        ({"media": encode_codes(np.zeros((9, 3)), "deadbeef")}, "other_codec"),
        ({"media": encode_codes(np.zeros((9, 2)), "c0ffee00")}, "speech_bad_codes"),
        ({"media": encode_codes(np.full((9, 3), 16), "c0ffee00")}, "speech_bad_codes"),
        ({"media": encode_audio(np.zeros(16_000, dtype=np.float32), 16_000, "flac")}, "no_codes"),
        ({"media": encode_codes(np.zeros((1, 3)), "c0ffee00")}, "speech_shorter_than_text"),
    ],
)
def test_bad_speech_is_named(shards: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample) as error:
        data(shards).encoder(speech_sample(2, **change), lambda s: s.media or b"")
    assert error.value.reason == reason


def test_codes_come_back(shards: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 2048, (7, 16))
    assert np.array_equal(decode_codes(encode_codes(codes, "abc"), "abc"), codes)


def test_a_default_voice_is_taken_where_none_is_named(shards: Path) -> None:
    encoder = data(shards, speech=replace(SPEECH, default_voice="ben")).encoder
    document = encoder(speech_sample(0, meta={}), lambda s: s.media or b"").spoken[0]
    assert 201 in document.codec_ids


def test_frames_bound_a_pack(shards: Path) -> None:
    module = data(shards, max_frames=16)
    module.setup("fit")
    batches = iter(module.train_dataloader())
    for _ in range(5):
        spoken = next(batches).spoken
        assert spoken is not None
        assert len(spoken.codes) <= 16


# ----------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_over_frames_of_both_parts(shards: Path) -> None:
    model, batch = talking_model(), a_batch(shards)
    module = TalkerModule(model, TalkerModuleConfig(loss=TalkerLossConfig(residual=0.5), frame_dropout=0.0))
    losses = module.losses(batch)
    assert model.talker is not None
    assert batch.spoken is not None
    inputs = TalkerInputs(**batch.spoken.inputs())
    accept = model(**batch.model_inputs()).accept_hidden
    x = model.talker.embed(inputs, model.thinker.embed_tokens, accept)
    out = model.talker(x, inputs.position_ids, inputs.cu_seqlens).hidden
    first = F.cross_entropy(model.talker.logits(out), inputs.labels, reduction="sum")
    logits = model.talker.mtp.logits(model.talker.residual_hidden(out, inputs))  # [F, Q - 1, K]
    residual = F.cross_entropy(logits.flatten(0, 1), inputs.codes[:, 1:].flatten(), reduction="sum") / 2
    torch.testing.assert_close(losses.total, first + 0.5 * residual, rtol=1e-5, atol=1e-5)
    assert float(losses.weight) == int((inputs.labels >= 0).sum())
    by_name = {key[1]: values for key, values in losses.groups}
    assert by_name["codebook_0"][0] == pytest.approx(float(first.detach()), rel=1e-5)
    assert by_name["codebook_1"][0] + by_name["codebook_2"][0] == pytest.approx(float(2 * residual.detach()), rel=1e-5)


def test_text_alone_needs_no_thinker(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = talking_model()
    encoder = data(shards).encoder
    batch = PackedBatch.pack([encoder(speech_sample(1), lambda s: s.media or b"")])
    monkeypatch.setattr(model.thinker, "forward", None)  # calling it would fail
    assert torch.isfinite(TalkerModule(model, TalkerModuleConfig(frame_dropout=0.0)).losses(batch).total)


def test_frame_dropout_hides_codes_in_training_alone(shards: Path) -> None:
    batch = a_batch(shards)
    assert batch.spoken is not None
    other = replace(batch, spoken=replace(batch.spoken, codes=(batch.spoken.codes + 1) % 16))
    module = TalkerModule(talking_model(), TalkerModuleConfig(frame_dropout=0.999999))
    module.loss_config = TalkerLossConfig(residual=0.0)
    # Nothing of the codes is seen: with the same labels, other codes give the same loss of codebook 0.
    assert torch.equal(module.train().losses(batch).total, module.losses(other).total)
    assert not torch.equal(module.eval().losses(batch).total, module.losses(other).total)


def test_another_share_of_each_answer_is_hidden(shards: Path) -> None:
    spoken = a_batch(shards).spoken
    assert spoken is not None
    inputs = TalkerInputs(**spoken.inputs())
    of_answers = [(a, b) for a, b in pairwise(inputs.cu_seqlens.tolist())]
    there = [int((inputs.frame_rows[a:b] >= 0).sum()) for a, b in of_answers]
    for share, low, high in ((0.5, 0.0, 1.0), (0.8, 0.6, 1.0), (0.1, 0.0, 0.2)):
        drawn = np.array(
            [
                [1 - int((rows[a:b] >= 0).sum()) / n for (a, b), n in zip(of_answers, there, strict=True)]
                for rows in (hide_frames(inputs, share) for _ in range(2000))
            ]
        )
        assert abs(drawn.mean() - share) < 0.02
        # Of n frames with a share drawn from low to high: the variance of a binomial with that share, and of the share.
        spread = (high - low) ** 2 / 12
        expected = np.mean([spread + (share * (1 - share) - spread) / n for n in there])
        assert drawn.var() == pytest.approx(expected, rel=0.15)
    kept = hide_frames(inputs, 0.5)
    assert ((kept == inputs.frame_rows) | (kept == -1)).all()


def test_a_share_of_frames_stands_for_all_in_mtp(shards: Path) -> None:
    batch = a_batch(shards)
    assert batch.spoken is not None
    n = len(batch.spoken.codes)
    module = TalkerModule(talking_model(), TalkerModuleConfig(frame_dropout=0.0, mtp_frames=0.5)).train()
    whole = TalkerModule(module.model, TalkerModuleConfig(frame_dropout=0.0)).train().losses(batch)
    first = dict(whole.groups)["speech", "codebook_0"][0]
    drawn = []
    for _ in range(400):
        losses = module.losses(batch)
        by_name = dict(losses.groups)
        rest = [by_name["speech", f"codebook_{q}"] for q in (1, 2)]
        assert [count for _, count, *_ in rest] == [math.ceil(n / 2)] * 2
        scale = n / math.ceil(n / 2)
        expected = by_name["speech", "codebook_0"][0] + scale * sum(nll for nll, *_ in rest) / 2
        assert losses.total.item() == pytest.approx(expected, rel=1e-4)
        drawn.append(losses.total.item() - first)
    error = np.std(drawn) / len(drawn) ** 0.5
    assert error > 0
    assert abs(np.mean(drawn) - (whole.total.item() - first)) < 4 * error  # on average it is the loss of all
    assert torch.equal(module.eval().losses(batch).total, whole.total)  # an evaluation leaves out nothing
    with pytest.raises(ValueError, match=r"module\.mtp_frames=0: must lie in \(0, 1\]"):
        TalkerModuleConfig(mtp_frames=0)


def with_hidden_states(shards: Path, folder: Path, model: OmniModel, fingerprint: str) -> Path:
    """The shards with what `model` hears beside the codes."""
    module = data(shards)
    source = module.opened("sources")["speech"]

    def heard(sample: Sample) -> Sample:
        encoded = module.encoder(sample, source.media_bytes)
        [rows] = heard_rows(encoded, TOKENIZER)
        if not len(rows):
            return sample
        with torch.no_grad():
            states = model(**PackedBatch.pack([encoded]).model_inputs()).accept_hidden[rows]
        *before, answer = sample.messages
        media = encode_codes(decode_codes(answer.segments[0].media or b""), "c0ffee00", states, fingerprint)
        return replace(
            sample, messages=(*before, replace(answer, segments=(replace(answer.segments[0], media=media),)))
        )

    write_shards([heard(source[i]) for i in range(len(source))], folder, "codes", progress=False)
    return folder


def test_a_cached_thinker_is_the_thinker(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = talking_model()
    fingerprint = thinker_fingerprint(model)
    assert fingerprint != thinker_fingerprint(talking_model(1))
    cached_shards = with_hidden_states(shards, tmp_path / "heard", model, fingerprint)
    module = data(cached_shards, speech=replace(SPEECH, thinker=fingerprint))
    source = module.opened("sources")["speech"]
    cached = PackedBatch.pack([module.encoder(source[i], source.media_bytes) for i in (1, 0, 4, 2)])
    live_data = data(cached_shards)  # not asked to read them: the same shards serve a live Thinker
    live = PackedBatch.pack([live_data.encoder(source[i], source.media_bytes) for i in (1, 0, 4, 2)])
    assert live.spoken is not None
    assert live.spoken.heard is None
    assert cached.spoken is not None
    assert cached.spoken.heard is not None

    gradients = []
    for batch, is_cached in ((live, False), (cached.to("cpu"), True)):
        if is_cached:
            monkeypatch.setattr(model.thinker, "forward", None)  # calling it would fail
        model.zero_grad()
        loss = TalkerModule(model, TalkerModuleConfig(cached_thinker=is_cached, frame_dropout=0.0)).losses(batch).total
        loss.backward()
        assert model.talker is not None
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.talker.parameters() if p.grad is not None)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_hidden_states_of_another_thinker_are_refused(shards: Path, tmp_path: Path) -> None:
    model = talking_model()
    heard = with_hidden_states(shards, tmp_path / "heard", model, thinker_fingerprint(model))
    for folder, reason in ((heard, "other_thinker"), (shards, "no_hidden_states")):
        module = data(folder, speech=replace(SPEECH, thinker="12345678"))
        source = module.opened("sources")["speech"]
        with pytest.raises(BadSample, match=rf"{reason}: .*module\.cached_thinker=false"):
            module.encoder(source[0], source.media_bytes)
        assert module.encoder(source[1], source.media_bytes).spoken  # has no media
    with pytest.raises(ValueError, match=r"cached_thinker needs a frozen Thinker.*thinker"):
        TalkerModuleConfig(train=["thinker", "talker"], cached_thinker=True)


# ------------------------------------------------------------------------------------------------------- the training


def fit(folder: Path, shards: Path, steps: int, *, resume: bool = False, **options: Any) -> TalkerModule:
    L.seed_everything(1, verbose=False)
    config = TalkerModuleConfig(**{"frame_dropout": 0.0, **options})
    optim = OptimConfig(lr=5e-3, warmup_steps=2, total_steps=max(8, steps), decay_fraction=0.2)
    module = TalkerModule(talking_model(), config, optim)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        log_every_n_steps=1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[ExactCsvLogger(run_dir=folder)],
        callbacks=[AtomicCheckpoint(CheckpointConfig(every_n_steps=1), run_dir=folder)],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "checkpoints/last.ckpt" if resume else None
    trainer.fit(module, data(shards), ckpt_path=last, weights_only=True)
    return module


JOINT = ("embeddings", "head", "router", "thinker", "mtp", "talker_router", "talker")


def test_an_interrupted_run_ends_bit_equal(shards: Path, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", shards, 8, train=JOINT)
    fit(tmp_path / "parts", shards, 3, train=JOINT)
    parts = fit(tmp_path / "parts", shards, 8, train=JOINT, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "whole/metrics.csv").read_bytes() == (tmp_path / "parts/metrics.csv").read_bytes()


def test_what_is_not_named_stays_as_it_was(shards: Path, tmp_path: Path) -> None:
    fresh, frozen = talking_model(), fit(tmp_path / "frozen", shards, 3).model
    joint = fit(tmp_path / "joint", shards, 3, train=JOINT).model
    for (name, a), (_, b), (_, c) in zip(
        fresh.named_parameters(), frozen.named_parameters(), joint.named_parameters(), strict=True
    ):
        talker = name.startswith("talker.")
        if not talker:
            assert torch.equal(a, b), name
        elif "hidden_projection" not in name and "router" not in name:
            assert not torch.equal(a, b), name
        if name.startswith(("thinker.embed", "thinker.layers.0.attention")):
            assert not torch.equal(a, c), name


def test_it_learns_codes_by_heart(shards: Path, tmp_path: Path) -> None:
    module = fit(tmp_path, shards, 60)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss_by_task/codebook_0")
    losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert losses[-1] < 0.6 * losses[0]
    assert module.skipped_steps == 0

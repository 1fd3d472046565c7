"""Talker and MTP on their own. Against `transformers`: tests/interop/test_speech_parity.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from omnitrain.models.mtp import MTPConfig
from omnitrain.models.omni import OmniModel
from omnitrain.models.presets import SPEECH_PRESETS, build, count_parameters, init_weights
from omnitrain.models.talker import TalkerConfig, TalkerInputs


@pytest.fixture(scope="module")
def model() -> OmniModel:
    model = build("tiny", vocab_size=320, speech=True, thinker={"layers": 2}, talker={"layers": 2})
    init_weights(model, seed=0)
    with torch.no_grad():
        for p in model.talker.mtp.parameters():
            p.mul_(2)  # so that logits are far enough apart
    return model


@pytest.fixture
def frames(model: OmniModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [7, D] and codes [7, Q]."""
    c, generator = model.config.talker, torch.Generator().manual_seed(0)
    hidden = torch.randn(7, c.d_model, generator=generator)
    return hidden, torch.randint(0, c.codebook_size, (7, c.codebooks), generator=generator)


def inputs(codes: torch.Tensor) -> TalkerInputs:
    """Two documents of 4 positions and 3 and 4 frames, the first of which reads two rows of the Thinker."""
    n = torch.tensor([4 + 3, 4 + 4])
    rows, nothing = torch.arange(7), torch.full((15,), -1)
    text = torch.tensor([5, -1, -1, 9, 8, 3, 3, 5, 9, 11, 2, 4, 3, 3, 3])
    hidden_rows, codec, frame_rows = nothing.clone(), nothing.clone(), nothing.clone()
    hidden_rows[1:3] = torch.tensor([6, 2])
    codec[[3, 10]] = torch.tensor([400, 401])
    places = torch.tensor([4, 5, 6, 11, 12, 13, 14])
    frame_rows[places] = rows
    return TalkerInputs(
        text_ids=text,
        hidden_rows=hidden_rows,
        codec_ids=codec,
        frame_rows=frame_rows,
        labels=torch.full((15,), -100),
        position_ids=torch.cat([torch.arange(k) for k in n]).float().expand(3, -1),
        cu_seqlens=torch.tensor([0, 7, 15], dtype=torch.int32),
        codes=codes,
        frame_sources=places - 1,
    )


@torch.no_grad()
def test_generated_frames_are_the_most_probable_ones(model: OmniModel, frames) -> None:
    """Step by step with a cache the same as teacher-forced on what was generated."""
    hidden, codes = frames
    mtp, first = model.talker.mtp, model.talker.codec_embedding(codes[:, 0])
    generated, embedding = mtp.generate(hidden, first, lambda logits: logits.argmax(-1))
    whole = torch.cat([codes[:, :1], generated], dim=1)
    logits = mtp.logits(mtp(hidden, first, whole))
    assert torch.equal(logits.argmax(-1), generated)
    assert len(generated.unique()) > 10
    torch.testing.assert_close(first + embedding, model.talker.embed_frames(whole))


@torch.no_grad()
def test_a_code_does_not_see_the_later_ones(model: OmniModel, frames) -> None:
    hidden, codes = frames
    mtp, first = model.talker.mtp, model.talker.codec_embedding(codes[:, 0])
    changed = codes.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 256
    before, after = mtp(hidden, first, codes), mtp(hidden, first, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])  # rows that predict codebooks 1 to 4
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_checkpointing_changes_no_gradient(model: OmniModel, frames) -> None:
    _, codes = frames
    gradients = []
    for enabled in (False, True):
        model.set_activation_checkpointing(["thinker", "talker", "mtp"] if enabled else [])
        model.zero_grad()
        batch = inputs(codes)
        accept_hidden = torch.linspace(-1, 1, 8 * 192).view(8, 192)
        x = model.talker.embed(batch, model.thinker.embed_tokens, accept_hidden)
        output = model.talker(x, batch.position_ids, batch.cu_seqlens)
        residuals = model.talker.mtp.logits(model.talker.residual_hidden(output.hidden, batch))
        (model.talker.logits(output.hidden).logsumexp(-1).sum() + residuals.logsumexp(-1).sum()).backward()
        gradients.append({name: p.grad for name, p in model.talker.named_parameters()})
    model.set_activation_checkpointing([])
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
def test_an_embedding_is_the_sum_of_what_a_position_names(model: OmniModel, frames) -> None:
    talker, batch = model.talker, inputs(frames[1])
    words, accept_hidden = model.thinker.embed_tokens, torch.linspace(-1, 1, 8 * 192).view(8, 192)
    x = talker.embed(batch, words, accept_hidden)
    torch.testing.assert_close(x[1], talker.hidden_projection(accept_hidden[6:7])[0])
    torch.testing.assert_close(x[3], talker.text_projection(words.weight[9:10])[0] + talker.codec_embedding.weight[400])
    frame = talker.codec_embedding.weight[batch.codes[4, 0]] + sum(
        talker.mtp.code_embedding[q - 1, batch.codes[4, q]] for q in range(1, batch.codes.shape[1])
    )
    torch.testing.assert_close(x[12], talker.text_projection(words.weight[3:4])[0] + frame)
    with pytest.raises(ValueError, match="hidden_rows names rows of accept_hidden"):
        talker.embed(batch, words)


@torch.no_grad()
def test_impossible_codes_are_refused(model: OmniModel, frames) -> None:
    hidden, codes = frames
    with pytest.raises(ValueError, match=r"codes must be \[F, 7\], found \[7, 5\]"):
        model.talker.embed_frames(codes[:, :6])
    wrong = codes.clone()
    wrong[2, 3] = 256  # would be the first code of the next codebook
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.255 \(codebook_size - 1\), found \d to 256"):
        model.talker.mtp(hidden, hidden, wrong)


@pytest.mark.parametrize("preset", SPEECH_PRESETS)
def test_presets_speak(preset: str) -> None:
    with torch.device("meta"):
        silent, speaking = build(preset), build(preset, speech=True)
    assert silent.talker is None
    assert silent.code2wav is None
    assert speaking.talker is not None
    assert speaking.code2wav is not None
    assert count_parameters(speaking) > count_parameters(silent)
    assert replace(speaking.config, talker=None, code2wav=None) == silent.config
    assert speaking.config.code2wav.samples_per_frame == 1920


def test_sizes_follow_each_other() -> None:
    changes = {"codebook_size": 32, "codebooks": 4, "d_model": 96, "mtp": {"layers": 1}}
    config = build("tiny", speech=True, thinker={"layers": 4, "d_model": 128}, talker=changes).config
    assert (config.talker.mtp.codebook_size, config.talker.mtp.codebooks, config.talker.mtp.d_model) == (32, 4, 96)
    assert (config.code2wav.codebook_size, config.code2wav.quantizers) == (32, 4)
    assert (config.talker.codec_vocab, config.talker.codec_eos, config.talker.speakers["ethan"]) == (1056, 134, 286)
    assert (config.talker.thinker_dim, config.talker.accept_hidden_layer) == (128, 2)
    assert config.talker.mtp.layers == 1


def test_the_public_special_codes() -> None:
    """Written out as defaults, and computed for any size of codebook."""
    config = build("tiny", speech=True, talker={"codebook_size": 2048}).config.talker
    public = TalkerConfig()
    for name in ("codec_vocab", "codec_pad", "codec_bos", "codec_eos", "codec_nothink", "codec_think_bos", "speakers"):
        assert getattr(config, name) == getattr(public, name), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(talker={"heads": 5}), r"talker.heads \(5\) must be a multiple of talker.kv_heads \(2\)"),
        (dict(talker={"head_dim": 48}), r"talker.mrope_sections .* must sum to head_dim / 2 = 24"),
        (dict(talker={"top_k": 9}), r"talker.top_k \(9\) must lie in 1..n_experts \(4\)"),
        (dict(talker={"codec_eos": 255}), r"talker.codec_eos \(255\) must lie in codebook_size..codec_vocab - 1"),
        (dict(talker={"speakers": {"eve": 9999}}), r"talker.speakers.eve \(9999\) must lie in"),
        (dict(talker={"mtp": {"d_model": 64}}), r"talker.mtp.d_model \(64\) must equal talker.d_model \(192\)"),
        (dict(talker={"mtp": {"depth": 64}}), "model.talker.mtp.depth: no such field; the fields are d_model"),
        (dict(talker={"accept_hidden_layer": 1}), r"talker.accept_hidden_layer \(1\) must equal thinker.accept_"),
        (dict(talker={"thinker_dim": 1}), r"talker.thinker_dim \(1\) must equal thinker.d_model \(192\)"),
        (dict(code2wav={"quantizers": 3}), r"code2wav.quantizers \(3\) must equal talker.codebooks \(8\)"),
        (dict(speech=False, talker={"layers": 3}), "need model.speech=true"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("tiny", **{"speech": True, **arguments})


def test_impossible_sizes_of_mtp() -> None:
    for field, value in (("heads", 7), ("head_dim", 15), ("codebooks", 1)):
        with pytest.raises(ValueError, match=rf"mtp\.{field} \({value}\)"):
            MTPConfig(**{field: value})


def test_initial_weights(model: OmniModel) -> None:
    """By name and seed; uniform predictions at the start; scales of Code2Wav as they were made."""
    fresh = build("tiny", vocab_size=320, speech=True, thinker={"layers": 2}, talker={"layers": 2})
    init_weights(fresh, seed=0)
    assert torch.equal(fresh.talker.codec_embedding.weight, model.talker.codec_embedding.weight)
    assert 0.09 < fresh.talker.mtp.code_embedding.std() < 0.11
    values = {name.rpartition(".")[2]: p for name, p in fresh.code2wav.named_parameters()}
    assert not values["alpha"].any()
    assert values["gamma"].unique().tolist() == pytest.approx([1e-6])
    assert values["scale"].unique().tolist() == pytest.approx([0.01])
    waveform = fresh.code2wav(torch.randint(0, 256, (1, 20, 8), generator=torch.Generator().manual_seed(0)))
    assert 1e-4 < waveform.std() < 1

"""AuT's decoder against Whisper's of transformers with the same random weights, and AuT on packed batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.cache import PackedKVCache
from omnitrain.models.aut_decoder import AuT, text_of
from omnitrain.models.presets import build, count_parameters, init_weights
from omnitrain.models.sizes import AUT_PRESETS, AuTConfig, AuTDecoderConfig, AuTModelConfig
from tests.models.whisper_reference import VOCABULARY, placed, small_aut, spoken_sample, whisper_of

TEXTS, RECORDINGS = [1, 7, 20, 7], [30, 1, 12, 30]


@pytest.fixture(scope="module")
def model() -> AuT:
    return small_aut()


@pytest.fixture
def documents():
    """Tokens and features of each document."""
    torch.manual_seed(1)
    return [
        (torch.randint(VOCABULARY, (n,)), torch.randn(t, 32, requires_grad=True))
        for n, t in zip(TEXTS, RECORDINGS, strict=True)
    ]


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def decoded(model: AuT, documents) -> torch.Tensor:
    """Hidden states of all documents, packed."""
    ids, encoded = zip(*documents, strict=True)
    positions = torch.cat([torch.arange(len(i)) for i in ids])
    memory = model.decoder.memory(torch.cat(encoded), borders([len(e) for e in encoded]))
    return model.decoder(torch.cat(ids), positions, borders([len(i) for i in ids]), memory)


def test_hidden_states_and_gradients_equal_the_reference(model, documents):
    reference = whisper_of(model.decoder).model.decoder
    weight = torch.randn(sum(TEXTS), 32)
    (sum(
        (reference(i[None], encoder_hidden_states=placed(e)[None]).last_hidden_state[0] * w).sum()
        for (i, e), w in zip(documents, weight.split(TEXTS), strict=True)
    ) / 100).backward()  # fmt: skip
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    expected["embed_tokens.weight"] = expected["embed_tokens.weight"] * math.sqrt(32)  # there, they are scaled already
    heard = [e.grad.clone() for _, e in documents]
    alone = [reference(i[None], encoder_hidden_states=placed(e)[None]).last_hidden_state[0] for i, e in documents]

    for model.decoder.activation_checkpointing in (True, False):
        model.zero_grad()
        for _, encoded in documents:
            encoded.grad = None
        hidden = decoded(model, documents)
        torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-4, rtol=1e-4)
        ((hidden * weight).sum() / 100).backward()
        found = {name: p.grad for name, p in model.decoder.named_parameters()}
        assert set(found) == set(expected) - {"embed_positions.weight"}
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
        for (_, encoded), gradient in zip(documents, heard, strict=True):
            torch.testing.assert_close(encoded.grad, gradient, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_logits_equal_the_reference(model, documents):
    reference = whisper_of(model.decoder)
    for ids, encoded in documents:
        hidden = reference.model.decoder(ids[None], encoder_hidden_states=placed(encoded)[None]).last_hidden_state[0]
        ours = model.decoder.logits(decoded(model, [(ids, encoded)]))
        torch.testing.assert_close(ours, reference.proj_out(hidden), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_texts_about_one_recording_share_its_memory(model, documents):
    """Two, none and one text; and each token after those in the cache."""
    (first, heard), (second, _), (third, heard_last) = documents[1], documents[2], documents[3]
    expected = torch.cat([decoded(model, [d]) for d in ((first, heard), (second, heard), (third, heard_last))])
    memory = model.decoder.memory(torch.cat([heard, documents[0][1], heard_last]), borders([1, 30, 30]))
    texts = [first, second, third]

    def read(starts: list[int], ends: list[int], cache: PackedKVCache | None) -> tuple[torch.Tensor, ...]:
        spans = list(zip(texts, starts, ends, strict=True))
        lengths = [b - a for a, b in zip(starts, ends, strict=True)]
        return model.decoder(
            torch.cat([text[a:b] for text, a, b in spans]),
            torch.cat([torch.arange(a, b) for a, b in zip(starts, ends, strict=True)]),
            borders(lengths),
            memory,
            listeners=borders([lengths[0] + lengths[1], 0, lengths[2]]),
            cache=cache,
        ).split(lengths)

    whole = read([0, 0, 0], [7, 20, 7], None)
    torch.testing.assert_close(torch.cat(whole), expected, atol=1e-5, rtol=1e-5)
    cache = PackedKVCache()
    pieces = [read([0, 0, 0], [5, 20, 1], cache), read([5, 20, 1], [7, 20, 7], cache)]
    joined = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    torch.testing.assert_close(torch.cat(joined), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 100])
def test_packed_equals_alone(model, window):
    samples = [
        spoken_sample(i, frames=f, before=b, after=a, answer=3)
        for i, (f, b, a) in enumerate([(30, 2, 1), (431, 0, 3), (100, 4, 0), (99, 1, 1)])
    ]
    batch = PackedBatch.pack(samples)
    together = model(**batch.model_inputs(), aut_window_frames=window)
    alone = [model(**PackedBatch.pack([s]).model_inputs(), aut_window_frames=window) for s in samples]
    torch.testing.assert_close(together.hidden, torch.cat([o.hidden for o in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.encoded, torch.cat([o.encoded for o in alone]), atol=1e-5, rtol=1e-5)
    assert together.cu_seqlens_audio.diff().tolist() == [len(o.encoded) for o in alone]
    is_audio = batch.token_types != 0
    assert not together.hidden[is_audio].any()
    assert together.hidden[~is_audio].any(dim=1).all()


@torch.no_grad()
def test_the_text_is_what_the_decoder_reads_of_a_document(model):
    sample = spoken_sample(5, frames=210, before=3, after=2)
    batch = PackedBatch.pack([sample])
    rows, positions, cu_seqlens = text_of(batch.cu_seqlens, batch.token_types)
    assert rows.tolist() == [0, 1, 2, len(sample) - 2, len(sample) - 1]
    assert positions.tolist() == [0, 1, 2, 3, 4]
    assert cu_seqlens.tolist() == [0, 5]
    output = model(**batch.model_inputs())
    torch.testing.assert_close(
        output.hidden[rows], decoded(model, [(batch.input_ids[rows], output.encoded)]), atol=1e-6, rtol=1e-6
    )


@torch.no_grad()
def test_several_recordings_of_a_document_are_heard_in_a_row(model):
    one, other = (spoken_sample(i, frames=f, before=1, after=1) for i, f in enumerate((130, 57)))
    both = replace(
        one,
        mel=one.mel + other.mel,
        **{name: torch.cat([torch.from_numpy(getattr(s, name)) for s in (one, other)], dim=-1).numpy()
           for name in ("input_ids", "token_types", "labels", "position_ids")},
    )  # fmt: skip
    output = model(**PackedBatch.pack([both]).model_inputs())
    parts = [model.aut.encode(torch.from_numpy(s.mel[0]), torch.tensor([len(s.mel[0])])) for s in (one, other)]
    torch.testing.assert_close(output.encoded, torch.cat(parts), atol=1e-5, rtol=1e-5)
    assert output.cu_seqlens_audio.tolist() == [0, sum(map(len, parts))]


@torch.no_grad()
def test_the_encoder_is_that_of_an_omni_model():
    sizes = dict(d_model=32, layers=2, heads=4, ffn=48, conv_hidden=8, n_mels=16)
    omni = build("tiny", aut=sizes)
    config = AuTConfig(**sizes, out_dim=omni.config.aut.out_dim)
    model = AuT(AuTModelConfig(encoder=config, decoder=AuTDecoderConfig(d_model=32, layers=1, heads=4, ffn=8)))
    for each in (omni, model):
        init_weights(each, seed=3)
    ours, theirs = dict(model.aut.named_parameters()), dict(omni.aut.named_parameters())
    assert set(theirs) - set(ours) == {f"proj{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    mel, lengths = torch.randn(563, 16), torch.tensor([130, 433])
    encoded = model.aut.encode(mel, lengths)
    assert torch.equal(encoded, omni.aut.encode(mel, lengths))
    projected = omni.aut.proj2(torch.nn.functional.gelu(omni.aut.proj1(encoded)))
    torch.testing.assert_close(omni.aut(mel, lengths), projected)


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 0.876), ("180m", 185), ("300m", 314), ("650m", 644)])
def test_presets_have_the_published_sizes(preset, millions):
    with torch.device("meta"):
        model = AuT(AUT_PRESETS[preset])
    assert count_parameters(model.aut) == pytest.approx(millions * 1e6, rel=0.005)
    assert (model.ctc is not None) == bool(AUT_PRESETS[preset].ctc_slots)


def test_errors_name_what_is_wrong(model):
    spoken = spoken_sample(0, frames=130, before=2, after=2)
    batch = PackedBatch.pack([spoken, spoken])
    inputs = batch.model_inputs()
    mute = torch.where(torch.arange(batch.n_tokens) < len(spoken), batch.token_types, 0)
    with pytest.raises(ValueError, match="document 1 of the batch has no recording, and AuT only hears"):
        model(**inputs | {"token_types": mute})
    with pytest.raises(ValueError, match="document 0 of the batch has no recording"):
        model(**inputs | {"mel": None, "mel_lengths": None})
    with pytest.raises(ValueError, match="AuT only hears"):
        model(**inputs | {"grid_thw": torch.tensor([[1, 2, 2]])})
    one_less = inputs["mel"][: 130 + 57], torch.tensor([130, 57])
    with pytest.raises(ValueError, match="34 audio positions for 25 features"):
        model(**inputs | dict(zip(("mel", "mel_lengths"), one_less, strict=True)))
    with pytest.raises(ValueError, match=r"decoder\.d_model"):
        AuTModelConfig(decoder=AuTDecoderConfig(d_model=64, heads=4))
    with pytest.raises(ValueError, match="multiple of heads"):
        AuTDecoderConfig(d_model=30, heads=4)

"""Transcription against `generate` of transformers on the same weights, against no cache, and against all texts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.transcribe import BeamSearch, transcribe
from omnitrain.models.aut_decoder import text_of
from tests.models.whisper_reference import VOCABULARY, placed, small_aut, spoken_sample, whisper_of

NEW = 14
SHAPES = [(130, 3, 4), (57, 1, 0), (100, 0, 2), (371, 2, 6), (101, 3, 4)]


@pytest.fixture(scope="module")
def model():
    return small_aut(seed=1)


@pytest.fixture(scope="module")
def samples():
    return [spoken_sample(i, frames=f, before=b, after=a) for i, (f, b, a) in enumerate(SHAPES)]


@pytest.fixture(scope="module")
def batch(samples):
    return PackedBatch.pack(samples)


@pytest.fixture(scope="module")
def expected(model, samples):
    """Of the reference, one recording at a time, as a function of the options of `generate`."""
    return lambda **options: [reference_tokens(model, sample, **options) for sample in samples]


@torch.no_grad()
def reference_tokens(model, sample, **options) -> list[int]:
    from transformers.generation import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutput

    one = PackedBatch.pack([sample])
    encoded, _ = model.listen(one.cu_seqlens, one.token_types, one.mel, one.mel_lengths)
    prompt = one.input_ids[text_of(one.cu_seqlens, one.token_types)[0]][None]
    reference = whisper_of(model.decoder)
    reference.generation_config.eos_token_id = options.pop("eos_token_id", None)
    out = GenerationMixin.generate(  # Whisper's own adds its task tokens
        reference, encoder_outputs=BaseModelOutput(last_hidden_state=placed(encoded)[None]), decoder_input_ids=prompt,
        do_sample=False, max_new_tokens=NEW, **options,
    )  # fmt: skip
    return out[0, prompt.shape[1] :].tolist()


def test_greedy_equals_the_reference(model, batch, expected):
    found = transcribe(model, batch, Decoding(max_new_tokens=NEW))
    assert found == expected()
    assert len({tuple(tokens) for tokens in found}) == len(found)  # the recordings matter


@torch.no_grad()
def test_cached_equals_uncached(model, samples, batch):
    for sample, tokens in zip(samples, transcribe(model, batch, Decoding(max_new_tokens=NEW)), strict=True):
        one = PackedBatch.pack([sample])
        for n, token in enumerate(tokens):
            inputs = one.model_inputs() | {
                "input_ids": torch.cat([one.input_ids, torch.tensor(tokens[:n], dtype=torch.int64)]),
                "token_types": torch.cat([one.token_types, torch.zeros(n, dtype=torch.uint8)]),
                "cu_seqlens": torch.tensor([0, one.n_tokens + n], dtype=torch.int32),
            }
            hidden = model(**inputs).hidden
            last = text_of(inputs["cu_seqlens"], inputs["token_types"])[0][-1]
            assert int((hidden[last] @ model.output_embedding.T).argmax()) == token


def test_texts_end_by_themselves(model, batch):
    whole = transcribe(model, batch, Decoding(max_new_tokens=NEW))
    stop = whole[1][3]
    found = transcribe(model, batch, Decoding(max_new_tokens=NEW), stop_ids=[stop])
    assert found == [tokens[: tokens.index(stop) + 1 if stop in tokens else NEW] for tokens in whole]
    assert len({len(tokens) for tokens in found}) > 1


def test_sampling_does_not_depend_on_neighbours(model, samples, batch):
    options = dict(max_new_tokens=NEW, temperature=1.3, top_k=20, repetition_penalty=1.2)
    found = transcribe(model, batch, Decoding(seed=3, **options))
    assert found != transcribe(model, batch, Decoding(seed=30, **options))
    for i, sample in enumerate(samples):
        assert transcribe(model, PackedBatch.pack([sample]), Decoding(seed=3 + i, **options)) == [found[i]]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.7, -0.5])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_beam_search_equals_the_reference(model, batch, expected, width, length_penalty):
    stop = [token for tokens in transcribe(model, batch, Decoding(max_new_tokens=NEW)) for token in tokens[6:8]]
    search = BeamSearch(width=width, length_penalty=length_penalty, max_new_tokens=NEW)
    found = transcribe(model, batch, search, stop_ids=stop)
    options = {"length_penalty": length_penalty} if width > 1 else {}
    theirs = expected(num_beams=width, eos_token_id=sorted(set(stop)), pad_token_id=VOCABULARY - 1, **options)
    for tokens, reference in zip(found, theirs, strict=True):
        assert tokens == reference[: len(tokens)]
        assert len(tokens) == len(reference) or tokens[-1] in stop


def test_a_wide_beam_finds_the_likeliest_text(model, batch):
    """All texts of three tokens, one after another, of a vocabulary of eight."""
    tiny = small_aut(seed=1)
    tiny.decoder.embed_tokens.weight = torch.nn.Parameter(tiny.decoder.embed_tokens.weight[:8].detach())
    sample = replace(spoken_sample(0, frames=130, before=1, after=2))
    sample = replace(sample, input_ids=sample.input_ids % 8)
    one = PackedBatch.pack([sample])
    (found,) = transcribe(tiny, one, BeamSearch(width=64, max_new_tokens=3), stop_ids=[5])

    @torch.no_grad()
    def log_p(tokens: tuple[int, ...]) -> float:
        ids = torch.cat([one.input_ids, torch.tensor(tokens)])
        types = torch.cat([one.token_types, torch.zeros(len(tokens), dtype=torch.uint8)])
        borders = torch.tensor([0, len(ids)], dtype=torch.int32)
        hidden = tiny(ids, one.position_ids, borders, types, one.mel, one.mel_lengths).hidden
        log_probs = (hidden[-len(tokens) - 1 : -1] @ tiny.output_embedding.T).log_softmax(-1)
        return float(log_probs[range(len(tokens)), list(tokens)].sum())

    texts = [t for n in (1, 2, 3) for t in product(range(8), repeat=n) if 5 not in t[:-1] and (n == 3 or t[-1] == 5)]
    assert tuple(found) == max(texts, key=lambda t: log_p(t) / len(t))


def test_beams_do_not_depend_on_neighbours(model, samples, batch):
    search = BeamSearch(width=3, max_new_tokens=NEW)
    found = transcribe(model, batch, search, stop_ids=[7, 11])
    assert found == [transcribe(model, PackedBatch.pack([s]), search, stop_ids=[7, 11])[0] for s in samples]


def test_errors_name_what_is_wrong(model, samples):
    with pytest.raises(ValueError, match="width is 0"):
        BeamSearch(width=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        BeamSearch(max_new_tokens=0)
    mute = PackedBatch.pack([samples[0], spoken_sample(9, frames=80, before=0, after=0)])
    with pytest.raises(ValueError, match="document 1 has no text"):
        transcribe(model, mute)
    with pytest.raises(ValueError, match="2 seeds for 1 prompts"):
        transcribe(model, PackedBatch.pack(samples[:1]), seeds=[1, 2])

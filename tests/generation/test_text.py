"""Generation against `generate` of transformers on the same weights, and against no cache at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.generation.cache import PackedKVCache
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.text import generate, next_positions, read_prompts
from omnitrain.interop.public_format import load_pretrained
from tests.interop import public_models

PROMPTS = {
    "text": [("text", 9)],
    "image": [("text", 3), ("image", (1, 4, 6)), ("text", 5)],
    "audio": [("text", 2), ("audio", 163), ("text", 4)],
    "video": [("video", (3, 4, 4), 0.5), ("text", 4)],
    "video with sound": [("text", 2), ("audio_video", (2, 4, 4), 1.0, 250), ("text", 3)],
    "several media": [("image", (1, 2, 4)), ("audio", 100), ("text", 3), ("image", (1, 6, 4)), ("text", 2)],
}
NEW = 12


@pytest.fixture(scope="module", params=[0, 1])
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    reference = public_models.save_public_model(folder, variant=request.param)
    return load_pretrained(folder).eval(), reference


@pytest.fixture(scope="module")
def samples(models):
    return [public_models.public_sample(models[1].config, p, seed=i) for i, p in enumerate(PROMPTS.values())]


@pytest.fixture(scope="module")
def batch(samples):
    return PackedBatch.pack([s.encoded for s in samples])


@pytest.fixture(scope="module")
def expected(models, samples):
    """Greedy continuations of the reference, one prompt at a time."""
    return [
        models[1].generate(**s.reference_inputs, do_sample=False, max_new_tokens=NEW)[0, len(s.encoded) :].tolist()
        for s in samples
    ]


def test_greedy_equals_the_reference(models, batch, expected):
    assert generate(models[0], batch, Decoding(max_new_tokens=NEW)) == expected
    assert len({tuple(e) for e in expected}) == len(expected)  # the prompts matter


def test_repetition_penalty_equals_the_reference(models, samples, batch):
    found = generate(models[0], batch, Decoding(max_new_tokens=NEW, repetition_penalty=1.5))
    for sample, tokens in zip(samples, found, strict=True):
        out = models[1].generate(**sample.reference_inputs, do_sample=False, max_new_tokens=NEW, repetition_penalty=1.5)
        assert tokens == out[0, len(sample.encoded) :].tolist()


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_prefill_in_chunks_equals_prefill_at_once(models, batch, expected, chunk):
    assert generate(models[0], batch, Decoding(max_new_tokens=NEW), prefill_chunk=chunk) == expected


@torch.no_grad()
def test_cached_equals_uncached(models, samples, expected):
    """Each token anew from its whole document."""
    model = models[0]
    for sample, tokens in zip(samples, expected, strict=True):
        one = PackedBatch.pack([sample.encoded])
        for n, token in enumerate(tokens):
            inputs = one.model_inputs() | {
                "input_ids": torch.cat([one.input_ids, torch.tensor(tokens[:n], dtype=torch.int64)]),
                "token_types": torch.cat([one.token_types, torch.zeros(n, dtype=torch.uint8)]),
                "position_ids": torch.cat(
                    [one.position_ids, (next_positions(one) + torch.arange(n)).expand(3, -1)], dim=1
                ),
                "cu_seqlens": torch.tensor([0, one.n_tokens + n], dtype=torch.int32),
            }
            assert int(model.thinker.logits(model(**inputs).hidden[-1:]).argmax()) == token


def test_documents_stop_by_themselves(models, batch, expected):
    """A token in the middle of one continuation as stop: that document ends there, the others go on."""
    stop = expected[1][4]
    found = generate(models[0], batch, Decoding(max_new_tokens=NEW), stop_ids=[stop])
    for tokens, whole in zip(found, expected, strict=True):
        n = whole.index(stop) + 1 if stop in whole else NEW
        assert tokens == whole[:n]
    assert len(found[1]) <= 5


def test_tokens_are_streamed(models, batch, expected):
    streamed: list[tuple[int, int]] = []
    generate(models[0], batch, Decoding(max_new_tokens=3), on_token=lambda *pair: streamed.append(pair))
    assert streamed == [(b, tokens[n]) for n in range(3) for b, tokens in enumerate(expected)]


def test_sampling_is_reproducible_and_independent_of_neighbours(models, samples, batch):
    options = dict(max_new_tokens=NEW, temperature=1.2, top_k=50, top_p=0.95)
    first = generate(models[0], batch, Decoding(seed=3, **options))
    assert first == generate(models[0], batch, Decoding(seed=3, **options))
    assert first != generate(models[0], batch, Decoding(seed=30, **options))
    for i, sample in enumerate(samples):
        assert generate(models[0], PackedBatch.pack([sample.encoded]), Decoding(seed=3 + i, **options)) == [first[i]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"seeds": [1, 2]}, "2 seeds for 6 prompts"),
    ],
)
def test_nonsense_is_refused_by_name(models, batch, options, message):
    of_call = {name: value for name, value in options.items() if name in ("prefill_chunk", "seeds")}
    with pytest.raises(ValueError, match=message):
        generate(models[0], batch, Decoding(**{k: v for k, v in options.items() if k not in of_call}), **of_call)


def test_an_empty_prompt_is_refused(models, samples):
    empty = replace(
        samples[0].encoded,
        input_ids=np.zeros(0, np.int64),
        token_types=np.zeros(0, np.uint8),
        labels=np.zeros(0, np.int64),
        position_ids=np.zeros((3, 0), np.float32),
    )
    with pytest.raises(ValueError, match="document 1 has no tokens"):
        generate(models[0], PackedBatch.pack([samples[0].encoded, empty]))


def test_the_window_of_the_audio_encoder(models):
    """Given by argument it is as if the configuration said it."""
    model, reference = models
    sample = public_models.public_sample(reference.config, [("text", 2), ("audio", 350), ("text", 4)], seed=5)
    batch = PackedBatch.pack([sample.encoded])
    cache = PackedKVCache()
    own = model.aut.config
    assert own.window_frames > 100
    hidden, _ = read_prompts(model, batch, cache, aut_window_frames=100)
    try:
        model.aut.config = replace(own, window_frames=100)
        expected, _ = read_prompts(model, batch, PackedKVCache())
    finally:
        model.aut.config = own
    assert torch.equal(hidden, expected)
    assert not torch.allclose(hidden, read_prompts(model, batch, PackedKVCache())[0])

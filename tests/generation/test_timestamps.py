"""Times of words against what the convolutions see, all paths of CTC, and Whisper's attention and time warping."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise, product

import numpy as np
import pytest
import torch

from omnitrain.data.batch import PackedBatch
from omnitrain.data.chat import train_bpe
from omnitrain.generation.sampling import Decoding
from omnitrain.generation.timestamps import (
    Word,
    attention_spans,
    cross_attention_maps,
    ctc_spans,
    document_times,
    feature_times,
    time_warping,
    with_texts,
    word_times,
    words,
)
from omnitrain.generation.transcribe import transcribe
from omnitrain.models.aut import AuTConfig, AuTEncoder
from omnitrain.models.aut_decoder import text_of
from tests.models.whisper_reference import placed, small_aut, spoken_sample, whisper_of

SHAPES = [(130, 3, 4), (57, 1, 0), (371, 2, 6)]


@pytest.fixture(scope="module")
def model():
    return small_aut(seed=1, ctc_slots=2)


@pytest.fixture(scope="module")
def batch():
    return PackedBatch.pack([spoken_sample(i, frames=f, before=b, after=a) for i, (f, b, a) in enumerate(SHAPES)])


@pytest.mark.parametrize("frames", [1, 8, 9, 57, 99, 100, 101, 204, 371])
def test_a_feature_lies_at_the_centre_of_what_it_sees(frames):
    encoder = AuTEncoder(AuTConfig(d_model=8, layers=1, heads=1, ffn=8, out_dim=8, conv_hidden=2, n_mels=16))
    encoder.layers = torch.nn.ModuleList()  # attention sees the whole window
    mel = torch.randn(frames, 16, requires_grad=True)
    features = encoder.encode(mel, torch.tensor([frames]))
    times = feature_times(encoder.config, [frames])
    assert len(times) == len(features)
    assert times[0, 0] == 0
    assert times[-1, 1] == frames / 100
    assert torch.equal(times[1:, 0], times[:-1, 1])
    for i, (feature, (start, end)) in enumerate(zip(features, (100 * times).tolist(), strict=True)):
        (gradient,) = torch.autograd.grad(feature.square().sum(), mel, retain_graph=True)
        seen = gradient.abs().sum(1).nonzero().squeeze(1)
        chunk = 100 * (i // 13)
        centre = chunk + 8 * (i % 13)
        assert seen.tolist() == list(range(max(chunk, centre - 7), min(chunk + 100, frames, centre + 8)))
        assert start <= centre < end


def test_times_of_a_document_with_two_recordings_go_on(model):
    one, other = (spoken_sample(i, frames=f, before=1, after=1) for i, f in enumerate((130, 57)))
    joined = {n: np.concatenate([getattr(one, n), getattr(other, n)], -1)
              for n in ("input_ids", "token_types", "labels", "position_ids")}  # fmt: skip
    both = replace(one, mel=one.mel + other.mel, **joined)
    first, second = document_times(model, PackedBatch.pack([both, other]))
    config = model.config.encoder
    torch.testing.assert_close(first, torch.cat([feature_times(config, [130]), 1.3 + feature_times(config, [57])]))
    torch.testing.assert_close(second, feature_times(config, [57]))


# --- CTC --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[1], [1, 1], [0, 1, 0], [2, 2, 0]], ids=str)
def test_ctc_spans_lie_on_the_likeliest_path(tokens):
    """Of all paths of six steps over three symbols and the blank (3)."""
    log_probs = torch.randn(6, 4, generator=torch.Generator().manual_seed(len(tokens))).log_softmax(-1)

    def spelled(path: tuple[int, ...]) -> list[int]:
        return [symbol for symbol, _ in groupby(path) if symbol != 3]

    best = max(
        (path for path in product(range(4), repeat=6) if spelled(path) == tokens),
        key=lambda path: float(log_probs[range(6), list(path)].sum()),
    )
    runs, start = [], 0
    for symbol, run in groupby(best):
        end = start + len(list(run))
        runs += [(start, end)] if symbol != 3 else []
        start = end
    assert ctc_spans(log_probs, tokens) == runs


def test_ctc_needs_a_feature_for_each_symbol(model, batch):
    log_probs = torch.randn(3, 4).log_softmax(-1)
    assert ctc_spans(log_probs, []) == []
    assert ctc_spans(log_probs, [1, 1]) == [(0, 1), (2, 3)]
    assert ctc_spans(log_probs, [1, 1, 2]) is None
    texts = [[1, 2], [5] * 9, [7]]  # 57 frames are 8 features of 2 slots, too few for 9 equal bytes, blanks between
    found = word_times(model, batch, texts, lambda ids: " ".join("abcdefgh"[i] for i in ids[:2]) + "f" * len(ids[2:]))
    assert [None if t is None else [w.text for w in t] for t in found] == [["b", "c"], None, ["h"]]
    with pytest.raises(ValueError, match="no CTC head"):
        word_times(small_aut(), batch, texts, str)


def test_words_are_found_where_they_were_said(model, batch, monkeypatch):
    """A CTC head that hears "é" in features 4 and 5, and "no" in feature 14, of every recording."""
    said = 0.01 * torch.rand(64, 2, 257)  # where two ways are equally likely, torchaudio may take a third
    said[..., 256] = 5
    first, last = "é".encode()
    said[4, 1, first] = said[5, 0, last] = said[14, 0, ord("n")] = said[14, 1, ord("o")] = 10
    heard = torch.nn.Module()
    lengths = model.aut.output_lengths(batch.mel_lengths).tolist()
    heard.slots, heard.forward = 2, lambda _: torch.cat([said[:n].flatten(0, 1) for n in lengths])
    monkeypatch.setattr(model, "ctc", heard)
    found = word_times(model, batch, [[9, 8], [9], [9, 8]], lambda ids: " ".join({9: "é", 8: "no"}[i] for i in ids))
    one, other = Word(text="é", start=0.28, end=0.44), Word(text="no", start=1.04, end=1.12)
    assert found == [[one, other], [one], [one, other]]


# --- cross-attention --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_maps_equal_the_reference(model, batch):
    reference = whisper_of(model.decoder).model.decoder
    rows = text_of(batch.cu_seqlens, batch.token_types)
    encoded, heard = model.listen(batch.cu_seqlens, batch.token_types, batch.mel, batch.mel_lengths)
    texts = batch.input_ids[rows[0]].split(rows[2].diff().tolist())
    found = cross_attention_maps(model, batch)
    for ids, features, maps in zip(texts, encoded.split(heard.diff().tolist()), found, strict=True):
        out = reference(ids[None], encoder_hidden_states=placed(features)[None], output_attentions=True)
        expected = torch.cat(out.cross_attentions)
        assert maps.shape == (3, 4, len(ids), len(features))
        torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-4)


def test_texts_are_laid_behind_their_documents(model, batch):
    """Written by the model, and then read again: each token is the likeliest one after what stands before it."""
    texts = transcribe(model, batch, Decoding(max_new_tokens=6))
    read = with_texts(batch, texts)
    assert read.cu_seqlens.diff().tolist() == [n + 6 for n in batch.cu_seqlens.diff().tolist()]
    rows, _, borders = text_of(read.cu_seqlens, read.token_types)
    ids, hidden = read.input_ids[rows], model(**read.model_inputs()).hidden[rows]
    for end, text in zip(borders[1:].tolist(), texts, strict=True):
        assert ids[end - 6 : end].tolist() == text
        assert (hidden[end - 7 : end - 1] @ model.output_embedding.T).argmax(-1).tolist() == text


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 7), (9, 4), (12, 30)], ids=str)
def test_time_warping_equals_the_reference(shape):
    from transformers.models.whisper.generation_whisper import _dynamic_time_warping

    cost = np.random.default_rng(0).standard_normal(shape)
    for found, expected in zip(time_warping(cost), _dynamic_time_warping(cost), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_attention_spans_follow_the_attention():
    """Tokens looked at in three, two and four features, the end in one; and a feature that everything looks at."""
    attention = torch.full((2, 3, 4, 10), 0.01)
    for token, features in enumerate([[0, 1, 2], [3, 4], [5, 6, 7, 8], [9]]):
        attention[1, :, token, features] = 0.2
    attention[:, :, :, 7] += 0.5
    assert attention_spans(attention) == [(0, 3), (3, 5), (5, 9)]
    attention[1, 0] = torch.rand(4, 10)
    assert attention_spans(attention, heads=[(1, 1), (1, 2)]) == [(0, 3), (3, 5), (5, 9)]


def test_word_times_by_attention_lie_in_the_recording(model, batch):
    texts = transcribe(model, batch, Decoding(max_new_tokens=5))
    found = word_times(model, batch, texts, lambda ids: "".join(f" w{i}" for i in ids), by="attention")
    for of_text, text, frames in zip(found, texts, batch.mel_lengths.tolist(), strict=True):
        assert [word.text for word in of_text] == [f"w{i}" for i in text]
        assert all(0 <= word.start < word.end <= frames / 100 for word in of_text)
        assert all(a.start <= b.start for a, b in pairwise(of_text))


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two", ["one", "two"]),
        (" Zwölf  Boxkämpfer, ja.", ["Zwölf", "Boxkämpfer,", "ja."]),
        ("naïve 🙂 ok", ["naïve", "🙂", "ok"]),
        ("Hi你好。 世界", ["Hi", "你", "好。", "世", "界"]),
        ("", []),
    ],
)
def test_tokens_become_words(text, expected):
    tokenizer = train_bpe(["one two three"] * 3, vocab_size=300)  # most characters are several tokens
    tokens = tokenizer.encode(text)
    times = torch.tensor([[i, i + 1] for i in range(len(tokens))], dtype=torch.float64)
    found = words(tokens, [(i, i + 1) for i in range(len(tokens))], times, tokenizer.decode)
    assert [word.text for word in found] == expected
    for word in found:
        spelled = tokenizer.decode(tokens[int(word.start) : int(word.end)])
        assert spelled.strip() == word.text

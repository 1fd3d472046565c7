"""CTC's texts against a sum over all paths, and the decoder's judgement against the model's own loss."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import groupby, product

import pytest
import torch
from torch.nn import functional as F

from omnitrain.data.batch import IGNORE, PackedBatch
from omnitrain.generation.rescore import Rescoring, _decoder_log_probs, prefix_beam_search, rescored
from omnitrain.generation.timestamps import with_texts
from omnitrain.generation.transcribe import ctc_transcribe
from tests.models.whisper_reference import small_aut, spoken_sample

STOP = 7


@pytest.fixture(scope="module")
def model():
    return small_aut(seed=1, ctc_slots=2)


@pytest.fixture(scope="module")
def batch():
    shapes = [(130, 3, 4), (57, 1, 1), (371, 2, 6)]
    return PackedBatch.pack([spoken_sample(i, frames=f, before=b, after=a) for i, (f, b, a) in enumerate(shapes)])


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_search_sums_over_all_paths(seed: int) -> None:
    """Five steps over three symbols and the blank: 1,024 paths."""
    log_probs = (2 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)
    texts: dict[tuple[int, ...], float] = defaultdict(float)
    for path in product(range(4), repeat=5):
        text = tuple(symbol for symbol, _ in groupby(path) if symbol != 3)
        texts[text] += float(log_probs[range(5), list(path)].sum().exp())
    expected = sorted(texts.items(), key=lambda one: -one[1])
    found = prefix_beam_search(log_probs, width=1000, symbols=4)
    assert [text for text, _ in found] == [text for text, _ in expected]
    torch.testing.assert_close(torch.tensor([p for _, p in found]).exp(), torch.tensor([p for _, p in expected]))
    narrow = prefix_beam_search(log_probs, width=3, symbols=4)
    assert len(narrow) == 3  # of whose paths it has seen some
    assert all(p <= texts[text] * 1.0001 for text, p in ((text, math.exp(log_p)) for text, log_p in narrow))


def test_the_log_p_of_a_text_is_that_of_the_loss(model, batch) -> None:
    answers = [[[5, STOP], [9, 8, 30, STOP]], [[STOP]], [[4, 4, 4, STOP], [11, STOP], [12, 13, STOP]]]
    encoded, borders = model.listen(batch.cu_seqlens, batch.token_types, batch.mel, batch.mel_lengths)
    found = _decoder_log_probs(model, batch, encoded, borders, answers)
    for i in range(3):  # one answer to each document at a time, through the model's own forward pass
        chosen = [of_document[i % len(of_document)] for of_document in answers]
        read = with_texts(batch, chosen)
        hidden = model(**read.model_inputs()).hidden
        labels = torch.full_like(read.input_ids, IGNORE)
        for end, answer in zip(read.cu_seqlens[1:].tolist(), chosen, strict=True):
            labels[end - len(answer) - 1 : end - 1] = torch.tensor(answer)
        nll = F.cross_entropy(hidden @ model.output_embedding.T, labels, ignore_index=IGNORE, reduction="none")
        for document, part in enumerate(nll.split(read.cu_seqlens.diff().tolist())):
            expected = -float(part.sum())
            assert found[document][i % len(answers[document])] == pytest.approx(expected, rel=1e-4)


def test_the_weight_decides_who_is_heard(model, batch) -> None:
    def encode(text: str) -> list[int]:
        return [10 + ord(c) % 40 for c in text]

    def best(**options: float) -> list[str]:
        return rescored(model, batch, encode, STOP, Rescoring(**options))

    greedy = best(ctc_weight=1, width=1)
    assert len(greedy) == 3
    by_decoder, by_ctc = best(ctc_weight=0, width=16), best(ctc_weight=1, width=16)
    assert by_decoder != by_ctc
    encoded, borders = model.listen(batch.cu_seqlens, batch.token_types, batch.mel, batch.mel_lengths)
    both = [[[*encode(text), STOP] for text in pair] for pair in zip(by_decoder, by_ctc, strict=True)]
    for preferred, other in _decoder_log_probs(model, batch, encoded, borders, both):
        assert preferred >= other


def test_a_sharp_head_is_read_as_it_is(model, batch, monkeypatch) -> None:
    """Where each step has one clear symbol, all ways of reading give the best path."""
    sharp = torch.nn.Module()
    features = int(model.aut.output_lengths(batch.mel_lengths).sum())
    symbols = torch.randint(97, 100, (features, 2), generator=torch.Generator().manual_seed(0))
    logits = torch.full((features, 2, 257), -30.0).scatter_(2, symbols[..., None], 0.0)
    sharp.slots, sharp.forward = 2, lambda _: logits.log_softmax(-1).flatten(0, 1)
    monkeypatch.setattr(model, "ctc", sharp)
    expected = ctc_transcribe(model, batch)
    for weight in (0.5, 1.0):
        assert rescored(model, batch, lambda text: [10] * len(text), STOP, Rescoring(ctc_weight=weight)) == expected


def test_nonsense_is_refused(model, batch) -> None:
    with pytest.raises(ValueError, match=r"ctc_weight is 1\.5: must lie between 0 and 1"):
        Rescoring(ctc_weight=1.5)
    with pytest.raises(ValueError, match="width is 0"):
        Rescoring(width=0)
    with pytest.raises(ValueError, match="no CTC head"):
        rescored(small_aut(), batch, lambda _: [1], STOP, Rescoring())

"""The test sees a model that looks, and is not fooled by one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.evaluation.media_swap import PARTNERS, Drawn, media_segments, media_swap, swap_partners, with_media_of
from omnitrain.evaluation.teacher_forced import sample_losses

from .conftest import WORDS, Reader, Samples, grey_sample

SAMPLES = [grey_sample(i) for i in range(40)]


def drawn(samples: list[Sample]) -> list[Drawn]:
    source = Samples(samples)
    return [Drawn(sample, source) for sample in samples]


def answering(sample: Sample, text: str) -> Sample:
    """The same question with another answer."""
    return replace(
        sample,
        messages=(sample.messages[0], Message(role="assistant", segments=(Segment(type="text", text=text),))),
    )


def test_a_model_that_looks_is_found(tokenizer: ChatTokenizer, encoder: SampleEncoder) -> None:
    result = media_swap(Reader(tokenizer, reads=True), encoder, drawn(SAMPLES))
    assert result.gain is not None
    assert result.gain.above_zero
    assert result.gain.n == 40
    assert result.gain.groups == 16  # concepts, not samples
    assert all(swap.gain > 1 for swap in result.swaps)


def test_a_model_that_does_not_look_gains_nothing(tokenizer: ChatTokenizer, encoder: SampleEncoder) -> None:
    result = media_swap(Reader(tokenizer, reads=False), encoder, drawn(SAMPLES))
    assert result.gain is not None
    assert result.gain.mean == pytest.approx(0, abs=1e-6)
    assert not result.gain.above_zero or result.gain.low < 1e-6


def test_partners_are_of_another_concept_and_answer_and_deterministic() -> None:
    partners = swap_partners(SAMPLES)
    assert partners == swap_partners(SAMPLES)
    assert all(len(set(those)) == len(those) for those in partners)
    for sample, partner in ((s, p) for s, those in zip(SAMPLES, partners, strict=True) for p in those):
        assert SAMPLES[partner].concept != sample.concept
        assert SAMPLES[partner].reference != sample.reference
    assert min(len(those) for those in partners) >= 1


def test_partners_are_a_derangement_of_a_class() -> None:
    samples = SAMPLES[:20]
    partners = swap_partners(samples, 3)
    for round_of in zip(*partners, strict=True):
        assert sorted(round_of) == list(range(20))
        assert all(p != i for i, p in enumerate(round_of))


def test_partners_keep_task_and_input_language() -> None:
    samples = [
        replace(grey_sample(i), task=("asr", "sound")[i % 2], languages=(("fr", "ru")[i // 2 % 2], "en"))
        for i in range(32)
    ]
    partners = swap_partners(samples)
    assert all(partners)
    for sample, partner in ((s, p) for s, those in zip(samples, partners, strict=True) for p in those):
        assert (samples[partner].task, samples[partner].languages) == (sample.task, sample.languages)


def test_the_only_one_of_its_language_takes_a_partner_of_its_task() -> None:
    samples = [replace(grey_sample(i), languages=("fr", "en") if i < 4 else ("ru", "en")) for i in range(5)]
    partners = swap_partners(samples)
    assert sorted(p[0] for p in partners[:4]) == [0, 1, 2, 3]
    assert partners[4][0] in (0, 1, 2, 3)


def test_no_partner_has_the_same_answer_though_its_concept_is_another() -> None:
    samples = [replace(grey_sample(0), id=f"same/{i}", concept=f"concept {i}") for i in range(5)]
    assert swap_partners(samples) == [()] * 5
    assert swap_partners([*samples, grey_sample(1)]) == [(5,)] * 5 + [(0, 1, 2, 3, 4)]


def test_the_only_one_of_its_language_takes_the_partner_of_nearest_length() -> None:
    lengths = (1, 9, 4, 20)  # neither the first nor the last, the shortest nor the longest is nearest to 5
    samples = [answering(replace(grey_sample(i), languages=("fr", "en")), WORDS[i] * n) for i, n in enumerate(lengths)]
    alone = answering(replace(grey_sample(4), languages=("ru", "en")), WORDS[4] * 5)
    assert swap_partners([*samples, alone])[4] == (2,)


def test_one_concept_alone_has_no_partner() -> None:
    samples = [replace(grey_sample(0), id=f"same/{i}") for i in range(5)]
    assert swap_partners(samples) == [()] * 5


def test_samples_without_a_partner_are_counted(tokenizer: ChatTokenizer, encoder: SampleEncoder) -> None:
    samples = [replace(grey_sample(0), id=f"same/{i}") for i in range(3)]
    result = media_swap(Reader(tokenizer, reads=True), encoder, drawn(samples))
    assert result.gain is None
    assert result.without_partner == 3


def test_a_broken_picture_is_counted_by_reason(tokenizer: ChatTokenizer, encoder: SampleEncoder) -> None:
    broken = replace(
        grey_sample(1),
        id="broken",
        messages=(
            Message(role="user", segments=(Segment(type="image", media=b"\x89PNG\r\n\x1a\n nothing"),)),
            Message(role="assistant", segments=(Segment(type="text", text="b"),)),
        ),
    )
    result = media_swap(Reader(tokenizer, reads=True), encoder, drawn([*SAMPLES[:8], broken]))
    assert sum(result.skipped.values()) == 1
    assert len(result.swaps) == 8


def test_the_swapped_loss_is_the_mean_over_partners(tokenizer: ChatTokenizer, encoder: SampleEncoder) -> None:
    model, samples = Reader(tokenizer, reads=True), drawn(SAMPLES[:20])
    by_id = {d.sample.id: d for d in samples}
    swap = media_swap(model, encoder, samples).swaps[0]
    assert len(swap.partners) == PARTNERS
    exchanged = [with_media_of(by_id[swap.id], by_id[partner]) for partner in swap.partners]
    losses = sample_losses(model, [encoder(sample, samples[0].source.media_bytes) for sample in exchanged])
    assert swap.swapped == pytest.approx(sum(loss.per_token for loss in losses) / PARTNERS, rel=1e-6)


def test_partners_that_cannot_be_decoded_are_not_in_the_mean(tokenizer: ChatTokenizer, encoder: SampleEncoder) -> None:
    model, samples = Reader(tokenizer, reads=True), drawn(SAMPLES[:8])
    user, assistant = samples[0].sample.messages
    picture = replace(user.segments[0], media=b"\x89PNG\r\n\x1a\n nothing")
    messages = (replace(user, segments=(picture, user.segments[1])), assistant)
    broken = Drawn(replace(samples[0].sample, messages=messages), samples[0].source)
    numbers = [encoder(d.sample, d.source.media_bytes) for d in samples]
    result = media_swap(model, encoder, [broken, *samples[1:]], own_losses=sample_losses(model, numbers))
    assert result.skipped == {"image_corrupt": 7}
    assert [len(swap.partners) for swap in result.swaps] == [7] + [6] * 7
    # A wrong picture costs every answer as much as any other.
    assert [swap.swapped for swap in result.swaps] == pytest.approx([result.swaps[0].swapped] * 8, rel=1e-6)


def test_all_media_are_exchanged_and_nothing_else() -> None:
    own, partner = drawn(SAMPLES)[:2]
    swapped = with_media_of(own, partner)
    assert media_segments(swapped)[0].media == media_segments(partner.sample)[0].media
    assert swapped.reference == own.sample.reference
    assert swapped.messages[0].segments[1] == own.sample.messages[0].segments[1]
    silent = Drawn(replace(own.sample, messages=own.sample.messages[1:]), own.source)
    with pytest.raises(ValueError, match="different kinds of media"):
        with_media_of(silent, partner)

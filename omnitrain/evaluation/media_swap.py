"""The media-swap test: does a model look and listen, or does it only guess well?

Every held-out answer is scored with its own picture, recording or video, and with those of several other samples
(docs/evaluation.md says of which, and why):

    gain = mean of loss(answer | prompt, another's medium) - loss(answer | prompt, its own medium)    [nats per token]
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omnitrain.data.batch import EncodedSample
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.sample import MEDIA, BadSample, Sample, Segment
from omnitrain.data.shards import Source
from omnitrain.evaluation.intervals import Interval, bootstrap_interval
from omnitrain.evaluation.teacher_forced import SampleLoss, Writer, sample_losses

PARTNERS = 8
"""Others' media that each sample is scored with."""
_LENGTH_CLASS = 24  # samples of similar answer length among which partners are chosen


@dataclass(frozen=True)
class Drawn:
    """A sample and the source that has its media."""

    sample: Sample
    source: Source


def media_segments(sample: Sample) -> list[Segment]:
    """What a model sees and hears of `sample`, in order."""
    return [s for m in sample.messages for s in m.segments if s.type in MEDIA]


def swap_partners(samples: Sequence[Sample], n: int = PARTNERS) -> list[tuple[int, ...]]:
    """For each sample the indices of up to `n` whose media it gets; none where no sample is fit for it.

    Within a class (task, kinds of media, input language, similar answer length) every round of partners is a
    derangement: no sample keeps its own medium, and no medium is used twice. A sample left alone by that gets the fit
    one of its task whose answer is nearest in length. A function of the samples alone.
    """
    partners: list[tuple[int, ...]] = [()] * len(samples)
    # The last language is that of the answer.
    classes = [(s.task, tuple((m.type, m.with_audio) for m in media_segments(s)), s.languages[:-1]) for s in samples]
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i in sorted(range(len(samples)), key=lambda i: (len(samples[i].reference), samples[i].id)):
        if media_segments(samples[i]):
            groups[classes[i]].append(i)
    for group in groups.values():
        blocks = max(1, len(group) // _LENGTH_CLASS)
        for b in range(blocks):
            block = group[b * len(group) // blocks : (b + 1) * len(group) // blocks]
            for pairs in _derangements(block, samples, n):
                for i, partner in pairs:
                    partners[i] = (*partners[i], partner)
    for i in (i for group in groups.values() for i in group if not partners[i]):
        candidates = [j for group in groups.values() for j in group if classes[j][:2] == classes[i][:2]]
        length = len(samples[i].reference)
        nearest = min(
            (j for j in candidates if _fit(samples[i], samples[j])),
            key=lambda j: (abs(len(samples[j].reference) - length), samples[j].id),
            default=None,
        )
        partners[i] = () if nearest is None else (nearest,)
    return partners


def _fit(own: Sample, other: Sample) -> bool:
    """Whether `other`'s media must lead to another answer."""
    return own.reference != other.reference and (own.concept != other.concept or not own.concept)


def _derangements(block: list[int], samples: Sequence[Sample], n: int) -> list[list[tuple[int, int]]]:
    """Rotations of `block`, sorted by concept: the `n` distances that leave the fewest without a fit partner, near ones
    first; (sample, partner) of each."""
    order = sorted(block, key=lambda i: (samples[i].concept, samples[i].reference, samples[i].id))
    rounds = []
    for distance in range(1, len(order)):
        pairs = zip(order, order[distance:] + order[:distance], strict=True)
        rounds.append([(i, j) for i, j in pairs if _fit(samples[i], samples[j])])
    return sorted(rounds, key=len, reverse=True)[:n]


def with_media_of(own: Drawn, partner: Drawn) -> Sample:
    """`own`'s conversation with `partner`'s media in the places of its own. Raises ValueError where the two do not have
    the same kinds of media in the same order; BadSample for a medium of the partner that is missing."""
    mine, theirs = media_segments(own.sample), media_segments(partner.sample)
    if [s.type for s in mine] != [s.type for s in theirs]:
        raise ValueError(f"samples {own.sample.id!r} and {partner.sample.id!r} have different kinds of media")
    blobs = iter([partner.source.media_bytes(segment) for segment in theirs])

    def exchange(segment: Segment) -> Segment:
        return replace(segment, media=next(blobs), path=None) if segment.type in MEDIA else segment

    messages = tuple(replace(m, segments=tuple(exchange(s) for s in m.segments)) for m in own.sample.messages)
    return replace(own.sample, messages=messages)


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One sample's losses, nats per target token, with its own medium and, on average, with its partners'; `tokens`:
    how many targets it has."""

    id: str
    partners: tuple[str, ...]
    concept: str
    own: float
    swapped: float
    tokens: int

    @property
    def gain(self) -> float:
        return self.swapped - self.own


@dataclass(frozen=True, kw_only=True)
class MediaSwap:
    """Result of the test over a set of samples.

    Attributes:
        gain: swapped - own over all targets, nats per target token, with its interval (resampled over concepts); None
            when there was no pair.
        swaps: one per scored sample.
        without_partner: samples that no other was fit for.
        skipped: samples that could not be encoded, by reason.
    """

    gain: Interval | None
    swaps: tuple[Swap, ...]
    without_partner: int
    skipped: dict[str, int]


def media_swap(
    model: Writer,
    encoder: SampleEncoder,
    drawn: Sequence[Drawn],
    *,
    own_losses: Sequence[SampleLoss | None] | None = None,
    seed: int = 0,
    on_sample: Callable[[], None] | None = None,
) -> MediaSwap:
    """Run the test on held-out samples of one modality; those without media are left out. `own_losses`: with the own
    media, where they are known already (None: not scorable). `seed`: of the bootstrap; partners do not depend on it.
    `on_sample`: as of `drawn_losses`."""
    skipped: Counter[str] = Counter()
    if own_losses is None:
        own_losses = drawn_losses(model, encoder, drawn, skipped, on_sample=on_sample)
    usable = [i for i, loss in enumerate(own_losses) if loss is not None]
    partners_of = swap_partners([drawn[i].sample for i in usable])
    pairs = [(i, usable[p]) for i, ps in zip(usable, partners_of, strict=True) for p in ps]
    own, others = [drawn[i] for i, _ in pairs], [drawn[p] for _, p in pairs]
    scored = drawn_losses(model, encoder, own, skipped, media_of=others, on_sample=on_sample)
    found: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (i, p), loss in zip(pairs, scored, strict=True):
        if loss is not None:
            found[i].append((p, loss.per_token))
    swaps = tuple(
        Swap(
            id=drawn[i].sample.id,
            partners=tuple(drawn[p].sample.id for p, _ in losses),
            concept=drawn[i].sample.concept or drawn[i].sample.id,
            own=loss.per_token,
            tokens=loss.tokens,
            swapped=sum(nats for _, nats in losses) / len(losses),
        )
        for i, losses in found.items()
        if (loss := own_losses[i]) is not None
    )
    without = sum(not ps and bool(media_segments(drawn[i].sample)) for i, ps in zip(usable, partners_of, strict=True))
    return MediaSwap(gain=swap_gain(swaps, seed=seed), swaps=swaps, without_partner=without, skipped=dict(skipped))


def swap_gain(swaps: Sequence[Swap], *, seed: int = 0) -> Interval | None:
    """Gain over all targets, nats per target token, with its bootstrap interval over concepts; None without swaps."""
    if not swaps:
        return None
    tokens, groups = [s.tokens for s in swaps], [s.concept for s in swaps]
    return bootstrap_interval([s.gain * s.tokens for s in swaps], weights=tokens, groups=groups, seed=seed)


def drawn_losses(
    model: Writer,
    encoder: SampleEncoder,
    drawn: Sequence[Drawn],
    skipped: Counter[str],
    *,
    media_of: Sequence[Drawn] | None = None,
    on_sample: Callable[[], None] | None = None,
    on_batch: Callable[[int, Any], None] | None = None,
) -> list[SampleLoss | None]:
    """The losses of samples, in their order, with the media of `media_of` in place of their own. None for what cannot
    be encoded, which is counted in `skipped`, by reason. `on_sample` is called for every sample, and `on_batch` as by
    `sample_losses`."""
    kept: list[int] = []

    def encoded() -> Iterator[EncodedSample]:
        for i, one in enumerate(drawn):
            if on_sample is not None:
                on_sample()
            try:
                sample = one.sample if media_of is None else with_media_of(one, media_of[i])
                numbers = encoder(sample, one.source.media_bytes)
            except BadSample as bad:
                skipped[bad.reason] += 1
                continue
            kept.append(i)
            yield numbers

    losses = sample_losses(model, encoded(), on_batch=on_batch)
    found = dict(zip(kept, losses, strict=True))
    return [found.get(i) for i in range(len(drawn))]

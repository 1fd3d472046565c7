"""The media-swap test: does a model look and listen, or does it only guess well?

Every held-out answer is scored twice: with its own picture, recording or video, and with that of another sample. Prompt
and answer stay the same. The difference

    gain = loss(answer | prompt, another's medium) - loss(answer | prompt, its own medium)    [nats per target token]

is zero on average for a model that ignores the medium, however low its loss. The partner is of the same task, a
similar answer length and, where enough samples allow it, the same input language, but of another concept and another
answer. So neither the language that is spoken nor the length of a recording gives the answer away.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from omnitrain.data.batch import EncodedSample
from omnitrain.data.encode import SampleEncoder
from omnitrain.data.packing import Budget
from omnitrain.data.sample import BadSample, Sample, Segment
from omnitrain.data.shards import Source
from omnitrain.evaluation.metrics import Interval, bootstrap_interval
from omnitrain.evaluation.teacher_forced import DEFAULT_BUDGET, SampleLoss, sample_losses
from omnitrain.models.omni import OmniModel

_LENGTH_CLASS = 24  # samples of similar answer length among which partners are chosen


@dataclass(frozen=True)
class Drawn:
    """A sample and the source that has its media."""

    sample: Sample
    source: Source


def media_segments(sample: Sample) -> list[Segment]:
    """What a model sees and hears of `sample`, in order."""
    return [s for m in sample.messages for s in m.segments if s.type in ("image", "audio", "video")]


def swap_partners(samples: Sequence[Sample]) -> list[int | None]:
    """For each sample the index of the one whose media it gets; None where no sample is fit for it.

    Within a class (task, kinds of media, input language, similar answer length) partners are a derangement: no sample
    keeps its own medium, and no medium is used twice. A sample left alone by that gets the fit one of its task whose
    answer is nearest in length. A function of the samples alone.
    """
    partners: list[int | None] = [None] * len(samples)
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
            for i, partner in _derange(block, samples):
                partners[i] = partner
    for i in (i for group in groups.values() for i in group if partners[i] is None):
        candidates = [j for group in groups.values() for j in group if classes[j][:2] == classes[i][:2]]
        length = len(samples[i].reference)
        partners[i] = min(
            (j for j in candidates if _fit(samples[i], samples[j])),
            key=lambda j: (abs(len(samples[j].reference) - length), samples[j].id),
            default=None,
        )
    return partners


def _fit(own: Sample, other: Sample) -> bool:
    """Whether `other`'s media must lead to another answer."""
    return own.reference != other.reference and (own.concept != other.concept or not own.concept)


def _derange(block: list[int], samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Rotate `block`, sorted by concept, by the first distance at which everybody (or else most) has a fit partner."""
    order = sorted(block, key=lambda i: (samples[i].concept, samples[i].reference, samples[i].id))
    best: list[tuple[int, int]] = []
    for distance in range(1, len(order)):
        pairs = zip(order, order[distance:] + order[:distance], strict=True)
        fitting = [(i, j) for i, j in pairs if _fit(samples[i], samples[j])]
        if len(fitting) > len(best):
            best = fitting
        if len(best) == len(order):
            break
    return best


def with_media_of(own: Drawn, partner: Drawn) -> Sample:
    """`own`'s conversation with `partner`'s media in the places of its own.

    Raises:
        ValueError: the two do not have the same kinds of media in the same order.
        BadSample: a medium of the partner is missing.
    """
    mine, theirs = media_segments(own.sample), media_segments(partner.sample)
    if [s.type for s in mine] != [s.type for s in theirs]:
        raise ValueError(f"samples {own.sample.id!r} and {partner.sample.id!r} have different kinds of media")
    blobs = iter([partner.source.media_bytes(segment) for segment in theirs])

    def exchange(segment: Segment) -> Segment:
        if segment.type not in ("image", "audio", "video"):
            return segment
        return replace(segment, media=next(blobs), path=None)

    messages = tuple(replace(m, segments=tuple(exchange(s) for s in m.segments)) for m in own.sample.messages)
    return replace(own.sample, messages=messages)


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One sample's losses, nats per target token, with its own medium and with its partner's."""

    id: str
    partner: str
    concept: str
    own: float
    swapped: float

    @property
    def gain(self) -> float:
        return self.swapped - self.own


@dataclass(frozen=True, kw_only=True)
class MediaSwap:
    """Result of the test over a set of samples.

    Attributes:
        gain: mean of swapped - own, nats per target token, with its interval (resampled over concepts); None when
            there was no pair.
        swaps: one per scored sample.
        without_partner: samples that no other was fit for.
        skipped: samples that could not be encoded, by reason.
    """

    gain: Interval | None
    swaps: tuple[Swap, ...]
    without_partner: int
    skipped: dict[str, int]


def media_swap(
    model: OmniModel,
    encoder: SampleEncoder,
    drawn: Sequence[Drawn],
    *,
    own_losses: Sequence[SampleLoss | None] | None = None,
    budget: Budget = DEFAULT_BUDGET,
    seed: int = 0,
    on_sample: Callable[[], None] | None = None,
) -> MediaSwap:
    """Run the test.

    Args:
        model: its training mode is restored.
        encoder: as in training.
        drawn: held-out samples of one modality; those without media are left out.
        own_losses: losses with the own media where they are known already (None: not scorable).
        budget: of a pack.
        seed: of the bootstrap; partners do not depend on it.
        on_sample: called for every encoded sample (progress).
    """
    skipped: Counter[str] = Counter()
    if own_losses is None:
        own_losses = _losses(model, encoder, [d.sample for d in drawn], drawn, budget, skipped, on_sample)
    usable = [i for i, loss in enumerate(own_losses) if loss is not None]
    partner_of = swap_partners([drawn[i].sample for i in usable])
    pairs = [(i, usable[p]) for i, p in zip(usable, partner_of, strict=True) if p is not None]

    exchanged: list[Sample | None] = []
    for i, p in pairs:
        try:
            exchanged.append(with_media_of(drawn[i], drawn[p]))
        except BadSample as bad:
            skipped[bad.reason] += 1
            exchanged.append(None)
    scored = _losses(model, encoder, exchanged, [drawn[i] for i, _ in pairs], budget, skipped, on_sample)
    swaps = tuple(
        Swap(
            id=drawn[i].sample.id,
            partner=drawn[p].sample.id,
            concept=drawn[i].sample.concept or drawn[i].sample.id,
            own=own.per_token,
            swapped=loss.per_token,
        )
        for (i, p), loss in zip(pairs, scored, strict=True)
        if loss is not None and (own := own_losses[i]) is not None
    )
    without = sum(p is None and bool(media_segments(drawn[i].sample)) for i, p in zip(usable, partner_of, strict=True))
    return MediaSwap(gain=swap_gain(swaps, seed=seed), swaps=swaps, without_partner=without, skipped=dict(skipped))


def swap_gain(swaps: Sequence[Swap], *, seed: int = 0) -> Interval | None:
    """Mean gain with its bootstrap interval over concepts; None without swaps."""
    if not swaps:
        return None
    return bootstrap_interval([s.gain for s in swaps], groups=[s.concept for s in swaps], seed=seed)


def _losses(
    model: OmniModel,
    encoder: SampleEncoder,
    samples: Sequence[Sample | None],
    drawn: Sequence[Drawn],
    budget: Budget,
    skipped: Counter[str],
    on_sample: Callable[[], None] | None,
) -> list[SampleLoss | None]:
    """Losses of `samples` (None in, or not encodable: None out); media come from the source beside each."""
    kept: list[int] = []

    def encoded() -> Iterator[EncodedSample]:
        for i, (sample, origin) in enumerate(zip(samples, drawn, strict=True)):
            if on_sample is not None:
                on_sample()
            if sample is None:
                continue
            try:
                numbers = encoder(sample, origin.source.media_bytes)
            except BadSample as bad:
                skipped[bad.reason] += 1
                continue
            kept.append(i)
            yield numbers

    losses = sample_losses(model, encoded(), budget=budget)
    found = dict(zip(kept, losses, strict=True))
    return [found.get(i) for i in range(len(samples))]

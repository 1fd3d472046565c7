"""``omnitrain data pairs``: a Talker says each text several times, judges hear it, and the best take and the worst
become a pair to prefer (report section 4: DPO of the Talker).

    cost(take) = min(WER, 1) + failed + (1 - similarity to the voice)

`failed` is 1 for a take that is cut, silent or repeats itself (`evaluation.speech_scores.failures`). A take that only
the limit of its length ended has no end that could be learnt, and is none. A pair is kept if its better take is
understood (`understood`) and the costs differ by `margin`. Rows are those of the shards, with both takes' codes as the
medium of the answer (`data.codec_frames`), so the same shards also train on the better takes alone.

A shard is written for every `PER_SHARD` texts, then ``pairs.json``: an interrupted run continues behind the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from omnitrain.data.codec_frames import encode_codes
from omnitrain.data.media import MediaLimits
from omnitrain.data.sample import BadSample, Sample
from omnitrain.data.shards import SampleSource, write_shard
from omnitrain.data.waveforms import Utterance, UtteranceReader
from omnitrain.evaluation.judges import Voices, Whisper
from omnitrain.evaluation.listening import SAMPLE_RATE, spoken_of
from omnitrain.evaluation.speech_scores import score_speech
from omnitrain.files import write_json
from omnitrain.generation.sampling import Sampling
from omnitrain.generation.speech import Speaker, speak_texts
from omnitrain.runs.encode_shards import begun, is_recorded, with_segments

RECORD = "pairs.json"
PER_SHARD = 32
"""Texts whose takes are made and judged together."""
_UNUSED = ("pocketsphinx", "pystoi", "pesq", "librosa")
"""Judges whose scores are not asked for."""


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """takes: of each text.  temperature, top_k: of all codes.  understood: the better take's word error rate is at most
    this.  margin: by which its cost is lower than the worse one's.  seconds_limit: of a take.  seed: of the takes."""

    takes: int = 4
    temperature: float = 0.9
    top_k: int = 50
    understood: float = 0.2
    margin: float = 0.25
    seconds_limit: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.takes < 2:
            raise ValueError(f"--takes {self.takes}: two at least, which are compared")
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}: above 0, or all takes are the same")


@dataclass(frozen=True, kw_only=True)
class Take:
    """One take of a text: codes int64 [F, Q], its word error rate, whether it failed, and its similarity to the voice
    (1 where nobody can tell)."""

    codes: np.ndarray
    wer: float
    failed: bool
    similarity: float = 1.0

    @property
    def cost(self) -> float:
        return min(self.wer, 1.0) + float(self.failed) + 1.0 - self.similarity


@dataclass
class PairCounts:
    """`texts` that were said, `pairs` made of them, rows `bad`; sums over all takes of their word error rates and
    failures."""

    texts: int = 0
    pairs: int = 0
    bad: int = 0
    takes: int = 0
    wer: float = 0.0
    failed: int = 0

    def add(self, other: PairCounts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def preferred(takes: Sequence[Take], options: PairOptions) -> tuple[Take, Take] | None:
    """(better, worse): of the takes with the lowest and with the highest cost, the first; None if they do not differ
    enough, or even the better one is not understood."""
    if len(takes) < 2:
        return None
    better, worse = min(takes, key=lambda take: take.cost), max(takes, key=lambda take: take.cost)
    enough = better.wer <= options.understood and worse.cost - better.cost >= options.margin
    return (better, worse) if enough else None


class PairMaker:
    """`maker(rows)` -> pairs of the rows that have any, and counts.

    Args:
        codec: fingerprint of the codec whose codes the `speaker` says.
        judge: hears the takes.  voices: whose they should be; None: that is not judged.
    """

    def __init__(
        self, speaker: Speaker, codec: str, judge: Whisper, voices: Voices | None, options: PairOptions
    ) -> None:
        self.speaker, self.codec, self.judge, self.voices, self.options = speaker, codec, judge, voices, options

    def __call__(self, rows: Sequence[tuple[Sample, Utterance]], first: int) -> tuple[list[Sample], PairCounts]:
        """`first`: number of the first row among all, which its takes' seeds are made of. Raises ValueError for a voice
        of which nobody knows how it sounds."""
        named = {u.voice for _, u in rows}
        if self.voices is not None and (unknown := named - self.voices.recordings.keys()):
            raise ValueError(
                f"no recordings of {', '.join(sorted(unknown))} to know the voice by; leave it out (--where)"
            )
        takes = self.takes([utterance for _, utterance in rows], first)
        found = [(row, preferred(of_row, self.options)) for (row, _), of_row in zip(rows, takes, strict=True)]
        every = [take for of_row in takes for take in of_row]
        counts = PairCounts(
            texts=len(rows),
            pairs=sum(pair is not None for _, pair in found),
            takes=len(every),
            wer=sum(take.wer for take in every),
            failed=sum(take.failed for take in every),
        )
        return [self._paired(row, *pair) for row, pair in found if pair is not None], counts

    def takes(self, utterances: Sequence[Utterance], first: int) -> list[list[Take]]:
        """Usable takes of each text."""
        options, n = self.options, self.options.takes
        warm = Sampling(temperature=options.temperature, top_k=options.top_k)
        every = [u for u in utterances for _ in range(n)]
        limit = max(1, round(options.seconds_limit * SAMPLE_RATE / self.speaker.samples_per_frame))
        said = speak_texts(
            self.speaker, self.speaker.tokenizer, [u.text for u in every], [u.voice for u in every],
            questions=[u.question for u in every], codes=warm, residuals=warm, max_frames=limit,
            seed=options.seed + first * n, batch_size=32,
        )  # fmt: skip
        spoken = [
            spoken_of(u, generated=s.wav, round_trip=None, hit_limit=s.hit_limit)
            for u, s in zip(every, said, strict=True)
        ]
        scores = score_speech(
            spoken, voices=self.voices, open_vocabulary=False, whisper=self.judge, without=_UNUSED
        ).measured
        found: list[list[Take]] = [[] for _ in utterances]
        for i, (speech, score) in enumerate(zip(said, scores, strict=True)):
            if speech.hit_limit or not len(speech.codes):
                continue
            wrong, words = score["wer/whisper/generated"]
            similarity = score.get("own_voice/generated", (1.0, 1.0))[0]
            failed = bool(score["failed/generated"][0])
            found[i // n].append(Take(codes=speech.codes, wer=wrong / words, failed=failed, similarity=similarity))
        return found

    def _paired(self, row: Sample, better: Take, worse: Take) -> Sample:
        data = encode_codes(better.codes, self.codec, rejected=worse.codes)
        told = {
            f"{name}_{measure}": f"{value:.3f}"
            for name, take in (("chosen", better), ("rejected", worse))
            for measure, value in (("wer", take.wer), ("similarity", take.similarity), ("failed", float(take.failed)))
        }
        paired = with_segments(row, lambda s: replace(s, media=data, path=None) if is_recorded(s) else s)
        return replace(paired, meta={**row.meta, **told})


def make_pairs(
    maker: PairMaker,
    source: SampleSource,
    out: Path,
    *,
    made_with: dict[str, Any],
    most: int | None = None,
    progress: Callable[[str, int], Any],
) -> PairCounts:
    """Pairs of the texts in `source`, the first `most` of them evenly spaced, as shards in `out`.

    Args:
        made_with: what `out` has to be continued with, beside the options.
        progress: (title, total) -> context manager of a function that is called after every text.

    Raises ValueError: `out` was begun with something else.
    """
    made_with = {**made_with, "options": asdict(maker.options), "most": most}
    shards = begun(out, RECORD, made_with, "data pairs")
    count = min(most or len(source), len(source))
    chosen = [i * len(source) // count for i in range(count)]
    reader = UtteranceReader(sample_rate=SAMPLE_RATE, limits=MediaLimits())
    with progress(f"takes for {out}", count) as advance:
        for start in range(0, count, PER_SHARD):
            name = f"pairs-{start // PER_SHARD:05d}.parquet"
            part = chosen[start : start + PER_SHARD]
            if name not in shards:
                rows, bad = [], 0
                for index in part:
                    try:
                        sample = source[index]
                        rows.append((sample, reader(sample, source.media_bytes)))
                    except BadSample:
                        bad += 1
                pairs, counts = maker(rows, start) if rows else ([], PairCounts())
                counts.bad = bad
                if pairs:
                    write_shard(pairs, out / name)
                shards[name] = asdict(counts)
                write_json(out / RECORD, {**made_with, "shards": shards})
            for _ in part:
                advance()
    total = PairCounts()
    for counts in shards.values():
        total.add(PairCounts(**counts))
    return total

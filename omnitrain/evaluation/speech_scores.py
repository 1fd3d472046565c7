"""Generated speech, judged by all `judges`.

    scores = score_speech(utterances, voices=Voices({"slt": recordings, ...}), grammar_words=WORDS)

Every measure is taken of each utterance first, of the generated speech, of the recording of the same text and of the
codec's round trip of it, and then summed up: over all, by voice and by language. What the recording itself gets is the
judges' own error: only what lies above it is the model's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from omnitrain.evaluation.intervals import Interval, bootstrap_interval
from omnitrain.evaluation.judges import (
    VoiceMatch,
    Voices,
    Whisper,
    compared,
    error_counts,
    is_silent,
    mel_distance,
    pesq,
    recognise,
    spoken_form,
    spoken_seconds,
    stoi,
)
from omnitrain.evaluation.metrics import edits, short_language
from omnitrain.evaluation.pitch import compare_pitch, mean_semitones, pitch, semitones, spread_semitones

SIGNALS = ("reference", "round_trip", "generated")
FAILURES = ("endless", "cut", "repeated", "silent")
EARLY = 0.5  # speech shorter than this share of its expected duration was cut
_UNDERSTOOD = 0.5  # character error rate, up to which the judge has understood the beginning of a text
_WORST_PESQ = 1.0  # of a silent round trip, for which PESQ itself has no number: left out, it would raise the mean


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What was generated for one text.

    Attributes:
        text: what should be said.
        wav: the generated speech, float [T] at `sample_rate` Hz.
        reference: a real recording of the same text, at the same rate; gives the expected duration too.
        round_trip: that recording through the codec and back.
        voice: whose voice it should be, of those in `Voices`.
        hit_limit: generation was ended by the limit of frames, not by the model.
        language: of the text, BCP 47; "" if unknown.
        id: for people who follow a score to its utterance.
    """

    text: str
    wav: np.ndarray
    sample_rate: int
    reference: np.ndarray | None = None
    round_trip: np.ndarray | None = None
    voice: str = ""
    hit_limit: bool = False
    language: str = ""
    id: str = ""

    @property
    def signals(self) -> dict[str, np.ndarray]:
        """``reference``, ``round_trip`` and ``generated``, as far as they are there."""
        every = {"reference": self.reference, "round_trip": self.round_trip, "generated": self.wav}
        return {name: wav for name, wav in every.items() if wav is not None}


@dataclass(frozen=True, kw_only=True)
class SpeechScores:
    """The scores of some utterances, by signal (``reference``, ``round_trip``, ``generated``). An interval's `n` says
    of how many utterances it is: PESQ, STOI and pitch need a moment of speech.

    Attributes:
        n: utterances.
        wer, cer: recogniser (``open``, ``word_loop``, ``whisper``) -> signal -> error rate, a share; above 1 where more
            is heard than was to be said.
        wer_rise: recogniser -> ``round_trip`` and ``generated`` -> word error rate less that of the reference, paired
            by utterance.
        own_voice, other_voice: signal -> cosine similarity to the voice it should have, and to the nearest other.
        other_name: signal -> the other voice that is nearest most often.
        right_voice: signal -> share of utterances whose nearest voice is the right one.
        right_language: signal -> share of utterances that a judge of any language takes for the text's language; empty
            where all texts are in one.
        pitch_rise: signal -> semitones by which it is higher than the voice's own recordings (`Voices`) on average.
        pitch_spread: signal -> standard deviation of the pitch within an utterance, semitones.
        pitch_correlation, voicing_error: of the round trip against the reference (`pitch.PitchMatch`).
        mel_db, pesq, stoi: the same; None without any.
        pace: characters per spoken second, as a ratio to that of the reference (1: as fast); None without references.
        failure_rates: signal -> kind (`failures`) -> share of utterances.
        by_voice, by_language: the same scores of the utterances in one voice, or language; empty where there is but
            one, and by language where each voice has one language of its own, so that it would be the same.
        by_voice_and_language: by both (``VOICE in LANGUAGE``), where there are both.
        heard: a row per utterance: id, text and what each recogniser heard in each signal.
        measured: the same, in numbers (`utterance_numbers`), for those who compare runs.
    """

    n: int
    wer: dict[str, dict[str, Interval]]
    cer: dict[str, dict[str, Interval]]
    wer_rise: dict[str, dict[str, Interval]]
    own_voice: dict[str, Interval]
    other_voice: dict[str, Interval]
    other_name: dict[str, str]
    right_voice: dict[str, Interval]
    right_language: dict[str, Interval]
    pitch_rise: dict[str, Interval]
    pitch_spread: dict[str, Interval]
    pitch_correlation: Interval | None
    voicing_error: Interval | None
    mel_db: Interval | None
    pesq: Interval | None
    stoi: Interval | None
    pace: Interval | None
    failure_rates: dict[str, dict[str, Interval]]
    by_voice: dict[str, SpeechScores] = field(default_factory=dict)
    by_language: dict[str, SpeechScores] = field(default_factory=dict)
    by_voice_and_language: dict[str, SpeechScores] = field(default_factory=dict)
    heard: tuple[dict[str, str], ...] = field(repr=False, default=())
    measured: tuple[dict[str, tuple[float, float]], ...] = field(repr=False, default=())


# ------------------------------------------------------------------------------------------------------------ failures


def failures(
    utterances: Sequence[Spoken], heard: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[frozenset[str]]]:
    """How each utterance fails, by signal; most fail in no way. Recordings and round trips are looked at in the same
    way: what they are said to do wrong are false alarms of the judge.

    - ``endless``: only the limit of frames ended it (`Spoken.hit_limit`; generated speech alone can).
    - ``silent``: there is nothing to hear; then it is nothing else.
    - ``cut``: it is spoken for less than `EARLY` of the time that the reference takes, or, without a reference, that
      the text takes at the pace of the references there are; or the judge heard `lacks_its_end`.
    - ``repeated``: the judge heard a word, or some words, more often in a row than they are written (`repeats`).

    Args:
        heard: what a judge of any language (`Whisper`) heard in each utterance, by signal. None: only what needs no
            words is looked for, and ``repeated`` is not.
    """
    lengths = [len(spoken_form(u.text)) for u in utterances]
    durations = [None if u.reference is None else spoken_seconds(u.reference, u.sample_rate) for u in utterances]
    seconds = sum(d for d in durations if d is not None)
    pace = sum(n for n, d in zip(lengths, durations, strict=True) if d is not None) / seconds if seconds else 0.0
    expected = [length / pace if d is None and pace else d or 0.0 for d, length in zip(durations, lengths, strict=True)]
    found: dict[str, list[frozenset[str]]] = {}
    for signal in SIGNALS:
        there = [i for i, u in enumerate(utterances) if signal in u.signals]
        if not there:
            continue
        said = [None] * len(there) if heard is None else heard[signal]
        found[signal] = [
            _failures_of(utterances[i], signal, expected[i], words) for i, words in zip(there, said, strict=True)
        ]
    return found


def _failures_of(u: Spoken, signal: str, expected: float, heard: str | None) -> frozenset[str]:
    wav = u.signals[signal]
    kinds = {"endless"} if signal == "generated" and u.hit_limit else set()
    if is_silent(wav):
        return frozenset(kinds | {"silent"})
    if spoken_seconds(wav, u.sample_rate) < EARLY * expected:
        kinds.add("cut")
    if heard is not None:
        text, said = compared(u.text, heard, u.language)
        if lacks_its_end(text, said):
            kinds.add("cut")
        if repeats(text, said):
            kinds.add("repeated")
    return frozenset(kinds)


def lacks_its_end(text: str, heard: str) -> bool:
    """Whether the last word of `text`, or more, is missing in `heard` (both normalised).

    Of all beginnings of the text, in whole words, which is nearest to what was heard, by character edits? It lacks its
    end if that is not the whole text (of two that are as near, the longer counts), but a beginning that was understood:
    with at most half as many edits as characters. So nobody can tell of a text of one word, nor of babble.
    """
    words, said = text.split(), heard.replace(" ", "")
    beginnings = ["".join(words[:count]) for count in range(len(words) + 1)]
    wrong = [edits(beginning, said, characters=True)[0] for beginning in beginnings]
    best = max(range(len(beginnings)), key=lambda count: (-wrong[count], count))
    return 0 < best < len(words) and wrong[best] <= _UNDERSTOOD * len(beginnings[best])


def repeats(text: str, heard: str) -> bool:
    """Whether a word, or some words, are heard more often in a row than they are written (both normalised)."""
    written = _in_a_row(text.split())
    return any(times > written.get(phrase, 1) for phrase, times in _in_a_row(heard.split()).items())


def _in_a_row(words: Sequence[str]) -> dict[tuple[str, ...], int]:
    """The phrases that follow themselves at once, and how often they are said in a row at most."""
    most: dict[tuple[str, ...], int] = {}
    for size in range(1, len(words) // 2 + 1):
        for start in range(len(words) - 2 * size + 1):
            phrase, times = tuple(words[start : start + size]), 1
            while tuple(words[start + times * size : start + (times + 1) * size]) == phrase:
                times += 1
            if times > most.get(phrase, 1):
                most[phrase] = times
    return most


# -------------------------------------------------------------------------------------------------------- all together


@dataclass
class _Measured:
    """What was measured of one utterance; keys are (recogniser, signal) or signals. `trip`: by field of `SpeechScores`,
    what compares the round trip with the reference."""

    spoken: Spoken
    heard: dict[tuple[str, str], str] = field(default_factory=dict)
    words: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    characters: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    match: dict[str, VoiceMatch] = field(default_factory=dict)
    right_language: dict[str, float] = field(default_factory=dict)
    rise: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    trip: dict[str, float] = field(default_factory=dict)
    failures: dict[str, frozenset[str]] = field(default_factory=dict)

    @cached_property
    def pace(self) -> float | None:
        """The same text: the ratio of characters per second is that of the durations, upside down."""
        u = self.spoken
        if u.reference is None:
            return None
        reference, generated = (spoken_seconds(wav, u.sample_rate) for wav in (u.reference, u.wav))
        return reference / generated if generated and reference else None


def score_speech(
    utterances: Sequence[Spoken],
    *,
    voices: Voices | None = None,
    grammar_words: Sequence[str] | None = None,
    open_vocabulary: bool = True,
    whisper: Whisper | None = None,
    without: Collection[str] = (),
) -> SpeechScores:
    """All scores of `utterances`. The open vocabulary takes about a quarter of their length per signal, on one core,
    pitch a tenth.

    Args:
        voices: to compare with; without it there are no scores of voices, nor `pitch_rise`.
        grammar_words: recognise with a loop of these words too.
        open_vocabulary: recognise with the open vocabulary (the slower of the two).
        whisper: recognise with this model too, in each utterance's language; its error rates are after Whisper's
            normalisation, those of PocketSphinx of `spoken_form`. What it hears tells failures, too.
        without: those of `judges.JUDGES` to do without; their scores stay empty.

    Raises ValueError for no utterances, or a text without words.
    """
    if not utterances:
        raise ValueError("no utterances to score")
    recognisers: dict[str, Callable[[Spoken, np.ndarray], str]] = {}
    if "pocketsphinx" not in without:
        if open_vocabulary:
            recognisers["open"] = lambda u, wav: recognise(wav, u.sample_rate)
        if grammar_words is not None:
            recognisers["word_loop"] = lambda u, wav: recognise(wav, u.sample_rate, grammar_words)
    if whisper is not None:
        recognisers["whisper"] = lambda u, wav: whisper.hear(wav, u.sample_rate, u.language)
    rows = [_Measured(u) for u in utterances]
    for name, hear in recognisers.items():
        for row in rows:
            _listen(row, name, hear)
    if whisper is not None and len({short_language(u.language) for u in utterances if u.language}) > 1:
        for row in rows:
            _recognise_language(row, whisper)
    for signal in SIGNALS:
        here = [row for row in rows if signal in row.spoken.signals]
        for name in recognisers if here else ():
            said, texts = [row.heard[name, signal] for row in here], [row.spoken.text for row in here]
            languages = [row.spoken.language for row in here] if name == "whisper" else None
            for row, words, characters in zip(here, *error_counts(said, texts, languages), strict=True):
                row.words[name, signal], row.characters[name, signal] = words, characters
        if voices is not None:
            for row in here:
                u = row.spoken
                row.match[signal] = voices.match(u.signals[signal], u.sample_rate, u.voice)
    if "librosa" not in without:
        heights = _heights(voices, {u.voice for u in utterances})
        for row in rows:
            _measure_pitch(row, heights.get(row.spoken.voice))
    for row in rows:
        _compare(row, without)
    by_signal = None
    if whisper is not None:
        by_signal = {s: [row.heard["whisper", s] for row in rows if s in row.spoken.signals] for s in SIGNALS}
    for signal, found in failures(utterances, by_signal).items():
        for row, kinds in zip((r for r in rows if signal in r.spoken.signals), found, strict=True):
            row.failures[signal] = kinds
    pairs = {(u.voice, u.language) for u in utterances}
    one_to_one = len(pairs) == len({voice for voice, _ in pairs}) == len({language for _, language in pairs})
    by_voice = _parts(rows, lambda u: u.voice)
    by_language = {} if one_to_one else _parts(rows, lambda u: u.language)
    by_both = _parts(rows, lambda u: f"{u.voice} in {u.language}") if by_voice and by_language else {}
    return replace(
        _summed(rows), by_voice=by_voice, by_language=by_language, by_voice_and_language=by_both,
        heard=tuple(
            {"id": row.spoken.id, "text": row.spoken.text} | {f"{n}/{s}": text for (n, s), text in row.heard.items()}
            for row in rows
        ),
        measured=tuple(utterance_numbers(row) for row in rows),
    )  # fmt: skip


def utterance_numbers(row: _Measured) -> dict[str, tuple[float, float]]:
    """What was measured of one utterance, each as (value, weight), so that a corpus has the sum of the first over that
    of the second: ``wer/whisper/round_trip`` (words that are wrong, words of the text), ``cer/...``, ``stoi``, ``pesq``
    and the like, ``own_voice/SIGNAL``, and ``failed/SIGNAL`` (1 if it fails in any way)."""
    found = {f"wer/{name}/{signal}": (float(a), float(b)) for (name, signal), (a, b) in row.words.items()}
    found |= {f"cer/{name}/{signal}": (float(a), float(b)) for (name, signal), (a, b) in row.characters.items()}
    found |= {name: (float(value), 1.0) for name, value in row.trip.items()}
    found |= {f"own_voice/{signal}": (float(match.own), 1.0) for signal, match in row.match.items()}
    return found | {f"failed/{signal}": (float(bool(kinds)), 1.0) for signal, kinds in row.failures.items()}


def _listen(row: _Measured, name: str, hear: Callable[[Spoken, np.ndarray], str]) -> None:
    """Hear every signal of one utterance; what is the same sound (a codec's round trip is all it generates), once."""
    known: dict[int, str] = {}
    for signal, wav in row.spoken.signals.items():
        if id(wav) not in known:
            known[id(wav)] = hear(row.spoken, wav)
        row.heard[name, signal] = known[id(wav)]


def _recognise_language(row: _Measured, whisper: Whisper) -> None:
    """Whether each signal of an utterance is taken for its text's language; a sound that is two signals, once."""
    u, known = row.spoken, dict[int, str]()
    for signal, wav in u.signals.items() if u.language else ():
        if id(wav) not in known:
            known[id(wav)] = whisper.language(wav, u.sample_rate)
        row.right_language[signal] = float(known[id(wav)] == short_language(u.language))


def _heights(voices: Voices | None, judged: Collection[str]) -> dict[str, float]:
    """How high the voices speak in their own recordings, semitones; a voice in which nothing is voiced is not there."""
    if voices is None:
        return {}
    found = {}
    for name in judged:
        every = np.concatenate([semitones(pitch(wav, rate)) for wav, rate in voices.recordings[name]])
        if len(every):
            found[name] = float(every.mean())
    return found


def _measure_pitch(row: _Measured, height: float | None) -> None:
    """Pitch of every signal, and of the round trip against the reference; `height`: of the voice, semitones."""
    u, known = row.spoken, dict[int, np.ndarray]()
    for signal, wav in u.signals.items():
        if id(wav) not in known:
            known[id(wav)] = pitch(wav, u.sample_rate)
        hertz = known[id(wav)]
        mean, spread = mean_semitones(hertz), spread_semitones(hertz)
        if mean is not None and spread is not None:
            row.spread[signal] = spread
            if height is not None:
                row.rise[signal] = mean - height
    if u.reference is not None and u.round_trip is not None:
        match = compare_pitch(known[id(u.reference)], known[id(u.round_trip)])
        row.trip["voicing_error"] = match.voicing_error
        if match.correlation is not None:
            row.trip["pitch_correlation"] = match.correlation


def _compare(row: _Measured, without: Collection[str]) -> None:
    """What the codec loses of one recording. PESQ and STOI have no number for a word of a few tenths of a second."""
    reference, trip, rate = row.spoken.reference, row.spoken.round_trip, row.spoken.sample_rate
    if reference is None or trip is None:
        return
    row.trip["mel_db"] = mel_distance(reference, trip, rate)
    for name, measure in (("pesq", pesq), ("stoi", stoi)):
        if {"pesq": "pesq", "stoi": "pystoi"}[name] in without:
            continue
        if name == "pesq" and is_silent(trip):
            row.trip[name] = _WORST_PESQ
            continue
        try:
            row.trip[name] = measure(reference, trip, rate)
        except ValueError:  # too short: that both are as long, the mel distance has seen
            continue


def _parts(rows: Sequence[_Measured], key: Callable[[Spoken], str]) -> dict[str, SpeechScores]:
    """Scores by `key`; nothing where it is the same for all, or unknown of one."""
    names = sorted({key(row.spoken) for row in rows})
    if len(names) < 2 or "" in names:
        return {}
    return {name: _summed([row for row in rows if key(row.spoken) == name]) for name in names}


def _summed(rows: Sequence[_Measured]) -> SpeechScores:
    def mean(values: Sequence[float | None]) -> Interval | None:
        there = [value for value in values if value is not None]
        return bootstrap_interval(there) if there else None

    def of_trips(name: str) -> Interval | None:
        return mean([row.trip.get(name) for row in rows])

    def by_signal(of: Callable[[_Measured], Mapping[str, float]]) -> dict[str, Interval]:
        found = {signal: mean([of(row).get(signal) for row in rows]) for signal in SIGNALS}
        return {signal: interval for signal, interval in found.items() if interval is not None}

    def rates(of: Callable[[_Measured], Mapping[tuple[str, str], np.ndarray]]) -> dict[str, dict[str, Interval]]:
        found: dict[str, dict[str, Interval]] = {name: {} for name, _ in rows[0].heard}
        for name, signal in dict.fromkeys(key for row in rows for key in of(row)):
            counts = np.array([of(row)[name, signal] for row in rows if (name, signal) in of(row)])  # [n, 2]
            if counts[:, 1].any():
                found[name][signal] = bootstrap_interval(counts[:, 0], weights=counts[:, 1])
        return found

    return SpeechScores(
        n=len(rows),
        wer=rates(lambda row: row.words),
        cer=rates(lambda row: row.characters),
        wer_rise=rates(_rises),
        own_voice=by_signal(lambda row: {signal: match.own for signal, match in row.match.items()}),
        other_voice=by_signal(lambda row: {signal: match.other for signal, match in row.match.items()}),
        other_name=_most_frequent(rows),
        right_voice=by_signal(lambda row: {s: float(m.nearest == row.spoken.voice) for s, m in row.match.items()}),
        right_language=by_signal(lambda row: row.right_language),
        pitch_rise=by_signal(lambda row: row.rise),
        pitch_spread=by_signal(lambda row: row.spread),
        pitch_correlation=of_trips("pitch_correlation"),
        voicing_error=of_trips("voicing_error"),
        mel_db=of_trips("mel_db"),
        pesq=of_trips("pesq"),
        stoi=of_trips("stoi"),
        pace=mean([row.pace for row in rows]),
        failure_rates={
            signal: {kind: bootstrap_interval([float(kind in row.failures[signal]) for row in here]) for kind in kinds}
            for signal in SIGNALS
            if (here := [row for row in rows if signal in row.failures])
            and (kinds := _kinds(signal, by_words="whisper" in {name for name, _ in rows[0].heard}))
        },
    )


def _kinds(signal: str, by_words: bool) -> list[str]:
    """The failures that are looked for in a signal."""
    return [
        kind for kind in FAILURES if (kind != "endless" or signal == "generated") and (kind != "repeated" or by_words)
    ]


def _rises(row: _Measured) -> dict[tuple[str, str], np.ndarray]:
    """Word errors less those of the reference, and the words of the text."""
    return {
        (name, signal): np.array([counts[0] - row.words[name, "reference"][0], counts[1]])
        for (name, signal), counts in row.words.items()
        if signal != "reference" and (name, "reference") in row.words
    }


def _most_frequent(rows: Sequence[_Measured]) -> dict[str, str]:
    found = {}
    for signal in SIGNALS:
        names = Counter(row.match[signal].other_name for row in rows if signal in row.match)
        del names[""]
        if names:
            found[signal] = names.most_common(1)[0][0]
    return found

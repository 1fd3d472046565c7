"""Long recordings with questions about them: short ones of prepared shards, stitched together (needle test).

    python -m data_prep.long_recordings --shards omnitrain/pack --out data/long/train --minutes 0.25 --recordings 2000
    python -m data_prep.long_recordings --shards omnitrain/pack --out data/long/30 --minutes 30 --recordings 8 --single

A recording is many spoken sentences with silence between them, and one *needle*: a sound, heard once to three times in
places drawn at random. Questions ask for the sound, how often it is heard, what is said after it, which sound comes
after a sentence, what is said first, and what is said at a time. A row is a recording with all its questions as one
conversation, for training; with `--single`, with one question, for scoring by position: its `meta` says where the
needle is (`needle_seconds`, and as a share of the recording `needle_share`).

All pieces of a recording are rows of one split (`--split`), and the recording is of that split: what is held out there
is held out here. The same shards, options and seed give the same rows and sounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.edit import SPEECH_RATE, normalise_peak, trim_silence
from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.prompts import LANGUAGE_NAMES
from data_prep.splits import fraction
from omnitrain.data.adapters import open_source
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import SPLITS, Message, Sample, Segment
from omnitrain.data.shards import Source, write_media_table, write_shards

MEDIA = "media.parquet"
LONGEST_PIECE = 6.0  # seconds
PAUSE = (0.25, 0.7)  # seconds, shortest and longest
MOST_TIMES = 3  # that a needle is heard

QUESTIONS: dict[str, tuple[str, ...]] = {
    "which": (
        "Which sound is heard between the sentences? Answer in {language}.",
        "Name the sound that interrupts the speaker, in {language}.",
        "There is a sound that is no speech. What makes it? {language}, please.",
    ),
    "count": (
        "How often is this sound heard: {sound}",
        "Count how many times you hear this: {sound}",
        "{sound} How many times is it heard?",
    ),
    "after": (
        "What is said after this sound: {sound}",
        "Write down the sentence that follows this sound: {sound}",
        "{sound} Which words come right after that sound?",
    ),
    "sound_after": (
        "Which sound comes after these words: {sentence} Answer in {language}.",
        'After "{sentence}" there is a sound. What is it, in {language}?',
    ),
    "first": (
        "What is said at the beginning?",
        "Write down the first sentence.",
        "Transcribe the very first words.",
    ),
    "moment": (
        "What is said at {time}?",
        "Which words are heard at {time}?",
        "Write down what the speaker says at {time}.",
    ),
}
"""Question -> wordings."""


@dataclass(frozen=True)
class Piece:
    """A short recording and its text: what is said, or what sounds."""

    text: str
    language: str
    data: bytes
    licence: str = ""

    @cached_property
    def wave(self) -> np.ndarray:
        """float32 [T] at `SPEECH_RATE`, without silent ends."""
        return normalise_peak(trim_silence(decode_audio(self.data, SPEECH_RATE)), 0.7)


@dataclass(frozen=True)
class Placed:
    """A piece and where it is heard, in samples."""

    piece: Piece
    start: int
    is_needle: bool

    @property
    def end(self) -> int:
        return self.start + len(self.piece.wave)


@dataclass(frozen=True)
class Question:
    """`sample`: where in the recording the answer is; of a needle heard more than once, the first."""

    kind: str
    text: str
    answer: str
    languages: tuple[str, ...]
    sample: int


def pieces(source: Source, task: str, languages: Sequence[str]) -> list[Piece]:
    """The recordings of `source` of this task whose answer is in one of `languages`, in the order of a hash."""
    found: dict[tuple[str, str], Piece] = {}
    for index in range(len(source)):
        sample = source[index]
        media = [segment for segment in sample.segments if segment.type == "audio"]
        if sample.task != task or sample.languages[-1] not in languages or len(media) != 1:
            continue
        piece = Piece(sample.reference, sample.languages[-1], source.media_bytes(media[0]), sample.licence)
        if 0.2 * SPEECH_RATE <= len(piece.wave) <= LONGEST_PIECE * SPEECH_RATE:
            found.setdefault((piece.language, piece.text), piece)
    return [found[key] for key in sorted(found, key=lambda key: fraction("long", *key))]


def stitch(sentences: Sequence[Piece], needle: Piece, minutes: float, rng: np.random.Generator) -> list[Placed]:
    """Sentences in random order until `minutes` are full, the needle between them; at least two sentences."""
    times = int(rng.integers(1, MOST_TIMES + 1))
    room = minutes * 60 * SPEECH_RATE - times * (len(needle.wave) + 0.5 * SPEECH_RATE)
    chosen: list[Piece] = []
    while room > 0 or len(chosen) < 2 * times:
        for index in rng.permutation(len(sentences)):
            chosen.append(sentences[index])
            room -= len(chosen[-1].wave) + np.mean(PAUSE) * SPEECH_RATE
            if room <= 0 and len(chosen) >= 2 * times:
                break
    before = set(rng.choice(np.arange(1, len(chosen)), size=min(times, len(chosen) - 1), replace=False).tolist())
    placed, at = [], 0
    for index, sentence in enumerate(chosen):
        for piece in [needle, sentence] if index in before else [sentence]:
            at += round(rng.uniform(*PAUSE) * SPEECH_RATE)
            placed.append(Placed(piece, at, piece is needle))
            at = placed[-1].end
    return placed


def length(placed: Sequence[Placed]) -> int:
    """Samples of the recording."""
    return placed[-1].end + round(PAUSE[0] * SPEECH_RATE)


def waveform(placed: Sequence[Placed]) -> np.ndarray:
    """float32 [T] at `SPEECH_RATE`."""
    wave = np.zeros(length(placed), np.float32)
    for part in placed:
        wave[part.start : part.end] = part.piece.wave
    return wave


def questions(placed: Sequence[Placed], rng: np.random.Generator) -> Iterator[Question]:
    """All that can be asked with one right answer."""
    heard = [index for index, part in enumerate(placed) if part.is_needle]
    needle, once = placed[heard[0]], len(heard) == 1
    sound, language = needle.piece.text, needle.piece.language

    def ask(kind: str, answer: str, languages: tuple[str, ...], sample: int, **words: str) -> Question:
        wording = QUESTIONS[kind][int(rng.integers(len(QUESTIONS[kind])))]
        named = {"language": LANGUAGE_NAMES[language], "sound": sound, **words}
        return Question(kind, wording.format(**named), answer, languages, sample)

    yield ask("which", sound, (language,), needle.start)
    yield ask("count", f"{len(heard)}.", ("en",), needle.start)
    before, after = placed[heard[0] - 1], placed[heard[0] + 1]
    spoken = [part for part in placed if not part.is_needle]
    if once:
        yield ask("after", after.piece.text, (after.piece.language,) * 2, after.start)
    if sum(part.piece is before.piece for part in spoken) == 1:  # a long recording repeats sentences
        yield ask("sound_after", sound, (language,), needle.start, sentence=before.piece.text)
    yield ask("first", spoken[0].piece.text, (spoken[0].piece.language,) * 2, spoken[0].start)
    moment = spoken[int(rng.integers(len(spoken)))]
    seconds = (moment.start + moment.end) // 2 // SPEECH_RATE
    if moment.start <= seconds * SPEECH_RATE < moment.end:
        time = f"{seconds // 60}:{seconds % 60:02}"
        yield ask("moment", moment.piece.text, (moment.piece.language,) * 2, moment.start, time=time)


def rows(name: str, placed: Sequence[Placed], asked: Sequence[Question], split: str, single: bool) -> Iterator[Sample]:
    """One conversation, or with `single` a row for each question."""
    seconds = length(placed) / SPEECH_RATE
    recording = Segment(type="audio", path=f"{MEDIA}#{name}")
    licence = " AND ".join(sorted({part.piece.licence for part in placed}))
    whole = {"seconds": f"{seconds:.2f}"}
    if not single:
        turns = [turn for i, question in enumerate(asked) for turn in _turn(question, None if i else recording)]
        yield Sample(
            id=name, source="long_recordings", messages=tuple(turns), split=split, task="needle", concept=name,
            languages=asked[0].languages, meta=whole, licence=licence,
        )  # fmt: skip
        return
    for question in asked:
        at = question.sample / SPEECH_RATE
        place = {"needle_seconds": f"{at:.2f}", "needle_share": f"{at / seconds:.4f}"}
        yield Sample(
            id=f"{name}/{question.kind}", source="long_recordings", messages=tuple(_turn(question, recording)),
            split=split, task=f"needle_{question.kind}", concept=name, languages=question.languages,
            meta=whole | place, licence=licence,
        )  # fmt: skip


def _turn(question: Question, recording: Segment | None) -> tuple[Message, Message]:
    asked = Segment(type="text", text=question.text)
    segments = (asked,) if recording is None else (recording, asked)
    answer = Segment(type="text", text=question.answer)
    return Message(role="user", segments=segments), Message(role="assistant", segments=(answer,))


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    sentences: list[Piece] = []
    sounds: list[Piece] = []
    for folder in options.shards:
        source = open_source(folder, split=options.split, where={"task": ["asr", "sound"]}, name=folder)
        sentences += pieces(source, "asr", options.speech)
        sounds += pieces(source, "sound", options.named)
    sentences, sounds = sentences[: options.sentences], sounds[: options.sounds]
    if len(sentences) < 2 or not sounds:
        raise ValueError(
            f"{len(sentences)} sentences in {', '.join(options.speech)} and {len(sounds)} sounds named in "
            f"{', '.join(options.named)} of split {options.split}; give --shards with more"
        )
    made: list[Sample] = []

    def recordings() -> Iterator[tuple[str, bytes]]:
        for number in track(range(options.recordings), "stitching", disable=not options.progress):
            rng = np.random.default_rng([options.seed, number, SPLITS.index(options.split)])
            minutes = options.minutes[number % len(options.minutes)]
            name = f"{options.split}/{options.seed}/{minutes:g}min/{number}"
            needle = sounds[int(rng.integers(len(sounds)))]
            placed = stitch(sentences, needle, minutes, rng)
            asked = list(questions(placed, rng))
            rng.shuffle(asked)  # else it is their order that a conversation teaches, and not what is asked
            made.extend(rows(name, placed, asked, options.split, options.single))
            yield name, encode_audio(waveform(placed), SPEECH_RATE, options.format, bit_rate=24_000)

    write_media_table(recordings(), options.out / MEDIA)
    write_shards(counts.watch(made), options.out, options.split, progress=options.progress)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shards", nargs="+", default=["omnitrain/pack"], help="prepared folders with recordings")
    add("--split", choices=SPLITS, default="train", help="of the pieces, and so of the recordings (default train)")
    add("--minutes", type=float, nargs="+", default=[30.0], help="lengths, in turn (default 30)")
    add("--recordings", type=int, default=8, help="how many (default 8)")
    add("--speech", nargs="+", default=["es"], help="languages of the sentences (default es)")
    add("--named", nargs="+", default=["en"], help="languages in which sounds are named (default en)")
    add("--sentences", type=int, help="so many different sentences; default: all")
    add("--sounds", type=int, help="so many different needles; default: all")
    add("--single", action="store_true", help="a row a question, with its position, instead of conversations")
    add("--format", choices=["opus", "flac"], default="opus", help="of the recordings (default opus, 24 kbit/s)")
    add("--seed", type=int, default=0, help="another seed stitches others (default 0)")


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name="long_recordings",
        description=__doc__ or "",
        packages=[],
        build=_build,
        add_options=_add_options,
    )


if __name__ == "__main__":
    sys.exit(main())

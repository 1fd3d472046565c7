"""Synthesised speech for controlled tests of speech output: known texts, known voices, as many hours as wanted.

    python -m data_prep.synthetic_speech --out data/synthetic_speech --voices slt,rms --sentences 1500
    python -m data_prep.synthetic_speech --voices espeak:de,espeak:en-us --texts sentences.txt

**It is not speech of people**, and every row says so (`meta["synthetic"]` names the engine, `meta["voice"]` the voice):
results on it show that a model learns to speak, not that it speaks like a person. Engines: `flite` (CMU Flite, US and
Scottish English voices of the Arctic recordings) and `espeak-ng` (formant synthesis, many languages), run from the
unpacked Debian packages; nothing is installed.

A row asks for a sentence in one of several wordings; the answer is one `speech` segment with the transcript and the
recording: mono, 24 kHz (flite's own rate is 16 kHz, so nothing sounds above 8 kHz), silent ends cut to 0.1 s, one peak
level, FLAC, since a codec must not learn the artefacts of another. `source` is ``synthetic_speech/VOICE``, so that
`where` can choose voices; `concept` is the sentence, and the split is a hash of it: a held-out sentence (5 %) is spoken
by no voice in training, nor is one for validation (4 %).

The sentences are drawn from a small grammar ("the lady sees three green windows"): 54 words, 3 to 6 in a sentence,
37,000 sentences. Its words are those of some 120 candidates that PocketSphinx (`omnitrain.evaluation.judges`) hears
well in slt's voice with its open vocabulary. Of 250 sentences of the first candidates it misheard 35 % of the words,
in most cases *dog, house, king, two, four, knows, walks*; of 200 of the second 17 %, mostly *poor, castle, holds,
paints, quiet, boy*. Word error rates of the first 120 sentences of the grammar that remained (`--sentences 120 --hear
120`; 95 % interval):

| voice | open vocabulary | loop of the 54 words |
|---|---|---|
| slt | 0.08 (0.05 to 0.11) | 0.00 (0.00 to 0.01) |
| rms | 0.20 (0.16 to 0.24) | 0.03 (0.02 to 0.04) |
| kal16 | 0.21 (0.16 to 0.26) | 0.00 (0.00 to 0.01) |
| awb | 0.22 (0.18 to 0.27) | 0.02 (0.00 to 0.03) |
| espeak:en-us | 0.84 (0.80 to 0.88) | 0.33 (0.29 to 0.37) |

So espeak's voices are of no use to this recogniser. A minute of FLAC takes about 1.5 MB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jiwer
from rich.console import Console
from rich.table import Table

from data_prep.edit import normalise_peak, trim_silence
from data_prep.fetch import Opened, Package, fetch
from data_prep.job import Counts, run
from data_prep.splits import document_split, fraction
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.shards import write_shards
from omnitrain.files import write_text

RATE = 24_000
"""Hz of the recordings: what Qwen3-Omni's codec speaks."""

NAME = "synthetic_speech"

# ----------------------------------------------------------------------------------------------------------- sentences


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words("baby child doctor farmer father girl lady mother sailor singer sister teacher")
THINGS = {thing: thing + "s" for thing in _words("camera flower garden letter picture train village window")}
ADJECTIVES = _words("beautiful big black famous green happy hungry little small young")
TRANSITIVE = _words("carries leaves loves needs sees")
INTRANSITIVE = _words("laughs listens sleeps works")
NUMBERS = _words("many three five six seven nine")

PATTERNS = (
    "the {person} {acts}",
    "the {adjective} {person} {acts}",
    "the {person} {does} the {thing}",
    "the {person} {does} {number} {things}",
    "the {adjective} {person} {does} the {thing}",
    "the {person} {does} {number} {adjective} {things}",
)

VOCABULARY = tuple(
    sorted({"the", *PEOPLE, *THINGS, *THINGS.values(), *ADJECTIVES, *TRANSITIVE, *INTRANSITIVE, *NUMBERS})
)
"""Every word of the grammar, for a recogniser's word loop."""


def sentence(number: int) -> str:
    """The sentence drawn by the hash of `number`; two numbers may give the same."""

    def choose(slot: str, words: Sequence[str]) -> str:
        return words[int(fraction("sentence", str(number), slot) * len(words))]

    return choose("pattern", PATTERNS).format(
        person=choose("person", PEOPLE),
        thing=choose("thing", tuple(THINGS)),
        things=choose("thing", tuple(THINGS.values())),
        adjective=choose("adjective", ADJECTIVES),
        does=choose("does", TRANSITIVE),
        acts=choose("acts", INTRANSITIVE),
        number=choose("number", NUMBERS),
    )


def sentences() -> Iterator[str]:
    """Different sentences, always in the same order: the first 100 are among the first 1,000. It ends after 200,000
    draws, with 28,449 of them."""
    seen: set[str] = set()
    for number in range(200_000):
        if (drawn := sentence(number)) not in seen:
            seen.add(drawn)
            yield drawn


# ------------------------------------------------------------------------------------------------------------- engines

_FLITE, _ESPEAK = "MIT-Festival", "GPL-3.0-or-later"
ENGINES: dict[str, tuple[Package, ...]] = {
    "flite": tuple(Package(name=name, manager="debian", licence=_FLITE) for name in ("flite", "libflite1")),
    "espeak-ng": tuple(
        Package(name=name, manager="debian", licence=_ESPEAK)
        for name in ("espeak-ng", "libespeak-ng1", "espeak-ng-data")
    ),
}
"""Packages of each engine, its program's first. The sound of a program is not its code; rows name its licence all the
same, being the strictest that could hold."""

_LANGUAGES = {"cmn": "zh", "nb": "nb", "en-us": "en", "en-gb": "en", "fr-fr": "fr", "es-419": "es"}


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A voice of an engine: ``slt`` of flite, or ``de`` of espeak-ng, whose voices are named by language."""

    engine: str
    name: str

    @staticmethod
    def parse(text: str) -> Voice:
        """``"slt"``, ``"flite:slt"``, ``"espeak:de"`` or ``"espeak-ng:de"``. Raises ValueError for another engine."""
        engine, _, name = text.strip().rpartition(":")
        engine = {"": "flite", "espeak": "espeak-ng"}.get(engine, engine)
        if engine not in ENGINES or not name:
            raise ValueError(f"voice {text!r} is none: write slt, flite:NAME or espeak:LANGUAGE")
        return Voice(engine=engine, name=name)

    @property
    def key(self) -> str:
        return self.name if self.engine == "flite" else f"espeak-{self.name}"

    @property
    def language(self) -> str:
        """BCP 47."""
        return "en" if self.engine == "flite" else _LANGUAGES.get(self.name, self.name)


class Engine:
    """A synthesiser's program, ready to run.

    Args:
        name: of `ENGINES`.
        opened: its packages, unpacked; or only the first, with the folder of a program that is installed.
        cache: where libraries go that this system lacks.

    Raises:
        FileNotFoundError: the folder holds no such program.
        RuntimeError: a library that it needs can not be had.
    """

    def __init__(self, name: str, opened: dict[str, Opened], cache: Path) -> None:
        roots = [opened[package.name].root for package in ENGINES[name] if package.name in opened]
        places = [root / place / name for root in roots for place in ("usr/bin", "bin", ".")]
        self.program = next((place.resolve() for place in places if place.is_file()), Path())
        if not self.program.is_file():
            raise FileNotFoundError(f"no program {name} in {roots[0]}; pass its path with --{name} PATH")
        self.name = name
        self.environment = dict(os.environ)
        self.options: list[str] = []
        if opened[name].version != "local":
            self.environment["LD_LIBRARY_PATH"] = _library_path(self.program, roots, cache)
            self.options = [f"--path={data.parent.resolve()}" for data in roots[-1].rglob("espeak-ng-data")]

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(self.program), *self.options, *arguments], env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{self.name} {' '.join(arguments)} failed: {done.stderr.strip()[-300:]}")
        return done.stdout

    def check(self, voice: str) -> None:
        """Raises ValueError for a voice the program does not have (flite would silently take another)."""
        if self.name == "flite":
            known = self._run("-lv").partition(":")[2].split()
            if voice not in known:
                raise ValueError(f"flite has no voice {voice!r}; it has {', '.join(known)}")

    def speak(self, voice: str, text: str) -> bytes:
        """A WAV file at the engine's own rate."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "speech.wav"
            if self.name == "flite":
                self._run("-voice", voice, "-t", text, "-o", str(file))
            else:
                self._run("-v", voice, "-w", str(file), "--", text)
            return file.read_bytes()


def _library_path(program: Path, roots: Sequence[Path], cache: Path) -> str:
    """Folders of the libraries in the unpacked packages and in those of their dependencies that this system lacks (an
    engine is linked with libraries that play sound, though it only writes files here)."""

    def folders(root: Path) -> list[str]:
        return sorted({str(library.parent.resolve()) for library in root.rglob("*.so*")})

    path = [folder for root in roots for folder in folders(root)]
    candidates: list[str] | None = None
    while "not found" in _output("ldd", str(program), LD_LIBRARY_PATH=":".join(path)):
        if candidates is None:
            skip = [f"--no-{kind}" for kind in _words("recommends suggests conflicts breaks replaces enhances")]
            lines = _output("apt-cache", "depends", "--recurse", *skip, program.name).splitlines()
            candidates = [line for line in lines if line.startswith("lib") and not line.startswith("libc6")]
            candidates = [name for name in candidates if "installed" not in _output("dpkg-query", "-s", name)]
        if not candidates:
            raise RuntimeError(
                f"{program.name} needs libraries that are neither here nor to be had; install {program.name} with the "
                f"system's package manager and pass --{program.name} PATH"
            )
        package = Package(name=candidates.pop(0), manager="debian", licence="")
        path += folders(fetch(package, cache).root)
    return ":".join(path)


def _output(*command: str, **environment: str) -> str:
    """What the command prints; empty where it fails or does not exist."""
    try:
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""


# ---------------------------------------------------------------------------------------------------------------- rows

PROMPTS = (
    "Say: {text}",
    "Say this aloud: {text}",
    'Please say "{text}".',
    "Read this out: {text}",
    "Speak this sentence: {text}",
    "Repeat after me: {text}",
    'How does "{text}" sound?',
    "{text} Say it out loud, please.",
)


def request_and_speech(sample_id: str, text: str, recording: bytes) -> tuple[Message, Message]:
    """Somebody asks for a sentence, in the wording that `sample_id` draws; the encoded `recording` of it answers."""
    question = PROMPTS[int(fraction("prompt", sample_id) * len(PROMPTS))].format(text=text)
    return (
        Message(role="user", segments=(Segment(type="text", text=question),)),
        Message(role="assistant", segments=(Segment(type="speech", text=text, media=recording),)),
    )


def sample(voice: Voice, text: str, recording: bytes) -> Sample:
    """The row of one sentence by one voice. `recording`: the encoded file."""
    sample_id = f"{NAME}/{voice.key}/{text}"
    return Sample(
        id=sample_id,
        source=f"{NAME}/{voice.key}",
        messages=request_and_speech(sample_id, text, recording),
        split=document_split(text),
        task="tts",
        licence=ENGINES[voice.engine][0].licence,
        languages=(voice.language,),
        concept=text,
        meta={"synthetic": voice.engine, "voice": voice.key},
    )


@dataclass
class Minutes:
    """Rows and minutes of each voice."""

    rows: dict[str, int]
    seconds: dict[str, float]

    @staticmethod
    def of(voices: Sequence[Voice]) -> Minutes:
        return Minutes(rows={voice.key: 0 for voice in voices}, seconds={voice.key: 0.0 for voice in voices})

    def table(self) -> list[tuple[str, str, str]]:
        return [(key, f"{count:,}", f"{self.seconds[key] / 60:.1f}") for key, count in self.rows.items()]

    def print(self) -> None:
        table = Table(title="recordings per voice", title_justify="left")
        for name in ("voice", "rows", "minutes"):
            table.add_column(name, justify="left" if name == "voice" else "right")
        for row in self.table():
            table.add_row(*row)
        Console(width=110).print(table)


class Studio:
    """Engines that record sentences, each as a row.

    Args:
        voices: who speaks.
        opened: the packages of their engines.
        cache: folder for further libraries.
        bit_rate: of Opus, bits per second; None for FLAC.
    """

    def __init__(
        self, voices: Sequence[Voice], opened: dict[str, Opened], cache: Path, bit_rate: int | None = None
    ) -> None:
        self.engines = {name: Engine(name, opened, cache) for name in dict.fromkeys(v.engine for v in voices)}
        for voice in voices:
            self.engines[voice.engine].check(voice.name)
        self.minutes = Minutes.of(voices)
        self.bit_rate = bit_rate

    def record(self, voice: Voice, text: str) -> Sample:
        """Speak `text`. Raises RuntimeError if the engine fails or writes no sound."""
        try:
            wave = decode_audio(self.engines[voice.engine].speak(voice.name, text), RATE)
        except BadSample as bad:
            raise RuntimeError(f"{voice.key} cannot say {text!r}: {bad}") from bad
        wave = normalise_peak(trim_silence(wave, RATE, margin=0.1), 0.7)
        self.minutes.rows[voice.key] += 1
        self.minutes.seconds[voice.key] += len(wave) / RATE
        if self.bit_rate is None:
            return sample(voice, text, encode_audio(wave, RATE, "flac"))
        return sample(voice, text, encode_audio(wave, RATE, "opus", self.bit_rate))


# -------------------------------------------------------------------------------------------------------------- script


def packages(options: argparse.Namespace) -> list[Package]:
    """The packages of the engines in use; of an engine whose program is given, only its own."""
    engines = dict.fromkeys(voice.engine for voice in parse_voices(options.voices))
    given = {source.partition("=")[0] for source in options.source if "=" in source}
    return [
        package for engine in engines for package in ENGINES[engine] if package.name == engine or engine not in given
    ]


def parse_voices(text: str) -> list[Voice]:
    """Comma-separated voices, each once."""
    return list(dict.fromkeys(Voice.parse(part) for part in text.split(",")))


def write_notice(folder: Path, opened: dict[str, Opened], minutes: Minutes, title: str, script: str) -> None:
    """`NOTICE.md`, and the packages' own licence texts below `licences/`."""
    lines = [
        f"# {title}: sources and licences",
        "",
        f"Made by `python -m data_prep.{script}`. **All speech in this folder is synthetic**: no person said these",
        "sentences. Every row names its engine and voice (`meta`) and the engine's licence (column `licence`), whose",
        "text lies in `licences/`.",
        "",
        "| package | version | licence |",
        "|---|---|---|",
        *(f"| {o.package.name} ({o.package.manager}) | {o.version} | {o.package.licence} |" for o in opened.values()),
        "",
        "| voice | rows | minutes |",
        "|---|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in minutes.table()),
        "",
        "flite: copyright (c) 1999-2001 Language Technologies Institute, Carnegie Mellon University, and others; its",
        "voices slt, rms and awb were made from the CMU Arctic recordings. The speech was resampled to 24 kHz, cut at",
        "its silent ends and brought to one peak level.",
        "",
    ]
    write_text(folder / "NOTICE.md", "\n".join(lines))
    for engine in ENGINES:
        if engine in opened and (text := opened[engine].root / "usr/share/doc" / engine / "copyright").is_file():
            (folder / "licences").mkdir(exist_ok=True)
            shutil.copyfile(text, folder / "licences" / f"{engine}.txt")


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    voices = parse_voices(options.voices)
    if not 0 < options.share <= 1:
        raise ValueError(f"--share {options.share} must be above 0 and at most 1")
    texts = options.texts or [text for text, _ in zip(sentences(), range(options.sentences), strict=False)]
    if len(texts) < options.sentences and not options.texts:
        raise ValueError(f"--sentences {options.sentences}: the grammar gives {len(texts):,}")
    pairs = [(v, text) for v in voices for text in texts if fraction("share", v.key, text) < options.share]
    # By hash, so that the first rows of a split are a fair sample of it.
    pairs.sort(key=lambda pair: fraction("row", pair[0].key, pair[1]))
    studio = Studio(voices, opened, options.cache)
    bar = track(pairs, description="speaking", disable=not options.progress)
    to_hear: list[Sample] = []

    def rows() -> Iterator[Sample]:
        for voice, text in bar:
            row = studio.record(voice, text)
            if studio.minutes.rows[voice.key] <= options.hear:
                to_hear.append(row)
            yield row

    write_shards(counts.watch(rows()), options.out, NAME, progress=False)
    write_notice(options.out, opened, studio.minutes, "Synthetic speech", NAME)
    studio.minutes.print()
    if to_hear:
        hear(to_hear)


def read_texts(path: str) -> list[str]:
    """The different lines of a UTF-8 file that are not empty."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))


def word_errors(texts: Sequence[str], heard: Sequence[str]) -> list[tuple[str, int, int]]:
    """(word, how often it was not heard as itself, how often it was said), the worst first."""
    said: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    aligned = jiwer.process_words(list(texts), list(heard))
    for words, chunks in zip(aligned.references, aligned.alignments, strict=True):
        for chunk in chunks:
            here = words[chunk.ref_start_idx : chunk.ref_end_idx]
            said.update(here)
            if chunk.type != "equal":
                missed.update(here)
    return sorted(((word, missed[word], said[word]) for word in said), key=lambda row: (-row[1] / row[2], row[0]))


def hear(rows: Sequence[Sample]) -> None:
    """Recognise the recordings of `rows` with PocketSphinx, and print the error rate of each voice, with the open
    vocabulary and with a loop of the rows' own words, and of each word that was missed."""
    from omnitrain.evaluation.judges import error_rates, recognise

    console = Console(width=110)
    by_voice: dict[str, list[Sample]] = defaultdict(list)
    for row in rows:
        by_voice[row.meta["voice"]].append(row)
    loop = sorted({word for row in rows for word in row.concept.split()})
    for voice, theirs in sorted(by_voice.items()):
        texts = [row.concept for row in theirs]
        waves = [decode_audio(row.messages[-1].segments[0].media or b"") for row in theirs]
        for name, words in (("open vocabulary", None), (f"loop of {len(loop)} words", loop)):
            heard = [recognise(wave, 16_000, words) for wave in waves]
            wer, cer = error_rates(heard, texts)
            missed = [f"{word} {wrong}/{all_}" for word, wrong, all_ in word_errors(texts, heard) if wrong]
            console.print(
                f"{voice}, {name}: WER {wer.mean:.3f} ({wer.low:.3f} to {wer.high:.3f}), CER {cer.mean:.3f}, "
                f"{len(texts)} sentences; missed: {', '.join(missed)}",
                markup=False,
            )


def _installed(engine: str, path: str) -> str:
    return f"{engine}={Path(path).resolve().parent}"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--voices", default="slt,rms", help="comma-separated: slt, rms, awb, kal16, espeak:LANGUAGE (default slt,rms)"
    )
    parser.add_argument("--sentences", type=int, default=1500, help="how many sentences (default 1500)")
    parser.add_argument("--share", type=float, default=1.0, help="share of them that each voice speaks (default 1)")
    parser.add_argument(
        "--texts", type=read_texts, metavar="FILE", help="a sentence a line, instead of the grammar's (any language)"
    )
    parser.add_argument(
        "--hear", type=int, default=0, metavar="N", help="recognise N recordings of each voice: error rates by word"
    )
    add_engine_options(parser)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """`--flite PATH` and `--espeak-ng PATH`."""
    for engine in ENGINES:
        parser.add_argument(
            f"--{engine}",
            dest="source",  # as if by --source, which the record leaves out: it may not depend on where a program lies
            action="append",
            type=partial(_installed, engine),
            metavar="PATH",
            help=f"an installed {engine} program, instead of the Debian package",
        )


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name=NAME,
        description=__doc__ or "",
        packages=packages,
        build=_build,
        add_options=_add_options,
    )


if __name__ == "__main__":
    sys.exit(main())

"""Asterisk core sounds: about 570 telephone prompts, read by one professional voice in each of five languages.

    python -m data_prep.asterisk --out data/asterisk --beside data/stamps

A language has a text list (`core-sounds-xx.txt.gz`, lines ``id: text``) and a package of recordings, in G.722 (16 kHz)
or WAV (8 kHz). Each recording becomes a transcript; each prompt that two languages share, speech translation.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import av.error
import numpy as np

from data_prep.fetch import Opened, Package
from data_prep.job import Counts, run
from data_prep.spoken_lines import Collection, Line, add_options, write, write_notice
from omnitrain.data.media import decode_audio
from omnitrain.data.sample import BadSample

LICENCES = {
    "en": "CC-BY-SA-3.0",
    "es": "CC-BY-SA-3.0",
    "fr": "CC-BY-SA-3.0",
    "it": "CC-BY-3.0",
    "ru": "CC-BY-3.0",
}
"""Of each language's recordings and texts, as the packages' copyright files state them."""

RATES = {"g722": 16_000, "wav": 8_000}
"""Samples per second of each format."""

NOTICE = """Recordings and texts of telephone prompts, copyright of their speakers: Allison Smith (English, Spanish),
June Wallack (French), Carlo Flora (Italian), Maxim Topal (Russian). The licence files name translators and sponsors."""

_VOICE = re.compile(r"^(?P<language>[a-z]{2})_[A-Z]{2}_[a-z]_(?P<name>\w+)$")
_ASIDE = r"\[[^\[\]]*\]|\([^()]*\)|<[^<>]*>"
_MARK = re.compile(r"[\[(<][^\w\])>]*[\])>]")
_LAST_ASIDE = re.compile(rf"\s*(?:{_ASIDE})[\s.]*$")


def texts_package(language: str) -> Package:
    return Package(name=f"asterisk-core-sounds-{language}", manager="debian", licence=LICENCES[language])


def recordings_package(language: str, format: str) -> Package:
    return Package(name=f"asterisk-core-sounds-{language}-{format}", manager="debian", licence=LICENCES[language])


def read_list(raw: bytes, counts: Counts) -> dict[str, str]:
    """The texts of a list, by id. An id with two different texts, and a text that does not tell what is said, is left
    out and counted.

    Raises:
        ValueError: a line that is neither empty, a comment (``;``) nor ``id: text``.
    """
    found: dict[str, str] = {}
    twice: set[str] = set()
    for number, line in enumerate(raw.decode("utf-8-sig").splitlines(), start=1):
        if not line.strip() or line.startswith(";"):
            continue
        name, colon, text = line.partition(":")
        if not colon or not re.fullmatch(r"[\w/-]+", name.strip()):
            raise ValueError(f"line {number} of the text list is neither a comment nor `id: text`: {line!r}")
        name, text = name.strip(), " ".join(text.split())
        if found.setdefault(name, text) != text:
            twice.add(name)
    spoken = {}
    for name, text in found.items():
        if name in twice:
            counts.left_out["texts: two for one recording"] += 1
        elif said := what_is_said(text, counts):
            spoken[name] = said
    return spoken


def what_is_said(text: str, counts: Counts) -> str:
    """The words of a text without notes; empty, and counted, where they cannot be told from notes.

    Notes stand in brackets. One at the end ("IAX (note: does not say "2")") and one without letters ("at [@]") are cut
    off. A text that is only a note ("[ascending tones]") is no speech. Of a note amid words nobody can tell whether it
    is spoken ("Il [suo] messaggio").
    """
    if re.fullmatch(rf"\s*(?:{_ASIDE})\s*", text):
        counts.left_out["texts: a note alone, no speech"] += 1
        return ""
    words = _LAST_ASIDE.sub("", _MARK.sub("", text))
    if words.count('"') % 2:  # one that was never opened or closed
        words = words.replace('"', "")
    words = " ".join(words.split())
    if re.search(r"[\[\]()<>]", words):
        counts.left_out["texts: a note amid the words"] += 1
        return ""
    if not re.search(r"\w", words):
        counts.left_out["texts: empty"] += 1
        return ""
    return words


def read_recordings(root: Path, format: str) -> tuple[str, dict[str, Path]]:
    """The voice's name and its recordings by id, below `root`.

    Raises:
        FileNotFoundError: there is no folder of a voice, such as `en_US_f_Allison`, with recordings of that format.
    """
    for folder in sorted(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink()):
        if match := _VOICE.match(folder.name):
            files = sorted(folder.rglob(f"*.{format}"))
            if files:
                return match["name"], {str(file.relative_to(folder).with_suffix("")): file for file in files}
    raise FileNotFoundError(f"no folder of a voice (as en_US_f_Allison) with .{format} files below {root}")


def read_texts(root: Path, language: str, counts: Counts) -> dict[str, str]:
    """The texts of the list below `root`, by id. Raises FileNotFoundError: there is none."""
    lists = sorted(root.rglob(f"core-sounds-{language}.txt*"))
    if not lists:
        raise FileNotFoundError(f"no core-sounds-{language}.txt.gz below {root}")
    raw = lists[0].read_bytes()
    return read_list(gzip.decompress(raw) if lists[0].suffix == ".gz" else raw, counts)


def read_lines(opened: dict[str, Opened], languages: list[str], format: str, counts: Counts) -> Iterator[Line]:
    """The prompts that are spoken in `languages`, by id. English texts are read in any case, so that a prompt has the
    same concept, and split, whatever is chosen. Raises FileNotFoundError: a text list or recordings are missing."""
    texts = {"en": read_texts(opened[texts_package("en").name].root, "en", counts)}
    recordings: dict[str, dict[str, Path]] = {}
    voices: dict[str, str] = {}
    for language in languages:
        if language != "en":
            texts[language] = read_texts(opened[texts_package(language).name].root, language, counts)
        root = opened[recordings_package(language, format).name].root
        voices[language], recordings[language] = read_recordings(root, format)
        if silent := set(texts[language]) - set(recordings[language]):
            counts.left_out["texts: without a recording"] += len(silent)
    for name in sorted({name for files in recordings.values() for name in files}):
        spoken = {language: files[name] for language, files in recordings.items() if name in files}
        yield Line(
            id=name,
            texts={
                language: here[name]
                for language, here in texts.items()
                if name in here and (language in spoken or language == "en")
            },
            recordings=spoken,
            voices={language: voices[language] for language in spoken},
        )


def decode(format: str, file: Path) -> tuple[np.ndarray, int]:
    """A recording's samples and rate. Raises BadSample."""
    rate = RATES[format]
    if format == "g722":
        return decode_g722(file.read_bytes()), rate
    return decode_audio(file.read_bytes(), rate), rate


def decode_g722(data: bytes) -> np.ndarray:
    """ITU-T G.722 at 64 kbit/s, which has no header, to float32 [T] at 16 kHz. Raises BadSample."""
    try:
        with av.open(io.BytesIO(data), format="g722") as container:
            frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    except av.error.FFmpegError as error:
        raise BadSample("audio_corrupt", f"no G.722: {error}") from error
    if not frames:
        raise BadSample("audio_empty", "no samples")
    return np.concatenate(frames).astype(np.float32) / 32768


def _languages(options: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(options.languages))


def _packages(options: argparse.Namespace) -> list[Package]:
    languages = _languages(options)
    return [
        *(recordings_package(language, options.format) for language in languages),
        *(texts_package(language) for language in dict.fromkeys(["en", *languages])),
    ]


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    lines = list(read_lines(opened, _languages(options), options.format, counts))
    collection = Collection(source="asterisk", licences=LICENCES)
    write(lines, collection, partial(decode, options.format), options, counts)
    write_notice(options.out, opened, "Asterisk core sounds", NOTICE)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--languages", nargs="+", choices=sorted(LICENCES), default=sorted(LICENCES), help="default: all five"
    )
    parser.add_argument("--format", choices=sorted(RATES), default="g722", help="g722 is 16 kHz (default), wav 8 kHz")
    add_options(parser)


def main(argv: list[str] | None = None) -> int:
    return run(
        argv, name="asterisk", description=__doc__ or "", packages=_packages, build=_build, add_options=_add_options
    )


if __name__ == "__main__":
    sys.exit(main())

"""Recorded sentences with their texts in several languages, as rows: transcripts (`asr`) and translations (`s2tt`).

What `asterisk` and `fillets` share. A *line* is one sentence: its text by language, and the languages it is spoken in.
Media are kept once, as 16-bit FLAC, in `media.parquet`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.edit import check_heard
from data_prep.fetch import Opened
from data_prep.job import Counts, add_without, read_misfits
from data_prep.prompts import LANGUAGE_NAMES, ask, prompt
from data_prep.splits import Sides, concept_key, document_split, fraction, sentence_key
from omnitrain.data.media import encode_audio
from omnitrain.data.sample import BadSample, Sample, Segment
from omnitrain.data.shards import write_media_table, write_shards
from omnitrain.files import write_text

MEDIA = "media.parquet"

Decode = Callable[[Path], tuple[np.ndarray, int]]
"""A recording's samples, float32 [T], and their rate in Hz. Raises BadSample."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One sentence. `texts`, `recordings` and `voices` (who speaks) are by BCP 47 language."""

    id: str
    texts: dict[str, str]
    recordings: dict[str, Path]
    voices: dict[str, str] = field(default_factory=dict)

    @property
    def concept(self) -> str:
        """The key of the English text, as of a stamp's caption; of the first language's where there is no English."""
        if "en" in self.texts:
            return concept_key(self.texts["en"])
        return sentence_key(self.texts[min(self.texts)])


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Where lines come from.

    Attributes:
        licences: of the recordings in a language, with that language's translations (SPDX).
        heldout_voices: their lines are of the split ``heldout_cell``.
    """

    source: str
    licences: Mapping[str, str]
    heldout_voices: frozenset[str] = frozenset()

    def split(self, line: Line) -> str:
        """That of the line's concept; of a line with a held-out voice ``heldout_cell``, if its concept is not."""
        split = document_split(line.concept)
        if split != "heldout_concept" and self.heldout_voices & set(line.voices.values()):
            return "heldout_cell"
        return split

    def sample(self, line: Line, spoken: str, wanted: str) -> Sample:
        """The row of a recording in language `spoken`, answered in language `wanted`."""
        task = "asr" if spoken == wanted else "s2tt"
        sample_id = f"{self.source}/{line.id}/audio:{spoken}>{wanted}"
        recording = Segment(type="audio", path=f"{MEDIA}#{medium(line, spoken)}")
        question = prompt(task, sample_id, language=wanted, given=spoken)
        return Sample(
            id=sample_id,
            source=self.source,
            messages=ask(sample_id, question, line.texts[wanted], recording),
            split=self.split(line),
            task=task,
            licence=self.licences[spoken],
            languages=(spoken, wanted),
            concept=line.concept,
            meta={"line": line.id} | ({"voice": line.voices[spoken]} if spoken in line.voices else {}),
        )


def medium(line: Line, spoken: str) -> str:
    """Name of a recording in the media table."""
    return f"speech/{line.id}/{spoken}"


def cells(lines: Iterable[Line]) -> Iterator[tuple[Line, str, str]]:
    """Every (line, spoken language, language of the answer); no translation that is the same as the transcript."""
    for line in lines:
        for spoken in sorted(line.recordings):
            for wanted in sorted(line.texts):
                if wanted == spoken or sentence_key(line.texts[wanted]) != sentence_key(line.texts[spoken]):
                    yield line, spoken, wanted


def spoken_texts(lines: Iterable[Line], counts: Counts) -> Iterator[Line]:
    """The lines without texts in languages that have no name in `LANGUAGE_NAMES`, and without recordings that have no
    text; both are counted. A line that nobody speaks is left out."""
    for line in lines:
        texts = {language: text for language, text in line.texts.items() if text and language in LANGUAGE_NAMES}
        recordings = {language: file for language, file in line.recordings.items() if language in texts}
        if missing := len(line.recordings) - len(recordings):
            counts.left_out["recordings: without a text"] += missing
        if recordings:
            yield Line(id=line.id, texts=texts, recordings=recordings, voices=line.voices)


def write(
    lines: Iterable[Line], collection: Collection, decode: Decode, options: argparse.Namespace, counts: Counts
) -> None:
    """Write `media.parquet` and the shards into `options.out`. What cannot be heard, contradicts the split of another
    row or folder (`options.beside`) or is listed (`options.without`) is left out and counted."""
    from rich.progress import track

    misfits = read_misfits(options.without)
    kept: list[Line] = []

    def media() -> Iterator[tuple[str, bytes]]:
        usable = list(spoken_texts(lines, counts))
        for line in track(usable, description="recordings", disable=not options.progress):
            heard: dict[str, Path] = {}
            for spoken, file in sorted(line.recordings.items()):
                if medium(line, spoken) in misfits:
                    counts.left_out["recordings: listed by --without"] += 1
                    continue
                try:
                    wave, rate = decode(file)
                    check_heard(wave, rate, file)
                except BadSample as error:
                    counts.left_out[f"recordings: {error.reason}"] += 1
                    continue
                heard[spoken] = file
                yield medium(line, spoken), encode_audio(wave, rate, "flac")
            if heard:
                kept.append(Line(id=line.id, texts=line.texts, recordings=heard, voices=line.voices))

    write_media_table(media(), options.out / MEDIA)
    sides = Sides(map(Path, options.beside))
    for line in kept:
        sides.add(collection.split(line), line.texts.values())

    def rows() -> Iterator[Sample]:
        # By hash, so that the first rows of a split are a fair sample of it.
        for line, spoken, wanted in sorted(cells(kept), key=lambda c: fraction("row", c[0].id, c[1], c[2])):
            if sides.admit(collection.split(line), (line.texts[spoken], line.texts[wanted])):
                yield collection.sample(line, spoken, wanted)
            else:
                counts.left_out["rows: a sentence that stands on another side of the split"] += 1

    write_shards(
        counts.watch(rows()), options.out, collection.source, rows_per_shard=100_000, progress=options.progress
    )


def write_notice(folder: Path, opened: Mapping[str, Opened], title: str, content: str) -> None:
    """`NOTICE.md`, and the packages' own licence texts below `licences/`.

    Args:
        content: what was taken from the packages, and whose it is.
    """
    lines = [
        f"# {title}: sources and licences",
        "",
        "The data in this folder are not under the project's own licence, but under those of their packages, whose",
        "texts lie in `licences/`. Each row names its licence (column `licence`).",
        "",
        "| package | version | licence |",
        "|---|---|---|",
        *(f"| {o.package.name} ({o.package.manager}) | {o.version} | {o.package.licence} |" for o in opened.values()),
        "",
        content,
        "",
        "Changes made to the material: recordings were made mono and written as FLAC; texts are unchanged except for",
        "spaces and notes in brackets.",
        "",
    ]
    write_text(folder / "NOTICE.md", "\n".join(lines))
    for package in opened.values():
        if (text := package.root / "usr/share/doc" / package.package.name / "copyright").is_file():
            (folder / "licences").mkdir(exist_ok=True)
            shutil.copyfile(text, folder / "licences" / f"{package.package.name}.txt")


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--beside` and `--without`."""
    parser.add_argument(
        "--beside",
        nargs="*",
        default=[],
        metavar="DIR",
        help="folders of shards that will be trained on too: leave out what they have on another side of the split",
    )
    add_without(parser)

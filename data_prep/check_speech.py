"""Does the text of a recording fit its sound? A Whisper model that nobody here trained listens.

    python -m data_prep.check_speech data/asterisk --judge base --limit 200

It hears the transcribed recordings (`asr`) of a folder of shards and compares, by character error rate after Whisper's
normalisation. `heard.jsonl` has a line per recording, and what was heard before is not heard again; `misfits.json`
lists the recordings above the threshold, and ``--without DIR/misfits.json`` of the scripts leaves these out.

``--fastest 40`` lists, without listening, what nobody could say in that time: more than 40 characters a second.

A judge errs too, more in some languages than in others ("7" for "seven" counts as wrong outside English): read the list
before using it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep.edit import SPEECH_RATE
from omnitrain.data.media import decode_audio, probe
from omnitrain.data.sample import BadSample, Sample
from omnitrain.data.shards import SampleSource
from omnitrain.evaluation.judges import compared
from omnitrain.evaluation.metrics import edits
from omnitrain.files import append_line, write_json

HEARD, MISFITS = "heard.jsonl", "misfits.json"


class Hears(Protocol):
    """A `judges.Whisper`."""

    name: str

    def hear(self, wav: np.ndarray, sample_rate: int, language: str = "") -> str: ...


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What `judge` heard in one recording (its name in the media table) whose text is `text`. `cer` is above 1 where
    more was heard than is written."""

    recording: str
    judge: str
    language: str
    text: str
    heard: str
    cer: float


def recording_of(row: Sample) -> str:
    """The recording's name in the media table; the row's id where it lies in the row itself."""
    path = next((segment.path for segment in row.segments if segment.path), None)
    return row.id if path is None else path.rpartition("#")[2]


def character_error_rate(text: str, heard: str, language: str) -> float:
    """Edits over the characters of the text, both after Whisper's normalisation and without spaces."""
    said, found = (part.replace(" ", "") for part in compared(text, heard, language))
    wrong, length = edits(said, found, characters=True)
    return wrong / max(1, length)


def to_hear(source: SampleSource, languages: Sequence[str], limit: int | None) -> dict[str, list[int]]:
    """Indices of the transcribed recordings by language, the first `limit` of each."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, (task, codes) in enumerate(
        zip(*(source.light()[c].to_pylist() for c in ("task", "languages")), strict=True)
    ):
        if task == "asr" and codes and (not languages or codes[-1] in languages):
            found[codes[-1]].append(index)
    return {language: indices[:limit] for language, indices in sorted(found.items())}


def read_heard(file: Path, judge: str) -> dict[str, Heard]:
    """What this judge heard before, by recording; half a line at the end, from a kill, is left out."""
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    every = [Heard(**json.loads(line)) for line in lines]
    return {heard.recording: heard for heard in every if heard.judge == judge}


def listen(source: SampleSource, indices: Iterable[int], language: str, judge: Hears, file: Path) -> Iterator[Heard]:
    """Each recording as the judge hears it, added to `file` unless it is there; none that does not decode."""
    before = read_heard(file, judge.name)
    for index in indices:
        row = source[index]
        name = recording_of(row)
        if name in before and before[name].text == row.reference:
            yield before[name]
            continue
        sound = next(segment for segment in row.segments if segment.type == "audio")
        try:
            wave = decode_audio(source.media_bytes(sound), SPEECH_RATE)
        except BadSample:
            continue
        heard = judge.hear(wave, SPEECH_RATE, language)
        one = Heard(
            recording=name,
            judge=judge.name,
            language=language,
            text=row.reference,
            heard=heard,
            cer=round(character_error_rate(row.reference, heard, language), 4),
        )
        append_line(file, json.dumps(asdict(one), ensure_ascii=False))
        yield one


def too_fast(source: SampleSource, languages: Sequence[str], fastest: float) -> Iterator[dict[str, Any]]:
    """The transcribed recordings whose text has more than `fastest` characters for each second of sound."""
    for language, indices in to_hear(source, languages, limit=None).items():
        for row in (source[index] for index in indices):
            sound = next(segment for segment in row.segments if segment.type == "audio")
            pace = len(row.reference) / max(0.01, probe(source.media_bytes(sound), "audio").seconds)
            if pace > fastest:
                name = recording_of(row)
                yield {"recording": name, "language": language, "text": row.reference, "pace": round(pace, 1)}


def check(source: SampleSource, judge: Hears, options: argparse.Namespace, console: Console) -> dict[str, list[Heard]]:
    """What was heard, by language. A language that the judge does not know is named and left out."""
    found: dict[str, list[Heard]] = {}
    for language, indices in to_hear(source, options.languages, options.limit).items():
        steps = track(indices, f"{source.name} {language}", disable=not options.progress)
        try:
            found[language] = list(listen(source, steps, language, judge, options.out / HEARD))
        except ValueError as error:
            console.print(f"left out: {error}", markup=False)
    return found


def print_found(found: dict[str, list[Heard]], threshold: float, console: Console) -> None:
    """Sentences, median CER and how many do not fit, by language."""
    table = Table("language", "recordings", "median CER", f"CER above {threshold:g}", title_justify="left")
    for language, heard in found.items():
        if heard:
            rates = [one.cer for one in heard]
            above = sum(rate > threshold for rate in rates)
            table.add_row(
                language, str(len(rates)), f"{statistics.median(rates):.3f}", f"{above} ({above / len(rates):.0%})"
            )
    console.print(table)


def main(argv: list[str] | None = None, judge: Hears | None = None) -> int:
    """The script; `judge` instead of the one that ``--judge`` names."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.check_speech", description=__doc__)
    parser.add_argument("shards", type=Path, help="folder of shards")
    parser.add_argument("--judge", help="Whisper: a name (base, large-v3), or a CTranslate2 folder")
    parser.add_argument("--fastest", type=float, help="characters a second; what has more does not fit")
    parser.add_argument("--languages", nargs="*", default=[], help="only these")
    parser.add_argument("--limit", type=int, help="at most so many recordings of each language (a fair sample)")
    parser.add_argument("--threshold", type=float, default=0.5, help="CER above which a text does not fit (0.5)")
    parser.add_argument("--out", type=Path, help="folder for the lists (default: that of the shards)")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    options = parser.parse_args(argv)
    options.out = options.out or options.shards
    console = Console(width=110)
    try:
        if options.judge is None and options.fastest is None:
            raise ValueError("name a judge (--judge), or the most characters a second (--fastest)")
        source = SampleSource(options.shards)
        if judge is None and options.judge is not None:
            from omnitrain.evaluation.judges import Whisper

            judge = Whisper(options.judge)
        hurried = [] if options.fastest is None else list(too_fast(source, options.languages, options.fastest))
        found = {} if judge is None else check(source, judge, options, console)
    except (FileNotFoundError, ValueError, ImportError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    misfits = [one for heard in found.values() for one in heard if one.cer > options.threshold]
    misfits.sort(key=lambda one: (-one.cer, one.recording))
    write_json(options.out / MISFITS, [asdict(one) for one in misfits] + hurried)
    if found:
        print_found(found, options.threshold, console)
    if hurried:
        counts = Counter(one["language"] for one in hurried)
        console.print(f"faster than {options.fastest:g} characters a second: {dict(counts)}", markup=False)
    console.print(f"{options.out / MISFITS}: {len(misfits) + len(hurried)} recordings")
    return 0


if __name__ == "__main__":
    sys.exit(main())

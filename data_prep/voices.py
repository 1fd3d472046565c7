"""Recordings of real voices, each with its sentence, as speech to be learnt: for the codec and the Talker.

    python -m data_prep.check_speech data/asterisk --judge base --out data/asterisk_heard
    python -m data_prep.voices data/asterisk data/stamps --without data/asterisk_heard/misfits.json --out data/voices

It reads folders that `data_prep.asterisk` and `data_prep.stamps` made. In both, all recordings in a language are one
voice (of the stamps' nearly all): ``asterisk_en``, ``stamps_fr``. A row asks for a sentence, in the wordings of
`data_prep.synthetic_speech`; the answer is one `speech` segment with the transcript and the recording. `source` is
``voices/VOICE``, so that `where` can choose voices, and `meta["voice"]` names it too. Splits are those of the folders;
a sentence that stands in two of them is kept in the stricter one alone, whoever says it.

What is done to a recording: quiet ends cut to 0.1 s; one gain, which brings it to -23 LUFS (ITU-R BS.1770-4, the level
of EBU R 128), or less where its peak would pass -1 dB of full scale; nothing is compressed. Rate and bandwidth stay as
they are, but for rates above 24 kHz, at which the codec hears: a source of 16 kHz has nothing above 8 kHz. FLAC.

What a judge does not hear (``--without``, lists by `data_prep.check_speech`) is left out, and `dropped.json` says what.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from rich.console import Console
from rich.table import Table

from data_prep.check_speech import recording_of
from data_prep.edit import check_heard, trim_silence
from data_prep.fetch import Opened
from data_prep.job import RECORD, Counts, add_without, misfits_by_recording, run
from data_prep.splits import Sides, fraction
from data_prep.synthetic_speech import request_and_speech
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import BadSample, Sample
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.files import read_json, write_json, write_text

NAME = "voices"
DROPPED = "dropped.json"
ONE_VOICE = ("asterisk", "stamps")
"""Sources whose recordings in a language are one voice."""
HIGHEST_RATE = 24_000  # Hz; what Qwen3-Omni's codec hears and speaks
LOUDNESS = -23.0  # LUFS
PEAK = 10 ** (-1 / 20)
MARGIN = 0.1  # seconds of quiet that are kept at either end
_BLOCK = 0.4  # seconds over which BS.1770 gates
_SILENCE = -70.0  # LUFS; what BS.1770 leaves out as no sound
_BAND = 25  # Hz; width of a band of `Spectrum`
_HEARD = 10 ** (-50 / 10)  # power of a band, beside the strongest, below which there is nothing


def loudness(wave: np.ndarray, rate: int) -> float:
    """Integrated loudness of float32 [T], LUFS (ITU-R BS.1770-4, as torchaudio filters: to 0.3 dB); -inf for silence.
    What is shorter than one block of 0.4 s is as loud as it is over and over."""
    peak, shortest = float(np.abs(wave).max(initial=0.0)), math.ceil(_BLOCK * rate)
    if peak == 0:
        return -math.inf
    if len(wave) < shortest:
        wave = np.tile(wave, math.ceil(shortest / len(wave)))
    gain = 0.5 / peak  # torchaudio's filters clip what they make louder than full scale
    scaled = torch.from_numpy(np.ascontiguousarray(wave * np.float32(gain)))
    return float(torchaudio.functional.loudness(scaled[None], rate)) - 20 * math.log10(gain)


def levelled(wave: np.ndarray, rate: int) -> np.ndarray:
    """float32 [T] at `LOUDNESS`, or as loud as `PEAK` allows. Raises BadSample: ``audio_silent``."""
    now = loudness(wave, rate)
    if not now > _SILENCE:  # nor NaN
        raise BadSample("audio_silent", f"it has {now:.0f} LUFS")
    gain = min(10 ** ((LOUDNESS - now) / 20), PEAK / float(np.abs(wave).max()))
    return wave * np.float32(gain)


@dataclass
class Spectrum:
    """The mean power of many recordings of any rate, in bands of 25 Hz."""

    power: np.ndarray = field(default_factory=lambda: np.zeros(HIGHEST_RATE // 2 // _BAND + 1))

    def add(self, wave: np.ndarray, rate: int) -> None:
        """Count float32 [T] in."""
        size = round(rate / _BAND)
        if len(wave) < size:
            return
        bands = torch.stft(torch.from_numpy(wave), size, window=torch.hann_window(size), return_complex=True)
        power = bands.abs().square().sum(dim=1).numpy() / size**2  # [size / 2 + 1]
        self.power[: len(power)] += power

    @property
    def highest(self) -> float:
        """The highest frequency in Hz that is heard: less than 50 dB below the strongest band."""
        return float(np.flatnonzero(self.power > _HEARD * self.power.max()).max(initial=0) * _BAND)


@dataclass
class Tally:
    """What became of the recordings of one voice. `before` and `after`: loudness of each that was kept, LUFS."""

    language: str
    licence: str
    seconds: float = 0.0
    dropped: int = 0
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    rates: Counter[int] = field(default_factory=Counter)
    spectrum: Spectrum = field(default_factory=Spectrum)

    def cells(self) -> tuple[str, ...]:
        """Language, sentences, minutes, dropped, loudness before and after with its deviation, bandwidth."""
        levels = (f"{np.mean(of):.1f} ± {np.std(of):.1f}" if of else "-" for of in (self.before, self.after))
        bandwidth = f"{self.spectrum.highest / 1000:.1f} kHz" if self.after else "-"
        count = f"{len(self.after):,}"
        return self.language, count, f"{self.seconds / 60:.1f}", f"{self.dropped:,}", *levels, bandwidth


HEADINGS = ("voice", "language", "sentences", "minutes", "dropped", "LUFS before", "LUFS after", "bandwidth")


def voice_of(row: Sample) -> str:
    """The voice of a transcribed recording, as ``asterisk_en`` or ``stamps_pt-br``. Raises ValueError: a source in
    which a language has several voices."""
    if row.source not in ONE_VOICE:
        raise ValueError(
            f"{row.source} is none of {', '.join(ONE_VOICE)}, in which all recordings in a language are one voice"
        )
    return f"{row.source}_{row.languages[0].lower()}"


def sample(row: Sample, voice: str, recording: bytes) -> Sample:
    """The row that asks `voice` for the sentence of the transcript `row`. `recording`: the encoded file."""
    sample_id = f"{NAME}/{voice}/{recording_of(row).removeprefix('speech/')}"
    return Sample(
        id=sample_id,
        source=f"{NAME}/{voice}",
        messages=request_and_speech(sample_id, row.reference, recording),
        split=row.split,
        task="tts",
        licence=row.licence,
        languages=row.languages[:1],
        concept=row.concept,
        meta={"voice": voice} | ({"speaker": row.meta["voice"]} if "voice" in row.meta else {}),
    )


def prepared(data: bytes, name: str) -> tuple[np.ndarray, int, float]:
    """Samples of a recording, cut and levelled, their rate, and how loud it was. Raises BadSample."""
    rate = min(HIGHEST_RATE, soundfile.info(io.BytesIO(data)).samplerate)
    wave = decode_audio(data, rate)
    check_heard(wave, rate, Path(name))
    wave = trim_silence(wave, rate, margin=MARGIN)
    check_heard(wave, rate, Path(name))
    before = loudness(wave, rate)
    return levelled(wave, rate), rate, before


@dataclass(frozen=True)
class _Place:
    """One transcribed recording of a folder."""

    source: SampleSource
    row: Sample
    voice: str


def _places(folders: Iterable[str], voices: list[str]) -> list[_Place]:
    """The transcribed recordings of the voices (all: none named), in the order of a hash. Raises ValueError for a voice
    that there is not."""
    found: list[_Place] = []
    for folder in folders:
        source = SampleSource(Path(folder), where={"task": "asr"})
        rows = (source[index] for index in range(len(source)))
        found += [_Place(source, row, voice_of(row)) for row in rows]
    there = sorted({place.voice for place in found})
    if unknown := sorted(set(voices) - set(there)):
        raise ValueError(f"--voices {' '.join(unknown)}: no such voice; there are {', '.join(there) or 'none'}")
    chosen = [place for place in found if not voices or place.voice in voices]
    # By hash, so that the first rows of a split are a fair sample of it.
    return sorted(chosen, key=lambda place: fraction("row", place.voice, place.row.id))


def _few(places: list[_Place], least: int) -> frozenset[str]:
    """Voices with fewer recordings than `least`."""
    counts = Counter(place.voice for place in places)
    return frozenset(voice for voice, count in counts.items() if count < least)


def _build(_: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    misfits = misfits_by_recording(options.without)
    places = _places(options.folders, options.voices)
    few = frozenset[str]() if options.voices else _few(places, options.least)
    counts.left_out |= Counter(
        f"recordings: {p.voice}, which has fewer than {options.least}" for p in places if p.voice in few
    )
    if few == {place.voice for place in places}:
        raise ValueError(
            f"all voices ({', '.join(sorted(few)) or 'none'}) have fewer than {options.least} recordings (--least)"
        )
    places = [place for place in places if place.voice not in few]
    tallies: dict[str, Tally] = {
        voice: Tally(language=first.row.languages[0], licence=first.row.licence)
        for voice, first in sorted({place.voice: place for place in places}.items())
    }
    dropped: list[dict[str, Any]] = []
    sides = Sides()
    for place in places:
        if recording_of(place.row) not in misfits:
            sides.add(place.row.split, [place.row.reference])

    def drop(place: _Place, reason: str, **known: Any) -> None:
        tallies[place.voice].dropped += 1
        counts.left_out[f"recordings: {reason}"] += 1
        about = {"recording": recording_of(place.row), "voice": place.voice, "text": place.row.reference}
        dropped.append({**about, "split": place.row.split, "reason": reason, **known})

    def rows() -> Iterator[Sample]:
        seen: set[bytes] = set()
        for place in track(places, "recordings", disable=not options.progress):
            row, tally = place.row, tallies[place.voice]
            name = recording_of(row)
            if name in misfits:
                told = {key: misfits[name][key] for key in ("heard", "cer", "pace") if key in misfits[name]}
                drop(place, "listed by --without", **told)
                continue
            if not sides.admit(row.split, [row.reference]):
                drop(place, "a sentence that stands on another side of the split")
                continue
            data = place.source.media_bytes(next(s for s in row.segments if s.type == "audio"))
            if (same := hashlib.sha256(data).digest()) in seen:
                drop(place, "the same sound again")
                continue
            seen.add(same)
            try:
                wave, rate, before = prepared(data, name)
            except BadSample as error:
                drop(place, error.reason)
                continue
            tally.seconds += len(wave) / rate
            tally.before.append(before)
            tally.after.append(loudness(wave, rate))
            tally.rates[rate] += 1
            tally.spectrum.add(wave, rate)
            yield sample(row, place.voice, encode_audio(wave, rate, "flac"))

    write_shards(counts.watch(rows()), options.out, NAME, rows_per_shard=4_000, progress=False)
    write_json(options.out / DROPPED, sorted(dropped, key=lambda one: (one["voice"], one["recording"])))
    _write_notice(options.out, [Path(folder) for folder in options.folders], tallies)
    table = Table(*HEADINGS, title="voices", title_justify="left")
    for voice, tally in tallies.items():
        table.add_row(voice, *tally.cells())
    Console(width=110).print(table)


def _write_notice(out: Path, folders: list[Path], tallies: dict[str, Tally]) -> None:
    """`NOTICE.md`, with what the folders' own records and notices say, and their licence texts below `licences/`."""
    packages = {
        package["name"]: package
        for folder in folders
        if (folder / RECORD).is_file()
        for package in read_json(folder / RECORD)["packages"]
    }
    lines = [
        "# Real voices: sources and licences",
        "",
        f"Made by `python -m data_prep.{NAME}` from folders of shards. The recordings are of people, and the data are",
        "not under the project's own licence, but under those of their packages. Each row names its licence (column",
        "`licence`) and its voice (`meta`).",
        "",
        "| package | version | licence |",
        "|---|---|---|",
        *(f"| {p['name']} ({p['manager']}) | {p['version']} | {p['licence']} |" for p in packages.values()),
        "",
        f"| {' | '.join((*HEADINGS, 'rate', 'licence'))} |",
        f"|{'---|' * (len(HEADINGS) + 2)}",
        *(
            f"| {' | '.join((voice, *t.cells(), _rates(t), t.licence))} |"
            for voice, t in tallies.items()
        ),
        "",
        f"Changes made to the material: quiet ends were cut to {MARGIN:g} s; each recording was brought to",
        f"{LOUDNESS:g} LUFS (ITU-R BS.1770-4) by one gain, or to a peak of -1 dB of full scale where that is less,",
        "made mono and written as FLAC. The bandwidth is that of the sources: what was recorded with 16 kHz has",
        "nothing above 8 kHz, and a codec that is trained on it learns nothing above. `dropped.json` lists what was",
        "left out.",
        "",
    ]  # fmt: skip
    carry_notices(out, folders, "\n".join(lines))


def carry_notices(out: Path, folders: Iterable[Path], text: str) -> None:
    """`NOTICE.md`: `text`, then what the folders' own notices say; and their licence texts below `licences/`."""
    lines = [text, ""]
    for folder in folders:
        if (notice := folder / "NOTICE.md").is_file():
            lines += [f"The notice of the folder `{folder.name}`:", ""]
            lines += [f"> {line}".rstrip() for line in notice.read_text(encoding="utf-8").splitlines()] + [""]
        for licence in sorted((folder / "licences").glob("*.txt")):
            (out / "licences").mkdir(exist_ok=True)
            shutil.copyfile(licence, out / "licences" / licence.name)
    write_text(out / "NOTICE.md", "\n".join(lines))


def _rates(tally: Tally) -> str:
    return ", ".join(f"{rate / 1000:g} kHz" for rate in sorted(tally.rates)) or "-"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="folders of shards by data_prep.asterisk and data_prep.stamps")
    parser.add_argument("--voices", nargs="*", default=[], help="only these, as in: asterisk_en stamps_fr")
    parser.add_argument(
        "--least", type=int, default=100, help="where --voices names none: recordings that a voice must have (100)"
    )
    add_without(parser)


def main(argv: list[str] | None = None) -> int:
    return run(argv, name=NAME, description=__doc__ or "", packages=[], build=_build, add_options=_add_options)


if __name__ == "__main__":
    sys.exit(main())

"""The embedded announcements: two real voices from which a Talker learns to read in minutes.

    python -m data_prep.announcement_pack data/announcements --codec builtin --out omnitrain/pack_announcements

Of the announcements (`data_prep.announcements`) of an English and a French voice come

    codes/       train and validation as frames of the embedded codec, its first 8 codebooks
    recordings/  Ogg Opus, 24 kbit/s: the held-out sentences, beside which speech is judged, and the validation's, from
                 which judges learn the voices
    tokenizer.json  whole words are tokens, so that a small model has to spell nothing

The same announcements and codec give the same bytes each time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.splits import fraction
from data_prep.tokenizer import training_texts
from data_prep.voices import carry_notices
from omnitrain.data.chat import train_bpe
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import Sample, Segment
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.runs.encode_shards import encode, is_recorded, with_segments
from omnitrain.runs.load import load_codec

NAME = "announcement_pack"
VOICES = ("asterisk_en", "asterisk_fr")
CODEBOOKS = 8
RATE, BIT_RATE = 24_000, 24_000
"""Hz, and bits a second, of the recordings."""
LIMIT_BYTES = 5_000_000


def chosen(folder: Path, voice: str, split: str, joined: str, most: int) -> Iterator[tuple[Sample, SampleSource]]:
    """Sentences or fragments (`joined`) of a voice and split, `most` at most, in the order of a hash."""
    source = SampleSource(folder, split=split, where={"source": f"announcements/{voice}"})
    rows = [row for row in (source[i] for i in range(len(source))) if row.meta["joined"] == joined]
    if not rows:
        raise ValueError(f"{folder} has no {joined} of {voice}; `python -m data_prep.announcements` makes them")
    for row in islice(sorted(rows, key=lambda row: fraction(NAME, row.id)), most):
        yield row, source


def with_media(row: Sample, source: SampleSource, opus: bool) -> Sample:
    """The row with the bytes of its recording in it, as Opus or as they are."""

    def change(segment: Segment) -> Segment:
        if not is_recorded(segment):
            return segment
        data = source.media_bytes(segment)
        return replace(
            segment, media=encode_audio(decode_audio(data, RATE), RATE, "opus", BIT_RATE) if opus else data, path=None
        )

    return with_segments(row, change)


def _build(_: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    codes, recordings, flac = (options.out / name for name in ("codes", "recordings", "flac"))
    shutil.rmtree(codes, ignore_errors=True)
    texts: list[Sample] = []
    for split, joined, most in (
        ("train", "sentence", options.sentences),
        ("train", "fragment", options.fragments),
        ("validation", "sentence", 20),
    ):
        rows = [row for voice in VOICES for row in chosen(options.folder, voice, split, joined, most)]
        texts += [row for row, _ in rows]
        write_shards((with_media(*row, opus=False) for row in rows), flac, f"{split}-{joined}", progress=False)
    no_bar: Any = lambda title, total: nullcontext(lambda: None)  # noqa: E731
    encode(
        load_codec(options.codec), [str(flac)], codes, only_speech=True, codebooks=CODEBOOKS,
        workers=options.workers, progress=no_bar,
    )  # fmt: skip
    shutil.rmtree(flac)
    for split, most in (("validation", 20), ("heldout_concept", options.heldout)):
        rows = [row for voice in VOICES for row in chosen(options.folder, voice, split, "sentence", most)]
        kept = (with_media(*row, opus=True) for row in track(rows, split, disable=not options.progress))
        write_shards(counts.watch(kept), recordings, split, progress=False)
    train_bpe(dict.fromkeys(training_texts(texts)), options.vocabulary).save(options.out / "tokenizer.json")
    made = (
        f"Made by `python -m data_prep.{NAME}` with the codec `{options.codec}`: recordings as Opus, and as its codes."
    )
    carry_notices(options.out, [options.folder], f"# The embedded announcements: sources and licences\n\n{made}")
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(f"{options.out} has {size:,} bytes, over {LIMIT_BYTES:,}; lower the counts of sentences")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of shards by data_prep.announcements")
    parser.add_argument("--codec", default="builtin", help="as of `omnitrain data encode`")
    for name, most in (("sentences", 1_300), ("fragments", 700), ("heldout", 40)):
        parser.add_argument(f"--{name}", type=int, default=most, help=f"of each voice ({most:,})")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens, bytes and special ones included")
    parser.add_argument("--workers", type=int, default=1)


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name=NAME,
        description=__doc__ or "",
        packages=[],
        build=_build,
        add_options=_add_options,
        default_out="omnitrain/pack_announcements",
    )


if __name__ == "__main__":
    sys.exit(main())

"""The embedded speech pack: the smallest data set with which speech output can be tried, and it is synthetic.

    python -m data_prep.speech_pack --out omnitrain/pack_speech

Some 300 sentences by one flite voice to train on, 20 to validate, 40 held out, and 60 by a second voice to adapt the
speaker to (`source` is ``synthetic_speech/VOICE``, so `where` tells them apart), as one shard per split: Ogg Opus,
24 kHz, 24 kbit/s (a tenth of FLAC's size; for training a codec make FLAC with `data_prep.synthetic_speech`). The same
packages give the same bytes each time.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.splits import document_split, fraction
from data_prep.synthetic_speech import (
    Studio,
    Voice,
    add_engine_options,
    packages,
    parse_voices,
    sentences,
    write_notice,
)
from omnitrain.data.shards import write_shards

LIMIT_BYTES = 4_000_000
BIT_RATE = 24_000
SENTENCES = {"train": 300, "validation": 20, "heldout_concept": 40}
SECOND_VOICE = 60
"""Training sentences of the second voice: some of those that the first has spoken."""


def choose(voices: list[Voice]) -> list[tuple[Voice, str]]:
    """Who speaks what: the first sentences of each split, in the order of a hash."""
    by_split: dict[str, list[str]] = defaultdict(list)
    for text in sentences():
        split = document_split(text)
        if len(by_split[split]) < SENTENCES[split]:
            by_split[split].append(text)
        if all(len(by_split[split]) == count for split, count in SENTENCES.items()):
            break
    first, second = voices
    pairs = [(first, text) for texts in by_split.values() for text in texts]
    pairs += [(second, text) for text in by_split["train"][:SECOND_VOICE]]
    return sorted(pairs, key=lambda pair: fraction("row", pair[0].key, pair[1]))


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    voices = parse_voices(options.voices)
    if len(voices) != 2:
        raise ValueError(f"--voices {options.voices}: the pack needs two voices")
    studio = Studio(voices, opened, options.cache, bit_rate=BIT_RATE)
    bar = track(choose(voices), description="speaking", disable=not options.progress)
    rows = list(counts.watch(studio.record(voice, text) for voice, text in bar))
    for split in SENTENCES:
        write_shards([row for row in rows if row.split == split], options.out, split, progress=False)
    write_notice(options.out, opened, studio.minutes, "The embedded speech pack", "speech_pack")
    studio.minutes.print()
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(f"{options.out} has {size:,} bytes, over {LIMIT_BYTES:,}; lower the counts of sentences")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--voices", default="slt,rms", help="the voice, and the second one (default slt,rms)")
    add_engine_options(parser)


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name="speech_pack",
        description=__doc__ or "",
        packages=packages,
        build=_build,
        add_options=_add_options,
        default_out="omnitrain/pack_speech",
    )


if __name__ == "__main__":
    sys.exit(main())

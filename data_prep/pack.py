"""The embedded pack: a small real data set that lies in the repository, so that a first run needs no download.

    python -m data_prep.pack --out omnitrain/pack

It holds a few hundred stamps with captions in thirteen languages, the matching recordings and sound effects, short
moving stamps, dictionary definitions and the Universal Declaration, as one shard per split, with `media.parquet`, two
byte-level BPEs (`tokenizer.json`, and the smaller `tokenizer_speech.json` for AuT) and `NOTICE.md`. All choices are
hashes of ids: the same packages give the same rows and the same decoded content each time.

Sizes are chosen for a small model and a few minutes: short captions ("A fire truck."), each stamp in many rows, clips
of two seconds, recordings without their silent ends.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep import dictionaries, moving_stamps, stamps, udhr
from data_prep.edit import SPEECH_RATE, loudest, normalise_peak, on_square, to_webp, trim_silence
from data_prep.fetch import Opened
from data_prep.job import Counts, run
from data_prep.prompts import FEW
from data_prep.splits import concept_is_heldout, fraction
from data_prep.stamps import MAIN_LANGUAGES, Stamp
from data_prep.tokenizer import training_texts
from omnitrain.data.chat import train_bpe
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import SPLITS, Sample
from omnitrain.data.shards import write_media_table, write_shards
from omnitrain.files import write_text

LIMIT_BYTES = 12_000_000
LICENCES = Path(__file__).parent / "licences"
VOCABULARY = 4096
SPEECH_VOCABULARY, SPEECH_TOKENIZER = 512, "tokenizer_speech.json"
"""Of the words that are said, for AuT: pieces so short that nearly all are in recordings of other words too."""
SPOKEN = ("fr", "es", "ca", "ru")
"""Languages whose recordings are in the pack (nearly every stamp has them); English too, where there is one."""

SOUND_LANGUAGES = ("en", "fr", "es", "ca", "ru", "de")
UDHR_CODES = {
    "en": "eng",
    "fr": "fra",
    "es": "spa",
    "ca": "cat",
    "ru": "rus",
    "de": "deu_1996",
    "it": "ita",
    "pt": "por_PT",
    "ja": "jpn",
    "zh": "cmn_hans",
    "el": "ell_monotonic",
    "uk": "ukr",
    "ro": "ron_2006",
}

PICTURE, FRAME, FPS, SECONDS = 128, 96, 8, 2.0
LONGEST_SOUND = 2.0
TRANSLATED = ("en", "es", "fr")
"""Languages between which every caption is translated: translation is what ties the languages of a concept together."""
SPEECH_TRANSLATED = ("en", "es", "fr", "ca")
"""Languages into which every recording is translated: then a held-out transcript is of a recording that was heard."""
TRANSLATIONS_PER_STAMP = 4
HELDOUT_CLIPS = 10  # per moving stamp of a held-out concept
DEFINITIONS, LONGEST_DEFINITION = 2400, 110


def choose_stamps(found: Sequence[Stamp], count: int) -> list[Stamp]:
    """`count` stamps with a short "A ..." caption and every recording in `SPOKEN`: first those of held-out concepts and
    those that sound, then by hash."""
    fitting = [
        stamp
        for stamp in found
        if moving_stamps.noun(stamp) is not None
        and not stamp.id.startswith("symbols/")
        and set(SPOKEN) <= set(stamp.recordings)
        and set(MAIN_LANGUAGES) - {"zh"} <= set(stamp.captions)
        and max(len(stamp.captions[language]) for language in MAIN_LANGUAGES if language in stamp.captions) <= 40
    ]
    ranked = sorted(
        fitting,
        key=lambda stamp: (
            not concept_is_heldout(stamp.concept),
            stamp.effect is None,
            fraction("pack", stamp.id),
        ),
    )
    return sorted(ranked[:count], key=lambda stamp: stamp.id)


def choose_objects(chosen: Sequence[Stamp], count: int) -> list[Stamp]:
    """The stamps that move: those of held-out concepts, and `count` others, first those with a sound and verb."""
    heldout = [stamp for stamp in chosen if concept_is_heldout(stamp.concept)]
    others = [stamp for stamp in chosen if not concept_is_heldout(stamp.concept)]
    ranked = sorted(others, key=lambda stamp: (stamp.id not in moving_stamps.SOUNDS, fraction("object", stamp.id)))
    return sorted(heldout + ranked[:count], key=lambda stamp: stamp.id)


def stamp_rows(stamp: Stamp) -> Iterator[Sample]:
    """A stamp's rows: every caption and transcript, the translations between `TRANSLATED`, and a choice by hash of the
    many others."""
    captions = [language for language in MAIN_LANGUAGES if language in stamp.captions]

    for language in captions:
        yield stamps.sample(stamp, "caption", "", language, few=FEW)
    for spoken in (*SPOKEN, "en"):
        if spoken not in stamp.recordings:
            continue
        yield stamps.sample(stamp, "asr", spoken, spoken, few=FEW)
        for wanted in SPEECH_TRANSLATED:
            if wanted in captions and wanted != spoken:
                yield stamps.sample(stamp, "s2tt", spoken, wanted, few=FEW)
    every = [(given, wanted) for given in captions for wanted in captions if given != wanted]
    main = [pair for pair in every if set(pair) <= set(TRANSLATED)]
    others = sorted((pair for pair in every if pair not in main), key=lambda pair: fraction("t2tt", stamp.id, *pair))
    for given, wanted in main + others[:TRANSLATIONS_PER_STAMP]:
        yield stamps.sample(stamp, "t2tt", given, wanted, few=FEW)
    if stamp.effect is not None:
        for language in SOUND_LANGUAGES:
            yield stamps.sample(stamp, "sound", "", language, few=FEW)


def stamp_media(stamp: Stamp) -> Iterator[tuple[str, bytes]]:
    """The picture, the recordings and the effect, small."""
    picture = stamps.open_picture(stamp.picture, PICTURE)
    yield f"image/{stamp.id}", to_webp(on_square(picture, PICTURE), quality=80)
    for spoken in (*SPOKEN, "en"):
        if spoken in stamp.recordings:
            yield f"speech/{stamp.id}/{spoken}", _opus(stamp.recordings[spoken], bit_rate=16_000)
    if stamp.effect is not None:
        yield f"sound/{stamp.id}", _opus(stamp.effect, bit_rate=20_000, longest=LONGEST_SOUND)


def _opus(file: Path, bit_rate: int, longest: float = 60.0) -> bytes:
    """The recording without its silent ends, its loudest part if longer than `longest` seconds, at one peak level."""
    wave = loudest(trim_silence(decode_audio(file.read_bytes(), SPEECH_RATE)), longest)
    return encode_audio(normalise_peak(wave), SPEECH_RATE, "opus", bit_rate)


def definition_rows(root: Path) -> Iterator[Sample]:
    """Short definitions of single words, by hash, one sense per word."""
    senses: dict[str, tuple[int, str, str]] = {}
    for number, (headword, pos, definition) in enumerate(dictionaries.wordnet_senses(root)):
        if re.fullmatch(r"[a-z]{3,9}", headword) and len(definition) <= LONGEST_DEFINITION and "{" not in definition:
            senses.setdefault(headword, (number, pos, definition))
    chosen = sorted(senses, key=lambda word: fraction("definition", word))[:DEFINITIONS]
    for headword in sorted(chosen):
        number, pos, definition = senses[headword]
        yield dictionaries.document("wordnet", number, headword, pos, definition, dictionaries.WORDNET.licence)


def declaration_rows(root: Path) -> Iterator[Sample]:
    """The Universal Declaration, an article a document."""
    by_code = {declaration.code: declaration for declaration in udhr.read_declarations(root)}
    for code in UDHR_CODES.values():
        if code in by_code:
            for article in sorted(by_code[code].articles):
                yield udhr.document(by_code[code], article)


def notice(opened: dict[str, Opened], counts: Counts) -> str:
    """`NOTICE.md`: what the pack holds and under which licences."""
    content = {
        stamps.PACKAGE.name: (
            "pictures (scaled to 128 pixels), captions, recordings and sound effects (cut, re-encoded as Opus), and "
            "the clips drawn from them. Copyright 2002-2022 Bill Kendrick and the Tux Paint contributors"
        ),
        dictionaries.WORDNET.name: (
            "definitions. WordNet 3.0, copyright 2006 by Princeton University. All rights reserved. The software and "
            'database is provided "as is"; title to copyright remains with Princeton University'
        ),
        udhr.PACKAGE.name: "the Universal Declaration of Human Rights. Copyright (c) Titus Wormer",
    }
    rows = Counter[str]()
    for (modality, _, _), count in counts.rows.items():
        rows[modality] += count
    lines = [
        "# The embedded pack: sources and licences",
        "",
        "Made by `python -m data_prep.pack`. The data in this folder are not under the project's own licence, but",
        "under those of their sources, whose texts lie in `licences/`. Each row names its licence (column `licence`).",
        "",
        "| package | version | licence | what is taken from it |",
        "|---|---|---|---|",
        *(
            f"| {p.name} ({p.manager}) | {version} | {p.licence} | {content[p.name]} |"
            for p, version in ((o.package, o.version) for o in opened.values())
        ),
        "",
        "Changes made to the material: pictures were put on white and scaled; recordings and effects were made mono,",
        "16 kHz, cut at their silent ends and brought to one peak level; videos were drawn from pictures and effects;",
        "texts are unchanged except for line breaks, and synonym lists left out.",
        "",
        f"Rows: {sum(rows.values()):,} ("
        + ", ".join(f"{modality} {count:,}" for modality, count in sorted(rows.items()))
        + ").",
        "",
    ]
    return "\n".join(lines)


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    found = stamps.read_stamps(opened[stamps.PACKAGE.name].root)
    chosen = list(stamps.usable(choose_stamps(found, options.stamps), counts))
    clips = [
        clip
        for clip in moving_stamps.plan(choose_objects(chosen, options.objects), options.clips, (SECONDS,), seed="pack/")
        if clip.split != "heldout_concept" or int(clip.id.rpartition("/")[2]) < HELDOUT_CLIPS
    ]
    renderer = moving_stamps.Renderer(moving_stamps.backgrounds(found), FRAME, FPS)

    def media() -> Iterator[tuple[str, bytes]]:
        for stamp in track(chosen, description="pictures and sounds", disable=not options.progress):
            yield from stamp_media(stamp)
        for clip in track(clips, description="drawing clips", disable=not options.progress):
            yield f"video/{clip.id}", renderer.encode(clip, crf=31, audio_bit_rate=24_000)

    write_media_table(media(), options.out / stamps.MEDIA)
    rows = [row for stamp in chosen for row in stamp_rows(stamp)]
    rows += [row for clip in clips for row in moving_stamps.rows(clip)]
    rows += definition_rows(opened[dictionaries.WORDNET.name].root)
    rows += declaration_rows(opened[udhr.PACKAGE.name].root)
    # By hash, so that the first rows of a split are a fair sample of it.
    rows = sorted(counts.watch(rows), key=lambda row: fraction("row", row.id))
    for split in SPLITS:
        write_shards([row for row in rows if row.split == split], options.out, split, progress=options.progress)

    train_bpe(training_texts(rows), VOCABULARY).save(options.out / "tokenizer.json")
    spoken = [row for row in rows if row.task in ("asr", "s2tt")]
    train_bpe(dict.fromkeys(training_texts(spoken)), SPEECH_VOCABULARY).save(options.out / SPEECH_TOKENIZER)
    write_text(options.out / "NOTICE.md", notice(opened, counts))
    shutil.copytree(LICENCES, options.out / "licences", dirs_exist_ok=True)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    if size > LIMIT_BYTES:
        raise ValueError(
            f"{options.out} has {size:,} bytes, over {LIMIT_BYTES:,}; lower --stamps, --objects or --clips"
        )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stamps", type=int, default=360, help="how many stamps (default 360)")
    parser.add_argument("--objects", type=int, default=60, help="how many of the trained stamps move (default 60)")
    parser.add_argument("--clips", type=int, default=14, help="clips per moving stamp (default 14)")


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name="pack",
        description=__doc__ or "",
        packages=[stamps.PACKAGE, dictionaries.WORDNET, udhr.PACKAGE],
        build=_build,
        add_options=_add_options,
        default_out="omnitrain/pack",
    )


if __name__ == "__main__":
    sys.exit(main())

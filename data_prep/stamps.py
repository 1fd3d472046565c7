"""Tux Paint stamps: ~950 pictures, each with captions in up to 77 languages, volunteers' recordings and sound effects.

    python -m data_prep.stamps --out data/stamps

A stamp is `NAME.png` or `NAME.svg` with `NAME.txt` (first line English, then lines ``xx.utf8=caption``), recordings
of the caption `NAME_desc_xx.ogg` (English: `NAME_desc.ogg`) and an effect `NAME.ogg`. Each *cell* (concept, input
modality and language, output language) becomes one row; media are kept once, in `media.parquet`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import ModuleType

from PIL import Image

from data_prep.edit import SPEECH_RATE, check_heard, on_white, to_webp
from data_prep.fetch import Opened, Package
from data_prep.job import Counts, add_without, read_misfits, run
from data_prep.prompts import LANGUAGE_NAMES, ask, prompt
from data_prep.splits import Sides, cell_split, concept_is_heldout, concept_key, fraction
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import BadSample, Sample, Segment
from omnitrain.data.shards import write_media_table, write_shards

PACKAGE = Package(name="tuxpaint-stamps-default", manager="debian", licence="GPL-2.0-only")
MEDIA = "media.parquet"

MAIN_LANGUAGES = ("en", "fr", "es", "ca", "ru", "de", "it", "pt", "ja", "zh", "el", "uk", "ro")
"""Languages between which every pair is a row; the others are paired with English only."""

_LOCALES = {"zh_CN": "zh", "zh_TW": "zh-Hant", "sr@latin": "sr-Latn", "ca@valencia": "ca-valencia"}
_RECORDING = re.compile(r"^(?P<stem>.+)_desc(?:_(?P<locale>[a-z]{2,3}(?:_[A-Z]{2})?))?(?:\.ogg)?$")
_LOCALE_SUFFIX = re.compile(r"_[a-z]{2,3}(_[A-Za-z]{2})?$")


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """One stamp. `id` is its path in the collection; `captions` and `recordings` are by BCP 47 language."""

    id: str
    picture: Path
    captions: dict[str, str]
    recordings: dict[str, Path] = field(default_factory=dict)
    effect: Path | None = None

    @property
    def concept(self) -> str:
        return concept_key(self.captions["en"])


def language_of(locale: str) -> str:
    """BCP 47 code of a POSIX locale name: ``"pt_BR"`` -> ``"pt-BR"``."""
    return _LOCALES.get(locale, locale.replace("_", "-"))


def read_captions(text: str) -> dict[str, str]:
    """The captions in a stamp's `.txt` file, by language. Regional English equal to the first line is left out."""
    lines = [line.strip() for line in text.split("\n")]
    captions = {"en": lines[0]}
    for line in lines[1:]:
        locale, equals, caption = line.partition(".utf8=")
        caption = caption.strip()
        if equals and caption and "\ufffd" not in caption and language_of(locale) in LANGUAGE_NAMES:
            captions[language_of(locale)] = caption
    return {language: caption for language, caption in captions.items() if caption}


def read_stamps(root: Path) -> list[Stamp]:
    """All stamps with a picture and an English caption below `root` (any folder around the `stamps` folder), by id.

    Raises:
        FileNotFoundError: there is no stamp below `root`.
    """
    folder = next((path for path in sorted(root.rglob("stamps")) if any(path.rglob("*.txt"))), root)
    recordings: dict[str, dict[str, Path]] = {}
    effects: dict[str, Path] = {}
    spoken: set[str] = set()
    for path in sorted([*folder.rglob("*.ogg"), *folder.rglob("*.wav")]):
        stem = str(path.relative_to(folder).with_suffix(""))
        if match := _RECORDING.match(stem):
            recordings.setdefault(match["stem"], {})[language_of(match["locale"] or "en")] = path
        elif folder.joinpath(stem + ".txt").is_file():
            effects[stem] = path
        elif match := _LOCALE_SUFFIX.search(stem):
            spoken.add(stem[: match.start()])  # a number said in several languages: speech, no sound effect
    stamps = []
    for path in sorted(folder.rglob("*.txt")):
        stem = str(path.relative_to(folder).with_suffix(""))
        pictures = [path.with_suffix(suffix) for suffix in (".png", ".svg") if path.with_suffix(suffix).is_file()]
        captions = read_captions(path.read_bytes().decode("utf-8", errors="replace"))
        if not pictures or "en" not in captions:
            continue
        is_speech = stem in spoken or stem.startswith(("symbols/alphabets", "seasonal/hanukkah"))
        stamps.append(
            Stamp(
                id=stem,
                picture=pictures[0],
                captions=captions,
                recordings={
                    language: file for language, file in recordings.get(stem, {}).items() if language in captions
                },
                effect=None if is_speech else effects.get(stem),
            )
        )
    if not stamps:
        raise FileNotFoundError(f"no stamps (NAME.txt beside NAME.png or NAME.svg) below {root}")
    return stamps


def open_picture(path: Path, size: int) -> Image.Image:
    """A stamp's picture, RGBA. SVG is drawn with its longer side at `size` pixels.

    Raises:
        ValueError: a picture that cannot be drawn.
        RuntimeError: an SVG where `cairosvg` or the cairo library is missing.
    """
    try:
        if path.suffix == ".svg":
            cairosvg = _svg_library()
            svg = path.read_bytes()
            probe = Image.open(BytesIO(cairosvg.svg2png(bytestring=svg, output_width=64)))
            wide = probe.width >= probe.height
            drawn = cairosvg.svg2png(bytestring=svg, **({"output_width": size} if wide else {"output_height": size}))
            return Image.open(BytesIO(drawn)).convert("RGBA")
        with Image.open(path) as picture:
            return picture.convert("RGBA")
    except RuntimeError:  # without the library no SVG can be drawn: stop
        raise
    except Exception as error:  # the SVG library raises whatever its parser met
        raise ValueError(f"{path.name} cannot be drawn ({type(error).__name__}: {error})") from error


def _svg_library() -> ModuleType:
    """The `cairosvg` module; RuntimeError that says what to install where it does not load."""
    try:
        import cairosvg
    except (ImportError, OSError) as error:  # OSError: the package is there, the C library is not
        raise RuntimeError(
            "stamps drawn as SVG need cairosvg and the cairo library: `pip install omnitrain[prep]`, and libcairo2 "
            "from the system's packages"
        ) from error
    return cairosvg


# -------------------------------------------------------------------------------------------------- cells -> samples


def sample(stamp: Stamp, task: str, given: str, wanted: str, *, few: Mapping[str, int] | None = None) -> Sample:
    """The row of one cell.

    Args:
        task: ``caption``, ``asr``, ``s2tt``, ``t2tt`` or ``sound``.
        given: language of the input; empty for pictures and effects.
        wanted: language of the answer.
        few: see `prompts.prompt`.
    """
    modality = {"caption": "image", "asr": "audio", "s2tt": "audio", "t2tt": "text", "sound": "sound"}[task]
    given_key = f"{modality}:{given}" if given else modality
    sample_id = f"stamps/{stamp.id}/{given_key}>{wanted}"
    medium = {
        "image": Segment(type="image", path=f"{MEDIA}#image/{stamp.id}"),
        "audio": Segment(type="audio", path=f"{MEDIA}#speech/{stamp.id}/{given}"),
        "sound": Segment(type="audio", path=f"{MEDIA}#sound/{stamp.id}"),
        "text": None,
    }[modality]
    text = stamp.captions[given] if task == "t2tt" else ""
    question = prompt(task, sample_id, language=wanted, given=given, text=text, few=few)
    return Sample(
        id=sample_id,
        source="stamps",
        messages=ask(sample_id, question, stamp.captions[wanted], medium),
        split=cell_split(stamp.concept, given_key, wanted),
        task=task,
        licence=PACKAGE.licence,
        languages=(given, wanted) if given else (wanted,),
        concept=stamp.concept,
        meta={"stamp": stamp.id},
    )


def cells(stamp: Stamp, main: Sequence[str] = MAIN_LANGUAGES) -> Iterator[tuple[str, str, str]]:
    """Every (task, input language, output language) that this stamp has a row for."""
    captions = stamp.captions
    main_here = [language for language in main if language in captions]
    for language in sorted(captions):
        yield "caption", "", language
    for spoken in sorted(stamp.recordings):
        yield "asr", spoken, spoken
        for language in main_here:
            if language != spoken:
                yield "s2tt", spoken, language
    for given in main_here:
        for wanted in main_here:
            if given != wanted:
                yield "t2tt", given, wanted
    for other in sorted(set(captions) - set(main_here)):
        if captions[other] != captions["en"]:
            yield "t2tt", "en", other
            yield "t2tt", other, "en"
    if stamp.effect is not None:
        for language in main_here:
            yield "sound", "", language


# ----------------------------------------------------------------------------------------------------------- script


def usable(
    stamps: Iterable[Stamp], counts: Counts, shortest: float = 0.2, misfits: frozenset[str] = frozenset()
) -> Iterator[Stamp]:
    """The stamps without recordings and effects that do not decode, are silent or shorter than `shortest` seconds, and
    without the recordings that `misfits` lists."""
    for stamp in stamps:
        good: dict[str, Path] = {}
        effect = stamp.effect
        for language, file in [*stamp.recordings.items(), ("effect", effect)]:
            if file is None:
                continue
            if f"speech/{stamp.id}/{language}" in misfits:
                counts.left_out["recordings: listed by --without"] += 1
                continue
            try:
                check_heard(decode_audio(file.read_bytes(), SPEECH_RATE), SPEECH_RATE, file, shortest)
            except BadSample as error:
                counts.left_out[f"recordings: {error.reason}"] += 1
                effect = None if file is effect else effect
            else:
                good[language] = file
        good.pop("effect", None)
        yield Stamp(id=stamp.id, picture=stamp.picture, captions=stamp.captions, recordings=good, effect=effect)


def stored(file: Path, rate: int | None) -> bytes:
    """The sound file as it is, or as FLAC with `rate` samples per second. Raises BadSample."""
    data = file.read_bytes()
    return data if rate is None else encode_audio(decode_audio(data, rate), rate, "flac")


def _side(stamp: Stamp) -> str:
    """A concept is held out whole or not at all; its cells are not, so its sentences stand on the trained side."""
    return "heldout_concept" if concept_is_heldout(stamp.concept) else "train"


def consistent(stamps: Sequence[Stamp], counts: Counts) -> Iterator[tuple[Stamp, str, str, str]]:
    """`cells` of all, without those of trained concepts whose caption is that of a held-out one in that language ("a
    taxi" and "a cab" are both "un taxi")."""
    sides = Sides()
    for stamp in stamps:
        sides.add(_side(stamp), stamp.captions.values())
    for stamp in stamps:
        for task, given, wanted in cells(stamp):
            captions = [stamp.captions[language] for language in (given, wanted) if language]
            if sides.admit(_side(stamp), captions):
                yield stamp, task, given, wanted
            else:
                counts.left_out["rows: a sentence that stands on another side of the split"] += 1


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    misfits = read_misfits(options.without)
    kept: list[Stamp] = []

    def media() -> Iterator[tuple[str, bytes]]:
        found = read_stamps(opened[PACKAGE.name].root)
        for stamp in track(found, description="pictures and recordings", disable=not options.progress):
            try:
                picture = to_webp(on_white(open_picture(stamp.picture, options.size), options.size))
            except ValueError:
                counts.left_out["stamps: the picture cannot be drawn"] += 1
                continue
            (stamp,) = usable([stamp], counts, misfits=misfits)
            kept.append(stamp)
            yield f"image/{stamp.id}", picture
            for language, file in stamp.recordings.items():
                yield f"speech/{stamp.id}/{language}", stored(file, options.flac)
            if stamp.effect is not None:
                yield f"sound/{stamp.id}", stored(stamp.effect, options.flac)

    write_media_table(media(), options.out / MEDIA)
    wanted_cells = [
        (stamp, task, given, wanted)
        for stamp, task, given, wanted in consistent(kept, counts)
        if not options.languages or {given or wanted, wanted} <= set(options.languages)
    ]
    # By hash, so that the first rows of a split are a fair sample of it.
    wanted_cells.sort(key=lambda cell: fraction("row", cell[0].id, *cell[1:]))
    rows = (sample(*cell) for cell in wanted_cells)
    write_shards(counts.watch(rows), options.out, "stamps", rows_per_shard=100_000, progress=options.progress)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=256, help="longer side of the pictures, pixels (default 256)")
    parser.add_argument("--languages", nargs="*", default=[], help="keep only rows between these languages")
    parser.add_argument(
        "--flac",
        type=int,
        metavar="RATE",
        help="keep recordings and effects as FLAC with RATE samples per second (16000: of about the same size as the "
        "files themselves, and read fifteen times as fast)",
    )
    add_without(parser)


def main(argv: list[str] | None = None) -> int:
    return run(
        argv, name="stamps", description=__doc__ or "", packages=[PACKAGE], build=_build, add_options=_add_options
    )


if __name__ == "__main__":
    sys.exit(main())

"""Emoji as pictures (Noto Color Emoji) with their names and keywords in more than a hundred languages (Unicode CLDR).

    python -m data_prep.emoji --out data/emoji

Only emoji of one code point: the others are mostly variants (skin tones, flags). The concept is the English name,
under the same key as a stamp's caption.
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_prep.edit import on_square, to_webp
from data_prep.fetch import Opened, Package
from data_prep.job import Counts, run
from data_prep.prompts import LANGUAGE_NAMES, ask, prompt
from data_prep.splits import cell_split, concept_key, fraction
from data_prep.stamps import MEDIA
from omnitrain.data.sample import Sample, Segment
from omnitrain.data.shards import write_media_table, write_shards

FONT = Package(name="fonts-noto-color-emoji", manager="debian", licence="OFL-1.1")
NAMES = Package(name="unicode-cldr-core", manager="debian", licence="Unicode-DFS-2016")
BITMAP_SIZE = 109
"""The one size, in points, of the font's bitmaps."""


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji with its `names` and `keywords` by BCP 47 language."""

    character: str
    names: dict[str, str]
    keywords: dict[str, str]

    @property
    def id(self) -> str:
        return f"{ord(self.character):x}"

    @property
    def concept(self) -> str:
        return concept_key(self.names["en"])


def read_annotations(root: Path) -> list[Emoji]:
    """Every annotated character of one code point with an English name, by code point.

    Raises:
        FileNotFoundError: no `annotations/en.xml` below `root`.
    """
    folder = next((path.parent for path in sorted(root.rglob("annotations/en.xml"))), None)
    if folder is None:
        raise FileNotFoundError(f"no annotations/en.xml below {root}; --source must be {NAMES.name}, or its folder")
    names: dict[str, dict[str, str]] = {}
    keywords: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*.xml")):
        language = file.stem.replace("_", "-")
        if language not in LANGUAGE_NAMES:
            continue
        for node in ElementTree.parse(file).iter("annotation"):
            character, text = node.get("cp", ""), (node.text or "").strip()
            if len(character) != 1 or not text or text == "↑↑↑":  # the arrows mean: as in the parent locale
                continue
            table = names if node.get("type") == "tts" else keywords
            table.setdefault(character, {})[language] = text.replace(" | ", ", ")
    return [
        Emoji(character=character, names=names[character], keywords=keywords.get(character, {}))
        for character in sorted(names)
        if "en" in names[character]
    ]


def find_font(root: Path) -> ImageFont.FreeTypeFont:
    """The colour font below `root` (or the font file itself)."""
    files = [root] if root.is_file() else sorted(root.rglob("NotoColorEmoji.ttf"))
    if not files:
        raise FileNotFoundError(f"no NotoColorEmoji.ttf below {root}; --source must be {FONT.name}, or its folder")
    return ImageFont.truetype(str(files[0]), BITMAP_SIZE)


def draw(character: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image | None:
    """The emoji on a white square, or None where the font shows nothing."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    canvas = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(canvas).text((-left, -top), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        return None
    return on_square(canvas.crop(box), size)


def rows(emoji: Emoji) -> Iterator[Sample]:
    """A caption per language, and the keywords where there are at least two."""
    for task, table in (("caption", emoji.names), ("keywords", emoji.keywords)):
        for language, answer in sorted(table.items()):
            if task == "keywords" and "," not in answer:
                continue
            sample_id = f"emoji/{emoji.id}/{task}>{language}"
            medium = Segment(type="image", path=f"{MEDIA}#{emoji.id}")
            yield Sample(
                id=sample_id,
                source="emoji",
                messages=ask(sample_id, prompt(task, sample_id, language=language), answer, medium),
                split=cell_split(emoji.concept, "image", language),
                task=task,
                licence=f"{FONT.licence} AND {NAMES.licence}",
                languages=(language,),
                concept=emoji.concept,
                meta={"emoji": re.sub(r"\s", "", emoji.character)},
            )


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    from rich.progress import track

    font = find_font(opened[FONT.name].root)
    drawn: list[Emoji] = []

    def media() -> Iterator[tuple[str, bytes]]:
        found = read_annotations(opened[NAMES.name].root)
        for emoji in track(found, description="drawing emoji", disable=not options.progress):
            picture = draw(emoji.character, font, options.size)
            if picture is None:
                counts.left_out["annotated characters without a picture"] += 1
            else:
                drawn.append(emoji)
                yield emoji.id, to_webp(picture)

    write_media_table(media(), options.out / MEDIA)
    # By hash, so that the first rows of a split are a fair sample of it.
    samples = (row for emoji in sorted(drawn, key=lambda e: fraction("row", e.id)) for row in rows(emoji))
    write_shards(counts.watch(samples), options.out, "emoji", rows_per_shard=100_000, progress=options.progress)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=128, help="side of the pictures, pixels (default 128)")


def main(argv: list[str] | None = None) -> int:
    return run(
        argv,
        name="emoji",
        description=__doc__ or "",
        packages=[FONT, NAMES],
        build=_build,
        add_options=_add_options,
    )


if __name__ == "__main__":
    sys.exit(main())

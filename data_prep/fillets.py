"""Fish Fillets: acted dialogue of a game in Czech and Dutch, each line with its text in about a dozen languages.

    python -m data_prep.fillets --out data/fillets --beside data/stamps data/asterisk

`script/LEVEL/dialogs_xx.lua` calls ``dialogId("ID", "FONT", "English")`` and ``dialogStr("the line in xx")``; the sound
of a line is `sound/LEVEL/xx/ID.ogg`. Each recording becomes a transcript and a translation into each other language.

The font says which character speaks (`font_small` and `font_big` are the two fish), which is what `meta["voice"]`
holds: ``cs/small``. The packages do not say which characters share an actor.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from data_prep.edit import SPEECH_RATE
from data_prep.fetch import Opened, Package
from data_prep.job import Counts, run
from data_prep.spoken_lines import Collection, Line, add_options, write, write_notice
from omnitrain.data.media import decode_audio

LICENCE = "GPL-2.0-only"
SPOKEN = ("cs", "nl")
TEXTS = Package(name="fillets-ng-data", manager="debian", licence=LICENCE)
RECORDINGS = {
    language: Package(name=f"fillets-ng-data-{language}", manager="debian", licence=LICENCE) for language in SPOKEN
}

NOTICE = """Dialogues of the game Fish Fillets - Next Generation and their recordings, copyright ALTAR interactive, Ivo
Danihelka, Pavel Danihelka and the translators that the licence files name. This material is free software: you can
redistribute and modify it under the terms of the GNU General Public License, version 2. There is no warranty."""

_FONT = "font_"
_STEPS = 1_000_000  # of Lua; a file of dialogues takes some thousands
_MEMORY = 64 << 20
_COLLECT = b"""
local code, steps = ...
if string.byte(code) == 27 then error("it is compiled Lua, not text", 0) end
local chunk, problem = loadstring(code, "=line")
if not chunk then error(problem, 0) end
local calls = {}
setfenv(chunk, {
    dialogId = function(id, font, english) calls[#calls + 1] = {id = id, font = font, english = english} end,
    dialogStr = function(text)
        if #calls == 0 then error("dialogStr stands before any dialogId", 0) end
        calls[#calls].text = text
    end,
})
debug.sethook(function() error("it does not end", 0) end, "", steps)
local done, failure = pcall(chunk)
debug.sethook()
if not done then error(failure, 0) end
return calls
"""


@dataclass(frozen=True, kw_only=True)
class Dialog:
    """One call of `dialogId`, and the text of the `dialogStr` after it (empty where none follows)."""

    id: str
    font: str = ""
    english: str = ""
    text: str = ""


def _lua() -> ModuleType:
    """Lua 5.1, for which the game's scripts are written; RuntimeError that says what to install."""
    try:
        from lupa import lua51
    except ImportError as error:
        raise RuntimeError("reading the dialogues needs a Lua interpreter: `pip install omnitrain[prep]`") from error
    return lua51


def read_dialogs(code: bytes) -> list[Dialog]:
    """The dialogues of a `dialogs_xx.lua` file, in order.

    Lua itself reads it, so escapes, long brackets, comments and concatenations mean what they mean in the game. The
    file finds `dialogId` and `dialogStr` there and nothing else, and its steps and memory are limited.

    Raises:
        ValueError: it is no Lua, calls anything else, does not end, or its text is not UTF-8.
        RuntimeError: `lupa` is not installed.
    """
    lua51 = _lua()
    lua = lua51.LuaRuntime(encoding=None, register_eval=False, register_builtins=False, max_memory=_MEMORY)
    try:
        calls = lua.execute(_COLLECT, code, _STEPS)
        return [
            Dialog(**{name.decode(): text.decode() for name, text in call.items() if isinstance(text, bytes)})
            for call in calls.values()
        ]
    except (lua51.LuaError, UnicodeDecodeError, TypeError) as error:  # TypeError: without an id
        raise ValueError(f"no file of dialogues: {error}") from error


def read_texts(root: Path, counts: Counts) -> tuple[dict[tuple[str, str], dict[str, str]], dict[tuple[str, str], str]]:
    """Texts by language, and the character that speaks, of each dialogue (level, id) below `root`.

    Files of regional variants (`dialogs_de_CH.lua`) are not read. An id with two different texts in one language has
    none there.

    Raises:
        FileNotFoundError: there are no dialogues.
    """
    texts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    characters: dict[tuple[str, str], str] = {}
    files = sorted(root.rglob("*dialogs_*.lua"))
    if not files:
        raise FileNotFoundError(f"no script/LEVEL/dialogs_xx.lua below {root}")
    for file in files:
        language = file.stem.rpartition("dialogs_")[2]
        if "_" in language:
            continue
        try:
            dialogs = read_dialogs(file.read_bytes())
        except ValueError:
            counts.left_out["files of dialogues: damaged"] += 1
            continue
        for dialog in dialogs:
            key = (file.parent.name, dialog.id)
            text = " ".join((dialog.text or (dialog.english if language == "en" else "")).split())
            if text and texts[key].setdefault(language, text) != text:
                counts.left_out["texts: two for one dialogue"] += 1
                texts[key][language] = ""
            if dialog.font.startswith(_FONT):
                characters.setdefault(key, dialog.font.removeprefix(_FONT))
    return texts, characters


def read_recordings(root: Path, language: str) -> dict[tuple[str, str], Path]:
    """The recordings of each dialogue (level, id) below `root`: `sound/LEVEL/.../xx/ID.ogg`.

    Raises:
        FileNotFoundError: there are none.
    """
    folder = next((path for path in sorted(root.rglob("sound")) if path.is_dir()), root)
    found = {}
    for file in sorted(folder.rglob("*.ogg")):
        parts = file.relative_to(folder).parts
        if len(parts) > 2 and parts[-2] == language:
            found[parts[0], file.stem] = file
    if not found:
        raise FileNotFoundError(f"no sound/LEVEL/{language}/ID.ogg below {root}")
    return found


def read_lines(opened: dict[str, Opened], counts: Counts) -> Iterator[Line]:
    """The dialogues that somebody speaks. Raises FileNotFoundError: texts or recordings are missing."""
    texts, characters = read_texts(opened[TEXTS.name].root, counts)
    recordings: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    for language, package in RECORDINGS.items():
        if package.name in opened:
            for key, file in read_recordings(opened[package.name].root, language).items():
                recordings[key][language] = file
    for key in sorted(recordings):
        voices = {}
        if key in characters:
            voices = {language: f"{language}/{characters[key]}" for language in recordings[key]}
        yield Line(id="/".join(key), texts=texts.get(key, {}), recordings=recordings[key], voices=voices)


def decode(file: Path) -> tuple[np.ndarray, int]:
    """A recording's samples and rate. Raises BadSample."""
    return decode_audio(file.read_bytes(), SPEECH_RATE), SPEECH_RATE


def _packages(options: argparse.Namespace) -> list[Package]:
    return [TEXTS, *(RECORDINGS[language] for language in dict.fromkeys(options.languages))]


def _build(opened: dict[str, Opened], options: argparse.Namespace, counts: Counts) -> None:
    lines = list(read_lines(opened, counts))
    known = {voice for line in lines for voice in line.voices.values()}
    if unknown := set(options.heldout_voices) - known:
        raise ValueError(f"--heldout-voices {' '.join(sorted(unknown))}: nobody; there are {', '.join(sorted(known))}")
    collection = Collection(
        source="fillets",
        licences=dict.fromkeys(SPOKEN, LICENCE),
        heldout_voices=frozenset(options.heldout_voices),
    )
    write(lines, collection, decode, options, counts)
    write_notice(options.out, opened, "Fish Fillets", NOTICE)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--languages", nargs="+", choices=SPOKEN, default=list(SPOKEN), help="spoken (default: cs nl)")
    parser.add_argument(
        "--heldout-voices",
        nargs="*",
        default=[],
        metavar="VOICE",
        help="lines of these voices (as cs/small nl/small) become the split heldout_cell",
    )
    add_options(parser)


def main(argv: list[str] | None = None) -> int:
    return run(
        argv, name="fillets", description=__doc__ or "", packages=_packages, build=_build, add_options=_add_options
    )


if __name__ == "__main__":
    sys.exit(main())

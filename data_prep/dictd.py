"""Dictionaries in dictd's format: `NAME.index` (headword, offset, length in base 64) and `NAME.dict[.dz]`."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def number(text: str) -> int:
    """A number in dictd's base 64: ``"Bl"`` -> 101."""
    value = 0
    for character in text:
        value = value * 64 + _DIGITS[character]
    return value


def find(root: Path, name: str) -> Path:
    """The index of dictionary `name` below `root`.

    Raises:
        FileNotFoundError: there is none.
    """
    if found := sorted(root.rglob(f"{name}.index")):
        return found[0]
    raise FileNotFoundError(f"no {name}.index below {root}; --source must be the package, or a folder with its files")


def entries(index: Path) -> Iterator[tuple[str, str]]:
    """(headword, entry) in the index's order, each entry once; the database's own information is left out.

    Raises:
        ValueError: a line of the index that is not three columns, or an entry past the end of the data.
    """
    data_file = next((f for f in (index.with_suffix(".dict.dz"), index.with_suffix(".dict")) if f.is_file()), None)
    if data_file is None:
        raise FileNotFoundError(f"{index} has no {index.stem}.dict.dz or {index.stem}.dict beside it")
    raw = data_file.read_bytes()
    data = gzip.decompress(raw) if data_file.suffix == ".dz" else raw
    seen: set[tuple[int, int]] = set()
    for row, line in enumerate(index.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line or line.startswith("00-database") or line.startswith("00database"):
            continue
        columns = line.split("\t")
        if len(columns) < 3:
            raise ValueError(f"{index}:{row}: {line!r} is not headword, offset and length; fetch the package again")
        place = (number(columns[1]), number(columns[2]))
        if place in seen:
            continue
        seen.add(place)
        if sum(place) > len(data):
            raise ValueError(f"{index}:{row}: the entry of {columns[0]!r} lies past the end of {data_file.name}")
        yield columns[0], data[place[0] : sum(place)].decode("utf-8", errors="replace")


def unwrap(text: str) -> str:
    """Lines of one paragraph joined: dictd files are wrapped at 70 columns, also after a word's own hyphen."""
    return re.sub(r"\s+", " ", re.sub(r"(?<=\w)-\n\s+", "-", text)).strip()

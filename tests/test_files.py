"""Files are whole or not there, and names from strangers say nothing but themselves on a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnitrain.files import append_line, atomic, printable, write_json, write_text

HOSTILE = "a\x1b[2J\x9b31m\r\n\x07\x7f\u202egnp.exe\u2066\u2028\udcff"


def test_printable_escapes_what_is_not_text() -> None:
    assert printable(HOSTILE) == r"a\x1b[2J\x9b31m\r\n\x07\x7f\u202egnp.exe\u2066\u2028\udcff"
    plain = "Größe = 3, 日本語 עברית हिन्दी 👩‍🚀 [bold]"
    assert printable(plain) == plain
    assert printable("two\nlines\t\x1b", keep="\n\t") == "two\nlines\t\\x1b"
    assert printable(Path("a\tb")) == r"a\tb"


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic(path) as partial:
            partial.write_text("new")
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]
    write_text(path, "newer", replace=False)
    assert path.read_text() == "old"


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic(tmp_path / "folder") as partial:
            (partial / "inner").mkdir(parents=True)
            (partial / "inner" / content).write_text(content)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "folder",
        "folder/inner",
        "folder/inner/second",
    ]


def test_lines_and_json(tmp_path: Path) -> None:
    for word in ("one", "zwei ü"):
        append_line(tmp_path / "logs" / "log.jsonl", word)
    assert (tmp_path / "logs" / "log.jsonl").read_text(encoding="utf-8") == "one\nzwei ü\n"
    write_json(tmp_path / "a.json", {"path": tmp_path, "ü": 1.5})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"path": str(tmp_path), "ü": 1.5}

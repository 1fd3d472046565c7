from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from data_prep import fillets
from data_prep.fillets import Dialog, read_dialogs
from omnitrain.data.shards import SampleSource
from tests.data_prep.conftest import DIALOGS, as_sources


def run(trees: dict[str, Path], out: Path, *more: str) -> int:
    return fillets.main(["--out", str(out), "--no-progress", *more, *as_sources(trees)])


def test_lua_strings_mean_what_they_mean_in_lua() -> None:
    texts = {dialog.id: dialog for dialog in read_dialogs(DIALOGS["cs"].encode())}
    assert texts["a-m-dog"].text == 'Řekl: "pes"\n'
    assert texts["a-v-wait"].text == "Počkej na mně!"
    assert texts["a-v-wait"].english == "Wait for me!"
    assert texts["a-v-silent"] == Dialog(id="a-v-silent", font="font_big", english="Not translated.", text="")
    assert read_dialogs(b"dialogId(\"x\")dialogStr([==[a]]b\n]==]..'\\'')") == [Dialog(id="x", text="a]]b\n'")]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (b"dialogId('a'", "no file of dialogues"),
        (b"os.exit(1)", "os"),
        (b"dialogStr('before')", "before any dialogId"),
        (b"while true do end", "does not end"),
        (b"local s = 'x' while true do s = s .. s end", "no file of dialogues"),
        (b"dialogId()", "no file of dialogues"),
        (b"dialogId('a') dialogStr('\\255')", "utf-8"),
        (b"\x1bLua", "compiled"),
        (b"getmetatable('').__index.dump(print)", "getmetatable"),
    ],
)
def test_a_file_can_do_nothing_but_name_dialogues(code: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_dialogs(code)


def test_without_lua_it_says_what_to_install(
    fillets_trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lupa", None)
    assert run(fillets_trees, tmp_path / "out") == 1
    assert "omnitrain[prep]" in capsys.readouterr().out


def test_the_script(fillets_trees: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(fillets_trees, out) == 0
    rows = {row.id: row for row in SampleSource(out)}
    row = rows["fillets/level/a-v-wait/audio:cs>nl"]
    assert (row.task, row.languages, row.reference) == ("s2tt", ("cs", "nl"), "Wacht op mij!")
    assert row.meta == {"line": "level/a-v-wait", "voice": "cs/big"}
    assert rows["fillets/level/a-v-wait/audio:nl>en"].reference == "Wait for me!"
    assert rows["fillets/level/a-m-dog/audio:cs>cs"].reference == 'Řekl: "pes"'
    assert rows["fillets/share/j1/audio:cs>cs"].meta["voice"] == "cs/statue"
    assert not [name for name in rows if "de-CH" in name or "de_CH" in name or "silent" in name]
    left_out = json.loads((out / "source.json").read_text())["counts"]["left_out"]
    assert left_out["files of dialogues: damaged"] == 1
    assert left_out["recordings: without a text"] == 2  # not translated; broken
    assert {row.licence for row in rows.values()} == {"GPL-2.0-only"}


def test_a_voice_held_out(fillets_trees: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(fillets_trees, out, "--heldout-voices", "cs/statue") == 0
    splits = {row.meta["voice"]: row.split for row in SampleSource(out) if row.split != "heldout_concept"}
    assert splits["cs/statue"] == "heldout_cell"
    assert splits["cs/big"] != "heldout_cell"
    assert run(fillets_trees, out, "--heldout-voices", "cs/shark") == 1
    assert "there are cs/big" in capsys.readouterr().out

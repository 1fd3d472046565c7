from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_prep import asterisk
from data_prep.asterisk import decode_g722, read_list, what_is_said
from data_prep.job import Counts
from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.data.sample import BadSample
from omnitrain.data.shards import SampleSource
from tests.data_prep.conftest import as_sources, g722_of, tone


def run(trees: dict[str, Path], out: Path, *more: str) -> int:
    arguments = ["--out", str(out), "--no-progress", "--languages", "en", "fr", "it", *more]
    return asterisk.main(arguments + as_sources(trees))


def test_g722_is_what_was_encoded() -> None:
    wave = tone(440)
    heard = decode_g722(g722_of(wave))
    assert abs(len(heard) - len(wave)) < 400
    spectra = [np.abs(np.fft.rfft(x[5000:11000])) for x in (wave, heard)]
    assert np.argmax(spectra[0]) == np.argmax(spectra[1])
    assert abs(np.abs(heard).max() - 0.5) < 0.05
    with pytest.raises(BadSample):
        decode_g722(b"")


@pytest.mark.parametrize(
    ("text", "said", "reason"),
    [
        ("Please wait:  now", "Please wait: now", ""),
        ("[ascending tones]", "", "a note alone"),
        ("<beep decending>", "", "a note alone"),
        ("at [@]", "at", ""),
        ("Punto [.]", "Punto", ""),
        ("[!] punto esclamativo", "punto esclamativo", ""),
        ('IAX (note: does not say "2")', "IAX", ""),
        ("Attendere. (un tono, ma non in questo file).", "Attendere.", ""),
        ("Il [suo] messaggio", "", "amid"),
        ("quitter (vraiment) maintenant", "", "amid"),
        ('... et raccrochez."', "... et raccrochez.", ""),
        ('say "dial" and "hangup"', 'say "dial" and "hangup"', ""),
        ("", "", "empty"),
        ("...", "", "empty"),
    ],
)
def test_notes_are_told_from_words(text: str, said: str, reason: str) -> None:
    counts = Counts()
    assert what_is_said(" ".join(text.split()), counts) == said
    assert len(counts.left_out) == bool(reason)
    assert all(reason in key for key in counts.left_out)


def test_a_list_is_read_line_by_line() -> None:
    counts = Counts()
    texts = read_list("\ufeff; comment\n\na/b-c: x: y\nd:  e \nd: e\nf: 1\nf: 2\n".encode(), counts)
    assert texts == {"a/b-c": "x: y", "d": "e"}
    assert counts.left_out == Counter({"texts: two for one recording": 1})
    with pytest.raises(ValueError, match="line 2"):
        read_list(b"a: b\nno colon here\n", Counts())


def test_the_script(asterisk_trees: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(asterisk_trees, out) == 0
    assert "CC-BY-SA-3.0" in capsys.readouterr().out
    source = SampleSource(out)
    rows = {row.id: row for row in source}
    row = rows["asterisk/vm-intro/audio:en>en"]
    assert row.reference == "Please wait: hold the line."
    assert (row.task, row.languages, row.meta["voice"]) == ("asr", ("en", "en"), "Allison")
    row = rows["asterisk/vm-intro/audio:en>fr"]
    assert (row.task, row.languages, row.reference) == ("s2tt", ("en", "fr"), "Patientez.")
    assert rows["asterisk/letters/at/audio:it>it"].reference == "a"
    assert rows["asterisk/letters/at/audio:it>it"].licence == "CC-BY-3.0"
    assert "asterisk/digits/0/audio:en>it" not in rows  # "zero" is no translation of "zero"
    assert "asterisk/digits/0/audio:en>fr" in rows
    assert not [name for name in rows if "beep" in name or "mine" in name or "twice" in name or "unlisted" in name]
    for row in source:
        (segment,) = [s for s in row.messages[0].segments if s.type == "audio"]
        assert len(decode_audio(source.media_bytes(segment), 16_000)) > 16_000
    assert (out / "NOTICE.md").read_text().count("CC-BY") >= 6
    assert (out / "licences/asterisk-core-sounds-en.txt").is_file()
    left_out = json.loads((out / "source.json").read_text())["counts"]["left_out"]
    assert left_out["texts: without a recording"] == 1
    assert left_out["recordings: without a text"] == 3 + 1 + 3  # unlisted; fr empty; en beep, mine, twice


def only(trees: dict[str, Path], language: str) -> dict[str, Path]:
    """The packages that this spoken language alone needs."""
    return {name: path for name, path in trees.items() if f"-{language}" in name or name.endswith("-en")}


def test_wav_is_kept_at_its_own_rate(asterisk_trees: dict[str, Path], tmp_path: Path) -> None:
    trees = {name.replace("g722", "wav"): path for name, path in only(asterisk_trees, "it").items()}
    for file in list(trees["asterisk-core-sounds-it-wav"].rglob("*.g722")):
        file.with_suffix(".wav").write_bytes(encode_audio(tone(300)[::2], 8_000, "wav"))
        file.unlink()
    arguments = ["--out", str(tmp_path / "out"), "--no-progress", "--languages", "it", "--format", "wav"]
    assert asterisk.main(arguments + as_sources(trees)) == 0
    source = SampleSource(tmp_path / "out")
    assert {row.id.rpartition("/")[0] for row in source} == {
        f"asterisk/{n}" for n in ("added", "digits/0", "letters/at")
    }
    (segment,) = [s for s in source[0].segments if s.type == "audio"]
    assert soundfile.info(io.BytesIO(source.media_bytes(segment))).samplerate == 8_000


def test_a_language_alone_has_the_same_splits(
    asterisk_trees: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(asterisk_trees, tmp_path / "all") == 0
    everything = {row.id: row for row in SampleSource(tmp_path / "all")}
    trees = only(asterisk_trees, "fr")
    arguments = ["--out", str(tmp_path / "out"), "--no-progress", "--languages", "fr", *as_sources(trees)]
    assert asterisk.main(arguments) == 0
    rows = {row.id: row for row in SampleSource(tmp_path / "out")}
    assert {row.languages for row in rows.values()} == {("fr", "fr"), ("fr", "en")}
    assert rows == {name: everything[name] for name in rows}
    for file in trees["asterisk-core-sounds-fr"].rglob("*.gz"):
        file.unlink()
    assert asterisk.main([*arguments, "--force"]) == 1
    assert "no core-sounds-fr.txt.gz" in " ".join(capsys.readouterr().out.split())

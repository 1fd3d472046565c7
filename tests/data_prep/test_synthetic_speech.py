"""Synthetic speech is marked as such, split by sentence and the same each time; the embedded pack is what it says."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

import omnitrain
from data_prep import speech_pack, synthetic_speech
from data_prep.fetch import fetch
from data_prep.splits import document_split
from data_prep.synthetic_speech import (
    ENGINES,
    NUMBERS,
    VOCABULARY,
    Engine,
    Studio,
    Voice,
    parse_voices,
    read_texts,
    sentences,
    word_errors,
)
from omnitrain.data.media import decode_audio
from omnitrain.data.sample import Sample
from omnitrain.data.shards import SampleSource

PACK = Path(omnitrain.__file__).parent / "pack_speech"
PACKAGES = Path("data/packages")

# A flite that hums: pitch by voice, a twentieth of a second a letter.
HUM = """#!{python}
import sys, wave, math, array
a = sys.argv[1:]
if a == ["-lv"]:
    print("Voices available: slt rms")
    sys.exit()
voice, text, file = a[a.index("-voice") + 1], a[a.index("-t") + 1], a[a.index("-o") + 1]
pitch = {{"slt": 200, "rms": 100}}[voice]
hum = [int(9000 * math.sin(6.2832 * pitch * t / 16000)) for t in range(800 * len(text))]
with wave.open(file, "wb") as out:
    out.setparams((1, 2, 16000, 0, "NONE", ""))
    out.writeframes(array.array("h", [0] * 8000 + hum + [0] * 8000).tobytes())
"""


@pytest.fixture
def hum(tmp_path: Path) -> Path:
    program = tmp_path / "bin" / "flite"
    program.parent.mkdir()
    program.write_text(HUM.format(python=sys.executable))
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def flite(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """The real engine: installed, or unpacked from the Debian packages in the cache of the scripts."""
    voices, cache = parse_voices("slt,rms"), tmp_path_factory.mktemp("packages")
    if program := shutil.which("flite"):
        opened = {"flite": fetch(ENGINES["flite"][0], cache, Path(program).parent)}
        return Studio(voices, opened, cache)
    if not all(any(PACKAGES.glob(f"{package.name}_*.deb")) for package in ENGINES["flite"]):
        pytest.skip(f"flite is neither installed nor in {PACKAGES} (`apt-get install flite`)")
    return Studio(voices, {package.name: fetch(package, PACKAGES) for package in ENGINES["flite"]}, PACKAGES)


def rows_of(folder: Path) -> list[Sample]:
    source = SampleSource(folder)
    return [source[i] for i in range(len(source))]


def test_sentences_are_different_short_and_in_the_same_order() -> None:
    first = [text for text, _ in zip(sentences(), range(3000), strict=False)]
    assert len(set(first)) == 3000
    assert first[:50] == [text for text, _ in zip(sentences(), range(50), strict=False)]
    assert {len(text.split()) for text in first} == {3, 4, 5, 6}
    assert {word for text in first for word in text.split()} == set(VOCABULARY)
    assert 40 <= len(VOCABULARY) <= 60
    splits = Counter(document_split(text) for text in first)
    assert set(splits) == {"train", "validation", "heldout_concept"}
    assert splits["heldout_concept"] > 100
    assert splits["validation"] > 80
    for text in first:  # "three doctors", never "three doctor"
        if number := set(text.split()) & set(NUMBERS):
            assert text.endswith("s"), (number, text)


def test_a_voice_is_of_an_engine() -> None:
    assert parse_voices("slt,espeak:de,slt") == [
        Voice(engine="flite", name="slt"),
        Voice(engine="espeak-ng", name="de"),
    ]
    assert [(v.key, v.language) for v in parse_voices("rms,espeak:fr-fr,espeak-ng:de")] == [
        ("rms", "en"),
        ("espeak-fr-fr", "fr"),
        ("espeak-de", "de"),
    ]
    with pytest.raises(ValueError, match="festival:kal"):
        Voice.parse("festival:kal")


def test_rows_are_marked_split_by_sentence_and_the_same_each_time(
    hum: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--flite", str(hum), "--sentences", "24", "--no-progress", "--cache", str(tmp_path / "cache")]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert synthetic_speech.main(["--out", str(out), *line]) == 0
    files = [{p.relative_to(o): p.read_bytes() for p in sorted(o.rglob("*")) if p.is_file()} for o in outs]
    assert files[0] == files[1]
    assert not [name for name, content in files[0].items() if str(tmp_path).encode() in content]

    rows = rows_of(outs[0])
    assert Counter(row.meta["voice"] for row in rows) == {"slt": 24, "rms": 24}
    by_concept: dict[str, set[str]] = {}
    for row in rows:
        (asked,), (spoken,) = row.messages[0].segments, row.messages[1].segments
        assert (row.task, row.licence, row.languages) == ("tts", "MIT-Festival", ("en",))
        assert row.meta["synthetic"] == "flite"
        assert row.source == f"synthetic_speech/{row.meta['voice']}"
        assert spoken.type == "speech"
        assert spoken.text == row.concept == row.reference
        assert row.concept in (asked.text or "")
        assert spoken.media is not None
        assert spoken.media[:4] == b"fLaC"
        wave = decode_audio(spoken.media, 24_000)
        assert len(wave) / 24_000 == pytest.approx(0.05 * len(row.concept) + 0.2, abs=0.05)
        assert abs(wave).max() == pytest.approx(0.7, abs=0.02)
        by_concept.setdefault(row.concept, set()).add(row.split)
    assert all(len(splits) == 1 for splits in by_concept.values())
    assert len({row.messages[0].segments[0].text.replace(row.concept, "") for row in rows}) == 8  # type: ignore[union-attr]

    notice = (outs[0] / "NOTICE.md").read_text()
    assert "synthetic" in notice
    assert "| slt | 24 |" in notice
    before = (outs[0] / "source.json").stat().st_mtime_ns
    capsys.readouterr()
    assert synthetic_speech.main(["--out", str(outs[0]), *line]) == 0
    assert "is complete" in capsys.readouterr().out
    assert (outs[0] / "source.json").stat().st_mtime_ns == before


def test_a_share_of_the_sentences_and_texts_of_ones_own(hum: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Guten  Tag.\n\nAuf Wiedersehen.\nGuten Tag.\n", encoding="utf-8")
    assert read_texts(str(texts)) == ["Guten Tag.", "Auf Wiedersehen."]
    line = ["--flite", str(hum), "--no-progress", "--voices", "slt"]
    assert synthetic_speech.main(["--out", str(tmp_path / "own"), *line, "--texts", str(texts)]) == 0
    assert {row.concept for row in rows_of(tmp_path / "own")} == {"Guten Tag.", "Auf Wiedersehen."}
    share = ["--sentences", "60", "--share", "0.5"]
    assert synthetic_speech.main(["--out", str(tmp_path / "some"), *line, *share]) == 0
    assert 15 < len(rows_of(tmp_path / "some")) < 45


def test_errors_say_what_to_do(hum: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--out", str(tmp_path / "out"), "--flite", str(hum), "--no-progress"]
    assert synthetic_speech.main([*line, "--voices", "nobody"]) == 1
    assert "flite has no voice 'nobody'; it has slt, rms" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert synthetic_speech.main([*line[:2], "--flite", str(tmp_path / "empty" / "flite")]) == 1
    assert "pass its path with --flite PATH" in " ".join(capsys.readouterr().out.split())


def test_words_that_were_missed() -> None:
    rows = word_errors(["the red cat", "the cat"], ["the read cat", "a cat sleeps"])
    assert rows == [("red", 1, 1), ("the", 1, 2), ("cat", 0, 2)]


def test_the_real_engine_says_the_same_each_time(flite: Studio) -> None:
    slt, rms = parse_voices("slt,rms")
    first, again = flite.record(slt, "the black train"), flite.record(slt, "the black train")
    other = flite.record(rms, "the black train")
    assert first == again
    assert first.messages[1] != other.messages[1]
    media = first.messages[1].segments[0].media
    assert media is not None
    assert 0.6 < len(decode_audio(media, 24_000)) / 24_000 < 2


def test_a_library_that_cannot_be_had_is_an_error(hum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def output(*command: str, **environment: str) -> str:
        return "libsound.so.2 => not found" if command[0] == "ldd" else ""

    monkeypatch.setattr(synthetic_speech, "_output", output)
    package = ENGINES["flite"][0]
    opened = fetch(package, tmp_path, hum.parent)
    fetched = type(opened)(package=package, version="2.2", root=opened.root)
    with pytest.raises(RuntimeError, match="--flite PATH"):
        Engine("flite", {"flite": fetched}, tmp_path)


# ----------------------------------------------------------------------------------------------------------- the pack


def test_the_embedded_pack() -> None:
    assert sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file()) <= speech_pack.LIMIT_BYTES
    rows = rows_of(PACK)
    counts = Counter((row.meta["voice"], row.split) for row in rows)
    assert counts == {
        ("slt", "train"): 300,
        ("slt", "validation"): 20,
        ("slt", "heldout_concept"): 40,
        ("rms", "train"): 60,
    }
    assert all(row.meta["synthetic"] == "flite" and row.licence == "MIT-Festival" for row in rows)
    trained = {row.concept for row in rows if row.split == "train"}
    assert len(trained) == 300
    assert not trained & {row.concept for row in rows if row.split != "train"}
    assert {word for text in trained for word in text.split()} == set(VOCABULARY)
    seconds = 0.0
    for row in rows:
        media = row.messages[1].segments[0].media
        assert media is not None
        assert media[:4] == b"OggS"
        wave = decode_audio(media, 24_000)
        assert 0.5 < len(wave) / 24_000 < 5
        assert abs(wave).max() > 0.3
        seconds += len(wave) / 24_000
    assert seconds > 10 * 60
    notice = (PACK / "NOTICE.md").read_text()
    for package in json.loads((PACK / "source.json").read_text())["packages"]:
        assert f"| {package['name']} ({package['manager']}) | {package['version']} | {package['licence']} |" in notice
        assert package["version"] != "local"
    assert "distribute" in (PACK / "licences" / "flite.txt").read_text()
    assert SampleSource(PACK, where={"source": "synthetic_speech/rms"}, split="train").light().num_rows == 60


def test_the_pack_is_made_from_what_the_hash_chooses(hum: Path, tmp_path: Path) -> None:
    assert speech_pack.main(["--out", str(tmp_path / "pack"), "--flite", str(hum), "--no-progress"]) == 0
    made = {(row.id, row.split) for row in rows_of(tmp_path / "pack")}
    assert made == {(row.id, row.split) for row in rows_of(PACK)}

from __future__ import annotations

import gzip
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from data_prep import dictd, dictionaries, emoji, freedict, udhr
from data_prep.splits import document_split
from omnitrain.data.media import decode_image
from omnitrain.data.shards import SampleSource
from tests.data_prep.conftest import write_dictd


def samples_of(folder: Path) -> list:
    source = SampleSource(folder)
    return [source[i] for i in range(len(source))]


def test_dictd_numbers_and_entries(tmp_path: Path) -> None:
    assert dictd.number("Bl") == 101
    assert dictd.number("A") == 0
    folder = write_dictd(tmp_path, "d", {"one": "one\n  text", "two": "two\n  täxt"})
    assert list(dictd.entries(folder / "d.index")) == [("one", "one\n  text"), ("two", "two\n  täxt")]
    (folder / "d.dict.dz").write_bytes(gzip.compress((folder / "d.dict").read_bytes()))
    (folder / "d.dict").unlink()
    assert len(list(dictd.entries(folder / "d.index"))) == 2
    assert dictd.unwrap("a bright orange-\n      brown\n      colour") == "a bright orange-brown colour"


def test_dictd_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no wn\.index"):
        dictd.find(tmp_path, "wn")
    folder = write_dictd(tmp_path, "d", {"one": "one"})
    (folder / "d.index").write_text("one\tA\tz\n")
    with pytest.raises(ValueError, match="past the end"):
        list(dictd.entries(folder / "d.index"))
    (folder / "d.index").write_text("one two\n")
    with pytest.raises(ValueError, match=r"d\.index:1"):
        list(dictd.entries(folder / "d.index"))


def test_wordnet(wordnet_tree: Path, tmp_path: Path) -> None:
    senses = list(dictionaries.wordnet_senses(wordnet_tree))
    assert senses[:3] == [
        ("dog", "noun", "a member of the genus Canis"),
        ("dog", "noun", 'a dull unattractive girl or woman; "she\'s a real dog"'),
        ("dog", "verb", "go after"),
    ]
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--source", str(wordnet_tree), "--only", "wordnet", "--no-progress"]
    assert dictionaries.main(arguments) == 0
    samples = samples_of(out)
    texts = {sample.reference for sample in samples if sample.task == "text"}
    assert "rose (adjective): of something having a dusty purplish pink colour" in texts
    assert [s.reference for s in samples if s.task == "define" and s.concept == "truck"] == [
        "an automotive vehicle suitable for hauling"
    ]
    assert all(sample.split == document_split(sample.concept) for sample in samples)


def test_gcide(tmp_path: Path) -> None:
    entry = 'Decrier \\De*cri"er\\ (d[-e]*kr[imac]"[~e]r), n.\n   One who {decries}.\n   [1913 Webster]\n'
    folder = write_dictd(tmp_path / "gcide", "gcide", {"Decrier": entry})
    assert list(dictionaries.gcide_entries(folder)) == [("Decrier", "n.", "One who decries.")]


def test_freedict(tmp_path: Path) -> None:
    folder = write_dictd(
        tmp_path / "package",
        "freedict-eng-fra",
        {
            "Greek": "Greek /griːk/\n1. grec\n2. Grec\n",
            "great lake": "great lake /x/ <n>\n[geo.] grand lac <masc>, lac\n",
            "see": "see\n see: {other}\n",
        },
    )
    assert list(freedict.translations(folder, "eng-fra")) == [("Greek", "grec"), ("great lake", "grand lac")]
    out = tmp_path / "out"
    assert freedict.main(["--out", str(out), "--source", str(folder), "--pairs", "eng-fra", "--no-progress"]) == 0
    assert {(s.languages, s.reference) for s in samples_of(out)} == {
        (("en", "fr"), "grec"),
        (("fr", "en"), "Greek"),
        (("en", "fr"), "grand lac"),
        (("fr", "en"), "great lake"),
    }
    with pytest.raises(SystemExit):
        freedict.main(["--pairs", "eng-xxx"])


def test_udhr(udhr_tree: Path, tmp_path: Path) -> None:
    english, german = sorted(udhr.read_declarations(udhr_tree), key=lambda d: d.language, reverse=True)
    assert (german.language, german.name, german.articles[0]) == ("de", "German", "Jeder whereas.")
    assert english.articles[2] == "Everyone & 2; more. x2"
    out = tmp_path / "out"
    assert udhr.main(["--out", str(out), "--source", str(udhr_tree), "--no-progress"]) == 0
    samples = samples_of(out)
    assert len([s for s in samples if s.task == "text"]) == 8
    assert {s.reference for s in samples if s.task == "language"} == {"English", "German"}
    assert len([s for s in samples if s.task == "t2tt"]) == 4
    splits: dict[str, set[str]] = {}
    for sample in samples:
        splits.setdefault(sample.concept, set()).add(sample.split)
    assert all(len(found) == 1 for found in splits.values())  # an article is on one side in every language


def test_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cldr/common/annotations"
    folder.mkdir(parents=True)
    for language, name, words in (("en", "dog face", "dog | face | pet"), ("fr", "tête de chien", "chien")):
        (folder / f"{language}.xml").write_text(
            f'<?xml version="1.0" encoding="UTF-8" ?><ldml><annotations><annotation cp="🐶">{words}</annotation>'
            f'<annotation cp="🐶" type="tts">{name}</annotation><annotation cp="A" type="tts">{name} a</annotation>'
            '<annotation cp="👩‍🚀" type="tts">astronaut</annotation></annotations></ldml>',
            encoding="utf-8",
        )
    (folder / "fr_CA.xml").write_text("<ldml/>")
    letter, dog = emoji.read_annotations(tmp_path)
    assert letter.character == "A"
    assert dog.names == {"en": "dog face", "fr": "tête de chien"}
    assert dog.id == "1f436"
    plain = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font = emoji.find_font(plain)
    assert emoji.draw(" ", font, 32) is None
    picture = emoji.draw("A", font, 32)
    assert picture is not None
    assert picture.size == (32, 32)

    def paint(character: str, font: object, size: int) -> Image.Image | None:
        return Image.new("RGB", (size, size), "yellow") if character == "🐶" else None

    monkeypatch.setattr(emoji, "draw", paint)
    sources = ["--source", f"fonts-noto-color-emoji={plain.parent}", "--source", f"unicode-cldr-core={tmp_path}"]
    (plain_copy := tmp_path / "NotoColorEmoji.ttf").write_bytes(plain.read_bytes())
    sources[1] = f"fonts-noto-color-emoji={plain_copy.parent}"
    out = tmp_path / "out"
    assert emoji.main(["--out", str(out), "--no-progress", *sources]) == 0
    samples = samples_of(out)
    assert {(s.task, s.languages, s.reference) for s in samples} == {
        ("caption", ("en",), "dog face"),
        ("caption", ("fr",), "tête de chien"),
        ("keywords", ("en",), "dog, face, pet"),
    }
    source = SampleSource(out)
    segment = next(s for s in samples[0].messages[0].segments if s.type == "image")
    assert decode_image(source.media_bytes(segment)).shape == (128, 128, 3)

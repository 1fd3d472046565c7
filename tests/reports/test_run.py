"""The report is whole, needs nothing from outside, and says what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnitrain.cli.report import main
from omnitrain.data.media import encode_audio, encode_image, encode_video
from omnitrain.evaluation.heldout import PREDICTIONS_SCHEMA
from omnitrain.reports.run import read_run, write_report

SECTIONS = (
    "scores", "swap", "curves", "samples", "experts", "data", "speed", "skipped", "config", "environment",
)  # fmt: skip
OUTSIDE = re.compile(r"""(?:src|href|url|@import)\s*[=(]\s*["']?\s*(?:https?:)?//""", re.IGNORECASE)


def prediction(i: int, modality: str, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(PREDICTIONS_SCHEMA.names)
    return row | {
        "id": f"{modality}/{i}", "source": "s", "split": "heldout_cell", "modality": modality, "task": "t",
        "concept": "c", "languages": ["en"], "prompt": "What is this?",
        "reference": "a <b>cat</b>", "prediction": "<script>x</script>",
        "chrf": 12.0, "exact_match": False, "loss": 2.5, "tokens": 3, "bytes": 5,
    } | values  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "eval").mkdir()
    (folder / "config.yaml").write_text(  # as before sizes stood in it: a report of such a run is still written
        "name: fancy run\nseed: 3\nmodel: {_target_: omnitrain.models.presets.build, preset: tiny}\n"
        "note: </pre><script>\n"
    )
    (folder / "metrics.csv").write_text(
        "step,train/loss,train/loss/image,train/loss/text,validation/loss/image,experts/entropy,experts/max_over_mean,"
        "lr/aut,gradient_norm\n1,5.0,5.5,4.5,,0.9,1.5,0.1,1.0\n2,4.0,4.5,nan,,0.9,1.5,0.1,1.0\n2,,,,4.75,,,,\n"
        "3,3.0,3.5,2.5,,0.9,1.4,0.1,1.0\n"
    )
    (folder / "throughput.csv").write_text(
        "step,tokens_per_second,data_wait,mfu,waiting,waiting/0,waiting/1\n"
        "1,10,0.5,0.1,0.2,0.1,0.3\n2,1234,0.01,0.5,0.128,0.256,0\n"
    )
    data = {
        "planned": [{"until_tokens": None, "shares": {"pictures": 0.75, "words": 0.25}}],
        "drawn": {"pictures": 30, "words": 10},
        "seen": {
            "source": {"samples": {"pictures": 29, "words": 10}, "tokens": {"pictures": 900, "words": 100}},
            "modality": {"samples": {"image": 29, "text": 10}, "tokens": {"image": 900, "text": 100}},
            "languages": {"samples": {"fr>en": 39}, "tokens": {"fr>en": 1000}},
        },
        "skipped": {"image_corrupt": 1},
        "tokens": 1000,
        "packing_efficiency": 0.987,
    }
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    (folder / "bad_samples.jsonl").write_text('{"reason": "image_corrupt", "id": "planted-bad"}\n{"half')
    loss = {
        "samples": 4,
        "tokens": 12,
        "bytes": 20,
        "loss": 2.5,
        "loss_low": 2.0,
        "loss_high": 3.0,
        "bits_per_byte": 1.5,
    }
    gain = {"mean": 0.31, "low": 0.2, "high": 0.4, "n": 4, "groups": 4, "level": 0.95, "above_zero": True}
    scores = {
        "scores": [
            {"modality": "image", "split": split, "task": "all",
             "generated": 4, "chrf": 33.3, "exact_match": 0.25, **loss}
            for split in ("all", "heldout_cell")
        ],
        "languages": [{"language": "en", **loss}],
        "media_swap": [
            {"modality": "image", "split": "all", "task": "all", "pairs": 4, "own": 2.5, "swapped": 2.81, "gain": gain,
             "without_partner": 0, "skipped": {}},
        ],
        "expert_load": {"image": [[1, 2, 3, 4], [4, 3, 2, 1]]},
        "skipped": {},
        "settings": {},
        "seconds": 1.0,
    }  # fmt: skip
    (folder / "eval/scores.json").write_text(json.dumps(scores))
    grey = np.full((32, 48, 3), 90, dtype=np.uint8)
    tone = np.sin(np.arange(8000) / 8).astype(np.float32) * 0.5
    rows = [
        prediction(0, "image", media=encode_image(grey), media_type="image", swapped_loss=2.9),
        prediction(1, "audio", media=encode_audio(tone, 16_000), media_type="audio"),
        prediction(2, "audio_video", media=encode_video(np.stack([grey] * 8), 4.0, tone), media_type="video"),
        prediction(3, "text"),
        prediction(4, "image", media=b"torn", media_type="image"),
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS_SCHEMA), folder / "eval/predictions.parquet")
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def test_every_section_is_there(page: str) -> None:
    assert [s for s in SECTIONS if f'id="{s}"' not in page] == []
    assert 'class="missing"' not in page
    for text in ("fancy run", "+0.310", "The interval is above zero", "33.3", "75.0%", "98.7%", "image_corrupt",
                 "1,234", "12.8%", "waiting of each rank over steps", "busiest expert", "planted-bad", "packages.torch",
                 "preset: tiny"):  # fmt: skip
        assert text in page, text
    assert page.count("<svg") >= 6


def test_media_can_be_seen_and_heard(page: str) -> None:
    for start in ("data:image/png;base64,", "data:audio/", "data:video/mp4;base64,"):
        assert f'src="{start}' in page
    assert page.count('class="spectrogram"') == 2  # the recording and the video's sound
    assert "image_" in page  # the torn picture's reason


def test_nothing_is_loaded_from_outside(page: str) -> None:
    assert OUTSIDE.findall(page) == []
    assert "<script" not in page  # neither ours nor one that a model or a configuration wrote
    assert "&lt;script&gt;" in page


def test_figures_take_the_colours_of_the_page(page: str) -> None:
    assert "var(--ink)" in page
    assert "#010203" not in page
    assert "prefers-color-scheme: dark" in page


def test_an_empty_run_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [s for s in SECTIONS if f'id="{s}"' not in page] == []
    for file in ("config.yaml", "metrics.csv", "throughput.csv", "data.json", "environment.json", "eval/scores.json",
                 "eval/predictions.parquet"):  # fmt: skip
        assert file in page
        assert file in said
    assert f"python -m omnitrain test {tmp_path}" in page


def test_a_run_without_scores_shows_its_last_validation(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes((run_dir / "metrics.csv").read_bytes())
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "last validation" in page
    assert "4.750" in page


def test_out_and_errors(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir), "--out", str(tmp_path / "sub/page.html")]) == 0
    assert (tmp_path / "sub/page.html").exists()
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "data.json").write_text("{torn")
    assert main([str(tmp_path)]) == 1
    assert "data.json" in capsys.readouterr().err


def test_rows_without_a_number_are_left_out(run_dir: Path) -> None:
    steps, losses = read_run(run_dir).metrics["train/loss/text"]
    assert steps.tolist() == [1, 3]
    assert losses.tolist() == [4.5, 2.5]

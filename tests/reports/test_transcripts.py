"""The page about transcripts: scores, differences between what was said and written, players; nothing from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnitrain.data.media import encode_audio
from omnitrain.evaluation.transcripts import CONSTANT, FREQUENT, MODEL, ROWS_SCHEMA
from omnitrain.reports.comparison import write_comparison
from omnitrain.reports.run import marked, write_report
from tests.reports.test_run import OUTSIDE


def record(languages: str, system: str, window: int | None, mean: float) -> dict[str, Any]:
    interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8, "groups": 4, "level": 0.95}
    return {
        "task": "asr", "languages": languages, "split": "all", "system": system, "window": window,
        "samples": 8, "sentences": 4, "measures": {"cer": interval, "wer": {**interval, "mean": mean + 0.05}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("run")
    (folder / "eval").mkdir()
    (folder / "config.yaml").write_text("name: a listener\nevaluation: {scores: transcripts}\n")
    (folder / "metrics.csv").write_text(
        "step,validation/cer,validation/cer/es,validation/cer_ctc,train/loss/audio\n1,0.9,0.8,1,4\n2,0.7,0.6,0.5,3\n"
    )
    systems = [(MODEL, 1, 0.61), (MODEL, 8, 0.4321), (FREQUENT, None, 0.8), (CONSTANT, None, 0.75)]
    gain = {"mean": 0.31, "low": 0.2, "high": 0.4, "n": 4, "groups": 4, "level": 0.95, "above_zero": True}
    scores = {
        "scores": [record(language, *system) for language in ("all", "es", "ca") for system in systems],
        "media_swap": [{"task": "asr", "pairs": 5, "gain": gain}],
        "constants": [],
        "skipped": {"audio_corrupt": 2},
        "settings": {"window_seconds": [1, 8]},
    }
    (folder / "eval/transcripts.json").write_text(json.dumps(scores))
    sound = encode_audio(np.sin(np.arange(8000) / 8).astype(np.float32), 16_000)
    rows = [
        {**dict.fromkeys(ROWS_SCHEMA.names), "id": "a", "task": "asr", "languages": "es", "split": "heldout_concept",
         "references": ["Un gato negro <b>"], "prediction": text, "window": window, "cer": 0.5,
         "media": sound if window == 8 else None, "tokens": ["un", " $1"],
         "attention": [[0.2, 0.8, 0.0], [0.3, 0.3, 0.4]]}
        for window, text in ((1, ""), (8, "un perro negro"))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=ROWS_SCHEMA), folder / "eval/transcripts.parquet")
    return write_report(folder).read_text(encoding="utf-8")


def test_scores_stand_beside_who_never_listens(page: str) -> None:
    for text in ("43.2% [33.2%, 53.2%]", "75.0%", "most frequent", "best constant", "+0.310", "audio_corrupt",
                 "windows of 1, 8 s", "scores by attention window", "error rates over steps"):  # fmt: skip
        assert text in page, text
    assert 'class="missing"' not in page.split('id="data"')[0].split('id="transcripts"')[1]
    assert OUTSIDE.findall(page) == []


def test_recordings_are_heard_and_differences_marked(page: str) -> None:
    assert page.count("<audio") == 1
    assert page.count('aria-label="cross-attention"') == 1
    assert "<ins>perro</ins>" in page
    assert "<del>gato</del>" in page
    assert "<del>&lt;b&gt;</del>" in page
    assert "window 1 s" in page


def test_differences() -> None:
    assert marked(["A red cat."], "a RED cat") == [("same", "a RED cat")]
    assert marked(["A red cat."], "") == [("missing", "A red cat.")]
    assert marked(["no", "A red cat."], "a blue cat") == [
        ("same", "a"), ("missing", "red"), ("wrong", "blue"), ("same", "cat")
    ]  # fmt: skip


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("evaluation: {scores: transcripts}\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "eval/transcripts.json" in page
    assert "eval/transcripts.parquet" in page


def listener(folder: Path, seed: int, wrong: int, **settings: Any) -> Path:
    """A run of which `wrong` of four transcripts are wrong in all letters."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"name": "n", "seed": seed, **settings}))
    rows = [
        {**dict.fromkeys(ROWS_SCHEMA.names), "id": str(i), "task": "asr", "languages": "es", "language": "es",
         "split": "heldout_concept", "group": str(i), "references": ["aaaa"], "window": window,
         "prediction": "bbbb" if i < wrong else "aaaa"}
        for window in (1, 8) for i in range(4)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=ROWS_SCHEMA), folder / "eval/transcripts.parquet")
    gain = {"mean": 0.1 * wrong, "low": 0, "high": 1, "above_zero": True}
    scores = {
        "scores": [record("all", FREQUENT, None, 0.875)],
        "media_swap": [{"task": "asr", "pairs": 4, "gain": gain}],
        "settings": {"window_seconds": [1, 8]},
    }
    (folder / "eval/transcripts.json").write_text(json.dumps(scores))
    return folder


def test_seeds_of_an_arm_are_one_column(tmp_path: Path) -> None:
    settings = {"evaluation": {"scores": "transcripts"}}
    runs = [
        listener(
            tmp_path / arm / f"seed={seed}",
            seed,
            wrong,
            variables={"encoder": arm, "from": f"aut/seed={seed}"},
            **settings,
        )
        for arm, wrongs in (("random", (3, 4)), ("aut", (1, 2)))
        for seed, wrong in enumerate(wrongs)
    ]
    path, _ = write_comparison(runs, tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    assert "random (2)" in page
    assert "None of the runs has held-out scores" not in page
    assert OUTSIDE.findall(page) == []
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    [cer] = [line.split(" | ") for line in table.splitlines() if line.startswith("| asr | all | 4 | CER")]
    means = [cell.split(" ")[0] for cell in cer[4:7]]
    assert means == ["87.5%", "37.5%", "−50.0%"]  # 3 and 4, 1 and 2 of 4; the difference is paired by seed
    assert cer[7] == "87.5%"  # who always says the same
    assert "+0.35 (+0.30, +0.40)" in table
    assert "| asr | 1 s | CER | 87.5%" in table


def test_two_runs_of_one_seed_are_refused(tmp_path: Path) -> None:
    runs = [listener(tmp_path / name, 3, 1) for name in ("a", "b")]
    for run in runs:
        (run / "config.yaml").write_text('{"seed": 3, "evaluation": {"scores": "transcripts"}}')
    with pytest.raises(ValueError, match="b and a are the same run: both have seed 3"):
        write_comparison(runs, tmp_path / "report.html")

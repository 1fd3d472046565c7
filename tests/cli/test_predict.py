"""Transcripts through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnitrain.__main__ import main


@pytest.mark.slow
def test_a_run_of_aut_writes_transcripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["trainer.max_steps=1", "optim.warmup_steps=1", "trainer.limit_val_batches=0", "evaluation.after_fit=false"]
    small = ["data.max_tokens=400", "data.max_mel_frames=2000", "model.encoder.layers=1", "model.decoder.layers=1"]
    assert main(["fit", "+recipe=aut_quickstart", f"paths.run_dir={tmp_path}", *short, *small]) == 0
    wanted = ["module.generation.beam=2", "module.generation.timestamps=ctc", "module.generation.max_new_tokens=3"]
    assert main(["predict", str(tmp_path), "data.predict_sources.heldout_cell.limit=3", *wanted]) == 0
    path = tmp_path / "transcripts.jsonl"
    assert f"3 transcripts: {path}" in capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == 3
    assert all(set(row) == {"id", "source", "task", "languages", "text", "words"} for row in rows)
    assert not (tmp_path / "predictions.parquet").exists()

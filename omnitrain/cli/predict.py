"""``predict``: answers to the prompts of `data.predict_sources`, as Parquet in the run folder; of AuT, transcripts as
lines of JSON."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from omnitrain.config.run_config import AuTModuleConfig, RunConfig
from omnitrain.files import write_parquet, write_text
from omnitrain.runs.experiment import build_experiment, trained_checkpoint


def run(config: RunConfig) -> None:
    """Write ``predictions.parquet``: id, source, task, modality, text (the answer); of a run of AuT
    ``transcripts.jsonl`` (`AuTModule.predict_step`). One file per process of a distributed run."""
    checkpoint = trained_checkpoint(config, "predict")
    experiment = build_experiment(config, "predict")
    trainer = experiment.trainer
    batches = trainer.predict(experiment.module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True)
    rows = list(chain.from_iterable(batches or []))
    rank = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
    if isinstance(config.module.config, AuTModuleConfig):
        _write_transcripts(experiment.run_dir / f"transcripts{rank}.jsonl", rows)
    else:
        _write_answers(experiment.run_dir / f"predictions{rank}.parquet", rows)


def _write_answers(path: Path, rows: list[dict[str, Any]]) -> None:
    write_parquet(path, pa.Table.from_pylist(rows))
    print(f"{len(rows)} answers: {path}")


def _write_transcripts(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    unaligned = sum("words" in row and row["words"] is None for row in rows)
    notice = f", {unaligned} too long for their recordings to be aligned" if unaligned else ""
    print(f"{len(rows)} transcripts{notice}: {path}")

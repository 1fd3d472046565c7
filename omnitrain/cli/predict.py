"""``predict``: answers to the prompts of `data.predict_sources`, as Parquet in the run folder."""

from __future__ import annotations

from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig

from omnitrain.runs.experiment import build, trained_checkpoint


def run(cfg: DictConfig) -> None:
    """Write ``predictions.parquet``: id, source, task, modality, text (the answer). One file per process of a
    distributed run."""
    checkpoint = trained_checkpoint(cfg, "predict")
    experiment = build(cfg, "predict")
    trainer = experiment.trainer
    batches = trainer.predict(experiment.module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True)
    rows = list(chain.from_iterable(batches or []))
    path = experiment.run_dir / (
        "predictions.parquet" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.parquet"
    )
    pq.write_table(pa.Table.from_pylist(rows), path)
    print(f"{len(rows)} answers: {path}")

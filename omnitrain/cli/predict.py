"""``predict``: answers to the prompts of `data.predict_sources`, as Parquet in the run folder."""

from __future__ import annotations

from itertools import chain

import pyarrow as pa

from omnitrain.config.run_config import RunConfig
from omnitrain.files import write_parquet
from omnitrain.runs.experiment import build_experiment, trained_checkpoint


def run(config: RunConfig) -> None:
    """Write ``predictions.parquet``: id, source, task, modality, text (the answer). One file per process of a
    distributed run."""
    checkpoint = trained_checkpoint(config, "predict")
    experiment = build_experiment(config, "predict")
    trainer = experiment.trainer
    batches = trainer.predict(experiment.module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True)
    rows = list(chain.from_iterable(batches or []))
    rank = "" if trainer.world_size == 1 else f"-{trainer.global_rank}"
    path = experiment.run_dir / f"predictions{rank}.parquet"
    write_parquet(path, pa.Table.from_pylist(rows))
    print(f"{len(rows)} answers: {path}")

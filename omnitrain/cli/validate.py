"""``validate``: loss on the validation split, by modality."""

from __future__ import annotations

from rich.console import Console

from omnitrain.config.run_config import RunConfig
from omnitrain.runs.experiment import build_experiment, trained_checkpoint


def run(config: RunConfig) -> float:
    """Returns the loss in nats per target token."""
    checkpoint = trained_checkpoint(config, "validate")
    experiment = build_experiment(config, "validate", checkpoint)
    module, trainer = experiment.module, experiment.trainer
    trainer.validate(module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)
    if trainer.is_global_zero:
        for table in module.validation_tables(module.global_step):
            Console().print(table)
    return float(trainer.callback_metrics["validation/loss"])

"""``validate``: loss on the validation split, by modality."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from omnitrain.runs.experiment import build, trained_checkpoint


def run(cfg: DictConfig) -> float:
    """Returns the loss in nats per target token."""
    checkpoint = trained_checkpoint(cfg, "validate")
    experiment = build(cfg, "validate")
    module, trainer = experiment.module, experiment.trainer
    trainer.validate(module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)
    if trainer.is_global_zero:
        for table in module.validation_tables(module.global_step):
            Console().print(table)
    return float(trainer.callback_metrics["validation/loss"])

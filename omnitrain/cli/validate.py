"""``validate``: loss on the validation split, by modality."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from omnitrain.cli.experiment import build, trained_checkpoint
from omnitrain.training.callbacks import loss_table


def run(cfg: DictConfig) -> float:
    """Returns the loss in nats per target token."""
    checkpoint = trained_checkpoint(cfg, "validate")
    experiment = build(cfg, "validate")
    module, trainer = experiment.module, experiment.trainer
    trainer.validate(module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)
    if trainer.is_global_zero:
        for name, sums in module.evaluation_sums.items():
            Console().print(loss_table(name, sums))
    return float(trainer.callback_metrics["validation/loss"])

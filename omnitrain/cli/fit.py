"""``fit``: train, then score on the held-out splits and write the report."""

from __future__ import annotations

from omegaconf import DictConfig

from omnitrain.cli.config import ConfigError
from omnitrain.cli.experiment import build, save_config, starting_checkpoint
from omnitrain.cli.test import evaluate_and_report


def run(cfg: DictConfig) -> float | None:
    """Train as `cfg` says. Returns the last validation loss, which sweepers minimise."""
    checkpoint = starting_checkpoint(cfg)
    experiment = build(cfg, "fit")
    run_dir, trainer = experiment.run_dir, experiment.trainer
    if cfg.ckpt_path is None and (run_dir / "checkpoints" / "last.ckpt").exists():
        raise ConfigError(
            f"{run_dir} already holds a run; continue it with ckpt_path=last, or choose another paths.run_dir"
        )
    if trainer.is_global_zero:
        save_config(cfg, run_dir)
        experiment.datamodule.tokenizer.save(run_dir / "tokenizer.json")
        print(f"run folder: {run_dir}" + (f", continued from {checkpoint}" if checkpoint else ""), flush=True)
    trainer.fit(experiment.module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True)
    loss = trainer.callback_metrics.get("validation/loss")
    if cfg.evaluation.after_fit and trainer.is_global_zero and not trainer.interrupted:
        evaluate_and_report(experiment, cfg.evaluation)
    return None if loss is None else float(loss)

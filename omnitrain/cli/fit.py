"""``fit``: train, then score on the held-out splits and write the report."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from omnitrain.cli.test import evaluate_and_report
from omnitrain.config.compose import ConfigError
from omnitrain.runs.chain import finished_stages, read_stages, run_stages
from omnitrain.runs.experiment import Experiment, build, save_config, starting_checkpoint


def run(cfg: DictConfig) -> float | None:
    """Train as `cfg` says, or run its stages, or the arm of its study. Returns the last validation loss, which sweepers
    minimise."""
    if cfg.ckpt_path is None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
        cfg.ckpt_path = "last"  # a job that Slurm has queued again goes on where it was
    if cfg.get("stages") is not None:  # a run from before there were stages has no such key
        return _run_stages(cfg)
    if cfg.get("study") is not None:
        from omnitrain.study.run import run_arm

        return run_arm(cfg, train)
    loss = train(cfg).trainer.callback_metrics.get("validation/loss")
    return None if loss is None else float(loss)


def train(cfg: DictConfig) -> Experiment:
    """Train one model, then score it and write its report, if the configuration says so.

    Raises:
        ConfigError: the run folder holds a run already, and `cfg.ckpt_path` does not continue it.
    """
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
        if cfg.evaluation.after_fit and cfg.evaluation.scores != "heldout":
            from omnitrain.evaluation.judges import missing_judges, missing_judges_notice

            if missing := missing_judges():  # said now, while it can still be mended before the end
                print(missing_judges_notice(missing), flush=True)
    trainer.fit(experiment.module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True)
    if cfg.evaluation.after_fit and trainer.is_global_zero and not trainer.interrupted:
        evaluate_and_report(experiment, cfg)
    return experiment


def _run_stages(cfg: DictConfig) -> None:
    run_dir = Path(cfg.paths.run_dir)
    stages = read_stages(OmegaConf.to_container(cfg.stages), OmegaConf.to_container(cfg.stage_overrides))
    done = finished_stages(stages, run_dir)
    save_config(cfg, run_dir)
    print(f"run folder: {run_dir}", flush=True)
    if status := run_stages(stages, run_dir, done):
        raise SystemExit(status)

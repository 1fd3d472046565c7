"""``fit``: train, then score on the held-out splits and write the report."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback

from omnitrain.cli.test import evaluate_and_report
from omnitrain.config import launched
from omnitrain.config.run_config import PretrainedConfig, RunConfig
from omnitrain.config.saved import write_config
from omnitrain.config.typed import ConfigError
from omnitrain.evaluation.settings import CodecEvaluation, SpeechEvaluation, TranscriptEvaluation
from omnitrain.files import CONFIG, METRICS, SKIPPED_STEPS, THROUGHPUT, TOKENIZER, last_checkpoint
from omnitrain.models.sizes import AuTModelConfig
from omnitrain.runs.chain import finished_stages, read_stages, run_stages
from omnitrain.runs.convert import keep_public
from omnitrain.runs.experiment import Experiment, build_experiment, gather, settle_decoder, starting_checkpoint
from omnitrain.runs.lock import hold
from omnitrain.runs.memory import check_memory
from omnitrain.runs.resume import check_resume, record_changes
from omnitrain.training.ranks import gather_objects


def run(config: RunConfig) -> float | None:
    """Train as `config` says, or run its stages, or the arm of its study. Returns the last validation loss, which
    sweepers minimise. Raises FolderInUse while another process writes into the run folder."""
    if config.ckpt_path is None and launched.restarts() > 0:
        config = replace(config, ckpt_path="last")  # a job that Slurm or torchrun has started again goes on
    with hold(config.paths.run_dir):
        if config.stages is not None:
            return _run_stages(config)
        if config.study is not None:
            from omnitrain.study.run import run_arm

            return run_arm(config, train)
        loss = train(config).trainer.callback_metrics.get("validation/loss")
        return None if loss is None else float(loss)


def train(config: RunConfig) -> Experiment:
    """Train one model, then score it and write its report, if the configuration says so. Raises ConfigError if the run
    folder holds a run already that `config.ckpt_path` does not continue, or continues with other settings than can
    be."""
    config = settle_decoder(config)
    run_dir = Path(config.paths.run_dir)
    checkpoint = starting_checkpoint(config)
    if config.ckpt_path is None and last_checkpoint(run_dir) is not None:
        raise ConfigError(
            f"{run_dir} already holds a run; continue it with ckpt_path=last, or choose another paths.run_dir"
        )
    begun_in = None if checkpoint is None else checkpoint.parent.parent
    changed = check_resume(config, begun_in) if begun_in is not None and (begun_in / CONFIG).is_file() else {}
    check_memory(config)
    _check_scoring(config)
    experiment = build_experiment(config, "fit", checkpoint)
    trainer = experiment.trainer

    def agree(trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Before anything is loaded: processes that began from different states would wait for one another."""
        written = gather_objects(None if checkpoint is None else checkpoint.stat().st_mtime_ns)
        if other := [rank for rank, time in enumerate(written) if time != written[0]]:
            raise ConfigError(
                f"{checkpoint or run_dir}: rank {other[0]} finds another checkpoint there than rank 0, or none; name a "
                "folder that all nodes see (paths.run_dir, ckpt_path)"
            )

    def begin(trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_config(config, run_dir)
            experiment.datamodule.tokenizer.save(run_dir / TOKENIZER)
            if isinstance(config.model.config, PretrainedConfig):
                keep_public(Path(config.model.config.folder), run_dir)
            record_changes(changed, run_dir, trainer.global_step)
            if begun_in is not None:
                _bring_rows(begun_in, run_dir)

    # Once the state of the run is restored, and not before: a refused resume leaves the folder as it was.
    vars(trainer)["callbacks"].insert(0, LambdaCallback(setup=agree, on_train_start=begin))
    if trainer.is_global_zero:
        print(f"run folder: {run_dir}" + (f", continued from {checkpoint}" if checkpoint else ""), flush=True)
        if config.evaluation.after_fit and isinstance(config.evaluation, (CodecEvaluation, SpeechEvaluation)):
            from omnitrain.evaluation.judges import missing_judges, missing_judges_notice

            if missing := missing_judges():  # said now, while it can still be mended before the end
                print(missing_judges_notice(missing), flush=True)
    trainer.fit(experiment.module, experiment.datamodule, ckpt_path=checkpoint, weights_only=True)
    if config.evaluation.after_fit and not trainer.interrupted:
        gather(experiment, config)
        if trainer.is_global_zero:
            evaluate_and_report(experiment, config)
    return experiment


def _check_scoring(config: RunConfig) -> None:
    """Raise before the training, not after it, where it could not be scored: the judge cannot be had, or a Thinker
    would have to search."""
    settings = config.evaluation
    searches = isinstance(settings, TranscriptEvaluation) and settings.beam > 1
    if searches and not isinstance(config.model.config, AuTModelConfig):
        raise ConfigError(f"evaluation.beam={settings.beam}: a beam search is AuT's alone; set it to 1")
    if settings.after_fit and isinstance(settings, (CodecEvaluation, SpeechEvaluation)) and settings.judge is not None:
        from omnitrain.evaluation.judges import find_whisper

        find_whisper(settings.judge)


def _bring_rows(begun_in: Path, run_dir: Path) -> None:
    """Logged rows of the run that a checkpoint of another folder belongs to, which this one goes on with."""
    for name in (METRICS, THROUGHPUT, SKIPPED_STEPS):
        if (begun_in / name).is_file() and not (run_dir / name).exists():
            shutil.copyfile(begun_in / name, run_dir / name)


def _run_stages(config: RunConfig) -> None:
    run_dir = Path(config.paths.run_dir)
    stages = read_stages(config.stages, config.stage_overrides)
    done = finished_stages(stages, run_dir)
    write_config(config, run_dir)
    print(f"run folder: {run_dir}", flush=True)
    if status := run_stages(stages, run_dir, done):
        raise SystemExit(status)

"""``test``: scores on the held-out data, and the report. ``fit`` ends with the same."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from omnitrain.config.compose import ConfigError
from omnitrain.data.waveforms import Utterance
from omnitrain.models.codec import Codec
from omnitrain.models.omni import OmniModel
from omnitrain.runs.experiment import Experiment, build, trained_checkpoint


def run(cfg: DictConfig) -> None:
    """Score the checkpoint that `cfg` names, and write the report into the run folder; with ``+eval=NAME``, run
    benchmarks instead."""
    if cfg.get("eval") is not None:
        return run_benchmarks(cfg)
    checkpoint = trained_checkpoint(cfg, "test")
    experiment = build(cfg, "test")
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        experiment.module.load_state_dict(state)
    if experiment.trainer.is_global_zero:
        evaluate_and_report(experiment, cfg)


SPEECH_JUDGES = ("codec", "speech")
"""Values of ``evaluation.judge`` that listen."""

EVAL_KEYS = ("path", "limit", "batch", "restart", "device", "dtype", "tasks")


def run_benchmarks(cfg: DictConfig) -> None:
    """Run the tasks of ``cfg.eval`` (``conf/eval``) on the run folder's last checkpoint, or on ``model.folder``."""
    from hydra.utils import instantiate

    from omnitrain.cli.generate import GenerateError, device_and_dtype, load
    from omnitrain.tasks.run import model_fingerprint, print_result, run_task
    from omnitrain.tasks.task import Task

    settings = {str(key): value for key, value in cfg.eval.items()}
    for key in settings:
        if key not in EVAL_KEYS:
            near = difflib.get_close_matches(key, EVAL_KEYS, n=1)
            raise ConfigError(f"eval.{key}: there is no such key; " + (f"did you mean {near[0]}?" if near else ""))
    if cfg.ckpt_path not in (None, "last"):
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: benchmarks run on the last checkpoint of a run folder")
    run_dir = Path(cfg.paths.run_dir)
    folder = Path(cfg.model.folder) if "folder" in cfg.model else run_dir
    try:
        tasks = [instantiate(task, _convert_="all") for task in cfg.eval.tasks.values() if task]
        for task in tasks:
            if isinstance(task, Task) and not task.path:
                raise ConfigError(
                    f"eval.tasks.{task.name}.path: name the benchmark's file or folder with eval.path=PATH"
                )
        device, dtype = device_and_dtype(settings.get("device") or "auto", settings.get("dtype") or "auto")
        model, encoder = load(folder, device=device, dtype=dtype)
        options: dict[str, Any] = {
            "limit": settings.get("limit"),
            "batch": settings.get("batch") or 16,
            "restart": bool(settings.get("restart")),
            "fingerprint": model_fingerprint(model, encoder),
        }
        out = run_dir / "eval" / "tasks"
        for task in tasks:
            if isinstance(task, Task):
                result = run_task(task, model, encoder, out, **options)
            else:
                result = task.run(model, encoder, out, **options)
            print_result(result)
    except (InstantiationException, GenerateError, FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error


def evaluate_and_report(experiment: Experiment, cfg: DictConfig) -> None:
    """Score the model as it stands on `data.test_sources` by the judge that `cfg.evaluation` names, print the table,
    write ``report.html`` and name it."""
    from omnitrain.reports.run import write_report

    settings = {str(key): value for key, value in cfg.evaluation.items()}
    report, judge = settings.pop("report"), settings.pop("judge")
    settings.pop("after_fit")
    trainer, model = experiment.trainer, experiment.module.model
    assert isinstance(model, OmniModel | Codec)
    model.to(trainer.strategy.root_device).eval()
    judges = {"heldout": _judge_answers, "codec": _judge_codec, "speech": _judge_speech}
    if judge not in judges:
        raise ConfigError(f"evaluation.judge={judge}: there are {', '.join(judges)}")
    if experiment.datamodule.test_sources:
        with trainer.precision_plugin.forward_context():
            judges[judge](experiment, model, cfg, settings)
    else:
        print("nothing is held out to score: name data in data.test_sources", flush=True)
    if report:
        print(f"report: {write_report(experiment.run_dir)}", flush=True)


def _judge_answers(experiment: Experiment, model: OmniModel | Codec, cfg: DictConfig, settings: dict) -> None:
    from omnitrain.evaluation.heldout import evaluate, print_table

    data = experiment.datamodule
    assert isinstance(model, OmniModel)
    scores = evaluate(
        model,
        data.encoder,
        data.tokenizer,
        data.opened("test_sources"),
        experiment.run_dir / "eval",
        train_sources=data.opened("sources"),
        **settings,
    )
    print_table(scores)


def _judge_codec(experiment: Experiment, model: OmniModel | Codec, cfg: DictConfig, settings: dict) -> None:
    from omnitrain.evaluation.spoken import judge_codec

    data = experiment.datamodule
    assert isinstance(model, Codec)
    sources = data.opened("test_sources"), data.opened("voice_sources")
    judge_codec(model, *sources, experiment.run_dir / "eval", **settings)


def _judge_speech(experiment: Experiment, model: OmniModel | Codec, cfg: DictConfig, settings: dict) -> None:
    from omnitrain.evaluation.spoken import SAMPLE_RATE, Said, judge_talker
    from omnitrain.generation.sampling import Sampling
    from omnitrain.generation.speech import speak_texts
    from omnitrain.runs.codec import load_codec

    data = experiment.datamodule
    assert isinstance(model, OmniModel)
    assert model.code2wav is not None
    residuals = Sampling(temperature=settings.pop("temperature"), top_k=settings.pop("top_k"))
    codes = replace(residuals, repetition_penalty=settings.pop("repetition_penalty"))
    frames_per_second = SAMPLE_RATE / model.code2wav.config.samples_per_frame
    seed, max_frames = settings.pop("seed"), max(1, round(settings.pop("seconds_limit") * frames_per_second))

    def speak(utterances: Sequence[Utterance]) -> list[Said]:
        spoken = speak_texts(
            model,
            data.tokenizer,
            [u.text for u in utterances],
            [u.voice for u in utterances],
            questions=[u.question for u in utterances],
            codes=codes,
            residuals=residuals,
            max_frames=max_frames,
            seed=seed,
        )
        return [Said(wav=s.wav, hit_limit=s.hit_limit) for s in spoken]

    judge_talker(
        speak,
        None if cfg.codec is None else load_codec(cfg.codec),
        data.opened("test_sources"),
        data.opened("voice_sources"),
        experiment.run_dir / "eval",
        **settings,
    )

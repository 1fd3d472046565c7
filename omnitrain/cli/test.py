"""``test``: scores on the held-out data, and the report. ``fit`` ends with the same."""

from __future__ import annotations

from pathlib import Path

from omnitrain.config.run_config import PretrainedConfig, RunConfig
from omnitrain.config.targets import built
from omnitrain.config.typed import ConfigError, named, typed
from omnitrain.evaluation.settings import (
    CodecEvaluation,
    DialogueEvaluation,
    Evaluation,
    HeldoutEvaluation,
    SpeechEvaluation,
    TranscriptEvaluation,
)
from omnitrain.files import EVALUATION, TASK_RESULTS
from omnitrain.interop.mimi import MimiCodec
from omnitrain.interop.start_from import load_weights, read_checkpoint
from omnitrain.models.aut_decoder import AuT
from omnitrain.models.codec import Codec
from omnitrain.models.omni import OmniModel
from omnitrain.runs.experiment import Experiment, build_experiment, trained_checkpoint


def run(config: RunConfig) -> None:
    """Score the checkpoint that `config` names, and write the report into the run folder; with ``+eval=NAME``, run
    benchmarks instead."""
    if config.eval is not None:
        return run_benchmarks(config)
    checkpoint = trained_checkpoint(config, "test")
    experiment = build_experiment(config, "test")
    if checkpoint is not None:
        load_weights(experiment.module, read_checkpoint(checkpoint)["state_dict"], checkpoint)
    if experiment.trainer.is_global_zero:
        evaluate_and_report(experiment, config)


def run_benchmarks(config: RunConfig) -> None:
    """Run the tasks of ``config.eval`` (``conf/eval``) on the run folder's last checkpoint, or on ``model.folder``."""
    from omnitrain.runs.load import load_writer
    from omnitrain.tasks.results import model_fingerprint, print_result
    from omnitrain.tasks.settings import BenchmarkRun, RunOptions

    asked = typed(BenchmarkRun, config.eval, "eval")
    if config.ckpt_path not in (None, "last"):
        raise ConfigError(f"ckpt_path={config.ckpt_path}: benchmarks run on the last checkpoint of a run folder")
    run_dir, model_config = Path(config.paths.run_dir), config.model.config
    try:
        tasks = [built(named(task, f"eval.tasks.{name}")) for name, task in asked.tasks.items() if task]
        for task in tasks:
            task.check()
        folder = Path(model_config.folder) if isinstance(model_config, PretrainedConfig) else run_dir
        model, encoder = load_writer(folder, device=asked.device, dtype=asked.dtype)
        fingerprint = model_fingerprint(model, encoder)
        options = RunOptions(limit=asked.limit, batch=asked.batch, restart=asked.restart, fingerprint=fingerprint)
        for task in tasks:
            print_result(task.run(model, encoder, run_dir / TASK_RESULTS, options))
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error


def evaluate_and_report(experiment: Experiment, config: RunConfig) -> None:
    """Score the model as it stands on `data.test_sources` as `config.evaluation` says, print the table, write
    ``report.html`` and name it."""
    from omnitrain.reports.run import write_report

    settings = config.evaluation
    trainer, model = experiment.trainer, experiment.module.model
    assert isinstance(model, OmniModel | AuT | Codec)
    model.to(trainer.strategy.root_device).eval()
    if experiment.datamodule.test_sources:
        with trainer.precision_plugin.forward_context():
            _evaluate(experiment, settings, config.codec)
    else:
        print("nothing is held out to score: name data in data.test_sources", flush=True)
    if settings.report:
        print(f"report: {write_report(experiment.run_dir)}", flush=True)


def _evaluate(experiment: Experiment, settings: Evaluation, codec: str | None) -> None:
    """Run the evaluation that `settings` are of; they and the model must fit."""
    data, model, out = experiment.datamodule, experiment.module.model, experiment.run_dir / EVALUATION
    test = data.opened("test_sources")
    if isinstance(settings, HeldoutEvaluation):
        from omnitrain.evaluation.heldout import evaluate, print_table

        assert isinstance(model, OmniModel | AuT)
        print_table(evaluate(model, data.encoder, test, settings, out, train_sources=data.opened("sources")))
    elif isinstance(settings, TranscriptEvaluation):
        from omnitrain.evaluation.transcripts import evaluate_transcripts, print_transcripts

        assert isinstance(model, OmniModel | AuT)
        heard = data.opened("sources")
        print_transcripts(evaluate_transcripts(model, data.encoder, test, settings, out, train_sources=heard))
    elif isinstance(settings, CodecEvaluation):
        from omnitrain.evaluation.listening import judge_codec

        assert isinstance(model, Codec)
        judge_codec(model, test, data.opened("voice_sources"), settings, out)
    else:
        from omnitrain.evaluation.dialogue import judge_dialogues
        from omnitrain.evaluation.listening import judge_talker
        from omnitrain.generation.decoding import for_decoding
        from omnitrain.generation.speech import Speaker
        from omnitrain.runs.load import load_codec

        assert isinstance(model, OmniModel)
        assert isinstance(settings, SpeechEvaluation)
        trips = None if codec is None else load_codec(codec)
        if settings.int8:
            for_decoding(model, int8=True)
        mimi = trips if isinstance(trips, MimiCodec) and model.code2wav is None else None
        speaker, voices = Speaker(model, data.tokenizer, decoder=mimi), data.opened("voice_sources")
        if isinstance(settings, DialogueEvaluation):
            judge_dialogues(speaker, data.encoder, test, voices, settings, out)
        else:
            judge_talker(speaker, data.tokenizer, trips, test, voices, settings, out)

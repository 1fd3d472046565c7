"""One run of a study: an arm, a matching and a seed, in the folder ``STUDY/MATCH/ARM/seed=N``.

It is planned (`plan`), trained as the ordinary run that the plan describes, and checked against the plan. Its scores go
to ``items.parquet``, written last: the file exists if and only if the run is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from omnitrain.config import launched
from omnitrain.config.run_config import RunConfig
from omnitrain.config.targets import build
from omnitrain.config.typed import ConfigError, typed
from omnitrain.data.stream import Stage
from omnitrain.evaluation.scores import SCORE_COLUMNS, read_table
from omnitrain.files import METRICS, PREDICTIONS, write_json, write_parquet
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import OmniConfig
from omnitrain.reports.run import read_run
from omnitrain.runs.experiment import Experiment, build_data
from omnitrain.study.fingerprint import check_same_study, data_fingerprint, digest, hashed_configuration, sentences
from omnitrain.study.plan import Plan, Planner, sample_sizes
from omnitrain.study.results import CURVE, CURVE_SCHEMA, ITEMS, ITEMS_SCHEMA, RUN, StudyRun, csv_rows, validation_loss
from omnitrain.study.spec import MATCHES, StudySpec
from omnitrain.training.callbacks.run_record import package_versions


def run_arm(config: RunConfig, train: Callable[[RunConfig], Experiment]) -> float | None:
    """Train (by `fit.train`), continue or only name the run that `config` describes, whose folder the caller holds.
    Returns its last validation loss, nats per target token, which sweepers minimise; None if it was stopped by hand.
    Raises ConfigError as `read_spec` and `check_same_study` do."""
    spec, run_dir, study_dir = read_spec(config), Path(config.paths.run_dir), Path(config.paths.study_dir)
    arm, match = _chosen(spec, config)
    data = build_data(config)
    try:
        data.setup("fit")
        fingerprint = data_fingerprint(data)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"data: {error}") from error
    config_hash, data_hash = check_same_study(study_dir, hashed_configuration(config), fingerprint)
    if (run_dir / ITEMS).exists():
        print(f"finished before: {run_dir}", flush=True)
        return validation_loss(run_dir)
    sizes = sample_sizes(data, study_dir / f"sizes-{digest([config_hash, data_hash])[:16]}.parquet")
    model = planning_model(config)
    limit = config.trainer.max_steps if config.trainer.max_steps > 0 else None
    plan = Planner(spec, data, sizes, model).plan(arm, match, limit)
    configured = run_configuration(config, spec, plan)
    run = StudyRun(
        match=match, arm=arm, seed=config.seed, config_hash=config_hash, data_hash=data_hash, planned=plan.summary(),
        margins=spec.margins, parameters=sum(p.numel() for p in model.parameters()), lr=configured.optim.lr,
        versions={name: found for name, found in package_versions().items() if found},
    )  # fmt: skip
    write_json(run_dir / RUN, asdict(run))
    print(
        f"{match}/{arm}, seed {config.seed}: {plan.steps} steps, {plan.tokens[-1]:,} tokens, "
        f"{plan.flops[-1] / 1e12:.2f} TFLOP; samples: "
        + ", ".join(f"{name} {count:,}" for name, count in plan.samples.items()),
        flush=True,
    )
    experiment = train(configured)
    if experiment.trainer.interrupted:
        return None
    steps, drawn = experiment.trainer.global_step, dict(experiment.datamodule.seen_mixture()["drawn"])
    if steps != plan.steps or drawn != plan.samples:
        raise RuntimeError(
            f"the run was planned with {plan.steps} steps of {plan.samples}, and made {steps} of {drawn}; "
            "were the data changed while it ran?"
        )
    items = read_table(run_dir / PREDICTIONS, SCORE_COLUMNS)
    opened = data.opened("sources")
    trained = [opened[name] for name in sorted({name for of in spec.arms.values() for name in of.sources})]
    items = items.append_column("sentence", pa.array(sentences(items["reference"].to_pylist(), trained))).to_pylist()
    write_parquet(run_dir / CURVE, _of_run(run, _curve(run_dir, plan), CURVE_SCHEMA))
    write_json(run_dir / RUN, asdict(replace(run, seconds=_seconds(run_dir), finished=True)))
    write_parquet(run_dir / ITEMS, _of_run(run, items, ITEMS_SCHEMA))
    return validation_loss(run_dir)


# --- from the configuration of the study's run to that of an ordinary one --------------------------------------------


def read_spec(config: RunConfig) -> StudySpec:
    """`config.study`, checked against the data's sources. Raises ConfigError, naming a field that is missing, unknown
    or contradicts another."""
    spec = typed(StudySpec, config.study, "study")
    try:
        spec.check([name for name, source in config.data.config.sources.items() if source is not None])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return spec


def _chosen(spec: StudySpec, config: RunConfig) -> tuple[str, str]:
    """`arm` and `match` of the configuration. Raises ConfigError for no such choice, or a setting under which a plan
    would not hold."""
    for key, choices in (("arm", tuple(spec.arms)), ("match", MATCHES)):
        if getattr(config, key) not in choices:
            raise ConfigError(f"{key}={getattr(config, key)}: the study has no such {key}; choose {', '.join(choices)}")
    if launched.processes() > 1 or str(config.trainer.devices) != "1" or config.trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "study: a run is one process whose batches are its steps; set trainer.devices=1 and "
            "trainer.accumulate_grad_batches=1 (runs of a study go side by side with a launcher)"
        )
    if config.ckpt_path not in (None, "last"):
        raise ConfigError(f"ckpt_path={config.ckpt_path}: a run of a study starts anew, or continues its own folder")
    sizes, after_fit = config.model.config, config.evaluation.after_fit
    if config.data.config.stages or not isinstance(sizes, OmniConfig) or sizes.talker or not after_fit:
        raise ConfigError(
            "study: the study sets data.stages itself, counts no Talker, draws the first weights from the seed and "
            "scores after training; leave out data.stages, choose a model of sizes without a Talker, and keep "
            "evaluation.after_fit=true"
        )
    assert config.arm is not None
    assert config.match is not None
    return config.arm, config.match


def planning_model(config: RunConfig) -> OmniModel:
    """The shapes of the model's weights, on `meta`, and which of them learn."""
    with torch.device("meta"):
        model = build(config.model, place="model")
        # The module freezes what does not learn. (Weights to start from have the same shapes.)
        build(replace(config.module, config=replace(config.module.config, init_from=None)), model, place="module")
    assert isinstance(model, OmniModel)
    return model


def run_configuration(config: RunConfig, spec: StudySpec, plan: Plan) -> RunConfig:
    """`config` as an ordinary run, without `study`, of what `plan` says: sources, stages, steps, and what is a fraction
    of these."""
    sources = {name: config.data.config.sources[name] for name in plan.samples}
    stages = [Stage(samples=dict(stage.samples or {})) for stage in plan.stages]
    data = replace(config.data, config=replace(config.data.config, sources=sources, stages=stages))
    trainer = replace(config.trainer, max_steps=plan.steps, val_check_interval=max(1, plan.steps // spec.validations))
    warmup, lr = max(1, round(spec.warmup_fraction * plan.steps)), spec.lr.get(config.arm or "", config.optim.lr)
    optim = replace(config.optim, warmup_steps=warmup, lr=lr)
    return replace(config, data=data, trainer=trainer, optim=optim, ckpt_path="last", study=None)


# --- what is left of it ----------------------------------------------------------------------------------------------


def _seconds(run_dir: Path) -> float | None:
    """Time in training steps, whatever process took them, and in the evaluation; None if nobody timed the steps."""
    run = read_run(run_dir, samples=False)
    training = run.training_seconds
    return None if training is None else round(training + run.scores["seconds"], 1)


def _curve(run_dir: Path, plan: Plan) -> list[dict[str, Any]]:
    prefix = "validation/loss/"
    return [
        {
            "step": step, "tokens": plan.tokens[step - 1], "flops": plan.flops[step - 1],
            "modality": name.removeprefix(prefix), "loss": float(value),
        }
        for row in csv_rows(run_dir / METRICS) if (step := int(row["step"]))
        for name, value in row.items() if name.startswith(prefix) and value
    ]  # fmt: skip


def _of_run(run: StudyRun, rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    keys = {"match": run.match, "arm": run.arm, "seed": run.seed}
    return pa.Table.from_pylist([{**keys, **row} for row in rows], schema=schema)

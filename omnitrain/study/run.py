"""One run of a study: the plan of an arm, made before it trains, and what is left of it afterwards.

A recipe with `study` (recipes/nondegradation.yaml) names arms: which sources each of them sees. ``fit`` then trains the
one that `arm`, `match` and `seed` name, in the folder ``STUDY/MATCH/ARM/seed=N``.

1. The sizes of all samples are measured once per study (`data.sizes`).
2. From them follow the samples of each source, and with the real order, mixing and packing every batch: steps, tokens
   and floating-point operations are known before training (`plan_run`).
3. The run is an ordinary one, `fit` with data stages that count samples.
4. Its scores go to ``items.parquet``, written last: the file exists if and only if the run is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from omnitrain.config.run_config import RunConfig
from omnitrain.config.targets import build
from omnitrain.config.typed import ConfigError, plain, typed
from omnitrain.data.batch import IGNORE, EncodedSample
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.mixture import Mixture
from omnitrain.data.packing import Packing
from omnitrain.data.shards import Source
from omnitrain.data.sizes import SizedSource, as_it_is, measure, sized_sources
from omnitrain.data.stream import PackedStream, Stage
from omnitrain.models.omni import OmniModel
from omnitrain.models.sizes import OmniConfig
from omnitrain.runs.experiment import Experiment, build_data, build_model
from omnitrain.runs.lock import hold
from omnitrain.study.results import CURVE, CURVE_SCHEMA, ITEMS, ITEMS_SCHEMA, RUN, csv_rows, validation_loss
from omnitrain.study.spec import MATCHES
from omnitrain.training.callbacks.run_record import package_versions
from omnitrain.training.flops import BatchSizes, training_flops, training_flops_by_part

# --- what a recipe says ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one arm is trained on.

    Attributes:
        sources: names in `data.sources`.
        first: sources that are alone at the beginning; the others come after them. Empty: all from the start.
        kept: the share of the samples of `first` that is kept for the time when the others have come.
    """

    sources: list[str]
    first: list[str] = field(default_factory=list)
    kept: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Study:
    """The key `study` of a recipe.

    Attributes:
        arms: by name.
        epochs: passes over each source under ``match=data``, fractions allowed; the same in every arm that sees it.
        margins: largest difference to the unimodal arm that still counts as no worse, by row of the table (`text` in
            bits per byte, `vision` and `audio` in nats per target token).
        compute_reference: under ``match=compute`` every arm gets the operations that this arm has under ``match=data``.
        warmup_fraction: share of a run's steps over which the learning rate rises.
        validations: looks at the validation split, evenly over a run.
        lr: peak learning rate by arm, where it is not `optim.lr`.
    """

    arms: dict[str, Arm]
    epochs: dict[str, float]
    margins: dict[str, float]
    compute_reference: str
    warmup_fraction: float = 0.03
    validations: int = 8
    lr: dict[str, float] = field(default_factory=dict)


def read_study(config: RunConfig) -> Study:
    """`config.study`, checked against the data's sources.

    Raises:
        ConfigError: a field that is missing, unknown or contradicts another; the message names it.
    """
    study = typed(Study, config.study, "study")
    sources = [name for name, source in config.data.config.sources.items() if source is not None]
    for name, arm in study.arms.items():
        place = f"study.arms.{name}"
        if unknown := [source for source in (*arm.sources, *arm.first) if source not in sources]:
            raise ConfigError(f"{place}: no data.sources are called {unknown}; there are {', '.join(sources)}")
        if not arm.sources or set(arm.first) - set(arm.sources):
            raise ConfigError(f"{place}: sources={list(arm.sources)} must hold at least all of first={list(arm.first)}")
        if arm.first and (not 0 <= arm.kept < 1 or set(arm.first) == set(arm.sources)):
            raise ConfigError(f"{place}: with `first`, other sources must follow and kept={arm.kept} lie in [0, 1)")
        if missing := [source for source in arm.sources if not study.epochs.get(source, 0) > 0]:
            raise ConfigError(f"study.epochs: give a number above 0 for {', '.join(missing)} (arm {name})")
    for key, names in (("compute_reference", [study.compute_reference]), ("lr", study.lr)):
        if unknown := [name for name in names if name not in study.arms]:
            raise ConfigError(f"study.{key}: no arm is called {unknown}; arms are {', '.join(study.arms)}")
    if not 0 <= study.warmup_fraction < 1 or study.validations < 1:
        raise ConfigError("study: warmup_fraction must lie in [0, 1) and validations be at least 1")
    return study


def _chosen(study: Study, config: RunConfig) -> tuple[str, str]:
    """`arm` and `match` of the configuration.

    Raises:
        ConfigError: there is no such choice, or a setting under which a plan would not hold.
    """
    for key, choices in (("arm", tuple(study.arms)), ("match", MATCHES)):
        if getattr(config, key) not in choices:
            raise ConfigError(f"{key}={getattr(config, key)}: the study has no such {key}; choose {', '.join(choices)}")
    processes = max(int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("SLURM_NTASKS") or 1))
    if processes > 1 or str(config.trainer.devices) != "1" or config.trainer.accumulate_grad_batches != 1:
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


# --- one configuration, one set of data ------------------------------------------------------------------------------

_HASHED = ("model", "data", "module", "optim", "trainer", "callbacks", "evaluation", "study")
_NO_RESULT = {
    "data": ("num_workers", "worker_buffer", "tokenizer", "predict_sources", "voice_sources"),
    "trainer": ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler"),
    "callbacks": ("checkpoint", "throughput", "record", "progress", "media_panels"),
    "evaluation": ("report", "after_fit"),
}
"""What changes no score. (The tokenizer and what lies at the paths of the sources are in the hash of the data.)"""


def hashed_configuration(config: RunConfig) -> dict[str, Any]:
    """What the results of a study depend on besides arm, matching, seed and data."""
    whole = plain(config)
    hashed: dict[str, Any] = {key: whole[key] for key in _HASHED}
    for section, keys in _NO_RESULT.items():
        for key in keys:
            hashed[section].pop(key, None)
    for which in ("sources", "validation_sources", "test_sources"):
        for source in hashed["data"][which].values():
            if source is not None:
                source.pop("path", None)
    return hashed


def data_fingerprint(data: OmniDataModule) -> dict[str, Any]:
    """Hashes of all that is read: tokenizer, and for each source the files of its samples, the media tables beside them
    and which rows are used. (Media that lie beside a shard as files of their own are not read for this.)"""
    hashes: dict[Path, str] = {}

    def of_file(path: Path) -> str:
        if path not in hashes:
            with path.open("rb") as file:
                hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashes[path]

    def of_source(source: Source) -> dict[str, Any]:
        rows: dict[Path, list[int]] = {}
        for index in range(len(source)):
            file, row = source.locate(index)
            rows.setdefault(Path(file), []).append(row)
        tables = {table for file in rows for table in file.parent.glob("*.parquet") if _is_media_table(table)}
        return {
            "files": {path.name: of_file(path) for path in sorted({*rows, *tables})},
            "rows": _digest([[path.name, numbers] for path, numbers in rows.items()]),
        }

    return {
        "tokenizer": hashlib.sha256(data.tokenizer.to_json().encode()).hexdigest(),
        **{
            which: {name: of_source(source) for name, source in data.opened(which).items()}
            for which in ("sources", "validation_sources", "test_sources")
        },
    }


def _is_media_table(path: Path) -> bool:
    return {"name", "bytes"} <= set(pq.read_schema(path).names)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_same_study(study_dir: Path, configuration: dict[str, Any], data: dict[str, Any]) -> tuple[str, str]:
    """Note configuration and data in ``study.json`` of an empty study folder, or compare with those noted there.

    Returns:
        config_hash, data_hash.

    Raises:
        ConfigError: they are others; the message says in which points.
    """
    now = {
        "config_hash": _digest(configuration),
        "data_hash": _digest(data),
        "configuration": configuration,
        "data": data,
    }
    path = study_dir / "study.json"
    text = json.dumps(now, indent=1, ensure_ascii=False) + "\n"
    _write(path, lambda partial: partial.write_text(text, encoding="utf-8"), replace=False)
    noted = json.loads(path.read_text(encoding="utf-8"))
    if (noted["config_hash"], noted["data_hash"]) != (now["config_hash"], now["data_hash"]):
        before, after = ({**_leaves(x["configuration"], ""), **_leaves(x["data"], "data: ")} for x in (noted, now))
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        rows = [f"  {key}: {before.get(key, '(none)')} -> {after.get(key, '(none)')}" for key in changed]
        more = [f"  and {len(rows) - 12} more"] if len(rows) > 12 else []
        raise ConfigError(
            "\n".join([f"{study_dir} holds a study of another configuration or other data:", *rows[:12], *more])
            + "\nset these back, or begin another study with paths.study_dir=FOLDER"
        )
    return now["config_hash"], now["data_hash"]


def _leaves(node: Any, place: str) -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {place.rstrip("."): node}
    return {name: leaf for key, value in node.items() for name, leaf in _leaves(value, f"{place}{key}.").items()}


def _write(path: Path, write: Callable[[Path], Any], *, replace: bool = True) -> None:
    """Let `write` fill a file beside `path` and give it that name at once, whoever else does the same; with
    ``replace=False``, only if `path` does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            with suppress(FileExistsError):
                os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before it is run.

    Attributes:
        stages: what its data stream does.
        samples: drawn by source (those that cannot be used included).
        tokens, flops: trained on up to and with each step.
        flops_by_part: over the whole run.
        batches: ids of the samples of each step; a piece of a document has its borders behind its id.
    """

    stages: tuple[Stage, ...]
    samples: dict[str, int]
    tokens: tuple[int, ...]
    flops: tuple[float, ...]
    flops_by_part: dict[str, float]
    batches: tuple[tuple[str, ...], ...]

    @property
    def steps(self) -> int:
        return len(self.batches)


class Planner:
    """Plans the runs of a study for one seed.

    Args:
        study: the arms.
        data: the data module with all sources; gives seed, budgets and window.
        sizes: of all samples, by source.
        model: whose operations are counted; on any device. What `requires_grad` counts as learning.
    """

    def __init__(self, study: Study, data: OmniDataModule, sizes: Mapping[str, SizedSource], model: OmniModel) -> None:
        self._study, self._data, self._model = study, data, model
        self._sizes = {name: sizes[name] for name in data.opened("sources")}
        self._mixture = Mixture(self._sizes, as_it_is, seed=data.seed)
        self._cost: dict[BatchSizes, float] = {}
        self._running: dict[str, list[float]] = {}

    def plan(self, arm: str, match: str, max_steps: int | None = None) -> Plan:
        """The run of `arm`, cut off after `max_steps`."""
        factor = 1.0 if match == "data" else self.compute_factor(arm)
        stages = self._stages(arm, self._counts(arm, factor))
        names = [name for name in self._sizes if name in self._study.arms[arm].sources]
        stream = PackedStream(
            Mixture({name: self._sizes[name] for name in names}, as_it_is, seed=self._data.seed),
            weights=dict.fromkeys(names, 1),
            packing=Packing(budget=self._data.budget, window=self._data.config.window, n_bytes=len),
            stages=stages,
            max_bad_fraction=self._data.config.max_bad_fraction,
        )
        tokens, flops, batches = [0], [0.0], []
        by_part: dict[str, float] = {}
        drawn = [0] * len(names)
        for batch in stream:
            for part, operations in training_flops_by_part(self._model, BatchSizes.of(batch)).items():
                by_part[part] = by_part.get(part, 0.0) + operations
            tokens.append(tokens[-1] + batch.n_tokens)
            flops.append(sum(by_part.values()))
            batches.append(batch.sample_ids)
            state = batch.stream_state
            assert state is not None
            drawn = [a + b for a, b in zip(state["drawn"], state["before"], strict=True)]
            if len(batches) == max_steps:
                break
        return Plan(
            stages=stages,
            samples=dict(zip(names, drawn, strict=True)),
            tokens=tuple(tokens[1:]),
            flops=tuple(flops[1:]),
            flops_by_part=by_part,
            batches=tuple(batches),
        )

    def compute_factor(self, arm: str) -> float:
        """By which all epochs of `arm` are multiplied so that its operations come nearest to those of the reference arm
        under ``match=data``."""
        goal = self._flops(self._study.compute_reference, 1.0)
        low, high = 0.0, 1.0
        while self._flops(arm, high) < goal:
            low, high = high, 2 * high
        if self._flops(arm, high) == goal:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._flops(arm, middle) < goal else (low, middle)
        return min((low, high), key=lambda factor: abs(self._flops(arm, factor) - goal))

    def _counts(self, arm: str, factor: float) -> dict[str, int]:
        """Samples drawn by source."""
        epochs = self._study.epochs
        return {
            name: round(factor * epochs[name] * len(source))
            for name, source in self._sizes.items()
            if name in self._study.arms[arm].sources
        }

    def _stages(self, arm: str, counts: Mapping[str, int]) -> tuple[Stage, ...]:
        of = self._study.arms[arm]
        if not of.first:
            return (Stage(samples=dict(counts)),)
        kept = {name: round(of.kept * n) if name in of.first else n for name, n in counts.items()}
        return (Stage(samples={name: counts[name] - kept[name] for name in of.first}), Stage(samples=kept))

    def _flops(self, arm: str, factor: float) -> float:
        """Operations of a run: they add up over samples, whatever pack each of them comes to."""
        return sum(self._up_to(name, n) for name, n in self._counts(arm, factor).items())

    def _up_to(self, name: str, count: int) -> float:
        """Operations of the first `count` samples of a source's endless order."""
        running = self._running.setdefault(name, [0.0])
        number = self._mixture.names.index(name)
        while len(running) <= count:
            draw = self._mixture.fetch(number, len(running) - 1)
            cost = 0.0
            if draw.sample is not None:
                for sizes in self._packed_sizes(draw.sample):
                    if sizes not in self._cost:
                        self._cost[sizes] = training_flops(self._model, sizes)
                    cost += self._cost[sizes]
            running.append(running[-1] + cost)
        return running[count]

    def _packed_sizes(self, sample: EncodedSample) -> Iterable[BatchSizes]:
        """Of `sample` as the stream packs it: whole, in pieces, or not at all."""
        for _, _, part in Packing(budget=self._data.budget, n_bytes=len).parts(sample):
            yield BatchSizes(
                lengths=(len(part),),
                targets=int((part.labels != IGNORE).sum()),
                mel_lengths=tuple(len(mel) for mel in part.mel),
                grid_thw=tuple(map(tuple, part.grid_thw.tolist())),
            )


def sample_sizes(data: OmniDataModule, path: Path) -> dict[str, SizedSource]:
    """The sizes of all samples of `data`, from the Parquet file `path`, or measured and written there."""
    if not path.exists():
        sources = data.opened("sources")
        console = Console(stderr=True)
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console,
        )  # fmt: skip
        total = sum(map(len, sources.values()))
        if not console.is_terminal:
            console.print(f"measuring {total} samples, once for this study", highlight=False)
        with bar:
            task = bar.add_task("measuring samples", total=total)
            table = measure(sources, data.encoder, on_sample=lambda: bar.advance(task))
        _write(path, lambda partial: pq.write_table(table, partial, compression="zstd"))
    return sized_sources(pq.read_table(path))


def planning_model(config: RunConfig) -> OmniModel:
    """The shapes of the model's weights, on `meta`, and which of them learn."""
    with torch.device("meta"):
        model = build_model(config.model)
        # The module freezes what does not learn. (Weights to start from have the same shapes.)
        build(replace(config.module, config=replace(config.module.config, init_from=None)), model, place="module")
    assert isinstance(model, OmniModel)
    return model


# --- the run ---------------------------------------------------------------------------------------------------------


def run_arm(config: RunConfig, train: Callable[[RunConfig], Experiment]) -> float | None:
    """Train, continue or only name the run that `config` describes. Returns its last validation loss, nats per target
    token, which sweepers minimise; None if it was stopped by hand.

    Args:
        config: of the run.
        train: makes an ordinary run (`fit.train`).

    Raises:
        ConfigError: see `read_study` and `check_same_study`.  FolderInUse: another process has the run.
    """
    study, run_dir, study_dir = read_study(config), Path(config.paths.run_dir), Path(config.paths.study_dir)
    arm, match = _chosen(study, config)
    with hold(run_dir):
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
        sizes = sample_sizes(data, study_dir / f"sizes-{_digest([config_hash, data_hash])[:16]}.parquet")
        model = planning_model(config)
        limit = config.trainer.max_steps if config.trainer.max_steps > 0 else None
        plan = Planner(study, data, sizes, model).plan(arm, match, limit)
        configured = run_configuration(config, study, plan)
        record: dict[str, Any] = {
            "arm": arm, "match": match, "seed": config.seed, "config_hash": config_hash, "data_hash": data_hash,
            "planned": {
                "steps": plan.steps, "tokens": plan.tokens[-1], "samples": plan.samples, "flops": plan.flops[-1],
                "flops_by_part": plan.flops_by_part,
            },
            "margins": dict(study.margins), "parameters": sum(p.numel() for p in model.parameters()),
            "lr": configured.optim.lr, "versions": {name: found for name, found in package_versions().items() if found},
            "seconds": None, "finished": False,
        }  # fmt: skip
        _write_json(run_dir / RUN, record)
        print(
            f"{match}/{arm}, seed {config.seed}: {plan.steps} steps, {plan.tokens[-1]:,} tokens, "
            f"{plan.flops[-1] / 1e12:.2f} TFLOP; samples: "
            + ", ".join(f"{name} {count:,}" for name, count in plan.samples.items()),
            flush=True,
        )
        experiment = train(configured)
        if experiment.trainer.interrupted:
            return None
        _check_as_planned(plan, experiment.trainer.global_step, experiment.datamodule.seen_mixture()["drawn"])
        record |= {"seconds": _seconds(run_dir), "finished": True}
        keys = {"match": match, "arm": arm, "seed": config.seed}
        items, curve = _items(run_dir, keys), _curve(run_dir, keys, plan)
        _write(run_dir / CURVE, lambda partial: pq.write_table(curve, partial, compression="zstd"))
        _write_json(run_dir / RUN, record)
        _write(run_dir / ITEMS, lambda partial: pq.write_table(items, partial, compression="zstd"))
        return validation_loss(run_dir)


def run_configuration(config: RunConfig, study: Study, plan: Plan) -> RunConfig:
    """`config` as an ordinary run, without `study`, of what `plan` says: sources, stages, steps, and what is a fraction
    of these."""
    data = config.data.config
    return replace(
        config,
        data=replace(
            config.data,
            config=replace(
                data,
                sources={name: data.sources[name] for name in plan.samples},
                stages=[Stage(samples=dict(stage.samples or {})) for stage in plan.stages],
            ),
        ),
        trainer=replace(
            config.trainer, max_steps=plan.steps, val_check_interval=max(1, plan.steps // study.validations)
        ),
        optim=replace(
            config.optim,
            warmup_steps=max(1, round(study.warmup_fraction * plan.steps)),
            lr=study.lr.get(config.arm or "", config.optim.lr),
        ),
        ckpt_path="last",
        study=None,
    )


def _check_as_planned(plan: Plan, steps: int, drawn: Mapping[str, int]) -> None:
    if steps != plan.steps or dict(drawn) != plan.samples:
        raise RuntimeError(
            f"the run was planned with {plan.steps} steps of {plan.samples}, and made {steps} of {dict(drawn)}; "
            "were the data changed while it ran?"
        )


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    _write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _seconds(run_dir: Path) -> float | None:
    """Time in training steps, whatever process took them, and in the evaluation; None if nobody timed the steps."""
    seconds, before = 0.0, 0
    if not (run_dir / "throughput.csv").exists():
        return None
    for row in csv_rows(run_dir / "throughput.csv"):
        seconds += float(row["seconds_per_step"]) * (int(row["step"]) - before)
        before = int(row["step"])
    return round(seconds + json.loads((run_dir / "eval" / "scores.json").read_text(encoding="utf-8"))["seconds"], 1)


def _with_keys(table: list[dict[str, Any]], keys: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([{**keys, **row} for row in table], schema=schema)


def _items(run_dir: Path, keys: Mapping[str, Any]) -> pa.Table:
    columns = [name for name in ITEMS_SCHEMA.names if name not in keys]
    rows = pq.read_table(run_dir / "eval" / "predictions.parquet", columns=columns).to_pylist()
    return _with_keys(rows, keys, ITEMS_SCHEMA)


def _curve(run_dir: Path, keys: Mapping[str, Any], plan: Plan) -> pa.Table:
    prefix, rows = "validation/loss/", []
    for row in csv_rows(run_dir / "metrics.csv"):
        step = int(row["step"])
        rows += [
            {
                "step": step, "tokens": plan.tokens[step - 1], "flops": plan.flops[step - 1],
                "modality": name.removeprefix(prefix), "loss": float(value),
            }
            for name, value in row.items() if name.startswith(prefix) and value
        ]  # fmt: skip
    return _with_keys(rows, keys, CURVE_SCHEMA)

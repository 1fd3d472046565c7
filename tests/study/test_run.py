"""One run of a study: planned exactly, matched over arms, run once, continued exactly."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from omnitrain.__main__ import main
from omnitrain.config.compose import run_config
from omnitrain.config.door import read
from omnitrain.config.locations import PACK
from omnitrain.config.run_config import RunConfig
from omnitrain.config.typed import ConfigError, plain, typed
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.sample import BadSample, Message, Sample, Segment
from omnitrain.data.settings import DataConfig
from omnitrain.data.shards import write_shards
from omnitrain.runs.experiment import build_data, build_experiment
from omnitrain.study.fingerprint import check_same_study, data_fingerprint, hashed_configuration, sentences
from omnitrain.study.plan import Planner, sample_sizes
from omnitrain.study.results import CURVE_SCHEMA, ITEMS_SCHEMA
from omnitrain.study.run import planning_model, read_spec, run_arm, run_configuration
from omnitrain.training.flops import BatchSizes, training_flops_by_part
from omnitrain.training.thinker import ThinkerModule

ARMS = ("text", "vision", "audio", "omni_early", "omni_late")
MICRO = [
    "+model.thinker={layers:2,accept_hidden_layer:1,d_model:32,heads:2,kv_heads:1,ffn:32,expert_width:16}",
    "+model.aut={d_model:16,layers:1,heads:2,ffn:16,conv_hidden:4}",
    "+model.vision={d_model:32,layers:2,heads:2,ffn:32,deepstack_layers:[0]}",
]
LIMITS = {"texts": 24, "translations": 10, "pictures": 8, "speech": 6, "sounds": 3}


def settings(folder: Path, limits: dict[str, int] = LIMITS) -> list[str]:
    return [
        f"paths.study_dir={folder}",
        *MICRO,
        *(f"+data.sources.{name}.limit={limit}" for name, limit in limits.items()),
        "study.epochs={texts:1,translations:1,pictures:2,speech:2.5,sounds:1}",
        "data.max_tokens=128",
    ]


def few_scores() -> list[str]:
    """What makes training and scoring of a run take a second or two."""
    limited = [f"+data.test_sources.{name}.limit=3" for name in LIMITS]
    return [
        *limited,
        "data.validation_sources.texts.limit=2",
        "data.validation_sources.others.limit=4",
        "study.validations=2",
        "evaluation.max_generated=1",
        "evaluation.max_new_tokens=2",
        "evaluation.report=false",
        "callbacks.checkpoint.every_n_steps=2",
    ]


def configuration(folder: Path, *overrides: str) -> RunConfig:
    return run_config(["+recipe=nondegradation", *overrides, f"paths.run_dir={folder}/run"])


def with_value(config: RunConfig, key: str, value: Any) -> RunConfig:
    values = plain(config)
    inner: list[Any] = [values]
    for name in key.split(".")[:-1]:
        inner.append(inner[-1][name])
    inner[-1][key.rpartition(".")[2]] = value
    return read(values)


def planner(folder: Path, seed: int = 0, limits: dict[str, int] = LIMITS, *more: str) -> tuple[RunConfig, Planner]:
    config = configuration(folder, f"seed={seed}", *settings(folder, limits), *more)
    data = build_data(config)
    data.setup("fit")
    sizes = sample_sizes(data, folder / "sizes.parquet")
    return config, Planner(read_spec(config), data, sizes, planning_model(config))


def of_source(planned: Any, sizes: Path, *sources: str) -> list[str]:
    """Ids of the samples of `sources` in the order in which a plan trains on them."""
    rows = pq.read_table(sizes, columns=["source", "id"]).to_pylist()
    names = {row["id"] for row in rows if row["source"] in sources}
    return [i for batch in planned.batches for i in batch if i.partition("@")[0] in names]


# --- plans -----------------------------------------------------------------------------------------------------------


def test_arms_see_the_same_samples_in_the_same_order(tmp_path: Path) -> None:
    first_seed: list[str] = []
    for seed in (0, 1):
        _, planned = planner(tmp_path, seed)
        plans = {arm: planned.plan(arm, "data") for arm in ARMS}
        for source, arms in {
            "texts": ARMS,
            "translations": ARMS,
            "pictures": ("vision", "omni_early", "omni_late"),
            "speech": ("audio", "omni_early", "omni_late"),
            "sounds": ("audio", "omni_early", "omni_late"),
        }.items():
            orders = [of_source(plans[arm], tmp_path / "sizes.parquet", source) for arm in arms]
            assert len(orders[0]) >= LIMITS[source]
            assert all(order == orders[0] for order in orders), source
            assert all(not of_source(plans[arm], tmp_path / "sizes.parquet", source) for arm in set(ARMS) - set(arms))
        assert plans["omni_early"].samples == {
            "texts": 24,
            "translations": 10,
            "pictures": 16,
            "speech": 15,
            "sounds": 3,
        }
        assert plans["omni_early"].tokens[-1] == plans["omni_late"].tokens[-1]
        # Late: only text at first, then all with a quarter of the text, none of it twice.
        late = plans["omni_late"]
        text = of_source(late, tmp_path / "sizes.parquet", "texts", "translations")
        assert len({i.partition("@")[0] for i in text}) == 34
        alone = [batch for batch in late.batches if set(batch) <= set(text)]
        assert late.batches[: len(alone)] == tuple(alone)
        kept = {i.partition("@")[0] for batch in late.batches[len(alone) :] for i in batch if i in text}
        assert len(kept) == round(0.25 * 24) + round(0.25 * 10)
        assert text != first_seed
        first_seed = text


def test_compute_matched_arms_agree_within_one_percent(tmp_path: Path) -> None:
    limits = {"texts": 90, "translations": 60, "pictures": 40, "speech": 40, "sounds": 10}
    for seed in (0, 1):
        _, planned = planner(tmp_path, seed, limits)
        goal = planned.plan("vision", "data")
        for arm in ARMS:
            plan = planned.plan(arm, "compute")
            assert plan.flops[-1] == pytest.approx(goal.flops[-1], rel=0.01), arm
            assert sum(plan.flops_by_part.values()) == pytest.approx(plan.flops[-1])
            assert ("aut" in plan.flops_by_part) == (arm in ("audio", "omni_early", "omni_late"))
            assert ("visual" in plan.flops_by_part) == (arm in ("vision", "omni_early", "omni_late"))
        assert planned.plan("vision", "compute") == goal
        assert (
            planned.plan("text", "compute").samples["texts"]
            > 90
            > planned.plan("omni_early", "compute").samples["texts"]
        )


@pytest.mark.parametrize("arm", ["omni_early", "omni_late"])
def test_the_plan_is_the_run(tmp_path: Path, arm: str) -> None:
    """Against the batches that the run's own data module decodes, and the operations of these."""
    cfg, planned = planner(tmp_path, 0, LIMITS, f"arm={arm}", "match=compute")
    plan = planned.plan(arm, "compute")
    experiment = build_experiment(run_configuration(cfg, read_spec(cfg), plan), "fit")
    assert isinstance(experiment.module, ThinkerModule)
    batches = list(experiment.datamodule.train_dataloader())
    assert tuple(batch.sample_ids for batch in batches) == plan.batches
    total: dict[str, float] = {}
    for number, batch in enumerate(batches):
        for part, flops in training_flops_by_part(experiment.module.model, BatchSizes.of(batch)).items():
            total[part] = total.get(part, 0) + flops
        assert sum(total.values()) == pytest.approx(plan.flops[number])
    assert total == pytest.approx(plan.flops_by_part)
    assert sum(batch.n_tokens for batch in batches) == plan.tokens[-1]
    experiment.datamodule.mark_trained(batches[-1])
    assert experiment.datamodule.seen_mixture()["drawn"] == plan.samples
    with pytest.raises(RuntimeError, match="lower it"):
        next(iter(experiment.datamodule.train_dataloader()))


def test_what_is_equal_over_arms(tmp_path: Path) -> None:
    """First weights per seed, evaluation, budgets and the shape of the schedule."""
    weights = {}
    for arm in ARMS:
        cfg, planned = planner(tmp_path, 3, LIMITS, f"arm={arm}", "+study.lr.audio=0.002")
        plan = planned.plan(arm, "data")
        run = run_configuration(cfg, read_spec(cfg), plan)
        model = build_experiment(run, "fit").module.model
        weights[arm] = {name: float(value.double().sum()) for name, value in model.state_dict().items()}
        assert weights[arm] == weights["text"]
        assert run.optim.warmup_steps == max(1, round(0.03 * plan.steps))
        assert run.optim.lr == (0.002 if arm == "audio" else 0.001)
        assert run.trainer.max_steps == plan.steps
        assert run.trainer.val_check_interval == plan.steps // 8
        for key in ("evaluation", "module", "model", "callbacks"):
            assert getattr(run, key) == getattr(cfg, key)
        for key in ("max_tokens", "window", "test_sources", "validation_sources"):
            assert getattr(run.data.config, key) == getattr(cfg.data.config, key)


# --- configuration ---------------------------------------------------------------------------------------------------


def never(config: RunConfig) -> Any:
    raise AssertionError("no run should have been started")


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    base = configuration(tmp_path)
    for key, value, message in [
        ("arm", "vison", "arm=vison: the study has no such arm; choose text, vision, audio"),
        ("match", "tokens", "choose data, compute"),
        ("study.epochs.texts", 0, "study.epochs: give a number above 0 for texts"),
        ("study.compute_reference", "omni", "study.compute_reference: no arm is called ['omni']"),
        ("study.arms.text.sources", ["text"], "no data.sources are called ['text']"),
        ("study.arms.omni_late.first", ["books"], "no data.sources are called ['books']"),
        ("study.arms.omni_late.kept", 1.0, "kept=1.0"),
        ("study.arms.text.source", ["texts"], "study.arms.text.source: there is no such key; did you mean sources"),
        ("study.epoch", {}, "study.epoch: there is no such key; did you mean epochs"),
        ("trainer.devices", 2, "trainer.devices=1"),
        ("evaluation.after_fit", False, "evaluation.after_fit=true"),
        ("ckpt_path", "other.ckpt", "ckpt_path=other.ckpt"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            run_arm(with_value(base, key, value), never)
    assert not list(tmp_path.iterdir())


def test_the_command_line_names_the_choices(tmp_path: Path, capsys: Any) -> None:
    assert main(["fit", "+recipe=nondegradation", f"paths.study_dir={tmp_path}", "arm=omni"]) == 1
    assert "arm=omni: the study has no such arm; choose text, vision, audio, omni_early, omni_late" in (
        capsys.readouterr().err
    )


def test_hash_of_the_configuration(tmp_path: Path) -> None:
    base = configuration(tmp_path)
    same = ["arm=text", "match=compute", "seed=7", "paths.study_dir=elsewhere", "data.num_workers=2", "name=other",
            "callbacks.progress=null", "trainer.enable_progress_bar=false", "evaluation.report=false",
            "paths.data_dir=else", "logger=csv", "callbacks.checkpoint.every_n_steps=7"]  # fmt: skip
    assert hashed_configuration(configuration(tmp_path, *same)) == hashed_configuration(base)
    for key, value in [
        ("optim.lr", 0.002), ("data.max_tokens", 256), ("study.margins.text", 0.1), ("evaluation.max_samples", 3),
        ("callbacks.spike_guard.factor", 3), ("data.sources.texts.where.languages", ["es"]), ("data.seed", 5),
        ("trainer.gradient_clip_val", 0.5), ("model.thinker.layers", 3), ("callbacks.spike_guard", None),
    ]:  # fmt: skip
        assert hashed_configuration(with_value(base, key, value)) != hashed_configuration(base), key


def test_hash_of_the_data(tmp_path: Path) -> None:
    def documents(text: str, count: int = 4) -> list[Sample]:
        segments = (Segment(type="text", text=text),)
        messages = (Message(role="document", segments=segments),)
        return [Sample(id=str(i), source="toy", languages=("en",), messages=messages) for i in range(count)]

    def fingerprint(**where: Any) -> dict[str, Any]:
        source = {"path": str(tmp_path / "toy"), "split": "train", **where}
        sources = {"sources": {"toy": source}, "validation_sources": {"toy": source}}
        values = {"tokenizer": str(PACK / "tokenizer.json"), **sources}
        return data_fingerprint(OmniDataModule(typed(DataConfig, values, "data")))

    write_shards(documents("a cat sits"), tmp_path / "toy", "toy", progress=False)
    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(limit=2) != first
    write_shards(documents("a cat lies"), tmp_path / "toy", "toy", progress=False)
    assert fingerprint() != first


def test_sentences_that_were_read_are_found_in_whatever_text() -> None:
    def sample(*texts: str) -> Sample:
        roles = ("user", "assistant") if len(texts) == 2 else ("document",)
        messages = [
            Message(role=role, segments=(Segment(type="text", text=text),))
            for role, text in zip(roles, texts, strict=True)
        ]
        return Sample(id="a", source="", split="train", task="", languages=(), messages=tuple(messages))

    class Broken(list):
        def __getitem__(self, index: Any) -> Any:
            if index == 0:
                raise BadSample("media_missing", "no such file")
            return super().__getitem__(index)

    trained = [
        [sample("Say this in Spanish: A sledge.", "Un trineo.")],
        Broken([0, sample("Birds: a crow, and a red\nkite!")]),
    ]
    texts = {
        "A sledge.": "read", "un  TRINEO": "read", "A crow.": "read", "A red kite.": "read",
        "A crow and a sledge.": "new", "A red.": "read", "A kit.": "new", "Un trineo. Birds": "new", "Un oso.": "new",
    }  # fmt: skip
    assert dict(zip(texts, sentences(texts, trained), strict=True)) == texts


def test_another_configuration_or_other_data_are_not_mixed_in(tmp_path: Path) -> None:
    hashes = check_same_study(tmp_path, {"optim": {"lr": 0.1}}, {"files": {"a.parquet": "1f"}})
    assert check_same_study(tmp_path, {"optim": {"lr": 0.1}}, {"files": {"a.parquet": "1f"}}) == hashes
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.1 -> 0\.2(.|\n)*paths\.study_dir"):
        check_same_study(tmp_path, {"optim": {"lr": 0.2}}, {"files": {"a.parquet": "1f"}})
    with pytest.raises(ConfigError, match=r"data: files\.a\.parquet: 1f -> 2e"):
        check_same_study(tmp_path, {"optim": {"lr": 0.1}}, {"files": {"a.parquet": "2e"}})
    assert not list(tmp_path.glob("*partial"))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_run_once(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = tmp_path / "study"
    line = ["fit", "-m", "+recipe=nondegradation", "arm=text,omni_late", "seed=1", *settings(study), *few_scores()]
    trained: list[list[int]] = []  # of every run: the lengths of the sources that its items are looked up in

    def looked_up(references: list[str], sources: list[Any]) -> list[str]:
        trained.append(sorted(map(len, sources)))
        return ["read" if i % 2 else "new" for i in range(len(references))]

    monkeypatch.setattr("omnitrain.study.run.sentences", looked_up)
    assert main(line) == 0
    shown = capsys.readouterr().out
    for arm in ("text", "omni_late"):
        run = study / "data" / arm / "seed=1"
        record = json.loads((run / "study_run.json").read_text())
        assert (record["arm"], record["match"], record["seed"]) == (arm, "data", 1)
        assert record["finished"] is True
        assert record["seconds"] > 0
        assert f"data/{arm}, seed 1: {record['planned']['steps']} steps" in shown
        items, curve = pq.read_table(run / "items.parquet"), pq.read_table(run / "curve.parquet")
        assert items.schema.equals(ITEMS_SCHEMA)
        assert curve.schema.equals(CURVE_SCHEMA)
        assert set(items["arm"].to_pylist()) == {arm}
        scored = pq.read_table(run / "eval" / "predictions.parquet")
        assert items["loss"].to_pylist() == scored["loss"].to_pylist()
        assert items["sentence"].to_pylist() == ["read" if i % 2 else "new" for i in range(len(items))]
        assert set(items["modality"].to_pylist()) == {"text", "image", "audio"}
        assert curve["tokens"].to_pylist()[-1] <= record["planned"]["tokens"]
        assert json.loads((run / "data.json").read_text())["drawn"] == record["planned"]["samples"]
    assert len({json.loads(path.read_text())["config_hash"] for path in study.rglob("study_run.json")}) == 1
    assert len({tuple(pq.read_table(path)["id"].to_pylist()) for path in study.rglob("items.parquet")}) == 1

    assert trained == [sorted(LIMITS.values())] * 2  # all arms' sources, and not only those of this one

    before = {path: path.stat().st_mtime_ns for path in study.rglob("*.*") if path.name != "multirun.yaml"}
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert shown.count("finished before: ") == 2
    assert "run folder" not in shown
    assert {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }

    single = ["fit", "+recipe=nondegradation", "arm=audio", *settings(study), *few_scores()]
    assert main([*single, "optim.lr=0.5"]) == 1
    error = capsys.readouterr().err
    assert "optim.lr: 0.001 -> 0.5" in error
    assert "paths.study_dir" in error
    assert not (study / "data" / "audio" / "seed=0" / "metrics.csv").exists()


def test_a_stopped_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def line(study: str) -> list[str]:
        return ["fit", "+recipe=nondegradation", "arm=omni_late", *settings(tmp_path / study), *few_scores()]

    whole, stopped = (tmp_path / study / "data" / "omni_late" / "seed=0" for study in ("whole", "stopped"))
    assert main(line("whole")) == 0
    step = ThinkerModule.training_step

    def stopping(self: Any, batch: Any, index: int) -> Any:
        if self.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(ThinkerModule, "training_step", stopping)
        assert main(line("stopped")) == 143
    assert json.loads((stopped / "study_run.json").read_text())["finished"] is False
    assert not (stopped / "items.parquet").exists()
    assert main(line("stopped")) == 0
    assert (whole / "metrics.csv").read_bytes() == (stopped / "metrics.csv").read_bytes()
    items, curve = (pq.read_table(whole / name) for name in ("items.parquet", "curve.parquet"))
    assert pq.read_table(stopped / "items.parquet").equals(items)
    assert pq.read_table(stopped / "curve.parquet").equals(curve)

    (whole / "items.parquet").unlink()  # as if it had been stopped while it was scored
    assert main(line("whole")) == 0
    assert pq.read_table(whole / "items.parquet").equals(items)
    assert pq.read_table(whole / "curve.parquet").equals(curve)

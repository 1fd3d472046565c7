"""Planned against seen: the bound holds for real streams, and a count that is off is found."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from omnitrain.config.typed import typed
from omnitrain.data.chat import train_bpe
from omnitrain.data.composition import composition
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.sample import Message, Sample, Segment
from omnitrain.data.settings import DataConfig
from omnitrain.data.shards import write_shards
from omnitrain.reports.mixture import by_language, by_modality, by_source, planned_draws

LANGUAGES = {"plain": [("en",)] * 40 + [("fr",)] * 20 + [()] * 3, "pairs": [("es", "fr")] * 11 + [("es", "en")] * 30}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, rng = tmp_path_factory.mktemp("mix"), random.Random(0)
    for name, rows in LANGUAGES.items():
        samples = []
        for i, languages in enumerate(rows):
            text = " ".join(rng.choices(["cat", "mat", "moon", "red"], k=rng.randint(3, 9)))
            document = Message(role="document", segments=(Segment(type="text", text=text),))
            samples.append(Sample(id=f"{name}/{i}", source=name, languages=languages, messages=(document,)))
        write_shards(samples, folder / name, name, progress=False)
    train_bpe(["cat mat moon red"], 300).save(folder / "tokenizer.json")
    return {"folder": folder, **{name: folder / name for name in LANGUAGES}}


def module(sources: dict[str, Path], **options: Any) -> OmniDataModule:
    values = {
        "sources": {name: {"path": sources[name], "weight": w} for name, w in (("plain", 0.7), ("pairs", 1.1))},
        "tokenizer": sources["folder"] / "tokenizer.json", "max_tokens": 128, "num_workers": 0, **options,
    }  # fmt: skip
    return OmniDataModule(typed(DataConfig, values, "data"), rank=0, world_size=1)


def record(data: OmniDataModule) -> dict[str, Any]:
    """As the run's `data.json`."""
    parts = {name: composition(source) for name, source in data.opened("sources").items()}
    return {"processes": 1, "planned": data.planned_mixture(), "composition": parts, **data.seen_mixture()}


def test_composition_is_what_the_shards_hold(sources: dict[str, Path]) -> None:
    parts = record(module(sources))["composition"]
    assert parts["plain"] == {
        "samples": 63, "modality": {"text": 63}, "languages": {"en": 40, "fr": 20, "und": 3},
    }  # fmt: skip
    assert parts["pairs"]["languages"] == {"es>fr": 11, "es>en": 30}


def test_the_bound_holds_all_along(sources: dict[str, Path]) -> None:
    data = module(sources)
    loader = iter(data.train_dataloader())
    ids: list[str] = []
    for step in range(60):
        batch = next(loader)
        data.mark_trained(batch)
        ids += batch.sample_ids
        state = record(data)
        rows = [*by_source(state), *by_modality(state), *by_language(state)]
        assert [row for row in rows if row.kept is not True] == [], step
    # Counted by hand: 0.7 of 1.8 of the draws, of which 20 of 63 are French, and 1.1 of 1.8, of which 11 of 41.
    by_name = {row.name: row for row in by_language(state)}
    french = {f"plain/{i}" for i in range(40, 60)} | {f"pairs/{i}" for i in range(11)}
    assert by_name["fr"].samples == Counter(i in french for i in ids)[True]
    assert by_name["fr"].planned == pytest.approx(len(ids) * (7 / 18 * 20 / 63 + 11 / 18 * 11 / 41))
    assert len(ids) > 300  # several epochs of both
    assert by_name["fr"].bound is not None
    assert by_name["fr"].bound < 0.2 * len(ids)
    [plain, _] = by_source(state)
    assert plain.planned == pytest.approx(sum(state["drawn"].values()) * 7 / 18)
    assert plain.bound == 1
    assert sum(row.share for row in by_source(state)) == pytest.approx(1)
    assert plain.planned_tokens == pytest.approx(plain.planned * plain.tokens / plain.samples)


def test_a_wrong_count_is_found(sources: dict[str, Path]) -> None:
    data = module(sources)
    loader = iter(data.train_dataloader())
    for _ in range(60):
        data.mark_trained(next(loader))
    state = copy.deepcopy(record(data))
    state["drawn"]["plain"] += 3
    state["drawn"]["pairs"] -= 3
    assert [row.kept for row in by_source(state)] == [False, False]
    state = copy.deepcopy(record(data))
    samples = state["seen"]["languages"]["samples"]
    moved = samples["es>fr"]
    samples["es>fr"], samples["es>en"] = 0, samples["es>en"] + moved
    samples["fr"], samples["en"] = 0, samples["en"] + samples["fr"]
    assert {row.name: row.kept for row in by_language(state)}["fr"] is False


def test_stages_that_count_samples(sources: dict[str, Path]) -> None:
    """The plan of a finished stage is its counts; the current one's follows its weights."""
    stages = [{"samples": {"plain": 50, "pairs": 10}}, {"weights": {"pairs": 1}}]
    data = module(sources, stages=stages)
    loader = iter(data.train_dataloader())
    for _ in range(30):
        data.mark_trained(next(loader))
    state = record(data)
    assert state["stage"] == 1
    assert planned_draws(state) == {"plain": 50, "pairs": sum(state["drawn"].values()) - 50}
    assert all(row.kept for row in [*by_source(state), *by_language(state)])


def test_what_is_not_promised(sources: dict[str, Path]) -> None:
    data = module(sources, stages=[{"until_tokens": 500, "weights": {"plain": 1}}, {}])
    loader = iter(data.train_dataloader())
    for _ in range(12):
        data.mark_trained(next(loader))
    state = record(data)
    assert state["stage"] == 1
    assert planned_draws(state) is None  # how many were drawn before token 500 is not recorded
    assert all(row.planned is row.bound is row.kept is None for row in by_language(state))
    state = {**record(module(sources)), "processes": 2}
    assert all(row.bound is None for row in by_modality(state))
    assert {row.bound for row in by_source(state)} == {2}
    unknown = {**state, "composition": {"plain": None, "pairs": None}, "drawn": {"plain": 3, "pairs": 2}}
    assert all(row.planned is None for row in by_modality(unknown))

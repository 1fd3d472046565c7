"""Planted effects are found, planted nulls are not, and the intervals cover what they promise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from omnitrain.evaluation.intervals import Estimate, crossed_interval, t_quantile
from omnitrain.evaluation.scores import BITS_PER_BYTE, EXACT_MATCH, NATS_PER_TOKEN, SWAP_GAIN, WER, scores_of
from omnitrain.study.report import write_study_report
from omnitrain.study.results import collect_study, read_study
from omnitrain.study.spec import ARMS
from omnitrain.study.verdicts import (
    MAIN_ROWS,
    Comparison,
    Row,
    cells,
    compare,
    details,
    direction,
    main_table,
    verdict,
)
from tests.study.simulated_study import items_table, simulated_items, write_collected_study, write_study


def table_of(folder: Path, match: str = "data") -> dict[str, Comparison]:
    study = read_study(folder)
    return {c.row.name: c for c in main_table(study, scores_of(study.items), match)}


# --- intervals ---


@pytest.mark.parametrize(
    ("p", "df", "expected"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.995, 4, 4.604),
        (0.975, 120, 1.98),
    ],
)
def test_t_quantile(p: float, df: float, expected: float) -> None:
    """Against the printed tables."""
    assert t_quantile(p, df) == pytest.approx(expected, abs=6e-4)


def test_without_item_variance_the_interval_is_the_t_interval_over_seeds() -> None:
    by_seed = np.array([0.31, 0.28, 0.35, 0.30, 0.26])
    weight = np.array([3.0, 5.0, 2.0, 4.0])
    found = crossed_interval(by_seed[:, None] * weight, weight, "abcd")
    half = 2.776 * by_seed.std(ddof=1) / math.sqrt(5)
    assert found.value == pytest.approx(by_seed.mean())
    assert (found.low, found.high) == pytest.approx((by_seed.mean() - half, by_seed.mean() + half), abs=1e-4)
    assert found.df == pytest.approx(4)


def test_without_seed_variance_the_interval_is_over_groups() -> None:
    of_group = np.random.default_rng(0).normal(size=40)
    of_item, groups = of_group.repeat(3), np.arange(40).repeat(3).astype(str)
    found = crossed_interval(np.tile(of_item, (5, 1)), np.ones(120), groups)
    assert found.se == pytest.approx(of_group.std(ddof=1) / math.sqrt(40))
    assert found.df == pytest.approx(39)
    # Three copies of an item are not three items.
    apart = crossed_interval(np.tile(of_item, (5, 1)), np.ones(120), np.arange(120).astype(str))
    assert apart.se is not None
    assert found.se is not None
    assert apart.se < 0.65 * found.se


def test_the_error_is_that_of_two_way_clusters() -> None:
    """Items of equal weight, one to a group: the variance components of a crossed design, from its mean squares."""
    rng = np.random.default_rng(0)
    seeds, items = 4, 30
    y = rng.normal(0, 0.5, (seeds, 1)) + rng.normal(0, 1.0, (1, items)) + rng.normal(0, 0.5, (seeds, items))
    left = y - y.mean(1, keepdims=True) - y.mean(0) + y.mean()
    both = float((left**2).sum()) / ((seeds - 1) * (items - 1)) / (seeds * items)
    of_seeds, of_items = y.mean(1).var(ddof=1) / seeds, y.mean(0).var(ddof=1) / items
    found = crossed_interval(y, np.ones(items), map(str, range(items)))
    assert of_seeds + of_items - both > max(of_seeds, of_items)  # the sum is what counts here
    assert found.se == pytest.approx(math.sqrt(of_seeds + of_items - both))


def test_the_value_is_the_ratio_of_sums() -> None:
    numerator, weight = np.array([[2.0, 30.0], [4.0, 50.0]]), np.array([1.0, 10.0])
    found = crossed_interval(numerator, weight, "ab")
    assert found.value == pytest.approx((2 + 30 + 4 + 50) / (2 * 11))
    assert found.per_seed == pytest.approx((32 / 11, 54 / 11))


def test_bad_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        crossed_interval(np.array([[1.0, math.nan], [1.0, 2.0]]), np.ones(2), "ab")
    with pytest.raises(ValueError, match=r"\[seeds, items\]"):
        crossed_interval(np.ones((2, 3)), np.ones(2), "ab")
    with pytest.raises(ValueError, match="one group per item"):
        crossed_interval(np.ones((2, 2)), np.ones(2), "abc")


MARGIN = 0.10
SCENES = {
    # standard deviation of seeds, of groups, of seed-by-group
    "seeds": (0.05, 0.02, 0.10),
    "items": (0.005, 0.30, 0.10),
    "both": (0.03, 0.25, 0.30),
}


def simulate(scene: str, *, seeds: int, effect: float, n: int, resamples: int = 0) -> list[Estimate]:
    """`n` studies of 60 concepts with 3 items each, whose true difference is `effect`."""
    of_seed, of_group, rest = SCENES[scene]
    rng = np.random.default_rng(17)
    groups = np.arange(60).repeat(3).astype(str)
    found = []
    for _ in range(n):
        weight = rng.integers(3, 12, 180).astype(float)
        values = effect + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_group, 60).repeat(3)
        values = values + rng.normal(0, rest, (seeds, 60)).repeat(3, axis=1) + rng.normal(0, rest, (seeds, 180))
        found.append(crossed_interval(values * weight, weight, groups, resamples=resamples))
    return found


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("scene", SCENES)
def test_intervals_cover_a_planted_null(scene: str, seeds: int) -> None:
    found = simulate(scene, seeds=seeds, effect=0.0, n=500)
    covered = np.mean([e.low <= 0 <= e.high for e in found])  # ty: ignore[unsupported-operator]
    assert 0.90 <= covered <= 0.99


def test_a_percentile_bootstrap_would_be_too_narrow() -> None:
    """Why the t interval decides, and not the bootstrap."""
    found = simulate("seeds", seeds=3, effect=0.0, n=300, resamples=300)
    assert np.mean([e.bootstrap[0] <= 0 <= e.bootstrap[1] for e in found if e.bootstrap]) < 0.88


@pytest.mark.parametrize("scene", SCENES)
def test_rates_of_false_verdicts(scene: str) -> None:
    """On the margin itself, each wrong answer comes at most about 2.5 % of the time."""
    at_margin = [verdict(e, MARGIN) for e in simulate(scene, seeds=5, effect=MARGIN, n=500)]
    assert at_margin.count("no worse") <= 0.05 * 500
    assert at_margin.count("worse") <= 0.05 * 500
    assert at_margin.count("not decided") >= 0.9 * 500
    null = [verdict(e, MARGIN) for e in simulate(scene, seeds=5, effect=0.0, n=200)]
    assert null.count("worse") == 0
    harm = [verdict(e, MARGIN) for e in simulate(scene, seeds=5, effect=3 * MARGIN, n=200)]
    assert harm.count("no worse") == 0
    assert harm.count("worse") >= 0.8 * 200


def interval(low: float | None, high: float | None) -> Estimate:
    value = 0.0 if low is None or high is None else (low + high) / 2
    return Estimate(
        value=value, low=low, high=high, se=None, se_seeds=None, se_items=None, df=None, seeds=5, items=9, groups=9,
        per_seed=(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "expected", "towards"),
    [
        (-0.05, 0.09, "no worse", ""),
        (-0.05, 0.10, "not decided", ""),  # the margin itself is not inside
        (0.02, 0.09, "no worse", "worse"),  # measurably higher, and within the margin: both are said
        (0.05, 0.15, "not decided", "worse"),
        (0.10, 0.20, "not decided", "worse"),
        (0.11, 0.20, "worse", "worse"),
        (-0.30, -0.01, "no worse", "better"),
        (None, None, "not decided", ""),
    ],
)
def test_verdicts(low: float | None, high: float | None, expected: str, towards: str) -> None:
    assert verdict(interval(low, high), MARGIN) == expected
    assert direction(interval(low, high), lower_is_better=True) == towards


def test_direction_of_scores_that_should_be_high() -> None:
    assert direction(interval(0.01, 0.02), lower_is_better=False) == "better"
    assert direction(interval(-0.02, -0.01), lower_is_better=False) == "worse"


def test_a_margin_must_be_positive() -> None:
    with pytest.raises(ValueError, match="above 0"):
        verdict(interval(0, 1), 0.0)


# --- a study ---


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Early mixing costs the pictures 0.4 nats per token, late mixing improves the sound by 0.5; the rest is null."""
    return write_study(
        tmp_path_factory.mktemp("planted"),
        effects={("omni_early", "image"): 0.4, ("omni_late", "audio"): -0.5},
        item_sd=0.03,
    )


def test_planted_effects_are_found_and_planted_nulls_are_not(planted: Path) -> None:
    table = table_of(planted)
    assert list(table) == ["text", "vision", "audio"]
    found = {(name, arm): (d.verdict, d.direction) for name, c in table.items() for arm, d in c.differences.items()}
    assert found == {
        ("text", "omni_early"): ("no worse", ""),
        ("text", "omni_late"): ("no worse", ""),
        ("vision", "omni_early"): ("worse", "worse"),
        ("vision", "omni_late"): ("no worse", ""),
        ("audio", "omni_early"): ("no worse", ""),
        ("audio", "omni_late"): ("no worse", "better"),
    }
    effect = table["vision"].differences["omni_early"].estimate
    assert effect.low is not None
    assert effect.high is not None
    assert effect.low < 0.4 < effect.high


def test_studies_that_are_too_small_decide_next_to_nothing(tmp_path: Path) -> None:
    """Each of 18 intervals has a chance of about one in twenty to miss."""
    verdicts = []
    for k in range(3):
        write_study(tmp_path / str(k), seeds=3, seed_sd=0.4, concepts=3, random_seed=k)
        verdicts += [d.verdict for c in table_of(tmp_path / str(k)).values() for d in c.differences.values()]
    assert len(verdicts) == 18
    assert verdicts.count("not decided") >= 15


def test_values_equal_a_plain_computation(planted: Path) -> None:
    """Bits per byte and nats per token, from the rows themselves."""
    table = table_of(planted)
    rows = pq.read_table(planted / "data" / "text" / "seed=3" / "items.parquet").to_pylist()
    documents = [r for r in rows if r["task"] == "text"]
    nats, size = sum(r["loss"] * r["tokens"] for r in documents), sum(r["bytes"] for r in documents)
    assert table["text"].arms["text"].per_seed[3] == pytest.approx(nats / math.log(2) / size)
    difference = table["vision"].differences["omni_early"].estimate
    for seed, found in enumerate(difference.per_seed):
        sums = {}
        for arm in ("vision", "omni_early"):
            rows = pq.read_table(planted / "data" / arm / f"seed={seed}" / "items.parquet").to_pylist()
            pictures = [r for r in rows if r["modality"] == "image"]
            sums[arm] = sum(r["loss"] * r["tokens"] for r in pictures) / sum(r["tokens"] for r in pictures)
        assert found == pytest.approx(sums["omni_early"] - sums["vision"])
    means = table["vision"].arms
    assert difference.value == pytest.approx(means["omni_early"].value - means["vision"].value)


def test_sentences_that_an_arm_has_read_stand_apart(tmp_path: Path) -> None:
    """Every other picture's sentence was read, and only these gain, 0.9 nats per token."""
    write_study(tmp_path, item_sd=0.02)
    for path in tmp_path.rglob("items.parquet"):
        rows = pq.read_table(path).to_pylist()
        for row in (row for row in rows if row["id"].startswith("image") and row["id"].endswith("0")):
            row["sentence"] = "read"
            row["loss"] -= 0.9 * row["arm"].startswith("omni")
        pq.write_table(items_table(rows), path)
    table = table_of(tmp_path)
    assert list(table) == ["text", "vision", "vision, sentence read", "audio"]
    new, read = (table[name].differences["omni_early"] for name in ("vision", "vision, sentence read"))
    assert table["vision"].items == table["vision, sentence read"].items == 24
    assert new.estimate.value == pytest.approx(0, abs=0.06)
    assert (new.verdict, new.margin) == ("no worse", 0.10)
    assert read.estimate.value == pytest.approx(-0.9, abs=0.06)
    assert (read.verdict, read.margin, read.direction) == (None, None, "better")
    found = details(scores_of(read_study(tmp_path).items), "data")
    assert {(d.input, d.value) for d in found if d.cut == "sentence"} == {("image", "new"), ("image", "read")}
    write_study_report(tmp_path)
    for line in (tmp_path / "table.md").read_text().splitlines():
        assert "None" not in line
        if line.startswith("| vision, sentence read"):
            assert "| measurably better than the vision arm |" in line
            assert line.endswith("| – |")


def test_answers_and_swaps(planted: Path) -> None:
    study = read_study(planted)
    scores = scores_of(study.items)
    row = Row(name="asr", measure=WER, baseline="audio", select={"modality": ("audio",)})
    found = compare(scores, row, "data")
    assert found is not None
    rows = pq.read_table(planted / "data" / "audio" / "seed=0" / "items.parquet").to_pylist()
    wrong = [r for r in rows if r["task"] == "asr" and r["prediction"] == "uno dos"]
    n_asr = sum(r["task"] == "asr" for r in rows)
    assert found.arms["audio"].per_seed[0] == pytest.approx(len(wrong) / (3 * n_asr))  # one of three words is missing
    assert found.items == n_asr
    cuts = {(d.input, d.comparison.row.measure.name, d.cut, d.value): d.comparison for d in details(scores, "data")}
    assert cuts["image", "swap_gain", "all", ""].arms["omni_early"].value == pytest.approx(0.8)
    assert cuts["image", "exact_match", "all", ""].arms["vision"].value == pytest.approx(0.5, abs=0.15)
    assert ("documents", "exact_match", "all", "") not in cuts  # nothing is generated there
    assert cuts["image", "nats_per_token", "language", "es"].differences["omni_early"].direction == "worse"
    grid = {(d.input, d.value): d.comparison for d in cells(scores, "data", NATS_PER_TOKEN)}
    assert set(grid) == {
        ("documents", "en"), ("translations", "fr"), ("image", "en"), ("image", "es"), ("audio", "es"),
        ("audio", "fr"), ("audio", "en"),
    }  # fmt: skip
    assert grid["image", "en"].differences["omni_early"].estimate.value == pytest.approx(0.4, abs=0.1)


def test_only_common_items_and_common_seeds_are_compared(tmp_path: Path) -> None:
    write_study(tmp_path, seeds={"text": 5, "omni_early": 3, "vision": 1, "omni_late": 1})
    path = tmp_path / "data" / "text" / "seed=1" / "items.parquet"
    rows = pq.read_table(path).to_pylist()
    documents = [r for r in rows if r["task"] == "text"]
    pq.write_table(items_table([r for r in rows if r["id"] != documents[0]["id"]]), path)
    table = table_of(tmp_path)
    text = table["text"]
    assert (text.items, text.dropped) == (len(documents) - 1, 1)
    assert text.arms["omni_early"].items == len(documents) - 1
    assert text.arms["text"].seeds == 5
    assert text.differences["omni_early"].estimate.seeds == 3
    notes = " | ".join(text.notes)
    assert f"1 of {len(documents)} items were not scored in every run" in notes
    assert "omni early − text: seeds 3, 4 not finished in both arms" in notes
    assert "omni early − text: 3 seeds, the interval is wide" in notes
    one = table["vision"].differences["omni_late"]
    assert (one.verdict, one.estimate.low) == ("not decided", None)
    assert any("omni late − vision: 1 seed, no interval" in note for note in table["vision"].notes)
    assert set(table["audio"].arms) == {"omni_early", "omni_late"}  # its baseline has not run
    assert table["audio"].differences == {}
    assert read_study(tmp_path).missing()["data", "audio", 0] == "not begun"


def test_matchings_do_not_mix(tmp_path: Path) -> None:
    write_study(tmp_path, matches=("data", "compute"), seeds=2)
    data, compute = table_of(tmp_path), table_of(tmp_path, "compute")
    assert data["text"].arms["text"].seeds == compute["text"].arms["text"].seeds == 2
    assert data["text"].arms["text"].value != compute["text"].arms["text"].value
    assert compare(scores_of(read_study(tmp_path).items), MAIN_ROWS[0], "nothing") is None


# --- reading ---


def test_both_layouts_say_the_same(tmp_path: Path, planted: Path) -> None:
    collect_study(read_study(planted), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"items.parquet", "curves.parquet", "runs.json", "study.json"}
    raw, collected = read_study(planted), read_study(tmp_path)
    assert raw.runs == collected.runs
    assert raw.configuration == collected.configuration
    assert len(collected.runs) == 5 * len(ARMS)
    assert table_of(planted) == table_of(tmp_path)
    assert pq.ParquetFile(tmp_path / "items.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_unfinished_runs_are_told_and_not_counted(tmp_path: Path) -> None:
    write_study(tmp_path, seeds=2)
    (tmp_path / "data" / "audio" / "seed=1" / "items.parquet").unlink()
    study = read_study(tmp_path)
    assert study.missing() == {("data", "audio", 1): "not finished"}
    assert len(study.finished) == 9
    assert table_of(tmp_path)["audio"].differences["omni_early"].estimate.seeds == 1


def test_nothing_finished_is_no_error(tmp_path: Path) -> None:
    write_study(tmp_path, seeds={"text": 1})
    (tmp_path / "data" / "text" / "seed=0" / "items.parquet").unlink()
    study = read_study(tmp_path)
    assert main_table(study, scores_of(study.items), "data") == []
    assert len(study.missing()) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config_hash": "0ther"}, r"different configuration .*config_hash.*0ther.*data/text/seed=1"),
        ({"data_hash": "0ther"}, r"different data .*0ther"),
        ({"margins": {"text": 0.5, "vision": 0.1, "audio": 0.1}}, "different margins"),
        ({"seed": 7}, r"seed=7, but lies in data/text/seed=1"),
        ({"arm": "all"}, "arm=all is unknown"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_study(tmp_path, seeds={"text": 2})
    path = tmp_path / "data" / "text" / "seed=1" / "study_run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        read_study(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run of a study"):
        read_study(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_study(tmp_path / "nowhere")
    write_study(tmp_path, seeds={"text": 1})
    items = tmp_path / "data" / "text" / "seed=0" / "items.parquet"
    table = pq.read_table(items)
    pq.write_table(table.drop_columns(["tokens"]), items)
    with pytest.raises(ValueError, match=r"items.parquet: columns tokens are missing"):
        read_study(tmp_path)
    items.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"seed=0/items.parquet cannot be read"):
        read_study(tmp_path)
    (items.parent / "study_run.json").write_text("{")
    with pytest.raises(ValueError, match=r"study_run.json is no JSON"):
        read_study(tmp_path)
    (items.parent / "study_run.json").write_text("{}")
    with pytest.raises(ValueError, match="fields arm, config_hash"):
        read_study(tmp_path)


def test_items_that_contradict_each_other_are_refused() -> None:
    rng = np.random.default_rng(0)
    found = simulated_items("data", {"text": 2}, effects={}, seed_sd=0, item_sd=0, concepts=1, rng=rng)
    rows = [row for run in found.values() for row in run]
    with pytest.raises(ValueError, match="stands twice"):
        scores_of(items_table([*rows, rows[0]]))
    rows[-1]["tokens"] += 1
    with pytest.raises(ValueError, match="another number of tokens"):
        scores_of(items_table(rows))


def test_collected_items_without_their_run_are_refused(tmp_path: Path) -> None:
    out = write_collected_study(tmp_path / "raw", tmp_path / "out", seeds={"text": 2})
    runs = json.loads((out / "runs.json").read_text())
    (out / "runs.json").write_text(json.dumps(runs[:1]))
    with pytest.raises(ValueError, match="not the same: data/text/seed=1"):
        read_study(out)


def test_measures_say_which_way_is_better() -> None:
    assert BITS_PER_BYTE.lower_is_better
    assert WER.lower_is_better
    assert not EXACT_MATCH.lower_is_better
    assert not SWAP_GAIN.lower_is_better

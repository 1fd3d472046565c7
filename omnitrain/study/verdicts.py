"""The statistics of the non-degradation study: does mixing modalities cost any of them?

A study is runs of arms (text, text + vision, text + audio, all of them early or late) with several seeds, all scored on
the same held-out items. `read_study` reads it, `compare` answers one row of its table: the score of the unimodal arm
and of both omni arms, and the differences, paired by seed and by item, with intervals that hold for new seeds *and* new
items. docs/nondegradation.md gives the equations and says how well the intervals cover.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omnitrain.evaluation.heldout import ERROR_RATE_TASKS, MODALITIES
from omnitrain.evaluation.metrics import normalise

UNIMODAL = ("text", "vision", "audio")
OMNI = ("omni_early", "omni_late")
ARMS = (*UNIMODAL, *OMNI)
MATCHES = ("data", "compute")
FEW_SEEDS = 5
"""Below this many seeds an interval is wide, and the page says so."""

RUN, ITEMS, CURVE = "study_run.json", "items.parquet", "curve.parquet"
RUNS, CURVES, CONFIGURATION = "runs.json", "curves.parquet", "study.json"

_RUN_COLUMNS = ("match", "arm", "seed")
SCORE_COLUMNS = (
    "id", "source", "split", "modality", "task", "concept", "languages", "loss", "tokens", "bytes", "exact_match",
    "chrf", "swapped_loss", "reference", "prediction",
)  # fmt: skip
"""What ``items.parquet`` has of each item, besides match, arm and seed; ``eval/predictions.parquet`` has them too."""
_ITEM_COLUMNS = (*_RUN_COLUMNS, *SCORE_COLUMNS)
_CURVE_COLUMNS = (*_RUN_COLUMNS, "step", "tokens", "flops", "modality", "loss")

RunKey = tuple[str, str, int]
"""match, arm, seed"""


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """``study_run.json``: one run of a study.

    Attributes:
        config_hash, data_hash: equal for all runs of one study.
        planned: ``steps``, ``tokens``, ``samples`` by source, ``flops``, ``flops_by_part``.
        margins: largest difference that counts as no worse, by row of the table, in the row's unit.
        seconds: that training and evaluation took; None while it runs.
    """

    match: str
    arm: str
    seed: int
    config_hash: str
    data_hash: str
    planned: Mapping[str, Any]
    margins: Mapping[str, float]
    parameters: int
    lr: float
    versions: Mapping[str, str]
    seconds: float | None = None
    finished: bool = False

    @property
    def key(self) -> RunKey:
        return self.match, self.arm, self.seed


@dataclass(frozen=True, kw_only=True)
class Study:
    """What there is of a study so far.

    Attributes:
        runs: all that have begun, in the order of matching, arm and seed.
        items: per-item scores of the finished runs.
        curves: validation losses over training of the finished runs.
        configuration: what ``study.json`` says of configuration and data, if it is there.
    """

    folder: Path
    runs: tuple[StudyRun, ...]
    items: pa.Table
    curves: pa.Table
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> list[StudyRun]:
        return [run for run in self.runs if run.finished]

    @property
    def margins(self) -> Mapping[str, float]:
        return self.runs[0].margins

    @property
    def matches(self) -> list[str]:
        begun = {run.match for run in self.runs}
        return [m for m in MATCHES if m in begun]

    def missing(self) -> dict[RunKey, str]:
        """What a full study with the seeds seen so far would have besides: ``not begun`` or ``not finished``. The seeds
        of one matching are not asked of the other."""
        found: dict[RunKey, str] = {}
        state = {run.key: run.finished for run in self.runs}
        for match in self.matches:
            seeds = sorted({run.seed for run in self.runs if run.match == match})
            for key in ((match, arm, seed) for arm in ARMS for seed in seeds):
                if not state.get(key, False):
                    found[key] = "not finished" if key in state else "not begun"
        return found


def read_study(folder: str | Path) -> Study:
    """Read a study: a folder of runs (``MATCH/ARM/seed=N``), or what `collect_study` made of one.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
        ValueError: a file cannot be read, or runs are not of one configuration and one set of data.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give that of a study (paths.study_dir)")
    collected = folder / RUNS
    if collected.is_file():
        told = _json(collected)
        if not isinstance(told, list):
            raise ValueError(f"{collected}: expected a list of runs")
        runs = [_run(record, collected) for record in told]
        items, curves = folder / ITEMS, folder / CURVES
        tables = [_table(items, _ITEM_COLUMNS)] if items.is_file() else []
        curve_tables = [_table(curves, _CURVE_COLUMNS)] if curves.is_file() else []
    else:
        runs, tables, curve_tables = [], [], []
        for path in sorted(folder.glob(f"*/*/seed=*/{RUN}")):
            run = _run(_json(path), path)
            place = path.parent.relative_to(folder).parts
            if place != (run.match, run.arm, f"seed={run.seed}"):
                raise ValueError(
                    f"{path} is of match={run.match} arm={run.arm} seed={run.seed}, but lies in {'/'.join(place)}; "
                    "was the folder renamed?"
                )
            # The items are written last: they alone say that a run is finished.
            finished = (path.parent / ITEMS).is_file()
            runs.append(replace(run, finished=finished))
            if finished:
                tables.append(_table(path.parent / ITEMS, _ITEM_COLUMNS))
                curve_tables.append(_table(path.parent / CURVE, _CURVE_COLUMNS))
    if not runs:
        raise FileNotFoundError(
            f"{folder} holds no run of a study (MATCH/ARM/seed=N/{RUN}, or {RUNS}); start one with "
            "`python -m omnitrain fit +recipe=nondegradation arm=text match=data seed=0`"
        )
    _check_one_study(runs, folder)
    noted = folder / CONFIGURATION
    order = {name: place for place, name in enumerate((*MATCHES, *ARMS))}
    study = Study(
        folder=folder,
        runs=tuple(sorted(runs, key=lambda r: (order[r.match], order[r.arm], r.seed))),
        items=pa.concat_tables(tables) if tables else _empty(_ITEM_COLUMNS),
        curves=pa.concat_tables(curve_tables) if curve_tables else _empty(_CURVE_COLUMNS),
        configuration=_json(noted) if noted.is_file() else {},
    )
    scored = set(zip(*(study.items[name].to_pylist() for name in _RUN_COLUMNS), strict=True))
    if scored != {run.key for run in study.finished}:
        odd = sorted(scored ^ {run.key for run in study.finished})
        raise ValueError(f"{folder}: items and finished runs are not the same: {', '.join(map(_name, odd[:6]))}")
    return study


def collect_study(study: Study, out: str | Path) -> None:
    """Write the study as a few small files: ``items.parquet`` and ``curves.parquet`` (zstd), ``runs.json``, and
    ``study.json`` if there is one. No media; `read_study` reads the folder."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    order = [(name, "ascending") for name in _RUN_COLUMNS]
    pq.write_table(study.items.sort_by([*order, ("id", "ascending")]), out / ITEMS, compression="zstd")
    by_step = [*order, ("step", "ascending"), ("modality", "ascending")]
    pq.write_table(study.curves.sort_by(by_step), out / CURVES, compression="zstd")
    (out / RUNS).write_text(json.dumps([asdict(run) for run in study.runs], indent=1) + "\n", encoding="utf-8")
    if study.configuration:
        text = json.dumps(study.configuration, indent=1, ensure_ascii=False)
        (out / CONFIGURATION).write_text(text + "\n", encoding="utf-8")


def _name(key: RunKey) -> str:
    return f"{key[0]}/{key[1]}/seed={key[2]}"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def _run(record: Any, path: Path) -> StudyRun:
    known = {f.name for f in fields(StudyRun)}
    needed = known - {"seconds", "finished"}
    if not isinstance(record, dict) or not needed <= set(record):
        lacking = sorted(needed - set(record)) if isinstance(record, dict) else sorted(needed)
        raise ValueError(f"{path}: fields {', '.join(lacking)} are missing; was it written by `fit`?")
    run = StudyRun(**{key: value for key, value in record.items() if key in known})
    if run.match not in MATCHES or run.arm not in ARMS:
        raise ValueError(
            f"{path}: match={run.match} arm={run.arm} is unknown; matchings are {', '.join(MATCHES)}, arms "
            f"{', '.join(ARMS)}"
        )
    return run


def _table(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if lacking := [name for name in columns if name not in table.column_names]:
        raise ValueError(f"{path}: columns {', '.join(lacking)} are missing")
    return table.select(list(columns))


def _empty(columns: Sequence[str]) -> pa.Table:
    return pa.table({name: pa.array([], pa.string()) for name in columns})


def _check_one_study(runs: Sequence[StudyRun], folder: Path) -> None:
    keys = [run.key for run in runs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{folder}: {', '.join(map(_name, twice))} is there twice")
    for name, what in (("config_hash", "configuration"), ("data_hash", "data"), ("margins", "margins")):
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(json.dumps(getattr(run, name), sort_keys=True), []).append(_name(run.key))
        if len(values) > 1:
            groups = "; ".join(f"{value[:60]}: {', '.join(names[:4])}" for value, names in values.items())
            raise ValueError(
                f"{folder}: runs of different {what} cannot be compared ({name} {groups}). Keep one of them here and "
                "move the others to a study folder of their own"
            )


# --- scores as arrays ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score that is a ratio of sums over items: ``sum(numerator) / sum(weight)``."""

    name: str
    unit: str
    lower_is_better: bool
    form: str = ".3f"


BITS_PER_BYTE = Measure(name="bits_per_byte", unit="bits per byte", lower_is_better=True)
NATS_PER_TOKEN = Measure(name="nats_per_token", unit="nats per token", lower_is_better=True)
EXACT_MATCH = Measure(name="exact_match", unit="exact match", lower_is_better=False)
CHRF = Measure(name="chrf", unit="chrF", lower_is_better=False, form=".1f")
WER = Measure(name="wer", unit="word error rate", lower_is_better=True)
SWAP_GAIN = Measure(name="swap_gain", unit="media swap, nats", lower_is_better=False)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The items of a study as arrays over R runs and I items; NaN where a run has no score for an item.

    Attributes:
        runs: match, arm, seed of each row.
        split, modality, task, concept, language: str [I]. `language` is the one that is written.
        tokens, bytes, words: of the reference, float [I]. `words` is 0 where no error rate is asked for.
        loss, swapped_loss: nats per target token, float [R, I].
        exact_match, chrf, word_errors: of generated answers, float [R, I].
    """

    runs: tuple[RunKey, ...]
    split: np.ndarray
    modality: np.ndarray
    task: np.ndarray
    concept: np.ndarray
    language: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    words: np.ndarray
    loss: np.ndarray
    swapped_loss: np.ndarray
    exact_match: np.ndarray
    chrf: np.ndarray
    word_errors: np.ndarray

    def parts(self, measure: Measure) -> tuple[np.ndarray, np.ndarray]:
        """Numerator [R, I] (NaN: no score) and weight [I] of a measure."""
        ones = np.ones(len(self.tokens))
        match measure.name:
            case "bits_per_byte":
                return self.loss * self.tokens / math.log(2), self.bytes
            case "nats_per_token":
                return self.loss * self.tokens, self.tokens
            case "exact_match":
                return self.exact_match, ones
            case "chrf":
                return self.chrf, ones
            case "wer":
                return self.word_errors, self.words
            case "swap_gain":
                return self.swapped_loss - self.loss, ones
        raise ValueError(f"there is no measure {measure.name}")

    def where(self, **conditions: Collection[str]) -> np.ndarray:
        """bool [I]: items whose attributes have one of the given values, e.g. ``where(modality=["text"])``."""
        chosen = np.ones(len(self.tokens), dtype=bool)
        for name, values in conditions.items():
            chosen &= np.isin(getattr(self, name), list(values))
        return chosen


def scores_of(items: pa.Table) -> Scores:
    """Lay the rows of ``items.parquet`` out by run and item.

    Raises:
        ValueError: an item stands twice in a run, or has another length in another run.
    """
    rows = items.to_pydict()
    n = len(rows["id"])
    run_places: dict[RunKey, int] = {}
    item_places: dict[tuple[str, str], int] = {}
    r, i, first = np.zeros(n, dtype=int), np.zeros(n, dtype=int), []
    for place, key in enumerate(zip(*(rows[name] for name in _RUN_COLUMNS), strict=True)):
        r[place] = run_places.setdefault(key, len(run_places))
        item = (rows["source"][place] or "", rows["id"][place])
        if item not in item_places:
            item_places[item] = len(item_places)
            first.append(place)
        i[place] = item_places[item]
    shape = len(run_places), len(item_places)
    names = list(item_places)
    if n:
        _, counts = np.unique(r * shape[1] + i, return_counts=True)
        if counts.max() > 1:
            raise ValueError("an item stands twice in one run's items; every (source, id) may be there once")

    def strings(name: str) -> np.ndarray:
        return np.array([rows[name][place] or "" for place in first], dtype=str)

    def numbers(name: str) -> np.ndarray:
        values = np.array([np.nan if v is None else float(v) for v in rows[name]])
        table = np.full(shape, np.nan)
        table[r, i] = values
        return table

    def lengths(name: str) -> np.ndarray:
        table = numbers(name)
        of_first = np.array([float(rows[name][place]) for place in first])
        if n and (np.abs(table - of_first) > 0).any():  # NaN, where a run lacks the item, is no difference
            odd = names[int(np.argmax((np.abs(table - of_first) > 0).any(axis=0)))]
            raise ValueError(
                f"item {odd[1]} of {odd[0]} has another number of {name} in another run; compare runs of the same data "
                "and tokenizer"
            )
        return of_first

    errors, words = np.full(shape, np.nan), np.zeros(shape[1])
    spoken = [place for place in range(n) if rows["task"][place] in ERROR_RATE_TASKS]
    for place in spoken:
        said, heard = normalise(rows["reference"][place] or ""), rows["prediction"][place]
        if said:
            words[i[place]] = len(said.split())
            if heard is not None:
                errors[r[place], i[place]] = _word_errors(normalise(heard), said)
    concept = strings("concept")
    languages = [rows["languages"][place] for place in first]
    return Scores(
        runs=tuple(run_places),
        split=strings("split"),
        modality=strings("modality"),
        task=strings("task"),
        # An item without a concept is a group of its own.
        concept=np.array([c or "/".join(names[k]) for k, c in enumerate(concept)], dtype=str),
        language=np.array([(given or ["unknown"])[-1] for given in languages], dtype=str),
        tokens=lengths("tokens"),
        bytes=lengths("bytes"),
        words=words,
        loss=numbers("loss"),
        swapped_loss=numbers("swapped_loss"),
        exact_match=numbers("exact_match"),
        chrf=numbers("chrf"),
        word_errors=errors,
    )


@cache
def _word_errors(heard: str, said: str) -> int:
    measured = jiwer.process_words(said, heard)
    return measured.substitutions + measured.deletions + measured.insertions


# --- intervals -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds and items with its 95 % interval.

    Attributes:
        low, high: the interval; None with fewer than two seeds or two groups of items.
        se: standard error for new seeds and new items; `se_seeds` and `se_items` are its two parts.
        df: degrees of freedom of the t distribution.
        bootstrap: percentile bootstrap over seeds and groups, for comparison; too narrow with few seeds.
        per_seed: the value of each seed.
    """

    value: float
    low: float | None
    high: float | None
    se: float | None
    se_seeds: float | None
    se_items: float | None
    df: float | None
    seeds: int
    items: int
    groups: int
    per_seed: tuple[float, ...]
    bootstrap: tuple[float, float] | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@cache
def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t distribution with `df` > 0 degrees of freedom, 0.5 < p < 1.

    With t = sqrt(df) tan(a), the density of a is proportional to cos(a)^(df - 1), which is summed on a grid.
    """
    if not 0.5 < p < 1 or df < 1:
        raise ValueError(f"t_quantile needs 0.5 < p < 1 and df >= 1, got p={p}, df={df}")
    angles = np.linspace(0.0, math.pi / 2, 8_001)
    density = np.cos(angles) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(float(np.interp(2 * p - 1, area / area[-1], angles)))


def _grouped(numerator: np.ndarray, weight: np.ndarray, groups: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums by group: numerator [S, G], weight [G]."""
    names, member = np.unique(np.asarray(list(groups), dtype=str), return_inverse=True)
    if len(member) != len(weight):
        raise ValueError(f"{len(weight)} items but {len(member)} groups: give one group per item")
    sums = np.stack([np.bincount(member, weights=one, minlength=len(names)) for one in numerator])
    return sums, np.bincount(member, weights=weight, minlength=len(names))


def crossed_interval(
    numerator: np.ndarray,
    weight: np.ndarray,
    groups: Iterable[str],
    *,
    level: float = 0.95,
    resamples: int = 0,
    seed: int = 0,
) -> Estimate:
    """Mean of a ratio over seeds that were all scored on the same items, with an interval for new seeds and new items.

    With y_sg the summed numerator of seed s and group g of items (one concept), w_g its weight, and
    d = sum_sg y_sg / (S sum_g w_g), the squared standard error is V_seeds + V_items - V_both, at least the larger of
    the first two: V_seeds = var_s(d_s) / S of the seeds' means; V_items = G / (G - 1) sum_g u_g^2 of the groups'
    linearised residuals u_g = (mean_s y_sg - d w_g) / sum w; V_both is what remains in seed-by-group residuals and is
    counted in both (two-way clustering: Cameron, Gelbach and Miller 2011). The interval is d +- t se, with
    Satterthwaite's degrees of freedom, which are near S - 1 where seeds make the difference.

    Args:
        numerator: float [S, I], without gaps.
        weight: float [I], above 0.
        groups: a name per item; items of one group (a concept) are not independent.
        level: of the interval.
        resamples: of the percentile bootstrap that is given for comparison; 0: none.
        seed: of the bootstrap.

    Raises:
        ValueError: shapes do not fit, nothing to average, or a gap.
    """
    numerator, weight = np.asarray(numerator, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    if numerator.ndim != 2 or numerator.shape[1:] != weight.shape or not numerator.size:
        raise ValueError(f"expected scores [seeds, items] and weights [items], got {numerator.shape}, {weight.shape}")
    if not np.isfinite(numerator).all() or not (weight > 0).all():
        raise ValueError("scores must be finite and weights above 0; take only items that every seed has")
    sums, sizes = _grouped(numerator, weight, groups)
    n_seeds, n_groups = sums.shape
    total = sizes.sum()
    by_seed = sums.sum(axis=1) / total
    value = float(by_seed.mean())
    base: dict[str, Any] = {
        "value": value, "seeds": n_seeds, "items": len(weight), "groups": n_groups,
        "per_seed": tuple(float(v) for v in by_seed),
    }  # fmt: skip
    if n_seeds < 2 or n_groups < 2:
        unknown = dict.fromkeys(("low", "high", "se", "se_seeds", "se_items", "df"))
        return Estimate(**base, **unknown)
    residual = (sums - by_seed[:, None] * sizes) / total  # of each seed about its own mean
    mean_residual = residual.mean(axis=0)
    inflate = n_groups / (n_groups - 1)
    v_seeds = float(by_seed.var(ddof=1)) / n_seeds
    v_items = inflate * float((mean_residual**2).sum())
    v_both = inflate * float(((residual - mean_residual) ** 2).sum()) / (n_seeds * (n_seeds - 1))
    variance = max(v_seeds + v_items - v_both, v_seeds, v_items)
    # A few heavy groups (long documents) tell less about the spread than as many equal ones.
    df_items = max(1.0, total**2 / float((sizes**2).sum()) - 1)
    shares = v_seeds**2 / (n_seeds - 1) + (variance - v_seeds) ** 2 / df_items
    # Above a thousand, t is the normal distribution.
    df = min(1000.0, max(1.0, variance**2 / shares)) if shares > 0 else float(n_seeds - 1)
    half = t_quantile((1 + level) / 2, round(df, 2)) * math.sqrt(variance)
    return Estimate(
        **base,
        low=value - half,
        high=value + half,
        se=math.sqrt(variance),
        se_seeds=math.sqrt(v_seeds),
        se_items=math.sqrt(v_items),
        df=df,
        bootstrap=_crossed_bootstrap(sums, sizes, resamples, level, seed) if resamples else None,
    )


def _crossed_bootstrap(
    sums: np.ndarray, sizes: np.ndarray, resamples: int, level: float, seed: int
) -> tuple[float, float]:
    """Percentile interval when seeds and groups are redrawn, each by itself (pigeonhole bootstrap, Owen 2007)."""
    rng = np.random.default_rng(seed)
    n_seeds, n_groups = sums.shape
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=resamples)  # [B, S]
    groups = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=resamples)  # [B, G]
    means = ((seeds @ sums) * groups).sum(axis=1) / (n_seeds * (groups @ sizes))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# --- the questions ---------------------------------------------------------------------------------------------------

Verdict = Literal["no worse", "worse", "not decided"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A question: a measure on some items, and the unimodal arm that omni is compared with (None: no arm has it)."""

    name: str
    measure: Measure
    baseline: str | None
    select: Mapping[str, tuple[str, ...]]


MAIN_ROWS = (
    Row(name="text", measure=BITS_PER_BYTE, baseline="text", select={"modality": ("text",), "task": ("text",)}),
    Row(name="vision", measure=NATS_PER_TOKEN, baseline="vision", select={"modality": ("image",)}),
    Row(name="audio", measure=NATS_PER_TOKEN, baseline="audio", select={"modality": ("audio",)}),
)
"""The rows of the main table, each with a margin of the same name. Everything else explores."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """omni - unimodal, paired by seed and by item.

    Attributes:
        verdict: against the margin; None where the row has none.
        direction: "better" or "worse" where the interval excludes zero, else "".
    """

    arm: str
    baseline: str
    estimate: Estimate
    margin: float | None
    verdict: Verdict | None
    direction: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of a table.

    Attributes:
        arms: scores of the arms that have one, over all their seeds.
        differences: by omni arm.
        items: compared; `dropped` more were scored in some run, but not in every one.
        notes: what a reader has to know.
    """

    row: Row
    match: str
    arms: Mapping[str, Estimate]
    differences: Mapping[str, Difference]
    items: int
    dropped: int
    notes: tuple[str, ...]


def verdict(estimate: Estimate, margin: float) -> Verdict:
    """Non-inferiority of a score that is better when low: the interval on one side of the margin, or undecided."""
    if not margin > 0:
        raise ValueError(f"a non-inferiority margin must be above 0, got {margin}")
    if estimate.low is None or estimate.high is None:
        return "not decided"
    if estimate.high < margin:
        return "no worse"
    return "worse" if estimate.low > margin else "not decided"


def direction(estimate: Estimate, *, lower_is_better: bool) -> str:
    """ "better" or "worse" where the interval excludes zero, else ""."""
    if not estimate.excludes_zero:
        return ""
    return "better" if (estimate.value < 0) == lower_is_better else "worse"


def compare(
    scores: Scores,
    row: Row,
    match: str,
    *,
    margin: float | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Comparison | None:
    """Answer one question under one matching from the runs that are there; None if no run has scored such an item.

    Only items are used that every run of the arms concerned has scored, so that all numbers of a row are of the same
    items; differences use the seeds that both arms have.
    """
    arms = [arm for arm in ((row.baseline,) if row.baseline else UNIMODAL) + OMNI]
    places = {
        arm: {seed: place for place, (m, a, seed) in enumerate(scores.runs) if (m, a) == (match, arm)} for arm in arms
    }
    places = {arm: dict(sorted(found.items())) for arm, found in places.items() if found}
    used = [place for found in places.values() for place in found.values()]
    numerator, weight = scores.parts(row.measure)
    scored = np.isfinite(numerator[used]) & scores.where(**row.select) & (weight > 0) if used else np.zeros((0, 0))
    if not scored.any():
        return None
    common = scored.all(axis=0)
    n_items, dropped = int(common.sum()), int((scored.any(axis=0) & ~common).sum())
    notes = []
    if dropped:
        notes.append(f"{dropped} of {dropped + n_items} items were not scored in every run and are left out")
    if not n_items:
        return Comparison(row=row, match=match, arms={}, differences={}, items=0, dropped=dropped, notes=tuple(notes))
    weights, groups = weight[common], scores.concept[common]

    def estimate(values: np.ndarray) -> Estimate:
        return crossed_interval(values, weights, groups, resamples=resamples, seed=seed)

    values = {arm: numerator[list(found.values())][:, common] for arm, found in places.items()}
    means = {arm: estimate(v) for arm, v in values.items()}
    differences: dict[str, Difference] = {}
    for arm in OMNI:
        base = row.baseline
        if base is None:
            break
        both = sorted(set(places.get(arm, ())) & set(places.get(base, ())))
        if lacking := sorted(set(places.get(arm, ())) ^ set(places.get(base, ()))):
            seeds = ("seeds " if len(lacking) > 1 else "seed ") + ", ".join(map(str, lacking))
            notes.append(f"{arm.replace('_', ' ')} − {base}: {seeds} not finished in both arms, and left out")
        if not both:
            continue
        pairs = numerator[[places[arm][s] for s in both]] - numerator[[places[base][s] for s in both]]
        found = estimate(pairs[:, common])
        if len(both) < FEW_SEEDS:
            hint = "no interval" if len(both) < 2 else "the interval is wide and rests on few"
            notes.append(f"{arm.replace('_', ' ')} − {base}: {len(both)} seed{'s' if len(both) > 1 else ''}, {hint}")
        differences[arm] = Difference(
            arm=arm,
            baseline=base,
            estimate=found,
            margin=margin,
            verdict=None if margin is None else verdict(found, margin),
            direction=direction(found, lower_is_better=row.measure.lower_is_better),
        )
    return Comparison(
        row=row,
        match=match,
        arms=means,
        differences=differences,
        items=n_items,
        dropped=dropped,
        notes=tuple(notes),
    )


def main_table(study: Study, scores: Scores, match: str, *, resamples: int = 4000) -> list[Comparison]:
    """The rows text, vision and audio under one matching, as far as they can be answered.

    Raises:
        ValueError: the study gives no margin for a row.
    """
    found = []
    for row in MAIN_ROWS:
        if row.name not in study.margins:
            raise ValueError(f"{study.folder}: no margin for '{row.name}' in the runs; set study.margins.{row.name}")
        compared = compare(scores, row, match, margin=float(study.margins[row.name]), resamples=resamples)
        if compared is not None:
            found.append(compared)
    return found


def _baseline(modality: str) -> str | None:
    return {"text": "text", "image": "vision", "video": "vision", "audio": "audio"}.get(modality)


@dataclass(frozen=True, kw_only=True)
class Detail:
    """A further comparison: of a kind of input (`documents`, `translations`, or a modality), cut in some way."""

    input: str
    cut: str
    value: str
    comparison: Comparison


def inputs(scores: Scores) -> dict[str, dict[str, tuple[str, ...]]]:
    """Kinds of input that were scored, with the items they mean: text as documents and as the rest, then modalities."""
    kinds: dict[str, dict[str, tuple[str, ...]]] = {}
    here = set(scores.modality.tolist())
    for modality in [m for m in MODALITIES if m in here]:
        tasks = set(scores.task[scores.modality == modality].tolist())
        if modality == "text":
            if "text" in tasks:
                kinds["documents"] = {"modality": ("text",), "task": ("text",)}
            if others := sorted(tasks - {"text"}):
                kinds["translations"] = {"modality": ("text",), "task": tuple(others)}
        else:
            kinds[modality] = {"modality": (modality,)}
    return kinds


def details(scores: Scores, match: str) -> list[Detail]:
    """Losses by split, task and language of the answer; scores of generated answers; what a swap of media costs."""
    found = []

    def add(kind: str, measure: Measure, cut: str, value: str, select: Mapping[str, tuple[str, ...]]) -> None:
        row = Row(name=kind, measure=measure, baseline=_baseline(select["modality"][0]), select=select)
        compared = compare(scores, row, match)
        if compared is not None:
            found.append(Detail(input=kind, cut=cut, value=value, comparison=compared))

    for kind, select in inputs(scores).items():
        mine = scores.where(**select)
        loss = BITS_PER_BYTE if kind == "documents" else NATS_PER_TOKEN
        add(kind, loss, "all", "", select)
        for cut in ("split", "task", "language"):
            values = sorted(set(getattr(scores, cut)[mine].tolist()))
            for value in values if len(values) > 1 else ():
                add(kind, loss, cut, value, {**select, cut: (value,)})
        for measure in (EXACT_MATCH, CHRF, WER, SWAP_GAIN):
            add(kind, measure, "all", "", select)
            if measure in (EXACT_MATCH, CHRF):
                for split in sorted(set(scores.split[mine].tolist())):
                    add(kind, measure, "split", split, {**select, "split": (split,)})
    return found


def cells(scores: Scores, match: str, measure: Measure, *, split: str | None = None) -> list[Detail]:
    """One comparison per kind of input and language of the answer, in one split or all."""
    found = []
    for kind, select in inputs(scores).items():
        limited = {**select, **({"split": (split,)} if split else {})}
        for language in sorted(set(scores.language[scores.where(**limited)].tolist())):
            chosen = {**limited, "language": (language,)}
            row = Row(name=kind, measure=measure, baseline=_baseline(select["modality"][0]), select=chosen)
            compared = compare(scores, row, match)
            if compared is not None and compared.items:
                found.append(Detail(input=kind, cut="language", value=language, comparison=compared))
    return found

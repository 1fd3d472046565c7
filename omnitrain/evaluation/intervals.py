"""How sure one can be of a score: intervals for new items, and for new items and new seeds.

Items that belong together (captions of one picture, questions about one recording) are one *group*, and groups are what
varies. :func:`bootstrap` redraws them; :func:`crossed_interval` is for models that were trained several times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95  # of every interval


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean or a ratio of sums with its bootstrap interval. `n` samples in `groups` independently drawn groups."""

    mean: float
    low: float
    high: float
    n: int
    groups: int
    level: float = LEVEL

    @property
    def above_zero(self) -> bool:
        return self.low > 0


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


def _group_sums(columns: np.ndarray, groups: Iterable[str], unit: str) -> np.ndarray:
    """Sums by group, float64 [S, G], of `columns`, float64 [S, n], one group for each of n `unit`."""
    names, member = np.unique(np.asarray(list(groups), dtype=str), return_inverse=True)
    if len(member) != columns.shape[1]:
        raise ValueError(f"{columns.shape[1]} {unit}s but {len(member)} groups: give one group per {unit}")
    return np.stack([np.bincount(member, weights=column, minlength=len(names)) for column in columns])


def bootstrap(
    score: Callable[..., np.ndarray], *sizes: int, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979) of a score.

    Args:
        score: float [B] of B redrawn data sets, from how often each unit is in each of them: int [B, n] for each size.
        sizes: n of each kind of unit that is redrawn by itself: of groups; of seeds and of groups (pigeonhole
            bootstrap, Owen 2007).
        resamples: B, how often the data are redrawn.

    Returns (low, high) over the redrawn data that have a score at all; NaN if none has.
    """
    rng = np.random.default_rng(seed)
    scores = score(*(rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in sizes))
    if not np.isfinite(scores).any():
        return math.nan, math.nan
    low, high = np.nanquantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    groups: Iterable[str] | None = None,
    combine: Callable[[np.ndarray], float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A mean, sum of `values` / sum of `weights`, or another score of sums over samples (BLEU), with its `bootstrap`
    interval. All of its sums are redrawn together.

    Args:
        values: float [n], one per sample, e.g. its nats or its errors; with `combine` float [n, S], its statistics.
        weights: float [n], e.g. its tokens, bytes or words; without it 1 each.
        groups: one name per sample, e.g. its concept. Samples of one group are not independent, so whole groups are
            redrawn (the mean stays the mean over samples); without it every sample is its own group.
        combine: sums of the statistics, float64 [S], to the score; NaN where there is none.

    Raises ValueError if there are no values, or not one weight and one group per value.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != (1 if combine is None else 2) or not len(data):
        raise ValueError(f"an interval needs at least one value in one dimension, got shape {data.shape}")
    weight = np.ones(len(data)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.shape != data.shape[:1]:
        raise ValueError(f"{len(data)} values but weights of shape {weight.shape}: give one weight per value")
    columns = np.stack([data, weight]) if combine is None else data.T
    sums = columns if groups is None else _group_sums(columns, groups, "value")  # [S, groups]
    n_groups = sums.shape[1]
    by_group = np.ascontiguousarray(sums.T)

    def score(drawn: np.ndarray) -> np.ndarray:
        if combine is None:
            with np.errstate(invalid="ignore"):  # nothing to weigh was drawn: NaN
                return (drawn @ sums[0]) / (drawn @ sums[1])
        return np.array([combine(row) for row in drawn @ by_group])

    value = float(data.sum() / weight.sum()) if combine is None else combine(data.sum(0))
    low, high = bootstrap(score, n_groups, resamples=resamples, seed=seed)
    return Interval(mean=value, low=low, high=high, n=len(data), groups=n_groups)


@cache
def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t distribution with `df` >= 1 degrees of freedom, 0.5 < p < 1. With t = sqrt(df) tan(a),
    the density of a is proportional to cos(a)^(df - 1), which is summed on a grid."""
    if not 0.5 < p < 1 or df < 1:
        raise ValueError(f"t_quantile needs 0.5 < p < 1 and df >= 1, got p={p}, df={df}")
    angles = np.linspace(0.0, math.pi / 2, 8_001)
    density = np.cos(angles) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(df) * math.tan(float(np.interp(2 * p - 1, area / area[-1], angles)))


def crossed_interval(
    numerator: np.ndarray, weight: np.ndarray, groups: Iterable[str], *, resamples: int = 0, seed: int = 0
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
        resamples: of the percentile bootstrap that is given for comparison; 0: none.

    Raises ValueError where shapes do not fit, there is nothing to average, or a gap.
    """
    numerator, weight = np.asarray(numerator, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    if numerator.ndim != 2 or numerator.shape[1:] != weight.shape or not numerator.size:
        raise ValueError(f"expected scores [seeds, items] and weights [items], got {numerator.shape}, {weight.shape}")
    if not np.isfinite(numerator).all() or not (weight > 0).all():
        raise ValueError("scores must be finite and weights above 0; take only items that every seed has")
    grouped = _group_sums(np.vstack([numerator, weight]), groups, "item")
    sums, sizes = grouped[:-1], grouped[-1]  # [S, G], [G]
    n_seeds, n_groups = sums.shape
    total = sizes.sum()
    by_seed = sums.sum(axis=1) / total
    value = float(by_seed.mean())
    base: dict[str, Any] = {
        "value": value, "seeds": n_seeds, "items": len(weight), "groups": n_groups,
        "per_seed": tuple(float(v) for v in by_seed),
    }  # fmt: skip
    if n_seeds < 2 or n_groups < 2:
        return Estimate(**base, **dict.fromkeys(("low", "high", "se", "se_seeds", "se_items", "df")))
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
    half = t_quantile((1 + LEVEL) / 2, round(df, 2)) * math.sqrt(variance)

    def redrawn(seeds: np.ndarray, groups: np.ndarray) -> np.ndarray:
        return ((seeds @ sums) * groups).sum(axis=1) / (n_seeds * (groups @ sizes))

    by_bootstrap = bootstrap(redrawn, n_seeds, n_groups, resamples=resamples, seed=seed) if resamples else None
    return Estimate(
        **base, low=value - half, high=value + half, df=df, bootstrap=by_bootstrap,
        se=math.sqrt(variance), se_seeds=math.sqrt(v_seeds), se_items=math.sqrt(v_items),
    )  # fmt: skip

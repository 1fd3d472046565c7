"""The mixture as planned against the mixture as seen, by source, modality and language of the answer.

Of D samples drawn, the schedule plans ``share_i * D`` from source i (docs/mixing.md). It keeps this within less than
one sample on each process and in each data stage. A source of n samples, c of them of a group (say, with a French
answer), is passed over in a new order each epoch; so whole epochs hold the group exactly, and the q samples drawn of
the current one hold between ``max(0, q - (n - c))`` and ``min(q, c)`` of it, on average ``q c / n``. This bounds what
is drawn of a group. Of the D samples W are not trained on (they wait in open packs, or were skipped), and may be of any
group: of one that is a part f of the plan, up to ``W max(f, 1 - f)`` more or less than its part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Group:
    """
    Attributes:
        planned: samples, of as many as were drawn (sources) or trained on (other groups); None where the plan is not
            known.
        bound: by how many samples `drawn` or `samples` may differ from it; None where nothing is promised.
        drawn: samples drawn; of sources only.
        samples, tokens: trained on.
        share: of all tokens trained on.
        planned_tokens: `planned` samples, each as long as those of the group were on average.
        asked: share of the tokens that the recipe asks for (its `mix`); of sources only.
    """

    name: str
    planned: float | None
    bound: float | None
    drawn: int | None = None
    samples: int
    tokens: int
    share: float
    planned_tokens: float | None
    asked: float | None = None

    @property
    def kept(self) -> bool | None:
        """Whether the difference is within the bound; None if there is none."""
        if self.planned is None or self.bound is None:
            return None
        return abs((self.samples if self.drawn is None else self.drawn) - self.planned) <= self.bound


def planned_draws(data: Mapping[str, Any]) -> dict[str, float] | None:
    """Samples planned from each source, of as many as were drawn in all, from what ``data.json`` holds. None if that
    cannot be told: several data stages whose lengths are given in tokens have passed."""
    stages, current, drawn = data.get("planned", []), int(data.get("stage", 0)), data.get("drawn", {})
    if not stages:
        return None
    left, planned = sum(drawn.values()), dict.fromkeys(drawn, 0.0)
    for number, stage in enumerate(stages[: current + 1]):
        if number < current and "samples" not in stage:
            return None
        here = left if number == current else sum(stage["samples"].values())
        for name, share in stage["shares"].items():
            planned[name] = planned.get(name, 0.0) + share * here
        left -= here
    return planned


def by_source(data: Mapping[str, Any], asked: Mapping[str, Any] | None = None) -> list[Group]:
    """One row per source, in the order of the configuration. `asked`: a recipe's `mix`, source -> ``{"tokens": relative
    share, ...}``."""
    seen, drawn = data.get("seen", {}).get("source", {}), data.get("drawn", {})
    planned, asked = planned_draws(data) or {}, asked or {}
    total = sum(asked.get(name, {}).get("tokens", 0) for name in drawn)
    bound = data.get("processes", 1) * (int(data.get("stage", 0)) + 1)
    named = dict.fromkeys([*(n for stage in data.get("planned", []) for n in stage.get("shares", {})), *drawn])
    rows = []
    for name in named:
        share = asked[name]["tokens"] / total if total and name in asked else None
        rows.append(_group(name, seen, planned.get(name), bound, drawn=int(drawn.get(name, 0)), asked=share))
    return rows


def by_modality(data: Mapping[str, Any]) -> list[Group]:
    """One row per modality."""
    return _by_group(data, "modality", lambda key: key)


def by_language(data: Mapping[str, Any]) -> list[Group]:
    """One row per language of the answer, the one with most tokens first."""
    return sorted(_by_group(data, "languages", lambda key: key.rpartition(">")[2]), key=lambda row: -row.tokens)


def _by_group(data: Mapping[str, Any], kind: str, group_of: Callable[[str], str]) -> list[Group]:
    tally = data.get("seen", {}).get(kind, {})
    seen = {what: _summed(tally.get(what, {}), group_of) for what in ("samples", "tokens")}
    parts = {name: part for name, part in (data.get("composition") or {}).items() if part is not None}
    sizes = {name: int(part["samples"]) for name, part in parts.items()}
    counts = {name: _summed(part[kind], group_of) for name, part in parts.items()}
    planned, drawn = planned_draws(data), data.get("drawn", {})
    weighted = {name: n for name, n in (planned or {}).items() if n}
    known = planned is not None and weighted.keys() <= parts.keys()
    groups = [*seen["samples"], *(group for name in weighted if known for group in counts[name])]
    stages = int(data.get("stage", 0)) + 1
    used, all_drawn = sum(seen["samples"].values()), sum(drawn.values())
    rows = []
    for group in dict.fromkeys(groups):
        plan = bound = None
        if known:
            here = [name for name in weighted if group in counts[name]]
            part = sum(weighted[name] * counts[name][group] / sizes[name] for name in here) / max(1, all_drawn)
            plan = part * used
            # Several processes take their own places of an order, which is no part of an epoch.
            if data.get("processes", 1) == 1:
                bound = (all_drawn - used) * max(part, 1 - part) + sum(
                    stages + _partial(int(drawn[name]), sizes[name], counts[name][group]) for name in here
                )
                bound = min(bound, max(plan, used - plan))  # no group can be less than nothing, or more than all
        rows.append(_group(group, seen, plan, bound))
    return rows


def _group(name: str, seen: Mapping[str, Any], planned: float | None, bound: float | None, **more: Any) -> Group:
    samples, tokens = (int(seen.get(what, {}).get(name, 0)) for what in ("samples", "tokens"))
    planned_tokens = planned * tokens / samples if planned is not None and samples else None
    share = tokens / max(1, sum(seen.get("tokens", {}).values()))
    return Group(
        name=name, planned=planned, bound=bound, samples=samples, tokens=tokens, share=share,
        planned_tokens=planned_tokens, **more,
    )  # fmt: skip


def _partial(drawn: int, size: int, count: int) -> float:
    """How far `drawn` samples of a source of `size` can be from their part of the `count` of a group (see above)."""
    q = drawn % size
    mean = q * count / size
    return max(min(q, count) - mean, mean - max(0, q - (size - count)))


def _summed(counts: Mapping[str, int], group_of: Callable[[str], str]) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for key, n in counts.items():
        summed[group_of(key)] += n
    return summed


def mixture(data: Mapping[str, Any], asked: Mapping[str, Any] | None, modalities: Iterable[str]) -> dict[str, Any]:
    """What the report shows of ``data.json``; `modalities`: their usual order."""
    order = list(modalities)
    rows = by_modality(data)
    skipped = Counter(data.get("skipped", {})).most_common()
    drawn, seen = sum(data.get("drawn", {}).values()), sum(row.samples for row in rows)
    return {
        "stages": data.get("planned", []),
        "sources": by_source(data, asked),
        "asked": bool(asked),
        "modalities": sorted(rows, key=lambda r: order.index(r.name) if r.name in order else len(order)),
        "languages": by_language(data)[:24],
        "skipped": skipped,
        "waiting": max(0, drawn - seen - sum(n for _, n in skipped)),
        "processes": data.get("processes", 1),
        "packing_efficiency": data.get("packing_efficiency"),
        "tokens": data.get("tokens"),
    }

"""The report's figures, as SVG text that takes the colours of the page around it (light or dark).

matplotlib draws with placeholder colours; `_svg` replaces them by CSS variables of the page: ``--ink`` for text and
axes, ``--line`` for grids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from omnitrain.parallel.estimate import Estimate
from omnitrain.parallel.ledger import KINDS

FEATURES_PER_SECOND = 13
"""Of the audio encoder (`models.aut`)."""
Columns = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Name -> (steps [n], values [n])."""
_INK, _LINE = "#010203", "#010204"
_BLUE, _ORANGE, _GREEN, _VIOLET, _RED, _OTHER = "#5b83d6", "#d98a3d", "#36a185", "#a86cc4", "#d1607f", "#8a8f98"
MODALITY_COLOURS = {"text": _BLUE, "image": _ORANGE, "audio": _GREEN, "video": _VIOLET, "audio_video": _RED}
ARM_COLOURS = {"text": _BLUE, "vision": _ORANGE, "audio": _GREEN, "omni_early": _RED, "omni_late": _VIOLET}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": _INK,
    "axes.labelcolor": _INK, "axes.edgecolor": _LINE, "axes.titlesize": 10.5, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": _LINE, "grid.linewidth": 0.6,
    "xtick.color": _INK, "ytick.color": _INK, "xtick.major.size": 0, "ytick.major.size": 0,
    "legend.frameon": False, "legend.fontsize": 8.5, "legend.handlelength": 1.2,
    "lines.solid_capstyle": "round",
}  # fmt: skip


def colour(modality: str) -> str:
    """The colour of a modality on the page and in figures."""
    return MODALITY_COLOURS.get(modality, _OTHER)


def title(name: str) -> str:
    """A key as words: ``audio_video`` -> ``audio + video``, ``heldout_cell`` -> ``held-out cell``."""
    if name == "audio_video":
        return "audio + video"
    return name.replace("heldout_", "held-out ").replace("_", " ")


def _svg(figure: Figure, label: str) -> Markup:
    """`figure` as an SVG element that scales with the page."""
    buffer = io.StringIO()
    # Identifiers are hashed with the salt: figures on one page must not share them.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(_INK, "var(--ink)").replace(_LINE, "var(--line)")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    # The width of the page decides; the drawing never grows much beyond its own size.
    style = r'style="width:100%;max-width:calc(1.3 * \1pt);height:auto"'
    text = re.sub(r'width="([\d.]+)pt" height="[\d.]+pt"', style, text, count=1)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # of our own making


def _axes(
    count: int, columns: int, panel: tuple[float, float], margin: tuple[float, float] = (0, 0)
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of at most `columns`, and empty places where the last row is not full.
    `panel`, `margin`: width and height in inches, of a panel and of what the figure has besides."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (panel[0] * columns + margin[0], panel[1] * rows + margin[1])
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes


def _styled(draw: Callable[..., Markup]) -> Callable[..., Markup | None]:
    """Run a drawing function under the report's style; of nothing to draw there is no figure."""

    @wraps(draw)
    def drawn(data: Any, *args: Any, **kwargs: Any) -> Markup | None:
        with matplotlib.rc_context(_STYLE):
            return draw(data, *args, **kwargs) if data else None

    return drawn


@_styled
def swap_intervals(records: Sequence[Mapping[str, Any]]) -> Markup:
    """Media-swap gains with their intervals, one line per modality and, smaller, per split."""
    shown = [r for r in records if r["task"] == "all"]
    figure, (axes,) = _axes(1, 1, (7.6, 0.7 + 0.27 * len(shown)))
    axes.axvline(0, color=_INK, linewidth=1)
    axes.set_yticks(range(len(shown)), [title(r["modality" if r["split"] == "all" else "split"]) for r in shown])
    for y, (record, label) in enumerate(zip(shown, axes.get_yticklabels(), strict=True)):
        gain, c = record["gain"], colour(record["modality"])
        whole = record["split"] == "all"
        size, alpha = (3.2, 1.0) if whole else (1.6, 0.65)
        axes.plot([gain["low"], gain["high"]], [y, y], color=c, linewidth=size, alpha=alpha)
        axes.plot(gain["mean"], y, "o", color=c, markersize=8 if whole else 4.5, alpha=alpha)
        label.set_fontweight("bold" if whole else "normal")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("rise of the loss with another sample's medium (nats per target token)")
    return _svg(figure, "media swap intervals")


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` rows, shorter at the ends."""
    if window < 2:
        return values
    ones = np.ones(window)
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


@_styled
def learning_curves(curves: Mapping[str, Columns]) -> Markup:
    """Loss over steps: one panel per modality, in it {"train": (steps [n], losses [n]), NAME: ... of a validation}."""
    figure, panels = _axes(len(curves), 3, (2.9, 2.3), (0.4, 0))
    for axes, (modality, lines) in zip(panels, curves.items(), strict=False):
        c = colour(modality)
        for name, (steps, losses) in lines.items():
            if name == "train":
                axes.plot(steps, losses, color=c, linewidth=0.8, alpha=0.35)
                axes.plot(steps, _smooth(losses, len(losses) // 20), color=c, linewidth=1.8, label="training")
            else:
                axes.plot(steps, losses, "o-", color=_INK, markersize=3.5, linewidth=1.1, label=name)
        axes.set_title(title(modality), color=c, fontweight="bold")
        axes.set_xlabel("step")
    panels[0].set_ylabel("nats per target token")
    panels[0].legend()
    return _svg(figure, "learning curves")


@_styled
def stage_curves(curves: Mapping[str, Sequence[Columns]], borders: Sequence[tuple[str, float]]) -> Markup:
    """Loss over all tokens of a run of stages, end to end: one panel per modality, a line where a stage begins.

    Args:
        curves: modality -> for each stage {"train": (tokens [n], losses [n]), "validation": ...}, either may be absent.
        borders: name of each stage, and tokens (of the whole run) at its start.
    """
    figure, panels = _axes(len(curves), 1, (9.2, 1.8), (0, 0.3))
    end = max(float(line[0][-1]) for parts in curves.values() for part in parts for line in part.values())
    for number, (axes, (modality, parts)) in enumerate(zip(panels, curves.items(), strict=True)):
        c = colour(modality)
        for part in parts:
            if "train" in part:
                tokens, losses = part["train"]
                axes.plot(tokens, losses, color=c, linewidth=0.7, alpha=0.3)
                axes.plot(tokens, _smooth(losses, len(losses) // 10), color=c, linewidth=1.7)
            if "validation" in part:
                axes.plot(*part["validation"], "o-", color=_INK, markersize=3.5, linewidth=1.1)
        for name, start in borders:
            axes.axvline(start, color=_INK, linewidth=0.7, linestyle=(0, (2, 3)))
            if number == 0:
                places: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                axes.annotate(name, (start, 1.0), xytext=(2, 3), fontsize=7.5, rotation=20, **places)
        axes.set_ylabel(title(modality), color=c, fontweight="bold")
        axes.set_xlim(0, 1.01 * end)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(labelbottom=number == len(curves) - 1)
    panels[-1].set_xlabel("tokens trained on, all stages")
    return _svg(figure, "learning curves over all stages")


@_styled
def expert_load(load: Mapping[str, Sequence[Sequence[float]]]) -> Markup:
    """Heat map of how often each expert of each layer was used, by modality; 1 is an even share."""
    shares = {m: np.asarray(c, dtype=float) / np.maximum(np.sum(c, axis=1, keepdims=True), 1) for m, c in load.items()}
    layers, experts = next(iter(shares.values())).shape
    columns = min(3 if experts <= 32 else 1, len(load))
    figure, panels = _axes(len(load), columns, (7.8 / columns, max(1.2, 0.16 * layers + 0.55)), (0, 0.4))
    top = max(1.5, float(np.quantile(np.concatenate([(s * experts).ravel() for s in shares.values()]), 0.99)))
    scale = TwoSlopeNorm(1.0, 0.0, top)
    image = ScalarMappable(scale, "RdYlBu_r")
    for axes, (modality, share) in zip(panels, shares.items(), strict=False):
        axes.imshow(share * experts, aspect="auto", cmap=image.cmap, norm=scale, interpolation="nearest")
        axes.grid(visible=False)
        axes.set_title(title(modality), color=colour(modality), fontweight="bold")
        axes.set_yticks(range(0, layers, max(1, layers // 8)))
        axes.set_xticks(range(0, experts, max(1, experts // 8)))
        axes.set_xlabel("expert")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, shrink=0.8, pad=0.015, label="times an even share").outline.set_visible(False)
    return _svg(figure, "expert load")


@_styled
def lines(series: Columns, ylabel: str, *, share: bool = False) -> Markup:
    """A few named lines over steps; `share` fixes the axis to 0..1."""
    figure, (axes,) = _axes(1, 1, (3.8, 2.1))
    for (name, (steps, values)), c in zip(series.items(), [*MODALITY_COLOURS.values(), _OTHER], strict=False):
        axes.plot(steps, values, color=c, linewidth=1.6, label=name)
    axes.set_xlabel("step")
    axes.set_title(ylabel)
    axes.set_ylim(0, 1.03 if share else None)
    if len(series) > 1:
        axes.legend()
    return _svg(figure, f"{ylabel} over steps")


@_styled
def rank_waiting(shares: Columns) -> Markup:
    """Heat map of the share of the time that each rank (its number -> steps, shares) waits, over steps."""
    ranks = sorted(shares, key=int)
    steps = np.unique(np.concatenate([shares[rank][0] for rank in ranks]))
    cells = np.full((len(ranks), len(steps)), np.nan)
    for row, rank in enumerate(ranks):
        cells[row, np.searchsorted(steps, shares[rank][0])] = shares[rank][1]
    figure, (axes,) = _axes(1, 1, (7.8, 0.9 + 0.16 * len(ranks)))
    top = max(0.1, float(np.nanmax(cells)))
    image = axes.imshow(cells, aspect="auto", interpolation="nearest", cmap="YlOrRd", vmin=0, vmax=top)
    axes.grid(visible=False)
    axes.set_yticks(range(0, len(ranks), max(1, len(ranks) // 16)))
    places = np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int)
    axes.set_xticks(places, [f"{steps[place]:g}" for place in places])
    axes.set_xlabel("step")
    axes.set_ylabel("rank")
    axes.set_title("share of its computing time that each rank waits for the slowest")
    figure.colorbar(image, ax=axes, pad=0.015).outline.set_visible(False)
    return _svg(figure, "waiting of each rank over steps")


@_styled
def by_window(panels: Mapping[str, Mapping[str, Any]]) -> Markup:
    """A score over the attention window of the audio encoder, a panel for each task: title -> ``unit``, ``points``
    (seconds, value, low, high) of all languages, ``languages``, name -> (seconds, value), and ``constant``, the score
    of who never listens, or None."""
    figure, axes_of = _axes(len(panels), 3, (2.9, 2.4), (0.4, 0))
    for axes, (name, panel) in zip(axes_of, panels.items(), strict=False):
        windows, values, lows, highs = np.array(panel["points"]).T
        place = np.arange(len(windows))
        for _, points in sorted(panel["languages"].items()):
            axes.plot(place, [value for _, value in points], color=_OTHER, linewidth=0.8, alpha=0.5)
        axes.fill_between(place, lows, highs, color=_GREEN, alpha=0.18, linewidth=0)
        axes.plot(place, values, "o-", color=_GREEN, linewidth=1.8, markersize=4.5)
        if panel["constant"] is not None:
            axes.axhline(panel["constant"], color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks(place, [f"{w:g}" for w in windows])
        axes.set_title(title(name), fontweight="bold")
        axes.set_xlabel("attention window, s")
        axes.set_ylabel(panel["unit"])
    return _svg(figure, "scores by attention window")


@_styled
def attention(weights: Sequence[Sequence[float]], tokens: Sequence[str]) -> Markup:
    """How much each token of an answer, [n], looks at each feature of a recording, [n, features]."""
    figure, (axes,) = _axes(1, 1, (3.2, 0.7 + 0.15 * len(tokens)))
    seconds = len(weights[0]) / FEATURES_PER_SECOND
    axes.imshow(
        np.asarray(weights), aspect="auto", interpolation="nearest", cmap="magma", extent=(0, seconds, len(tokens), 0)
    )
    axes.grid(visible=False)
    axes.set_yticks(np.arange(len(tokens)) + 0.5, [token.replace("$", r"\$") for token in tokens], fontsize=7)
    axes.set_xlabel("seconds")
    return _svg(figure, "cross-attention")


@_styled
def error_curves(rates: Columns) -> Markup:
    """Error rates over steps: "all" as a thick line, every language as a thin one."""
    figure, (axes,) = _axes(1, 1, (7.8, 2.9))
    colours = matplotlib.colormaps["tab20"]
    for i, (name, (steps, values)) in enumerate(sorted(rates.items(), key=lambda item: (item[0] != "all", item[0]))):
        width, c = (2.4, _INK) if name == "all" else (1.2, colours((i - 1) % 20))
        axes.plot(steps, values, color=c, linewidth=width, label=name)
    axes.set_xlabel("step")
    axes.set_title("character error rate, validation")
    axes.set_ylim(0, min(1.5, axes.get_ylim()[1]))  # a model that cannot stop writes many times the reference
    figure.legend(loc="outside right upper", ncols=1 + len(rates) // 12)
    return _svg(figure, "error rates over steps")


@_styled
def position_curves(lengths: Mapping[str, Mapping[str, Any]], measures: Mapping[str, str]) -> Markup:
    """Scores by position in the recording: a column for each length, a row for each measure (name -> label), points
    with intervals (`positions.Curve`), and dashed what no listening gives."""
    names = list(lengths)
    figure, axes_of = _axes(len(measures) * len(names), len(names), (max(1.5, 7.8 / max(3, len(names))), 1.6), (0.3, 0))
    panels = [(measure, name) for measure in measures for name in names]
    for axes, (measure, name) in zip(axes_of, panels, strict=True):
        curve = lengths[name][measure]
        means = [score.mean for score in curve.scores]
        low, high = ([abs(getattr(s, end) - s.mean) for s in curve.scores] for end in ("low", "high"))
        if means:
            axes.errorbar(curve.places, means, yerr=[low, high], fmt="o-", color=_GREEN, markersize=4, linewidth=1.3)
        if curve.chance is not None:
            axes.axhline(curve.chance, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, {"right": 1, "chrf": 100}.get(measure))
        if name == names[0]:
            axes.set_ylabel(measures[measure])
        if measure == next(iter(measures)):
            axes.set_title(name.replace(", ", "\n"), fontweight="bold")
        if measure == list(measures)[-1] and name == names[len(names) // 2]:
            axes.set_xlabel("place, share of the recording")
    return _svg(figure, "scores by position in the recording")


@_styled
def forest(panels: Sequence[Mapping[str, Any]]) -> Markup:
    """Differences with their intervals against a margin, one panel per row of a table: each has ``title``, ``unit``,
    ``margin``, and ``lines``: label, arm, value, low, high (None: no interval)."""
    rows = max(len(panel["lines"]) for panel in panels)
    figure, axes_of = _axes(len(panels), len(panels), (3.2, 1.25 + 0.34 * rows), (0.4, 0))
    for axes, panel in zip(axes_of, panels, strict=True):
        lines, margin = panel["lines"], panel["margin"]
        ends = [abs(v) for line in lines for v in (line["low"], line["high"], line["value"]) if v is not None]
        reach = 1.15 * max([1.4 * margin, *ends])
        axes.axvspan(margin, reach, color=_OTHER, alpha=0.16, linewidth=0)
        axes.axvline(margin, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.axvline(0, color=_INK, linewidth=1)
        for y, line in enumerate(lines):
            c = ARM_COLOURS.get(line["arm"], _OTHER)
            if line["low"] is not None:
                axes.plot([line["low"], line["high"]], [y, y], color=c, linewidth=3)
            inside = c if line["low"] is not None else "none"
            axes.plot(line["value"], y, "o", color=c, markerfacecolor=inside, markersize=7)
        axes.set_yticks(range(len(lines)), [line["label"] for line in lines])
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlim(-reach, reach)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y", visible=False)
        axes.set_title(panel["title"], fontweight="bold")
        axes.set_xlabel(f"{panel['unit']}; dashed: margin")
    return _svg(figure, "differences to the unimodal arm")


@_styled
def arm_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]],
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, str] = ARM_COLOURS,
) -> Markup:
    """Mean curve of each arm over its seeds, with a band from the lowest to the highest seed. `panels`: title -> arm ->
    for each seed (x [n], losses [n]), x rising; lengths may differ. `colours`: by arm."""
    figure, axes_of = _axes(len(panels), 3, (3.0, 2.5), (0.6, 0))
    named: dict[str, Any] = {}
    for axes, (name, arms) in zip(axes_of, panels.items(), strict=False):
        for arm, curves in arms.items():
            # Only where every seed has a value.
            grid = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
            values = np.stack([np.interp(grid, x, y) for x, y in curves])
            c = colours.get(arm, _OTHER)
            axes.fill_between(grid, values.min(axis=0), values.max(axis=0), color=c, alpha=0.18, linewidth=0)
            [line] = axes.plot(grid, values.mean(axis=0), color=c, linewidth=1.7)
            named[title(arm) if colours is ARM_COLOURS else arm] = line
        axes.set_title(name, fontweight="bold")
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 4T
    axes_of[0].set_ylabel(ylabel)
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=5, fontsize=9, handlelength=1.4)
    return _svg(figure, f"learning curves by arm over {xlabel}")


@_styled
def cell_maps(
    maps: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    form: str,
    marks: Mapping[str, np.ndarray],
    lower_is_better: bool,
    reach: float,
) -> Markup:
    """Heat maps of kind of input x language of the answer: the first of values, the others of differences.

    Args:
        maps: title -> float [rows, columns]; NaN: no such cell.
        marks: title -> bool [rows, columns] for differences: cells in bold, with a star.
        lower_is_better: colours improvements blue.
        reach: the difference at which colours end, unless there are larger ones: small ones shall look small.
    """
    figure, axes_of = _axes(len(maps), 1, (7.8, 0.36 + 0.25 * len(rows)), (0, 0.2))
    differences = [values for name, values in maps.items() if name in marks]
    reach = max([reach, *(float(np.nanmax(np.abs(d))) for d in differences if np.isfinite(d).any())])
    for axes, (name, values) in zip(axes_of, maps.items(), strict=True):
        # Values run from light to dark; the middle of the colours of differences is zero.
        colours = ("RdBu_r" if lower_is_better else "RdBu") if name in marks else "YlGnBu"
        norm = TwoSlopeNorm(0.0, -reach, reach) if name in marks else None
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, norm=norm)
        axes.grid(visible=False)
        for r, c in np.argwhere(np.isfinite(values)):
            red, green, blue, _ = image.cmap(image.norm(values[r, c]))
            light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.55
            bold = name in marks and bool(marks[name][r, c])
            shown = f"{values[r, c]:{'+' if name in marks else ''}{form}}{'*' if bold else ''}".replace("-", "−")
            ink, weight = "#14171a" if light else "#ffffff", "bold" if bold else "normal"
            axes.text(c, r, shown, ha="center", va="center", fontsize=8.5, color=ink, fontweight=weight)
        axes.set_title(name, fontweight="bold")
        axes.set_yticks(range(len(rows)), [title(r) for r in rows])
        axes.set_xticks(range(len(columns)), columns if axes is axes_of[-1] else [""] * len(columns))
        axes.spines[:].set_visible(False)
    return _svg(figure, "cells of input and language")


@_styled
def plan(estimates: Sequence[Estimate]) -> Markup:
    """Memory of each process at its peak, stacked by what it is for, and positions per second of each GPU; one bar a
    mesh, in order."""
    figure, (memory, speed) = _axes(2, 2, (3.6, 0.9 + 0.26 * len(estimates)), (0.6, 0))
    places = range(len(estimates))
    names = [" x ".join(f"{n}" for n in vars(e.sizes).values()) for e in estimates]
    left = np.zeros(len(estimates))
    for kind, c in zip(KINDS, (_BLUE, _GREEN, _ORANGE, _VIOLET, _RED), strict=True):
        widths = np.array([e.memory.get(kind, 0) / 1e9 for e in estimates])
        memory.barh(places, widths, left=left, color=c, height=0.7, label=kind)
        left += widths
    memory.axvline(estimates[0].gpu.memory / 1e9, color=_INK, linewidth=1)
    memory.set_xlabel("GB of each process, and of the GPU")
    memory.legend(fontsize=7)
    colours = [_GREEN if e.fits else _OTHER for e in estimates]
    speed.barh(places, [e.tokens_per_second for e in estimates], color=colours, height=0.7)
    speed.set_xlabel("positions per second of each GPU (grey: does not fit)")
    for axes in (memory, speed):
        axes.set_yticks(places, names if axes is memory else [""] * len(names))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    memory.set_title("data x shard x expert x context")
    return _svg(figure, "memory and speed by mesh")

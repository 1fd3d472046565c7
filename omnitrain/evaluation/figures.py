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
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

_INK, _LINE = "#010203", "#010204"
MODALITY_COLOURS = {
    "text": "#5b83d6",
    "image": "#d98a3d",
    "audio": "#36a185",
    "video": "#a86cc4",
    "audio_video": "#d1607f",
}
_OTHER = "#8a8f98"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def colour(modality: str) -> str:
    """The colour of a modality on the page and in figures."""
    return MODALITY_COLOURS.get(modality, _OTHER)


def title(name: str) -> str:
    """A key as words: ``audio_video`` -> ``audio + video``, ``heldout_cell`` -> ``held-out cell``."""
    if name == "audio_video":
        return "audio + video"
    return name.replace("heldout_", "held-out ").replace("_", " ")


def _svg(figure: Figure, label: str) -> str:
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
    text = re.sub(
        r'width="([\d.]+)pt" height="[\d.]+pt"',
        r'style="width:100%;max-width:calc(1.3 * \1pt);height:auto"',
        text,
        count=1,
    )
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _axes(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.ravel())


def _styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Run a drawing function under the report's style."""

    @wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> str:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


@_styled
def swap_intervals(records: Sequence[Mapping[str, Any]]) -> str:
    """Media-swap gains with their intervals, one line per modality and, smaller, per split."""
    shown = [r for r in records if r["gain"] and r["task"] == "all"]
    figure, (axes,) = _axes(7.6, 0.7 + 0.27 * len(shown))
    axes.axvline(0, color=_INK, linewidth=1)
    for y, record in enumerate(shown):
        whole = record["split"] == "all"
        gain, c = record["gain"], colour(record["modality"])
        size, alpha = (3.2, 1.0) if whole else (1.6, 0.65)
        axes.plot([gain["low"], gain["high"]], [y, y], color=c, linewidth=size, alpha=alpha)
        axes.plot(gain["mean"], y, "o", color=c, markersize=8 if whole else 4.5, alpha=alpha)
    axes.set_yticks(range(len(shown)))
    axes.set_yticklabels([title(r["modality"]) if r["split"] == "all" else title(r["split"]) for r in shown])
    for label, record in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if record["split"] == "all" else "normal")
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
def learning_curves(curves: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> str:
    """Loss over steps: one panel per modality.

    Args:
        curves: modality -> {"train": (steps [n], losses [n]), NAME: ... of a validation}.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, panels = _axes(2.9 * columns + 0.4, 2.3 * rows, rows, columns)
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
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("nats per target token")
    panels[0].legend(fontsize=8.5, handlelength=1.2)
    return _svg(figure, "learning curves")


@_styled
def expert_load(load: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Heat map of how often each expert of each layer was used, by modality; 1 is an even share."""
    first = np.asarray(next(iter(load.values())))
    columns = min(3 if first.shape[1] <= 32 else 1, len(load))
    rows = -(-len(load) // columns)
    height = max(1.2, 0.16 * first.shape[0] + 0.55)
    figure, panels = _axes(7.8, height * rows + 0.4, rows, columns)
    scaled = {m: np.asarray(c, dtype=float) / np.maximum(np.sum(c, axis=1, keepdims=True), 1) for m, c in load.items()}
    scaled = {m: share * share.shape[1] for m, share in scaled.items()}
    top = max(1.5, float(np.quantile(np.concatenate([s.ravel() for s in scaled.values()]), 0.99)))
    image = None
    for axes, (modality, share) in zip(panels, scaled.items(), strict=False):
        image = axes.imshow(
            share, aspect="auto", cmap="RdYlBu_r", norm=TwoSlopeNorm(1.0, 0.0, top), interpolation="nearest"
        )
        axes.grid(visible=False)
        axes.set_title(title(modality), color=colour(modality), fontweight="bold")
        axes.set_yticks(range(0, share.shape[0], max(1, share.shape[0] // 8)))
        axes.set_xticks(range(0, share.shape[1], max(1, share.shape[1] // 8)))
        axes.set_xlabel("expert")
    panels[0].set_ylabel("layer")
    for axes in panels[len(load) :]:
        axes.set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.8, pad=0.015, label="times an even share").outline.set_visible(False)
    return _svg(figure, "expert load")


@_styled
def lines(series: Mapping[str, tuple[np.ndarray, np.ndarray]], ylabel: str, *, share: bool = False) -> str:
    """A few named lines over steps; `share` fixes the axis to 0..1."""
    figure, (axes,) = _axes(3.8, 2.1)
    for (name, (steps, values)), c in zip(series.items(), [*MODALITY_COLOURS.values(), _OTHER], strict=False):
        axes.plot(steps, values, color=c, linewidth=1.6, label=name)
    axes.set_xlabel("step")
    axes.set_title(ylabel)
    if share:
        axes.set_ylim(0, 1.03)
    else:
        axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend(fontsize=8.5, handlelength=1.2)
    return _svg(figure, f"{ylabel} over steps")

"""``report.html``: one file about a run that needs no other file and no network.

Everything is read from the run folder, so a report can be written while a run is going on, from a run that was cut off,
or on another machine. What is not there is named in the report, with the command that makes it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup

from omnitrain.data.media import MediaLimits, decode_video, encode_image
from omnitrain.data.sample import MODALITIES, BadSample, Segment
from omnitrain.data.view import browser_media, show, spectrogram
from omnitrain.files import (
    CONFIG,
    DATA,
    ENVIRONMENT,
    METRICS,
    PREDICTIONS,
    REPORT,
    SCORES,
    SKIPPED_STEPS,
    THROUGHPUT,
    read_json,
    write_text,
)
from omnitrain.reports import figures
from omnitrain.reports.mixture import mixture

SAMPLES_PER_MODALITY = 8


@dataclass(frozen=True)
class Missing:
    """A part of the report that could not be made: what, from which file, and how to get it."""

    part: str
    file: str
    fix: str


@dataclass
class Run:
    """What a run folder holds; anything may be absent.

    Attributes:
        metrics, throughput: column -> (steps [n], values [n]), rows without a value left out.
        missing: what is absent.
    """

    folder: Path
    config_text: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    throughput: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    speech: dict[str, Any] = field(default_factory=dict)
    spoken: list[dict[str, Any]] = field(default_factory=list)
    bad_samples: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: list[dict[str, Any]] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def last(self, column: str) -> float | None:
        """The latest value of a metrics column."""
        return float(self.metrics[column][1][-1]) if column in self.metrics else None


def _scores(run: Run) -> str:
    """Which evaluation the run ends with; it was once called ``judge``."""
    evaluation = run.config.get("evaluation") or {}
    return evaluation.get("scores") or evaluation.get("judge") or "heldout"


def read_run(folder: str | Path, *, samples: bool = True) -> Run:
    """Read a run folder.

    Args:
        samples: False leaves out predictions and speech, which are large.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is there but cannot be read; the message names it.
    """
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise FileNotFoundError(f"{run.folder} is no folder; give the folder of a run (paths.run_dir)")
    train = "written while training (`python -m omnitrain fit`)"
    test = f"run `python -m omnitrain test {run.folder}`"

    def there(name: str, part: str, fix: str) -> Path | None:
        path = run.folder / name
        if path.is_file() and path.stat().st_size:
            return path
        run.missing.append(Missing(part, name, fix))
        return None

    if path := there(CONFIG, "configuration", train):
        import yaml

        run.config_text = path.read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(run.config_text) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no configuration: write a mapping of keys")
        run.config = {**(values.get("variables") or {}), **values}  # what a recipe calls by names of its own: `mix`
    if path := there(METRICS, "learning curves", train):
        run.metrics = _columns(path)
    if path := there(THROUGHPUT, "throughput", train):
        run.throughput = _columns(path)
    if path := there(DATA, "data mixture", "written with each checkpoint (callbacks.record)"):
        run.data = _record(path)
    if path := there(ENVIRONMENT, "environment", train):
        run.environment = _record(path)
    if _scores(run) == "heldout":
        if path := there(SCORES, "held-out scores, media swap, expert load", test):
            run.scores = _record(path)
        if samples and (path := there(PREDICTIONS, "samples and predictions", test)):
            run.predictions = pq.read_table(path).to_pylist()
    else:
        if path := there("eval/speech.json", "scores of the speech", test):
            run.speech = _record(path)
        if samples and (path := there("eval/speech.parquet", "speech to listen to", test)):
            run.spoken = pq.read_table(path).to_pylist()
    # These exist only when there is something to tell.
    run.bad_samples = [row for path in sorted(run.folder.glob("bad_samples*.jsonl")) for row in _json_lines(path)]
    if (path := run.folder / SKIPPED_STEPS).is_file():
        run.skipped_steps = _json_lines(path)
    return run


def _record(path: Path) -> dict[str, Any]:
    """What a run has noted: a mapping.

    Raises:
        ValueError: the file holds something else; the message names it.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no record of a run: it must be a mapping")
    return record


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a run that is going on may be writing the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def _columns(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each column of a metrics file; empty and non-finite entries are left out."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            for name, text in row.items():
                value = _number(text)
                if name and name != "step" and step is not None and value is not None:
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


# --- parts of the page ---------------------------------------------------------------------------------------------


def _by_modality(names: Iterable[str]) -> list[str]:
    """Known modalities first, in their usual order."""
    names = set(names)
    return [m for m in MODALITIES if m in names] + sorted(names - set(MODALITIES))


def _headline(run: Run) -> list[dict[str, Any]]:
    """One row per modality: held-out scores, or else the last validation's losses."""
    if run.scores:
        gains = {r["modality"]: r["gain"] for r in run.scores["media_swap"] if r["split"] == r["task"] == "all"}
        rows = [r for r in run.scores["scores"] if r["split"] == r["task"] == "all"]
        return [{**row, "gain": gains.get(row["modality"])} for row in rows]
    modalities = _by_modality(name.rpartition("/")[2] for name in run.metrics if name.startswith("validation/loss/"))
    return [
        {
            "modality": m,
            "loss": run.last(f"validation/loss/{m}"),
            "bits_per_byte": run.last(f"validation/bits_per_byte/{m}"),
        }
        for m in modalities
    ]


def _named(
    table: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Mapping[str, str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The columns of `table` that are there, under their labels."""
    return {label: table[column] for column, label in names.items() if column in table}


def _curves(run: Run) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for column, values in run.metrics.items():
        match = re.fullmatch(r"(?:(train)|(validation(?:/.+)?))/loss/(\w+)", column)
        if match:
            curves.setdefault(match[3], {})[match[1] or match[2]] = values
    return {m: dict(sorted(curves[m].items())) for m in _by_modality(curves)}


def _samples(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """For each modality the first samples in the order they were drawn, those with media and answers first."""
    groups = []
    for modality in _by_modality(row["modality"] for row in run.predictions):
        rows = [row for row in run.predictions if row["modality"] == modality]
        if modality != "text":
            rows = [row for row in rows if row["media"] is not None]
        answered = [row for row in rows if row["prediction"] is not None]
        chosen = _spread(answered or rows)
        if chosen:
            groups.append((modality, [{**row, **_media(row)} for row in chosen]))
    return groups


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`SAMPLES_PER_MODALITY` rows, splits in turn."""
    queues = [[r for r in rows if r["split"] == split] for split in sorted({r["split"] for r in rows})]
    chosen = [queue[i] for i in range(len(rows)) for queue in queues if i < len(queue)]
    return chosen[:SAMPLES_PER_MODALITY]


def _media(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["media"] is None:
        return {}
    segment = Segment(type=row["media_type"], media=row["media"], with_audio=row["modality"] == "audio_video")
    shown = show(segment, lambda s: s.media or b"", MediaLimits())
    media: dict[str, Any] = {"line": shown.line, "bad": shown.bad, **browser_media(shown)}
    if row["media_type"] == "video" and not shown.bad:
        try:
            sound = decode_video(row["media"], 1.0, MediaLimits()).audio
        except BadSample:
            sound = None
        if sound is not None:
            media["spectrogram"] = _picture(spectrogram(sound))
    return media


SIGNALS = {"reference": "recording", "round_trip": "codec round trip", "generated": "generated"}
CODEC_TERMS = {
    f"train/{name}": name for name in ("mel", "waveform", "commitment", "content", "features", "discriminators")
}
CODEC_VALIDATION = {
    "validation/mel": "mel distance",
    "validation/waveform": "waveform",
    "validation/content": "content",
}


def _codebooks(run: Run, what: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    prefix = f"codebook/{what}/"
    return {name.removeprefix(prefix): values for name, values in run.metrics.items() if name.startswith(prefix)}


def _speech(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the table of speech scores: label, form, and an interval (or nothing) for each signal."""
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for recogniser, label in (("open", "open vocabulary"), ("word_loop", f"loop of {scores.get('words')} words")):
        for measure in ("wer", "cer"):
            if values := scores.get(measure, {}).get(recogniser):
                rows.append((f"{measure.upper()}, {label}", ".1%", values))
    for name, label in (("own_voice", "similarity to the voice"), ("other_voice", "to the nearest other voice")):
        if scores.get(name):
            rows.append((label, ".2f", scores[name]))
    if scores.get("right_voice"):
        rows.append(("nearest to its own voice", ".0%", scores["right_voice"]))
    signals = [s for s in SIGNALS if s != "generated" or scores.get("kind") != "codec"]
    singles = [("mel_db", "mel distance of the round trip, dB"), ("pesq", "PESQ of it"), ("stoi", "STOI of it")]
    if scores.get("kind") != "codec":
        singles.append(("pace", "pace of the generated speech (1: as the recording)"))
    return {
        "signals": [(s, SIGNALS[s]) for s in signals],
        "rows": [(label, [_interval_text(values.get(s), form) for s in signals]) for label, form, values in rows],
        "singles": [(label, _interval_text(scores[name], ".2f")) for name, label in singles if scores.get(name)],
        "failures": scores.get("failures") if scores.get("kind") != "codec" else None,
        "n": scores.get("n"),
        "recogniser": scores.get("recogniser"),
        "not_judged": scores.get("not_judged"),
    }


def _interval_text(value: Mapping[str, Any] | None, form: str) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def _players(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Utterances with sound: a player, a spectrogram and what was heard for each signal."""
    players = []
    for row in rows:
        heard = json.loads(row["heard"] or "{}")
        signals = []
        for name, label in SIGNALS.items():
            if row.get(name) is None:
                continue
            shown = show(Segment(type="audio", media=row[name]), lambda s: s.media or b"", MediaLimits())
            words = {key.split("/")[0]: text for key, text in heard.items() if key.endswith(f"/{name}")}
            signals.append({"label": label, "heard": words, **browser_media(shown)})
        if signals:
            players.append({**{k: row[k] for k in ("id", "text", "voice", "hit_limit")}, "signals": signals})
    return players


def _picture(pixels: np.ndarray) -> str:
    import base64

    return f"data:image/png;base64,{base64.b64encode(encode_image(pixels)).decode()}"


def _shares(counts: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(name, count, share), largest first."""
    total = sum(counts.values()) or 1
    return sorted(((str(k), v, v / total) for k, v in counts.items()), key=lambda item: -item[1])


def _speed(run: Run) -> list[tuple[str, str]]:
    """Figures of the throughput file: medians over the rows after the first."""
    forms = {
        "tokens_per_second": ("tokens per second", "{:,.0f}"),
        "samples_per_second": ("samples per second", "{:,.1f}"),
        "seconds_per_step": ("seconds per step", "{:.2f}"),
        "mfu": ("share of the matmul peak (MFU)", "{:.0%}"),
        "data_wait": ("time waiting for data", "{:.1%}"),
        "memory_gb": ("largest memory, GB", "{:.2f}"),
        "memory_cuda_gb": ("largest GPU memory, GB", "{:.2f}"),
    }
    found = []
    for name, (label, form) in forms.items():
        if name in run.throughput:
            values = run.throughput[name][1]
            value = values.max() if name.startswith("memory") else np.median(values[1:] if len(values) > 1 else values)
            found.append((label, form.format(value)))
    return found


def _facts(run: Run) -> list[tuple[str, str]]:
    """What stands at the top: size of the run."""
    facts = []
    steps = max((steps[-1] for steps, _ in run.metrics.values()), default=None)
    if steps is not None:
        facts.append(("steps", f"{steps:,.0f}"))
    for column, label in (("seen/tokens", "tokens"), ("seen/samples", "samples")):
        if (value := run.last(column)) is not None:
            facts.append((label, f"{value:,.0f}"))
    model = run.config.get("model") or {}
    if isinstance(model, dict) and (size := model.get("preset") or model.get("folder")):
        facts.append(("model", str(size)))
    elif isinstance(model, dict) and isinstance(sizes := model.get("thinker"), dict) and sizes:
        facts.append(("model", f"Thinker of {sizes['layers']} layers, width {sizes['d_model']}"))
    if run.environment.get("device"):
        processes = run.environment.get("processes", 1)
        facts.append(("device", f"{processes} x {run.environment['device']}"))
    if run.environment.get("precision"):
        facts.append(("precision", str(run.environment["precision"])))
    if "seed" in run.config:
        facts.append(("seed", str(run.config["seed"])))
    return facts


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text of everything in nested mappings."""
    found: dict[str, str] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and bool(value)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": str(value)}
    return found


def _formatted(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def templates() -> jinja2.Environment:
    """Where the pages' templates are found, with the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("omnitrain.reports", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    environment.filters |= {
        "title": figures.title,
        "colour": figures.colour,
        "num": partial(_formatted, form=".3f"),
        "num2": partial(_formatted, form=".2f"),
        "num1": partial(_formatted, form=".1f"),
        "percent": partial(_formatted, form=".0%"),
        "percent1": partial(_formatted, form=".1%"),
        "count": lambda value: _formatted(value, ",.0f"),
        "signed": partial(_formatted, form="+.3f"),
        "signed1": partial(_formatted, form="+.1f"),
    }
    return environment


def render(run: Run) -> str:
    """The page."""
    curves = _curves(run)
    swap, loads = run.scores.get("media_swap", []), run.scores.get("expert_load", {})
    experts = _named(run.metrics, {"experts/entropy": "mean of layers", "experts/entropy_min": "worst layer"})
    tokens = _named(run.throughput, {"tokens_per_second": "tokens"})
    waiting = _named(run.throughput, {"data_wait": "waiting for data", "mfu": "MFU"})
    norms = _named(run.metrics, {"gradient_norm": "all parts"})
    rates = _named(run.metrics, {c: c.removeprefix("lr/") for c in run.metrics if c.startswith("lr/")})

    def figure(draw: Any, *args: Any, **kwargs: Any) -> Markup | None:
        return Markup(draw(*args, **kwargs)) if args[0] else None  # SVG of our own making

    return (
        templates()
        .get_template("run.html.j2")
        .render(
            run=run,
            speaks=_scores(run) != "heldout",
            name=run.config.get("name") or run.folder.resolve().name,
            folder=run.folder.resolve().name,
            facts=_facts(run),
            headline=_headline(run),
            scores=run.scores.get("scores", []),
            languages=run.scores.get("languages", []),
            swap=swap,
            swap_figure=figure(figures.swap_intervals, [r for r in swap if r["gain"]]),
            curves_figure=figure(figures.learning_curves, curves),
            expert_figure=figure(figures.expert_load, {m: loads[m] for m in _by_modality(loads)}),
            entropy_figure=figure(figures.lines, experts, "expert load entropy (1: even)", share=True),
            speed_figure=figure(figures.lines, tokens, "tokens per second"),
            waiting_figure=figure(figures.lines, waiting, "share of time and of peak", share=True),
            norm_figure=figure(figures.lines, norms, "gradient norm"),
            rate_figure=figure(figures.lines, rates, "learning rate"),
            samples=_samples(run),
            speech=_speech(run.speech) if run.speech else None,
            players=_players(run.spoken),
            codec_figure=figure(figures.lines, _named(run.metrics, CODEC_TERMS), "terms of the loss"),
            codec_validation_figure=figure(figures.lines, _named(run.metrics, CODEC_VALIDATION), "validation"),
            use_figure=figure(figures.lines, _codebooks(run, "perplexity"), "perplexity of the codebooks"),
            mixture=mixture(run.data, run.config.get("mix"), MODALITIES) if run.data else None,
            speed=_speed(run),
            evaluation_skipped=_shares(run.scores.get("skipped", {})),
            environment_rows=list(flat(run.environment).items()),
        )
    )


def write_report(run: str | Path | Run, out: str | Path | None = None) -> Path:
    """Write the report of a run (its folder, or what `read_run` returned) and return its path, by default
    ``RUN_DIR/report.html``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file in it is broken; the message names it.
    """
    run = run if isinstance(run, Run) else read_run(run)
    page = render(run)
    path = Path(out) if out is not None else run.folder / REPORT
    write_text(path, page)
    return path

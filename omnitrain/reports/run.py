"""``report.html``: one file about a run that needs no other file and no network.

Everything is read from the run folder, so a report can be written while a run is going on, from a run that was cut off,
or on another machine. What is not there is named in the report, with the command that makes it.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
import yaml

from omnitrain import files
from omnitrain.data.media import MediaLimits, decode_video, encode_image
from omnitrain.data.sample import MODALITIES, BadSample, Segment
from omnitrain.data.view import Shown, browser_media, data_uri, show, spectrogram
from omnitrain.evaluation.metrics import normalise
from omnitrain.evaluation.speech_tables import LABELS, interval_text, speech_tables
from omnitrain.evaluation.transcripts import CONSTANT, FREQUENT, MODEL, Measure, measures_of
from omnitrain.files import read_json, write_text
from omnitrain.reports import figures, rollouts
from omnitrain.reports.mixture import mixture
from omnitrain.reports.positions import MEASURES as POSITION_MEASURES
from omnitrain.reports.positions import by_position

SAMPLES_PER_MODALITY = 8


@dataclass(frozen=True)
class Missing:
    """A part of the report that could not be made: what, from which file, and how to get it."""

    part: str
    file: str
    fix: str

    def __str__(self) -> str:
        return f"{self.part} ({self.file}): {self.fix}"


@dataclass
class Run:
    """What a run folder holds; anything may be absent. Of `metrics` and `throughput`, rows without a value are left
    out."""

    folder: Path
    config_text: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: figures.Columns = field(default_factory=dict)
    throughput: figures.Columns = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    transcripts: dict[str, Any] = field(default_factory=dict)
    heard: list[dict[str, Any]] = field(default_factory=list)
    speech: dict[str, Any] = field(default_factory=dict)
    spoken: list[dict[str, Any]] = field(default_factory=list)
    bad_samples: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: list[dict[str, Any]] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def last(self, column: str) -> float | None:
        """The latest value of a metrics column."""
        return float(self.metrics[column][1][-1]) if column in self.metrics else None

    def below(self, prefix: str) -> figures.Columns:
        """The metrics whose names begin with `prefix`, by the rest of their names."""
        return _below(self.metrics, prefix)

    @property
    def training_seconds(self) -> float | None:
        """Time of all steps, from the throughput file; steps that a resumed run took again count once."""
        if "seconds_per_step" not in self.throughput:
            return None
        latest = dict(zip(*self.throughput["seconds_per_step"], strict=True))
        steps = np.array(sorted(latest))
        return float(sum(np.diff(steps, prepend=0) * [latest[step] for step in steps]))

    @property
    def amounts(self) -> dict[str, float]:
        """Steps, tokens and samples trained on, as far as they are known."""
        steps = max((steps[-1] for steps, _ in self.metrics.values()), default=None)
        found = {"steps": steps, "tokens": self.last("seen/tokens"), "samples": self.last("seen/samples")}
        return {name: value for name, value in found.items() if value is not None}


def _scores(run: Run) -> str:
    """Which evaluation the run ends with; it was once called ``judge``."""
    evaluation = run.config.get("evaluation") or {}
    return evaluation.get("scores") or evaluation.get("judge") or "heldout"


def read_run(folder: str | Path, *, samples: bool = True) -> Run:
    """Read a run folder; without `samples`, leave out predictions and speech, which are large. Raises FileNotFoundError
    for no such folder; ValueError, naming it, for a file that cannot be read."""
    run = Run(Path(folder))
    if not run.folder.is_dir():
        raise FileNotFoundError(f"{run.folder} is no folder; give the folder of a run (paths.run_dir)")
    train = "written while training (`python -m omnitrain fit`)"
    test = f"run `python -m omnitrain test {run.folder}`"

    def read(name: str, reader: Callable[[Path], Any], empty: Any, part: str, fix: str) -> Any:
        path = run.folder / name
        if path.is_file() and path.stat().st_size:
            return reader(path)
        run.missing.append(Missing(part, name, fix))
        return empty

    run.config_text, run.config = read(files.CONFIG, _config, (None, {}), "configuration", train)
    run.metrics = read(files.METRICS, _columns, {}, "learning curves", train)
    run.throughput = read(files.THROUGHPUT, _columns, {}, "throughput", train)
    run.data = read(files.DATA, _record, {}, "data mixture", "written with each checkpoint (callbacks.record)")
    run.environment = read(files.ENVIRONMENT, _record, {}, "environment", train)
    if _scores(run) == "heldout":
        run.scores = read(files.SCORES, _record, {}, "held-out scores, media swap, expert load", test)
        if samples:
            run.predictions = read(files.PREDICTIONS, _rows, [], "samples and predictions", test)
    elif _scores(run) == "transcripts":
        run.transcripts = read(files.TRANSCRIPTS, _record, {}, "scores of the transcripts", test)
        if samples:
            run.heard = read(files.HEARD, _rows, [], "recordings to listen to", test)
    else:
        run.speech = read(files.SPEECH, _record, {}, "scores of the speech", test)
        if samples:
            run.spoken = read(files.SPOKEN, _rows, [], "speech to listen to", test)
            if "other_voices" in run.speech:
                run.spoken += read(files.SPOKEN_OTHERS, _rows, [], "speech in other voices", test)
    # These exist only when there is something to tell.
    run.bad_samples = [row for path in sorted(run.folder.glob("bad_samples*.jsonl")) for row in _json_lines(path)]
    if (path := run.folder / files.SKIPPED_STEPS).is_file():
        run.skipped_steps = _json_lines(path)
    return run


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a configuration, and its values."""
    text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no configuration: write a mapping of keys")
    return text, {**(values.get("variables") or {}), **values}  # what a recipe calls by names of its own: `mix`


def _rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _record(path: Path) -> dict[str, Any]:
    """What a run has noted: a mapping."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds no record of a run: it must be a mapping")
    return record


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a run that is going on may be writing the last one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def _columns(path: Path) -> figures.Columns:
    """Steps and values of each column of a metrics file; empty and non-finite entries are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.pop("step", None))
            for name, text in row.items():
                value = _number(text)
                if name and step is not None and value is not None:
                    found.setdefault(name, []).append((step, value))
    return {name: (np.array(points)[:, 0], np.array(points)[:, 1]) for name, points in found.items()}


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


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
    modalities = _by_modality(run.below("validation/loss/"))
    measures = ("loss", "bits_per_byte")
    return [{"modality": m} | {name: run.last(f"validation/{name}/{m}") for name in measures} for m in modalities]


def _named(table: figures.Columns, names: Mapping[str, str]) -> figures.Columns:
    """The columns of `table` that are there, under their labels."""
    return {label: table[column] for column, label in names.items() if column in table}


def _below(table: figures.Columns, prefix: str) -> figures.Columns:
    """The columns whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): values for name, values in table.items() if name.startswith(prefix)}


def _curves(run: Run) -> dict[str, figures.Columns]:
    curves: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for column, values in run.metrics.items():
        match = re.fullmatch(r"(?:(train)|(validation(?:/.+)?))/loss/(\w+)", column)
        if match:
            curves.setdefault(match[3], {})[match[1] or match[2]] = values
    return {m: dict(sorted(curves[m].items())) for m in _by_modality(curves)}


def _validation_errors(run: Run) -> figures.Columns:
    """Character error rates of validations, of all languages and of each."""
    whole = _named(run.metrics, {"validation/cer": "all", "validation/cer_ctc": "all, CTC head"})
    return {**whole, **run.below("validation/cer/")}


def _samples(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """For each modality the first samples in the order they were drawn, those with media and answers first."""
    groups = []
    shown = [row for row in run.predictions if row["modality"] == "text" or row["media"] is not None]
    for modality in _by_modality(row["modality"] for row in shown):
        rows = [row for row in shown if row["modality"] == modality]
        chosen = _spread([row for row in rows if row["prediction"] is not None] or rows)
        groups.append((modality, [{**row, **_media(row)} for row in chosen]))
    return groups


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`SAMPLES_PER_MODALITY` rows, splits in turn."""
    queues = [[r for r in rows if r["split"] == split] for split in sorted({r["split"] for r in rows})]
    chosen = [queue[i] for i in range(len(rows)) for queue in queues if i < len(queue)]
    return chosen[:SAMPLES_PER_MODALITY]


def _show(segment: Segment) -> Shown:
    return show(segment, lambda s: s.media or b"", MediaLimits())


def _media(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["media"] is None:
        return {}
    segment = Segment(type=row["media_type"], media=row["media"], with_audio=row["modality"] == "audio_video")
    shown = _show(segment)
    media: dict[str, Any] = {"line": shown.line, "bad": shown.bad, **browser_media(shown)}
    if row["media_type"] == "video" and not shown.bad:
        try:
            sound = decode_video(row["media"], 1.0, MediaLimits()).audio
        except BadSample:
            sound = None
        if sound is not None:
            media["spectrogram"] = data_uri(encode_image(spectrogram(sound)), "image/png")
    return media


CODEC_TERMS = {f"train/{t}": t for t in ("mel", "waveform", "commitment", "content", "features", "discriminators")}
CODEC_VALIDATION = {
    "validation/mel": "mel distance", "validation/waveform": "waveform", "validation/content": "content",
}  # fmt: skip


def _speech(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of speech, with their tables."""
    return {**scores, "tables": speech_tables(scores)}


def _transcripts(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of transcripts: a table for each task, its rows languages with the longest window; the same by window
    for the figure; and what is said by who never listens."""
    rows = [row for row in scores["scores"] if row["split"] == "all"]
    windows = sorted({row["window"] for row in rows if row["window"] is not None})
    found = {(r["task"], r["languages"], r["system"], r["window"]): r for r in rows}
    tasks, panels = [], {}
    for task in dict.fromkeys(row["task"] for row in rows):
        measures = measures_of(task)
        lines = [languages for name, languages, system, window in found if (name, window) == (task, windows[-1])]
        others = [system for system in (FREQUENT, CONSTANT) if (task, "all", system, None) in found]
        columns = [(MODEL, windows[-1]), *((system, None) for system in others)]
        tasks.append({
            "task": task,
            "systems": [f"window {windows[-1]} s", *others],
            "measures": [measure.heading for measure in measures],
            "rows": [_transcript_row([found.get((task, line, *column)) for column in columns], line, measures)
                     for line in lines],
        })  # fmt: skip
        panels[task] = _window_panel(found, task, lines, windows, measures[0])
    return {**scores, "tasks": tasks, "by_window": figures.by_window(panels), "swaps": scores["media_swap"]}


def _transcript_row(records: Sequence[Mapping[str, Any] | None], line: str, measures: Sequence[Measure]) -> Any:
    """The cells of one language: of each system each measure."""
    first = records[0]
    assert first is not None
    cells = [
        interval_text(None if record is None else record["measures"].get(measure.name), measure.form)
        for record in records
        for measure in measures
    ]
    return {"languages": line, "samples": first["samples"], "sentences": first["sentences"], "cells": cells}


def _window_panel(
    found: Mapping[Any, Mapping[str, Any]], task: str, lines: Sequence[str], windows: Sequence[int], measure: Measure
) -> dict[str, Any]:
    def of(line: str, system: str, window: int | None) -> Mapping[str, Any]:
        return found.get((task, line, system, window), {}).get("measures", {}).get(measure.name, {})

    def points(line: str, *names: str) -> list[tuple[float, ...]]:
        return [(w, *(of(line, MODEL, w).get(name, math.nan) for name in names)) for w in windows]

    return {
        "unit": measure.title,
        "points": points("all", "mean", "low", "high"),
        "languages": {line: points(line, "mean") for line in lines if line != "all"},
        "constant": of("all", CONSTANT, None).get("mean"),
    }


def _recordings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Recordings with sound: a player, a spectrogram, what was said and what was written with each window."""
    written: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["window"]):
        written.setdefault(row["id"], []).append(row)
    shown = []
    for row in (row for row in rows if row["media"] is not None):
        sound = browser_media(_show(Segment(type="audio", media=row["media"])))
        by_text: dict[str, list[str]] = {}
        for other in written[row["id"]]:
            by_text.setdefault(other["prediction"], []).append(str(other["window"]))
        answers = [
            {"windows": " and ".join(filter(None, [", ".join(windows[:-1]), windows[-1]])), "text": text,
             "marks": marked(row["references"], text)}
            for text, windows in by_text.items()
        ]  # fmt: skip
        attention = figures.attention(row["attention"] or [], row["tokens"] or [])
        shown.append({**row, **sound, "answers": answers, "attention": attention})
    return shown


def marked(references: Sequence[str], prediction: str) -> list[tuple[str, str]]:
    """The words of `prediction` as ``same`` or ``wrong``, and between them the ``missing`` ones of the reference that
    is most alike; compared without case and punctuation."""
    said = prediction.split()
    compared = [(words, _alignment(words, said)) for words in map(str.split, references)]
    reference, match = max(compared, key=lambda pair: pair[1].ratio())
    marks: list[tuple[str, str]] = []
    for kind, a, b, c, d in match.get_opcodes():
        if kind != "equal" and a < b:
            marks.append(("missing", " ".join(reference[a:b])))
        if c < d:
            marks.append(("same" if kind == "equal" else "wrong", " ".join(said[c:d])))
    return marks


def _alignment(reference: Sequence[str], said: Sequence[str]) -> SequenceMatcher[str]:
    return SequenceMatcher(None, [normalise(w) for w in reference], [normalise(w) for w in said], autojunk=False)


def _players(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Utterances with sound: a player, a spectrogram and what was heard for each signal."""
    players = []
    for row in rows:
        heard = json.loads(row["heard"] or "{}")
        signals = []
        for name, label in LABELS.items():
            if row.get(name) is not None:
                shown = _show(Segment(type="audio", media=row[name]))
                words = {key.split("/")[0]: text for key, text in heard.items() if key.endswith(f"/{name}")}
                signals.append({"label": label, "heard": words, **browser_media(shown)})
        if signals:
            players.append({**{k: row[k] for k in ("id", "text", "voice", "hit_limit")}, "signals": signals})
    return players


def _speed(run: Run) -> list[tuple[str, str]]:
    """Figures of the throughput file: medians over the rows after the first, and maxima of memory."""
    forms = {
        "tokens_per_second": ("tokens per second", ",.0f"),
        "text_tokens_per_second": ("of them text", ",.0f"),
        "samples_per_second": ("samples per second", ",.1f"),
        "seconds_per_step": ("seconds per step", ".2f"),
        "tflops": ("1e12 operations per second and device", ".3g"),
        "mfu": ("share of the matmul peak (MFU)", ".0%"),
        "data_wait": ("time waiting for data", ".1%"),
        "waiting": ("time that ranks wait for the slowest", ".1%"),
        "waiting_counted": ("the same, by operations", ".1%"),
        "memory_gb": ("largest memory, GB", ".2f"),
        "memory_cuda_gb": ("largest GPU memory, GB", ".2f"),
    }
    found = []
    for name, (label, form) in forms.items():
        if name in run.throughput:
            values = run.throughput[name][1]
            value = values.max() if name.startswith("memory") else np.median(values[1:] if len(values) > 1 else values)
            found.append((label, format(value, form)))
    return found


def _facts(run: Run) -> list[tuple[str, str]]:
    """What stands at the top: size of the run."""
    facts = [(name, f"{value:,.0f}") for name, value in run.amounts.items()]
    model, environment = run.config.get("model"), run.environment
    if isinstance(model, dict):
        if size := model.get("preset") or model.get("folder"):
            facts.append(("model", str(size)))
        elif isinstance(sizes := model.get("thinker"), dict) and sizes:
            facts.append(("model", f"Thinker of {sizes['layers']} layers, width {sizes['d_model']}"))
    if environment.get("device"):
        facts.append(("device", f"{environment.get('processes', 1)} x {environment['device']}"))
    if environment.get("precision"):
        facts.append(("precision", str(environment["precision"])))
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


_FORMS = {
    "num": ".3f", "num2": ".2f", "num1": ".1f", "percent": ".0%", "percent1": ".1%", "count": ",.0f",
    "signed": "+.3f", "signed1": "+.1f",
}  # fmt: skip


def formatted(value: float | None, form: str) -> str:
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
    environment.filters |= {name: partial(formatted, form=form) for name, form in _FORMS.items()}
    environment.filters |= {"title": figures.title, "colour": figures.colour}
    return environment


def _render(run: Run) -> str:
    swap, loads = run.scores.get("media_swap", []), run.scores.get("expert_load", {})
    experts = _named(run.metrics, {"experts/entropy": "mean of layers", "experts/entropy_min": "worst layer"})
    busiest = _named(run.metrics, {"experts/max_over_mean": "worst layer"})
    tokens = _named(run.throughput, {"tokens_per_second": "tokens"})
    shares = {"data_wait": "waiting for data", "mfu": "MFU", "waiting": "waiting for the slowest rank"}
    norms = _named(run.metrics, {"gradient_norm": "all parts"})
    lines, folder = figures.lines, run.folder.resolve().name
    return templates().get_template("run.html.j2").render(
        run=run,
        speaks=_scores(run) in ("codec", "speech", "dialogue"),
        listens=_scores(run) == "transcripts",
        transcripts=_transcripts(run.transcripts) if run.transcripts else None,
        recordings=_recordings(run.heard),
        error_figure=figures.error_curves(_validation_errors(run)),
        name=run.config.get("name") or folder,
        folder=folder,
        facts=_facts(run),
        headline=_headline(run),
        scores=run.scores.get("scores", []),
        languages=run.scores.get("languages", []),
        swap=swap,
        swap_figure=figures.swap_intervals([r for r in swap if r["gain"]]),
        curves_figure=figures.learning_curves(_curves(run)),
        expert_figure=figures.expert_load({m: loads[m] for m in _by_modality(loads)}),
        entropy_figure=lines(experts, "expert load entropy (1: even)", share=True),
        busiest_figure=lines(busiest, "load of the busiest expert over the mean (1: even)"),
        speed_figure=lines(tokens, "tokens per second"),
        waiting_figure=lines(_named(run.throughput, shares), "share of time and of peak", share=True),
        ranks_figure=figures.rank_waiting(_below(run.throughput, "waiting/")),
        norm_figure=lines(norms, "gradient norm"),
        rate_figure=lines(run.below("lr/"), "learning rate"),
        position_figure=figures.position_curves(by_position(run.predictions), POSITION_MEASURES),
        samples=_samples(run),
        rollout_curves=rollouts.curves(run.metrics),
        rollout_steps=rollouts.read_steps(run.folder),
        speech=_speech(run.speech) if run.speech else None,
        players=_players(run.spoken),
        codec_figure=lines(_named(run.metrics, CODEC_TERMS), "terms of the loss"),
        codec_validation_figure=lines(_named(run.metrics, CODEC_VALIDATION), "validation"),
        use_figure=lines(run.below("codebook/perplexity/"), "perplexity of the codebooks"),
        mixture=mixture(run.data, run.config.get("mix"), MODALITIES) if run.data else None,
        speed=_speed(run),
        evaluation_skipped=Counter((run.scores or run.transcripts).get("skipped", {})).most_common(),
        environment_rows=list(flat(run.environment).items()),
    )  # fmt: skip


def write_report(run: str | Path | Run, out: str | Path | None = None) -> Path:
    """Write the report of a run (its folder, or what `read_run` returned) and return its path, by default
    ``RUN_DIR/report.html``. Raises as `read_run` does."""
    run = run if isinstance(run, Run) else read_run(run)
    path = Path(out) if out is not None else run.folder / files.REPORT
    write_text(path, _render(run))
    return path

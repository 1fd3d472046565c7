"""What there is of a study so far: the files that its runs left, read into one `Study`.

A study folder holds ``MATCH/ARM/seed=N``: ordinary run folders with ``study_run.json`` (what was planned),
``items.parquet`` (a row per held-out sample) and ``curve.parquet`` besides. `collect_study` makes a few small files of
them, which `read_study` reads as well.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from omnitrain.evaluation.heldout import PREDICTIONS_SCHEMA
from omnitrain.evaluation.scores import RUN_COLUMNS, SCORE_COLUMNS, RunKey, read_table
from omnitrain.files import METRICS, read_json, write_json, write_parquet
from omnitrain.study.spec import ARMS, MATCHES

RUN, ITEMS, CURVE = "study_run.json", "items.parquet", "curve.parquet"
"""Of one run. The items are written last: they alone say that it is finished."""
RUNS, CURVES, FINGERPRINT = "runs.json", "curves.parquet", "study.json"
"""Of the whole study; the first two where it is collected."""

_KEYS = [("match", pa.string()), ("arm", pa.string()), ("seed", pa.int64())]
_SCORES = [PREDICTIONS_SCHEMA.field(name) for name in SCORE_COLUMNS]
ITEMS_SCHEMA = pa.schema([*_KEYS, *_SCORES, ("sentence", pa.string())])
"""One row per held-out sample. `loss`, `swapped_loss`: nats per target token; `sentence`: "read" or "new"."""
_COUNTS = [("step", pa.int64()), ("tokens", pa.int64()), ("flops", pa.float64())]
CURVE_SCHEMA = pa.schema([*_KEYS, *_COUNTS, ("modality", pa.string()), ("loss", pa.float64())])
"""One row per validation and modality. `tokens`, `flops`: trained on so far; `loss`: nats per target token."""


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

    @property
    def name(self) -> str:
        """The run's folder in that of the study."""
        return _folder(self.key)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What there is of a study so far.

    Attributes:
        runs: all that have begun, in the order of matching, arm and seed.
        items: `ITEMS_SCHEMA` rows of the finished runs.
        curves: `CURVE_SCHEMA` rows of the finished runs.
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
        state = {run.key: run.finished for run in self.runs}
        return {
            key: "not finished" if key in state else "not begun"
            for match in self.matches
            for arm in ARMS
            for seed in sorted({run.seed for run in self.runs if run.match == match})
            if not state.get(key := (match, arm, seed), False)
        }


def read_study(folder: str | Path) -> Study:
    """Read a study: a folder of runs (``MATCH/ARM/seed=N``), or what `collect_study` made of one. Raises
    FileNotFoundError for no such folder, or no run in it; ValueError for a file that cannot be read, or runs that are
    not of one configuration and one set of data."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give that of a study (paths.study_dir)")
    collected = folder / RUNS
    if collected.is_file():
        told = read_json(collected)
        if not isinstance(told, list):
            raise ValueError(f"{collected}: expected a list of runs")
        runs = [_run(record, collected) for record in told]
        items, curves = ([path] if (path := folder / name).is_file() else [] for name in (ITEMS, CURVES))
    else:
        runs = [_run_in(folder, path) for path in sorted(folder.glob(f"*/*/seed=*/{RUN}"))]
        items, curves = ([folder / run.name / name for run in runs if run.finished] for name in (ITEMS, CURVE))
    if not runs:
        raise FileNotFoundError(
            f"{folder} holds no run of a study (MATCH/ARM/seed=N/{RUN}, or {RUNS}); start one with "
            "`python -m omnitrain fit +recipe=nondegradation arm=text match=data seed=0`"
        )
    _check_one_study(runs, folder)
    noted = folder / FINGERPRINT
    order = {name: place for place, name in enumerate((*MATCHES, *ARMS))}
    study = Study(
        folder=folder,
        runs=tuple(sorted(runs, key=lambda r: (order[r.match], order[r.arm], r.seed))),
        items=_rows(items, ITEMS_SCHEMA),
        curves=_rows(curves, CURVE_SCHEMA),
        configuration=read_json(noted) if noted.is_file() else {},
    )
    scored = set(zip(*(study.items[name].to_pylist() for name in RUN_COLUMNS), strict=True))
    if odd := sorted(scored ^ {run.key for run in study.finished}):
        raise ValueError(f"{folder}: items and finished runs are not the same: {', '.join(map(_folder, odd[:6]))}")
    return study


def collect_study(study: Study, out: str | Path) -> None:
    """Write the study as a few small files: ``items.parquet`` and ``curves.parquet`` (zstd), ``runs.json``, and
    ``study.json`` if there is one. No media; `read_study` reads the folder."""
    out = Path(out)
    for name, table, further in ((ITEMS, study.items, ("id",)), (CURVES, study.curves, ("step", "modality"))):
        order = [(column, "ascending") for column in (*RUN_COLUMNS, *further)]
        write_parquet(out / name, table.sort_by(order))
    write_json(out / RUNS, [asdict(run) for run in study.runs])
    if study.configuration:
        write_json(out / FINGERPRINT, study.configuration)


def csv_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of metrics; empty where there was nothing to say."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def validation_loss(run_dir: Path) -> float | None:
    """The last validation loss of a run, nats per target token; None if it never looked at its validation split."""
    values = [row["validation/loss"] for row in csv_rows(run_dir / METRICS) if row.get("validation/loss")]
    return float(values[-1]) if values else None


def _folder(key: RunKey) -> str:
    return f"{key[0]}/{key[1]}/seed={key[2]}"


def _run(record: Any, path: Path) -> StudyRun:
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a mapping; was it written by `fit`?")
    if lacking := [f.name for f in fields(StudyRun) if f.default is MISSING and f.name not in record]:
        raise ValueError(f"{path}: fields {', '.join(sorted(lacking))} are missing; was it written by `fit`?")
    run = StudyRun(**{f.name: record[f.name] for f in fields(StudyRun) if f.name in record})
    if run.match not in MATCHES or run.arm not in ARMS:
        raise ValueError(
            f"{path}: match={run.match} arm={run.arm} is unknown; matchings are {', '.join(MATCHES)}, arms "
            f"{', '.join(ARMS)}"
        )
    return run


def _run_in(folder: Path, path: Path) -> StudyRun:
    run, place = _run(read_json(path), path), path.parent.relative_to(folder).as_posix()
    if place != run.name:
        raise ValueError(
            f"{path} is of match={run.match} arm={run.arm} seed={run.seed}, but lies in {place}; was it renamed?"
        )
    return replace(run, finished=(path.parent / ITEMS).is_file())


def _rows(paths: Sequence[Path], schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([read_table(path, schema.names) for path in paths] or [schema.empty_table()])


def _check_one_study(runs: Sequence[StudyRun], folder: Path) -> None:
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{folder}: {', '.join(twice)} is there twice")
    for name, what in (("config_hash", "configuration"), ("data_hash", "data"), ("margins", "margins")):
        values: dict[str, list[str]] = {}
        for run in runs:
            values.setdefault(json.dumps(getattr(run, name), sort_keys=True), []).append(run.name)
        if len(values) > 1:
            groups = "; ".join(f"{value[:60]}: {', '.join(of[:4])}" for value, of in values.items())
            raise ValueError(
                f"{folder}: runs of different {what} cannot be compared ({name} {groups}). Keep one of them here and "
                "move the others to a study folder of their own"
            )

"""Metrics as CSV, exact under resume.

`metrics.csv` holds what is a function of configuration, data and seed: a run that was killed and resumed writes the
same file, byte for byte, as an uninterrupted one. What the clock decides (names under ``time/``) goes to
`throughput.csv`.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from omnitrain.config.run_config import CsvLoggerConfig
from omnitrain.files import METRICS, THROUGHPUT, append_line, write_text

TIME_PREFIX = "time/"


class CsvTable:
    """A CSV file that grows by whole rows, each on disk when `append` returns. New columns are added at the right."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.n_rows = 0
        if path.exists():
            self._write(self._read())  # without a half-written last line, if a crash left one

    def _read(self) -> list[dict[str, str]]:
        """Whole rows of the file (a last line without its end, left by a crash, is dropped); sets `columns`."""
        text = self.path.read_text(encoding="utf-8")
        text = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(text))
        rows = list(reader)
        self.columns = list(reader.fieldnames or [])
        return rows

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file at once by `columns` and `rows`."""
        write_text(self.path, self._text([dict(zip(self.columns, self.columns, strict=True)), *rows]))
        self.n_rows = len(rows)

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n").writerows(rows)
        return text.getvalue()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; columns that the file does not have yet are added, empty in the rows before."""
        if new := [name for name in row if name not in self.columns]:
            rows = self._read() if self.path.exists() else []
            self.columns += new
            self._write([*rows, row])
        else:
            append_line(self.path, self._text([row]).removesuffix("\n"))
            self.n_rows += 1

    def restart(self, columns: list[str], n_rows: int) -> None:
        """Go back to the first `n_rows` rows with these `columns`."""
        rows = self._read()[:n_rows] if self.path.exists() else []
        if len(rows) < n_rows:
            raise ValueError(
                f"{self.path}: {len(rows)} rows, but the checkpoint was written after {n_rows}; the file was cut or "
                "replaced. Resume into another run folder, or delete the checkpoint to start anew"
            )
        self.columns = list(columns)
        if self.columns:
            self._write(rows)
        else:
            self.path.unlink(missing_ok=True)
            self.n_rows = 0


class ExactCsvLogger(Logger):
    """Writes `metrics.csv` and `throughput.csv` into the run folder.

    Each call of `log_metrics` is one row with a leading `step` (optimizer steps taken). A training run takes the files
    over: it starts them anew, or cuts them back to where its checkpoint was written (`AtomicCheckpoint` sees to both).
    """

    name, version = "csv", ""

    def __init__(self, config: CsvLoggerConfig | None = None, *, run_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self._tables: dict[str, CsvTable] = {}

    def _table(self, name: str) -> CsvTable:
        if name not in self._tables:
            self._tables[name] = CsvTable(self.run_dir / name)
        return self._tables[name]

    @property
    def save_dir(self) -> str:
        return str(self.run_dir)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder's `config.yaml` holds them all."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append the metrics as a row to each file that they concern."""
        timed = {k.removeprefix(TIME_PREFIX): v for k, v in metrics.items() if k.startswith(TIME_PREFIX)}
        exact = {k: v for k, v in metrics.items() if not k.startswith(TIME_PREFIX)}
        for name, row in ((METRICS, exact), (THROUGHPUT, timed)):
            if row:
                self._table(name).append({"step": step, **{k: _number(v) for k, v in row.items()}})

    def state_dict(self) -> dict[str, Any]:
        """Columns and number of rows of each file, for the checkpoint."""
        return {
            name: {"columns": list(self._table(name).columns), "rows": self._table(name).n_rows}
            for name in (METRICS, THROUGHPUT)
        }

    @rank_zero_only
    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Start the files anew (None), or go back to what `state_dict` returned."""
        for name in (METRICS, THROUGHPUT):
            columns, n_rows = (state[name]["columns"], state[name]["rows"]) if state else ([], 0)
            self._table(name).restart(columns, n_rows)


def _number(value: Any) -> Any:
    """Shortest text that reads back to the same number."""
    value = value.item() if hasattr(value, "item") else value
    return repr(value) if isinstance(value, float) else value


def wandb_logger(*, run_dir: Path, run_name: str, **options: Any) -> Logger:
    """Weights & Biases beside the CSV; `options` are the fields of `WandbConfig`."""
    from lightning.pytorch.loggers import WandbLogger

    name = options.pop("name") or run_name
    given = {key: value for key, value in options.items() if value is not None}
    return WandbLogger(name=name, save_dir=run_dir, **given)

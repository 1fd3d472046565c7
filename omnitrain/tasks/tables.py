"""Rows of benchmarks as they are published: JSON, JSON lines, Parquet, CSV and TSV files, data sets of the Hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnitrain.files import encoding_hint


class ArrowRows(Sequence):
    """Rows of a `datasets.Dataset` as plain values: media stay encoded bytes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index].to_pylist()[0]


def file_in(path: str, name: str) -> Path:
    """`path` itself if it is a file, else the file `name` in it."""
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; name a list such as {name}, or the folder that holds it")
    return file


def read_table(
    path: str, *, split: str = "test", config: str | None = None, columns: Sequence[str] | None = None
) -> Sequence[dict[str, Any]]:
    """The rows of `path`: a ``.json`` (list, or mapping of ids to rows), ``.jsonl``, ``.parquet``, ``.csv`` or ``.tsv``
    file, a folder with such a data set of the Hub (downloaded or `save_to_disk`), or its name there (``owner/name``).

    Args:
        split, config: of a data set of the Hub; config ``all`` is all of them, one after the other.
        columns: names of the columns of a CSV or TSV file that has no header.

    Raises FileNotFoundError for no such file or data set; ValueError for one that is not what its ending says.
    """
    file = Path(path)
    if file.is_file():
        return _read_file(file, columns)
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    if (file / "dataset_dict.json").is_file() or (file / "state.json").is_file():
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, loaded))}")
            loaded = loaded[split]
        return ArrowRows(loaded)
    if not file.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"{path}: no such file or folder, nor a name on the Hub (owner/name)")
    try:
        configs = datasets.get_dataset_config_names(path) if config == "all" else [config]
        loaded = [datasets.load_dataset(path, name, split=split) for name in configs]
        return ArrowRows(loaded[0] if len(loaded) == 1 else datasets.concatenate_datasets(loaded))
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{path}: no such folder, and as a data set of the Hub it cannot be had ({error})"
        ) from error


def _read_file(file: Path, columns: Sequence[str] | None) -> Sequence[dict[str, Any]]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        import datasets

        return ArrowRows(datasets.Dataset.from_parquet(str(file)))
    try:
        if kind in (".csv", ".tsv"):
            with file.open(encoding="utf-8-sig", newline="") as lines:
                quoting = csv.QUOTE_NONE if kind == ".tsv" else csv.QUOTE_MINIMAL
                delimiter = "\t" if kind == ".tsv" else ","
                return list(csv.DictReader(lines, fieldnames=columns, delimiter=delimiter, quoting=quoting))
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); {encoding_hint(file.read_bytes()[:4000])}") from error
    if kind not in (".json", ".jsonl"):
        raise ValueError(f"{file}: its ending is none of .json, .jsonl, .parquet, .csv, .tsv")
    try:
        rows: Any = json.loads(content) if kind == ".json" else _lines(content)
    except (ValueError, RecursionError) as error:
        try:  # lists of objects one per line are often called .json
            rows = _lines(content)
        except (ValueError, RecursionError):
            raise ValueError(f"{file} is no {'JSON lines' if kind == '.jsonl' else 'JSON'}: {error}") from error
    if isinstance(rows, dict):  # rows by their ids, or one line of JSON lines
        by_id = all(isinstance(row, dict) for row in rows.values())
        rows = [{"id": key, **row} for key, row in rows.items()] if by_id else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} is no list of objects")
    return rows


def _lines(content: str) -> list[Any]:
    return [json.loads(line) for line in content.splitlines() if line.strip()]

"""Parquet shards of the one schema: written once, then read row by row in any order.

A shard holds one row per :class:`~omnitrain.data.sample.Sample`; docs/data.md says what its columns hold (`SCHEMA`).

Rows are written in small row groups (a quarter of a megabyte), because one row is read by decoding its row group: this
keeps random access at about a millisecond without a second copy of the data on disk.
`datasets.load_dataset("parquet", data_files=...)` reads the same files.

A *media table* beside the shards (columns `name`, `bytes`) keeps a blob once that many samples show: a segment names it
by the path ``"media.parquet#NAME"``.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import stat
import threading
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from omnitrain.data.sample import ROLES, SEGMENT_TYPES, BadSample, Message, Sample, Segment
from omnitrain.files import atomic, did_you_mean, encoding_hint, place, printable, unfinished

_TEXT = pa.string()
_SEGMENT = pa.struct({"type": _TEXT, "text": _TEXT, "media": pa.binary(), "path": _TEXT, "with_audio": pa.bool_()})
_MESSAGE = pa.struct({"role": _TEXT, "segments": pa.list_(_SEGMENT)})
SCHEMA = pa.schema(
    {name: _TEXT for name in ("id", "source", "split", "task", "licence")}
    | {"languages": pa.list_(_TEXT), "concept": _TEXT, "modality": _TEXT, "meta": _TEXT, "messages": pa.list_(_MESSAGE)}
)
"""The Arrow schema of a shard."""

MEDIA_TABLE_SCHEMA = pa.schema({"name": _TEXT, "bytes": pa.binary()})
LIGHT_COLUMNS = ("id", "source", "split", "task", "languages", "concept", "modality")
FILTERS = ("source", "split", "task", "languages", "concept", "concept_share", "modality")

_ROW_GROUP_BYTES, _ROW_GROUP_ROWS = 1 << 18, 256
_CACHE_BYTES = 64 << 20  # decoded row groups kept per reader: a small data set lies in memory after the first epoch
_OF = re.compile(r"^(?P<name>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.parquet$")
_MEDIA_LEAF = "messages.list.element.segments.list.element.media"


Location = str | Path | Sequence[str | Path]
Where = Mapping[str, Any] | None


@runtime_checkable
class Source(Protocol):
    """What the stream reads samples from: random access, picklable, opened lazily in each worker process."""

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...
    def locate(self, index: int) -> tuple[str, int]:
        """The file and the row (from 0) behind sample `index`, for messages that a person can follow."""
        ...

    def media_bytes(self, segment: Segment) -> bytes:
        """The encoded bytes of a segment's medium."""
        ...


# ---------------------------------------------------------------------------------------------------------- writing


def _columns(sample: Sample) -> dict[str, Any]:
    """One row. Raises ValueError that names the sample and the field when the sample does not fit the schema."""
    for message in sample.messages:
        check_known(f"sample {sample.id!r}", "role", [message.role], ROLES)
    check_known(f"sample {sample.id!r}", "segment type", [segment.type for segment in sample.segments], SEGMENT_TYPES)
    if not sample.id or not sample.messages:
        raise ValueError(f"sample {sample.id!r} of source {sample.source!r} needs an id and at least one message")
    if wrong := [key for key, value in sample.meta.items() if not isinstance(value, str)]:
        raise ValueError(f"sample {sample.id!r}: meta values must be strings; mend {wrong}")
    meta = json.dumps(sample.meta, ensure_ascii=False, sort_keys=True)
    return asdict(sample) | {"modality": sample.modality, "meta": meta}


def _payload(sample: Sample) -> int:
    return 64 + sum(len(segment.text or "") + len(segment.media or b"") for segment in sample.segments)


class _RowWriter:
    """Rows of `schema` to one Parquet file, in row groups of `_ROW_GROUP_BYTES`.

    Attributes:
        rows, bytes: written so far.
    """

    def __init__(self, path: Path, schema: pa.Schema, rows_per_group: int | None = None) -> None:
        names = [leaf.path for leaf in pq.ParquetFile(_empty(schema)).schema]
        self._file = pq.ParquetWriter(
            path,
            schema,
            # media are compressed already
            compression={name: "NONE" if name in (_MEDIA_LEAF, "bytes") else "ZSTD" for name in names},
            use_dictionary=[name for name in names if name not in (_MEDIA_LEAF, "bytes", "meta")],
            write_statistics=[name for name in names if name in LIGHT_COLUMNS or name == "name"],
        )
        self._schema, self._rows_per_group = schema, rows_per_group
        self._group: list[dict[str, Any]] = []
        self._group_bytes = self.rows = self.bytes = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        """One more row, of `size` bytes."""
        self._group.append(row)
        self._group_bytes, self.rows, self.bytes = self._group_bytes + size, self.rows + 1, self.bytes + size
        if self._group_bytes >= _ROW_GROUP_BYTES or len(self._group) == self._rows_per_group:
            self._flush()

    def _flush(self) -> None:
        if self._group:
            table = pa.Table.from_pylist(self._group, schema=self._schema)
            self._file.write_table(table, row_group_size=len(self._group))
        self._group, self._group_bytes = [], 0

    def __enter__(self) -> _RowWriter:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._flush()
        self._file.close()


def _empty(schema: pa.Schema) -> pa.BufferReader:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return pa.BufferReader(sink.getvalue())


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    name: str,
    rows_per_shard: int = 10_000,
    shard_bytes: int = 512 << 20,
    progress: bool = True,
) -> list[Path]:
    """Write `samples` as ``NAME-00000-of-00003.parquet`` and so on, in order.

    Shards get their names only once all are complete, so an interrupted run leaves none that looks whole; shards of an
    earlier run under the same `name` are replaced. The same samples give the same bytes.

    Args:
        rows_per_shard, shard_bytes: a shard ends at whichever comes first (bytes of text and media).

    Returns:
        The shards' paths; one empty shard for no samples.

    Raises ValueError: a sample that does not fit the schema; the message names it.
    """
    from rich.progress import track

    folder, partial = Path(folder), []
    with unfinished(folder / name) as beside, ExitStack() as current:
        beside.mkdir()

        def new_shard() -> _RowWriter:
            current.close()
            partial.append(beside / f"{len(partial)}.parquet")
            return current.enter_context(_RowWriter(partial[-1], SCHEMA, _ROW_GROUP_ROWS))

        writer = new_shard()
        for sample in track(samples, f"writing {printable(name)}", disable=not progress):
            if writer.rows >= rows_per_shard or writer.bytes >= shard_bytes:
                writer = new_shard()
            writer.add(_columns(sample), _payload(sample))
        current.close()
        for path in folder.glob("*.parquet"):
            if (match := _OF.match(path.name)) and match["name"] == name:
                path.unlink()
        final = [folder / f"{name}-{i:05d}-of-{len(partial):05d}.parquet" for i in range(len(partial))]
        for source, target in zip(partial, final, strict=True):
            place(source, target)
    return final


def write_shard(samples: Iterable[Sample], path: Path) -> None:
    """Write `samples` to one shard, whole or not at all. Raises as `write_shards`."""
    with atomic(path) as partial, _RowWriter(partial, SCHEMA, _ROW_GROUP_ROWS) as writer:
        for sample in samples:
            writer.add(_columns(sample), _payload(sample))


def write_media_table(items: Iterable[tuple[str, bytes]], path: str | Path) -> Path:
    """Write blobs under unique names to one media table. Raises ValueError: a name occurs twice, is empty, or has no
    bytes."""
    path = Path(path)
    names: set[str] = set()
    with atomic(path) as partial, _RowWriter(partial, MEDIA_TABLE_SCHEMA) as writer:
        for name, blob in items:
            if not name or not blob or name in names:
                problem = "occurs twice" if name in names else "needs a name and bytes"
                raise ValueError(f"{path.name}: medium {name!r} {problem}")
            names.add(name)
            writer.add({"name": name, "bytes": blob}, len(blob))
    return path


# ---------------------------------------------------------------------------------------------------------- reading


class _RowGroups:
    """Parquet files of one reader, opened when first needed, with their latest row groups kept decoded."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: dict[Path, tuple[pq.ParquetFile, np.ndarray]] = {}
        self._groups: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> tuple[type[_RowGroups], tuple[()]]:  # a worker opens its own files
        return (type(self), ())

    def row(self, path: Path, row: int) -> pa.Table:
        """Row `row` of the file as a table of one row."""
        with self._lock:
            if path not in self._open:
                file = _open_parquet(path)
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                self._open[path] = (file, np.cumsum([0, *sizes]))
            file, starts = self._open[path]
            group = int(np.searchsorted(starts, row, side="right")) - 1
            key = (path, group)
            if key in self._groups:
                self._groups.move_to_end(key)
            else:
                try:
                    table = file.read_row_group(group, use_threads=False)
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(
                        f"{path}: row group {group} (rows {starts[group]} to {starts[group + 1] - 1}) is damaged "
                        f"({error}); fetch or write this shard again"
                    ) from error
                self._groups[key] = table
                self._bytes += table.nbytes
                while self._bytes > _CACHE_BYTES and len(self._groups) > 1:
                    self._bytes -= self._groups.popitem(last=False)[1].nbytes
            return self._groups[key].slice(row - int(starts[group]), 1)


def _open_parquet(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; fetch or write it again, or mend the path in the configuration")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}); fetch or write it again") from error


class MediaReader:
    """Encoded bytes of segments whose media lie in, or below, one folder. Paths that lead out of it are refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[str, dict[str, int]] = {}
        self._groups = _RowGroups()

    def __call__(self, segment: Segment) -> bytes:
        """The bytes of `segment`'s medium. Raises BadSample: ``media_missing`` (no bytes and no path, nothing there, or
        nothing that can be read), ``media_outside`` (an absolute path or one with ``..``), ``row_invalid`` (a data URI
        that is none)."""
        if segment.media is not None:
            return segment.media
        if not segment.path:
            raise BadSample("media_missing", f"a segment of type {segment.type!r} has neither media bytes nor a path")
        if (inline := _inline(segment.path)) is not None:
            return inline
        table, _, name = segment.path.partition(".parquet#")
        path = self._inside(f"{table}.parquet" if name else segment.path)
        try:
            return self._from_table(path, name) if name else _read_regular(path)
        except (OSError, ValueError) as error:  # ValueError: half of a character, as of a name that is not UTF-8
            shown = segment.path if len(segment.path) < 200 else f"{segment.path[:200]}..."
            why = f"{shown!r} is not a file that can be read in {self.folder.resolve()} ({error.args[-1]})"
            raise BadSample("media_missing", why) from error

    def _inside(self, relative: str) -> Path:
        if Path(relative).is_relative_to(self.folder.absolute()):
            relative = str(Path(relative).relative_to(self.folder.absolute()))
        pure, windows = PurePosixPath(relative), PureWindowsPath(relative)
        if pure.is_absolute() or windows.drive or windows.root or ".." in windows.parts or "\0" in relative:
            raise BadSample("media_outside", f"path {relative!r} leads out of {self.folder}; make it relative to that")
        return self.folder / relative

    def _from_table(self, path: Path, name: str) -> bytes:
        table = str(path)
        if table not in self._tables:
            file = _open_parquet(path)
            if missing := {"name", "bytes"} - set(file.schema_arrow.names):
                raise ValueError(f"{path}: a media table has the columns name and bytes; {sorted(missing)} is missing")
            self._tables[table] = {key: row for row, key in enumerate(file.read(columns=["name"])["name"].to_pylist())}
        if name not in self._tables[table]:
            raise BadSample("media_missing", f"{table} holds no medium named {name!r}")
        return self._groups.row(path, self._tables[table][name])["bytes"][0].as_py()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tables": {}}  # `_groups` empties itself


LARGEST_FILE = 2**30
"""Bytes of a medium; more are not read."""


def _read_regular(path: Path) -> bytes:
    """The bytes of a file, through links too; a pipe is not waited for, and a device is not read without end."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError("a folder, pipe or device")
        if facts.st_size > LARGEST_FILE:
            raise OSError(f"{facts.st_size} bytes; at most {LARGEST_FILE} are read")
        return file.read()


def _inline(path: str) -> bytes | None:
    """The medium that stands in the row itself, as a data URI (RFC 2397) or in base64; None of a file's name."""
    head, comma, body = path.partition(",")
    if comma and head.startswith("data:"):
        if not head.endswith(";base64"):
            return unquote_to_bytes(body)
    elif len(body := path) < 256:  # the longest name that a file may have
        return None
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        if comma:
            raise BadSample("row_invalid", f"{path[:60]!r}... is no base64") from None
        return None


class IndexedSource(ABC):
    """What sources of any format share. Each sets `_kept`, the row behind every sample, and `_media`."""

    name: str
    _kept: np.ndarray
    _media: MediaReader

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, media not decoded.

        Raises:
            BadSample: ``row_invalid``, ``text_not_utf8``, ``media_missing``.
            IndexError: outside ``0 .. len - 1``.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: sample {index} of {len(self)}")
        return self._read(index)

    @abstractmethod
    def _read(self, index: int) -> Sample: ...

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def media_bytes(self, segment: Segment) -> bytes:
        """The encoded bytes of a segment's medium; see `MediaReader`."""
        return self._media(segment)


class SampleSource(IndexedSource):
    """The samples of one or more shards in one folder, by index.

    Opening reads the light columns alone. Reading a row decodes its row group (latest groups stay in memory). Pickled
    for a worker process, it carries its row numbers and opens the files there.

    Args:
        path: a folder (all its ``*.parquet`` that are not media tables), one file, a glob, or a list of files of one
            folder. Media paths are relative to that folder.
        split: keep the rows of this split; the same as ``where={"split": [split]}``.
        where: which rows to keep: each key one of `FILTERS`, each value a list (or one string). A row stays when it
            agrees with every key. ``languages`` keeps rows whose languages all stand in the list; an entry such as
            ``"en>fr"`` names an exact sequence. ``concept_share`` is a number in (0, 1]: that share of the concepts,
            chosen by a hash, so that 0.2 is a part of 0.4 and every source keeps the same ones (rows without a concept
            stay).
        name: for logs and counters; default: the folder's or file's name.

    Raises:
        FileNotFoundError: no shard there, or one of a numbered series is missing.
        ValueError: a column or nested field is missing, unknown or of another type; an unknown filter; no row left.
            The message names file, field and fix.
    """

    def __init__(self, path: Location, split: str | None = None, where: Where = None, name: str | None = None) -> None:
        self.files = shard_files(path)
        self.folder = self.files[0].parent
        if other := [file for file in self.files if file.parent != self.folder]:
            raise ValueError(f"shards of one source lie in one folder; {other[0]} is not in {self.folder}")
        shown = Path(path) if isinstance(path, (str, Path)) else self.folder
        self.name = name or (shown.stem if shown.suffix == ".parquet" and "*" not in shown.name else self.folder.name)
        conditions = read_conditions(where, split)
        kept_files, kept_rows = [], []
        for number, file in enumerate(self.files):
            rows = _matching_rows(_open_shard(file), conditions)
            kept_files.append(np.full(len(rows), number, dtype=np.int32))
            kept_rows.append(rows)
        self._file, self._kept = np.concatenate(kept_files), np.concatenate(kept_rows)
        if conditions and not len(self):
            there = self._values(conditions)
            raise ValueError(f"{self.name}: no row of {self.folder} has {conditions}; it holds {there}")
        self._groups = _RowGroups()
        self._media = MediaReader(self.folder)

    def _read(self, index: int) -> Sample:
        return row_to_sample(self._groups.row(self.files[self._file[index]], int(self._kept[index])))

    def locate(self, index: int) -> tuple[str, int]:
        """The shard's path and the row in it (from 0)."""
        return str(self.files[self._file[index]]), int(self._kept[index])

    def light(self) -> pa.Table:
        """The light columns (`LIGHT_COLUMNS`) of this source's rows, in order."""
        parts = []
        for number, file in enumerate(self.files):
            table = _open_parquet(file).read(columns=list(LIGHT_COLUMNS), use_threads=False)
            parts.append(table.take(self._kept[self._file == number]))
        return pa.concat_tables(parts)

    def _values(self, keys: Iterable[str]) -> str:
        texts = []
        for key in dict.fromkeys("concept" if key == "concept_share" else key for key in keys):
            columns = [_open_parquet(file).read(columns=[key])[key] for file in self.files]
            values = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
            if _is_list(values.type):
                values = pc.call_function("list_flatten", [values])
            seen = sorted(str(value) for value in values.unique().to_pylist())
            texts.append(f"{key} {', '.join(seen[:20])}{', ...' if len(seen) > 20 else ''}")
        return "; ".join(texts)


def shard_files(path: Location) -> list[Path]:
    """The shards that `path` (folder, file, glob or list) names, sorted by name; media tables are left out. Raises
    FileNotFoundError: none there, or one of a numbered series (``-00001-of-00003``) is missing."""
    if not isinstance(path, (str, Path)):
        files, nothing = [Path(file).expanduser() for file in path], "an empty list of shards"
    elif (given := Path(path).expanduser()).is_dir():
        files = _shards(given, "*.parquet")
        nothing = f"{given} holds no Parquet shard; write one with `omnitrain data import` or data_prep"
    elif "*" in given.name or "?" in given.name:
        files, nothing = _shards(given.parent, given.name), f"no file matches {given}"
    else:
        files, nothing = [given], ""
    if not files:
        raise FileNotFoundError(nothing)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"shard {file} is missing; fetch or write it again, or mend the path")
    if isinstance(path, (str, Path)) and Path(path).suffix != ".parquet":
        for file in files:  # a folder must hold every shard of a numbered series
            if match := _OF.match(file.name):
                for index in range(int(match["count"])):
                    sibling = file.with_name(f"{match['name']}-{index:05d}-of-{match['count']}.parquet")
                    if not sibling.is_file():
                        raise FileNotFoundError(f"shard {sibling} of {match['count']} is missing; fetch it again")
    return files


def _shards(folder: Path, pattern: str) -> list[Path]:
    tables = set(MEDIA_TABLE_SCHEMA.names)
    return sorted(file for file in folder.glob(pattern) if set(_open_parquet(file).schema_arrow.names) != tables)


def nearest(word: str, words: Iterable[str]) -> str:
    """`` (did you mean ...?)``, or nothing when no word is near."""
    hint = did_you_mean(word, words, form="{!r}", otherwise="")
    return f" ({hint})" if hint else ""


def read_conditions(where: Where, split: str | None = None) -> dict[str, list[Any]]:
    """What `where` and `split` ask for: filter -> allowed values. Raises ValueError: an unknown filter, or a share
    outside (0, 1]."""
    conditions = {
        key: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for key, value in (where or {}).items()
    }
    if split is not None:
        conditions["split"] = [split]
    check_known("where", "filter", conditions, FILTERS)
    for key, allowed in conditions.items():
        if key == "concept_share":
            try:
                conditions[key] = [share] = [float(value) for value in allowed]
            except ValueError:
                share = math.nan
            if not 0 < share <= 1:
                raise ValueError(f"where: concept_share {allowed} must be one number above 0 and at most 1")
    return conditions


def concept_fraction(concept: str) -> float:
    """A number in [0, 1) for each concept, the same everywhere; `concept_share` keeps those below it."""
    return zlib.crc32(concept.encode()) / 2**32


def check_known(where: str, what: str, given: Iterable[object], known: Sequence[str]) -> None:
    """Raise ValueError for the first name that is none of the `known`, with the one that is meant."""
    for word in given:
        if word not in known:
            hint = f"{nearest(str(word), known)}; use one of {', '.join(known)}"
            raise ValueError(f"{where}: {what} {word!r} is unknown{hint}")


def _open_shard(path: Path) -> pq.ParquetFile:
    """The shard, once its columns are what `SCHEMA` says."""
    file = _open_parquet(path)
    _check_fields(path, "column", file.schema_arrow, SCHEMA)
    return file


def _check_fields(
    path: Path, what: str, found: Iterable[pa.Field], wanted: Iterable[pa.Field], prefix: str = ""
) -> None:
    have, want = {field.name: field.type for field in found}, {field.name: field.type for field in wanted}
    fix = "write the shard with write_shards or `omnitrain data import`"
    for name in want:
        if name not in have:
            raise ValueError(f"{path}: {what} {prefix + name!r} is missing; {fix}")
    for name in have:
        if name not in want:
            near = f"{nearest(name, want)}; rename it, move it into meta, or {fix}"
            raise ValueError(f"{path}: {what} {prefix + name!r} is unknown{near}")
    for name, kind in want.items():
        given = have[name]
        while _is_list(kind) and _is_list(given):
            kind, given = kind.value_type, given.value_type
        if pa.types.is_struct(kind) and pa.types.is_struct(given):
            _check_fields(path, "field", given, kind, f"{prefix}{name}.")
        elif _family(kind) != _family(given) and not pa.types.is_null(given):
            raise ValueError(f"{path}: {what} {prefix + name!r} is {given}, not {kind}; {fix}")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _family(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _family(kind.value_type)
    return str(kind).removeprefix("large_")


def _matching_rows(file: pq.ParquetFile, conditions: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """Row numbers (int64) of `file` that agree with every condition; text is compared as bytes and never decoded."""
    keep = np.ones(file.metadata.num_rows, dtype=bool)
    if not conditions:
        return np.flatnonzero(keep)
    columns = {key: "concept" if key == "concept_share" else key for key in conditions}
    table = file.read(columns=sorted(set(columns.values())), use_threads=False)
    for key, allowed in conditions.items():
        column = table[columns[key]].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # a table without rows
            continue
        if key == "languages":
            plain = pa.array([value for value in allowed if ">" not in value], pa.string())
            exact = pa.array([value for value in allowed if ">" in value], pa.string())
            offsets = column.offsets.to_numpy()
            other = ~_is_in(column.values, plain)
            before = np.concatenate([[0], np.cumsum(other)])
            joined = _is_in(pc.call_function("binary_join", [column, ">"]), exact)
            keep &= ((before[offsets[1:]] == before[offsets[:-1]]) & (len(plain) > 0)) | joined
        elif key == "concept_share":
            fractions = {concept: concept_fraction(concept) for concept in column.unique().to_pylist()}
            keep &= np.array([fractions[concept] < allowed[0] for concept in column.to_pylist()], dtype=bool)
        else:
            keep &= _is_in(column, pa.array(allowed, pa.string()))
    return np.flatnonzero(keep)


def _is_in(values: pa.Array, allowed: pa.Array) -> np.ndarray:
    found = pc.call_function("is_in", [values], pc.SetLookupOptions(allowed))
    return found.to_numpy(zero_copy_only=False)


def row_to_sample(row: pa.Table) -> Sample:
    """The sample in a table of one row of `SCHEMA`. Raises BadSample: ``text_not_utf8``, or ``row_invalid`` (unknown
    role or segment type, missing value, broken meta)."""
    try:
        values = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadSample("text_not_utf8", f"column {_undecodable(row)!r} holds {error.object[:40]!r}") from error
    name = f"sample {values['id']!r}"
    meta = parse_json(values["meta"] or "{}", f"{name}: column 'meta'")
    messages = []
    for message in values["messages"] or ():
        role = message and message["role"]
        if role not in ROLES:
            raise BadSample("row_invalid", f"{name}: role {role!r} is none of {', '.join(ROLES)}")
        segments = []
        for segment in message["segments"] or ():
            kind = segment and segment["type"]
            if kind not in SEGMENT_TYPES:
                raise BadSample("row_invalid", f"{name}: segment type {kind!r} is none of {', '.join(SEGMENT_TYPES)}")
            if kind == "text" and segment["text"] is None:
                raise BadSample("row_invalid", f"{name}: a text segment has no text")
            segments.append(Segment(**segment | {"with_audio": bool(segment["with_audio"])}))
        messages.append(Message(role=role, segments=tuple(segments)))
    if not values["id"] or not messages:
        raise BadSample("row_invalid", f"{name}: id and messages may not be empty")
    return Sample(
        id=values["id"],
        source=values["source"] or "",
        messages=tuple(messages),
        languages=tuple(values["languages"] or ()),
        meta={key: str(value) for key, value in meta.items()},
        **{key: values[key] for key in ("split", "task", "licence", "concept") if values[key]},
    )


def parse_json(data: str | bytes, name: str, of: type = dict) -> Any:
    """The JSON value in `data`, which `name` names. Raises BadSample: ``text_not_utf8``, ``row_invalid``."""
    try:
        value = json.loads(data if isinstance(data, str) else data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        found = error.object[error.start : error.start + 20]
        raise BadSample("text_not_utf8", f"{name} holds {found!r}; {encoding_hint(error.object)}") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("row_invalid", f"{name} is no JSON: {error}") from error
    if not isinstance(value, of):
        raise BadSample("row_invalid", f"{name} is {type(value).__name__}, not a JSON object")
    return value


def _undecodable(row: pa.Table) -> str:
    for name in row.column_names:
        try:
            row[name].to_pylist()
        except UnicodeDecodeError:
            return name
    return "?"

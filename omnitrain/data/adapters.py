"""A user's own data without code: a YAML file (`ColumnMapping`) says which column is what; docs/data.md shows them.

:class:`MappedSource` reads such data by index, with the interface of `SampleSource`. A streamed Hub data set has no
index: ``omnitrain data import`` writes it to shards (:func:`stream_samples`).
"""

from __future__ import annotations

import glob
import json
import math
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np

from omnitrain.data.sample import MEDIA, ROLES, SEGMENT_TYPES, BadSample, Message, Role, Sample, Segment, SegmentType
from omnitrain.data.shards import (
    IndexedSource,
    Location,
    MediaReader,
    SampleSource,
    Source,
    Where,
    check_known,
    concept_fraction,
    nearest,
    parse_json,
    read_conditions,
)
from omnitrain.data.turns import FORMATS, answer_pieces, signatures, write_calls
from omnitrain.files import encoding_hint, looks_like_utf16

KINDS = ("jsonl", "parquet", "webdataset", "hub")
_LOOK_AT = 100  # rows of a format without a schema, for its columns


def open_source(path: Location, split: str | None = None, where: Where = None, name: str | None = None) -> Source:
    """Shards, or the data that a mapping (a ``.yaml`` file) describes. Arguments as of `SampleSource`."""
    if isinstance(path, (str, Path)) and Path(path).suffix in (".yaml", ".yml"):
        return MappedSource(path, split=split, where=where, name=name)
    return SampleSource(path, split=split, where=where, name=name)


def spaced(source: Source, limit: int | None) -> Source:
    """`limit` samples of `source`, evenly spaced; all of them if there are no more."""
    return source if limit is None or limit >= len(source) else _Spaced(source, limit)


class _Spaced(IndexedSource):
    def __init__(self, source: Source, count: int) -> None:
        self.name, self._source = source.name, source
        self._kept = np.arange(count) * len(source) // count

    def _read(self, index: int) -> Sample:
        return self._source[int(self._kept[index])]

    def locate(self, index: int) -> tuple[str, int]:
        return self._source.locate(int(self._kept[index]))

    def media_bytes(self, segment: Segment) -> bytes:
        return self._source.media_bytes(segment)


# ------------------------------------------------------------------------------------------------------------- mapping


@dataclass(frozen=True, kw_only=True)
class ColumnMapping:
    """The contents of a mapping file. Strings, and the strings in lists, are templates.

    Attributes:
        kind, path: what is read. `path` is a file or glob relative to the mapping file; for ``hub`` a name on the Hub,
            or a loader of `datasets` such as ``imagefolder`` with `data_dir`.
        config, hub_split, revision, data_dir, streaming: of a Hub data set.
        media_root: folder of media paths, relative to the mapping file; default: that file's folder (``hub``: the data
            set's own).
        messages: a list of ``{role: content}``; or ``{format, column, role, text, roles, media, tools, with_audio}``
            for a column that holds the turns of a conversation: `role` and `text` name a turn's fields, `roles`
            translates roles, `media` gives the segment that a marker such as ``<image>`` in the text stands for,
            `tools` the functions that may be called, and with `with_audio` the sound of videos in parts is heard.
            `format` is one of `turns.FORMATS`, whose fields these are by default; its name alone is enough.
    """

    kind: str
    path: str
    source: str
    messages: Any
    id: str | None = None
    split: str = "train"
    task: str = "text"
    licence: str = ""
    languages: tuple[str, ...] | list[str] = ()
    concept: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    media_root: str | None = None
    config: str | None = None
    hub_split: str = "train"
    revision: str | None = None
    data_dir: str | None = None
    streaming: bool = False


def load_mapping(file: str | Path) -> ColumnMapping:
    """Read a mapping file. Raises FileNotFoundError, ValueError: naming the file, the field and the fix."""
    import yaml

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"mapping {file} is missing")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a mapping needs the fields kind, path, source and messages")
    check_known(str(file), "field", values, [f.name for f in fields(ColumnMapping)])
    for key in ("kind", "path", "source", "messages"):
        if not values.get(key):
            raise ValueError(f"{file}: field {key!r} is missing")
    check_known(str(file), "kind", [values["kind"]], KINDS)
    return ColumnMapping(**values)


class _Template:
    """Text with ``{column}`` fields."""

    def __init__(self, text: Any, where: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"{where} is {text!r}; it must be text with {{column}} fields")
        self.pieces: list[tuple[str, tuple[tuple[str, ...], ...]]] = []
        try:
            for literal, name, spec, conversion in Formatter().parse(text):
                if spec or conversion or name == "":
                    raise ValueError("a field is {column}, {column.field} or {first|second}")
                paths = tuple(tuple(path.split(".")) for path in name.split("|")) if name else ()
                self.pieces.append((literal, paths))
        except ValueError as error:
            raise ValueError(f"{where}: {text!r}: {error}; write {{{{ for a brace") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Template) and self.pieces == other.pieces

    def __hash__(self) -> int:
        return hash(tuple(self.pieces))

    def columns(self) -> Iterator[tuple[str, ...]]:
        """For each field, the columns of which one must exist."""
        return (tuple(path[0] for path in paths) for _, paths in self.pieces if paths)

    def value(self, row: Mapping[str, Any]) -> Any:
        """The one column's own value where the template is just that, else text."""
        match self.pieces:
            case [("", paths)] if paths:
                return _look_up(row, paths)
        return self.text(row)

    def text(self, row: Mapping[str, Any]) -> str:
        return "".join(
            literal + (_as_text(_look_up(row, paths), _shown(paths)) if paths else "") for literal, paths in self.pieces
        )


def _look_up(row: Mapping[str, Any], paths: tuple[tuple[str, ...], ...]) -> Any:
    for path in paths:
        value: Any = row
        for key in path:
            if isinstance(value, Mapping):
                value = value.get(key)
            elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and key.isdigit():
                value = value[int(key)] if int(key) < len(value) else None
            else:
                value = None
        if value is not None:
            return value
    raise BadSample("row_invalid", f"the row has no value for {_shown(paths)}")


def _shown(paths: tuple[tuple[str, ...], ...]) -> str:
    return "{" + "|".join(".".join(path) for path in paths) + "}"


def _as_text(value: Any, name: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSample("text_not_utf8", f"{name} holds {value[:40]!r}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise BadSample("row_invalid", f"{name} is {value}, a missing value that was written as a number")
    if isinstance(value, (str, int, float)):
        return str(value)
    raise BadSample("row_invalid", f"{name} is {type(value).__name__}, not text")


@dataclass(frozen=True)
class _SegmentMapping:
    type: SegmentType
    texts: tuple[_Template, ...] = ()
    medium: _Template | None = None
    with_audio: bool = False

    def build(self, row: Mapping[str, Any], id: str, occurrence: int = 0) -> Segment:
        text = self.texts[zlib.crc32(id.encode()) % len(self.texts)].text(row) if self.texts else None
        if self.medium is None:
            return Segment(type=self.type, text=text)
        value = self.medium.value(row)
        value = value[occurrence] if isinstance(value, list) else value  # several in one column, in order
        media, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
        if isinstance(media, str):
            media, path = None, media
        if not isinstance(media, bytes) and not isinstance(path, str):
            raise BadSample("media_missing", f"the {self.type} is {type(value).__name__} without bytes or path")
        media = media if isinstance(media, bytes) else None
        return Segment(type=self.type, text=text, media=media, path=None if media else path, with_audio=self.with_audio)

    def templates(self) -> Iterator[_Template]:
        yield from self.texts
        if self.medium is not None:
            yield self.medium


def _build(
    messages: Iterable[tuple[Role, list[_SegmentMapping | Segment]]],
    row: Mapping[str, Any],
    id: str,
    markers: Mapping[str, _SegmentMapping],
) -> tuple[Message, ...]:
    """The messages of a row; segments stand as they are. The media of a column are used in order, all of them and
    each once; but a single medium as often as a mapping without `markers` names it. Raises BadSample: ``row_invalid``,
    with both counts."""
    parts = [part for _, content in messages for part in content if isinstance(part, _SegmentMapping)]
    used = Counter(part.medium for part in parts)
    for part in (*parts, *markers.values()):
        if part.medium is not None and any(part.medium.columns()):
            try:
                value = part.medium.value(row)
            except BadSample:
                value = None
            there = len(value) if isinstance(value, list) else int(value not in (None, ""))
            if used[part.medium] != there and (markers or isinstance(value, list)):
                names = [name for name, marked in markers.items() if marked.medium == part.medium]
                what = f"marker(s) {' '.join(names)} in the text" if markers else "segment(s) in the mapping"
                raise BadSample("row_invalid", f"{used[part.medium]} {what} for {there} {part.type}(s) of the row")
    seen: Counter[_Template | None] = Counter()

    def segment(part: _SegmentMapping | Segment) -> Segment:
        if isinstance(part, Segment):
            return part
        seen[part.medium] += 1
        return part.build(row, id, seen[part.medium] - 1)

    return tuple(Message(role=role, segments=tuple(map(segment, content))) for role, content in messages)


def _segment_mapping(spec: Any, where: str) -> _SegmentMapping:
    if isinstance(spec, str):
        return _SegmentMapping("text", (_Template(spec, where),))
    if not isinstance(spec, dict):
        raise ValueError(f"{where} is {spec!r}; a segment is text or such as {{image: ...}} or {{audio: ...}}")
    check_known(where, "segment type", spec, (*SEGMENT_TYPES, "with_audio"))
    media: list[Any] = [kind for kind in SEGMENT_TYPES if kind != "text" and kind in spec]
    if len(media) > 1 or not (media or "text" in spec) or (media and media[0] != "speech" and "text" in spec):
        raise ValueError(f"{where}: one segment holds one medium or text; found {', '.join(map(str, spec))}")
    texts = spec.get("text", [])
    texts = tuple(_Template(text, f"{where}.text") for text in (texts if isinstance(texts, list) else [texts]))
    medium = _Template(spec[media[0]], f"{where}.{media[0]}") if media else None
    return _SegmentMapping(media[0] if media else "text", texts, medium, bool(spec.get("with_audio", False)))


class _Turns:
    """Messages written out in the mapping: ``[{user: [...]}, {assistant: ...}]``."""

    def __init__(self, spec: list[Any], where: str) -> None:
        self.messages: list[tuple[Role, list[Any]]] = []
        for number, message in enumerate(spec):
            here = f"{where}[{number}]"
            if not isinstance(message, dict) or len(message) != 1:
                raise ValueError(f"{here} is {message!r}; a message is one {{role: content}}")
            [(role, content)] = message.items()
            parts = content if isinstance(content, list) else [content]
            segments = [_segment_mapping(part, f"{here}.{role}[{i}]") for i, part in enumerate(parts)]
            check_known(here, "role", [role], ROLES)
            self.messages.append((role, segments))

    def templates(self) -> Iterator[_Template]:
        return (template for _, segments in self.messages for segment in segments for template in segment.templates())

    def build(self, row: Mapping[str, Any], id: str) -> tuple[Message, ...]:
        return _build(self.messages, row, id, {})


class _Conversation:
    """Messages in a column: a list of turns (or its JSON) with a role and a content. That is a text in which markers
    stand for media, or a list of parts as OpenAI's, Qwen's and TRL's; one without a medium of its own stands for the
    next one of the mapping's `media`. What an assistant's turn has beside it, `turns.answer_pieces` makes text."""

    def __init__(self, spec: dict[str, Any], where: str, *, sparse: bool = False) -> None:
        check_known(where, "field", spec, ("format", "column", "role", "text", "roles", "media", "tools", "with_audio"))
        if (name := spec.get("format")) is not None:
            check_known(f"{where}.format", "format", [name], list(FORMATS))
            spec = {**FORMATS[name], **spec}
        if "column" not in spec:
            raise ValueError(f"{where}: field 'column' is missing; name the column that holds the turns, or a `format`")
        self.turns = _Template("{" + str(spec["column"]) + "}", f"{where}.column")
        self.tools = _Template(spec["tools"], f"{where}.tools") if "tools" in spec else None
        self.found_tools = name is not None and self.tools is None  # a column `tools`, in the rows that have one
        self.with_audio, self.sparse = bool(spec.get("with_audio", False)), sparse
        self.role, self.text = str(spec.get("role", "role")), str(spec.get("text", "content"))
        self.roles: dict[str, Role] = spec.get("roles") or {}
        check_known(f"{where}.roles", "role", self.roles.values(), ROLES)
        self.media = {
            marker: _segment_mapping(part, f"{where}.media[{marker!r}]")
            for marker, part in (spec.get("media") or {}).items()
        }
        self.markers = re.compile("(" + "|".join(map(re.escape, self.media)) + ")") if self.media else None

    def templates(self) -> Iterator[_Template]:
        yield self.turns
        if self.tools is not None:
            yield self.tools
        for part in self.media.values():
            yield from part.templates()

    def signatures(self, row: Mapping[str, Any]) -> str | None:
        """The functions that may be called, as `Sample.meta` keeps them."""
        if self.tools is None:
            tools = row.get("tools") if self.found_tools else None
        else:
            try:
                tools = self.tools.value(row)
            except BadSample:  # this row has none
                return None
        return signatures(tools, sparse=self.sparse) if tools else None

    def build(self, row: Mapping[str, Any], id: str) -> tuple[Message, ...]:
        turns = self.turns.value(row)
        if isinstance(turns, str):
            turns = parse_json(turns, "the conversation column", of=list)
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise BadSample("row_invalid", "the conversation column is no list of turns")
        messages = []
        for turn in turns:
            named, text = turn.get(self.role), turn.get(self.text)
            role = self.roles.get(named, named)
            thoughts, calls = "", ""
            if role == "assistant":
                if named == "function_call":  # ShareGPT has calls as a turn of their own
                    text = write_calls(text, sparse=self.sparse)
                thoughts, said, calls = answer_pieces(turn, text if isinstance(text, str) else "", sparse=self.sparse)
                text = said if isinstance(text, str) or (text is None and (thoughts or calls)) else text
            if role not in ROLES or not isinstance(text, str | list):
                raise BadSample("row_invalid", f"a turn with role {role!r} and {type(text).__name__} as text")
            if isinstance(text, list):
                content = [self._part(part) for part in text]
                calls = f"\n{calls}" if content and calls else calls
            else:
                pieces = filter(str.strip, self.markers.split(text) if self.markers else [text])
                texts = ((piece, piece.strip("\n") if self.media else piece) for piece in pieces)
                content = [self.media.get(p) or Segment(type="text", text=text) for p, text in texts]
            around = [[Segment(type="text", text=text)] if text else [] for text in (thoughts, calls)]
            messages.append((role, [*around[0], *content, *around[1]]))
        return _build(messages, row, id, self.media)

    def _part(self, part: Any) -> _SegmentMapping | Segment:
        """``{type: text, text: ...}``, ``{type: image_url, image_url: {url: ...}}``, ``{type: input_audio, input_audio:
        {data: BASE64}}``, ``{type: image, image: PATH}``, ``{type: image}`` and the like."""
        if isinstance(part, str):
            return Segment(type="text", text=part)
        kind = type(part).__name__
        if isinstance(part, Mapping):  # Qwen's parts may name their medium alone: {"image": PATH}
            own = (k for k in ("text", *MEDIA, *(f"{m}_url" for m in MEDIA)) if part.get(k) is not None)
            kind = str(part.get("type") or next(own, None))
            if cut := [key for key in ("video_start", "video_end", "audio_start", "audio_end") if part.get(key)]:
                raise BadSample("row_invalid", f"a part with {cut[0]}: a medium is read whole; cut the file")
        name: Any = kind.removeprefix("input_").removeprefix("output_").removesuffix("_url")
        if name not in SEGMENT_TYPES or name == "speech":
            raise BadSample("row_invalid", f"a part of type {kind!r}; known are text, image, audio and video")
        # Tables give every part all the keys that any of them has.
        keys = (kind, f"{name}_url", f"input_{name}", name, "url", "path")
        value = next((v for key in keys if (v := part.get(key)) is not None), None)
        if name == "text":
            if not isinstance(value, str):
                raise BadSample("row_invalid", f"a part of type text whose text is {type(value).__name__}")
            return Segment(type="text", text=value)
        if value is None:
            found = next((medium for medium in self.media.values() if medium.type == name), None)
            if found is None:
                fix = f'name its column in the mapping, as media: {{"<{name}>": {{{name}: "{{{name}s}}"}}}}'
                raise BadSample("row_invalid", f"a part of type {kind} without {name}; {fix}")
            return found
        if isinstance(value, Mapping):
            value = next((v for key in ("url", "bytes", "path") if (v := value.get(key))), None) or (
                f"data:;base64,{value['data']}" if isinstance(value.get("data"), str) else None
            )
        heard = name == "video" and self.with_audio
        if isinstance(value, bytes):
            return Segment(type=name, media=value, with_audio=heard)
        if not isinstance(value, str):
            raise BadSample("media_missing", f"a part of type {kind} is {type(value).__name__} without bytes or path")
        return Segment(type=name, path=value.removeprefix("file://"), with_audio=heard)


class _RowMapping:
    """Row -> sample."""

    def __init__(self, mapping: ColumnMapping, where: str) -> None:
        self.mapping = mapping
        names = ("source", "split", "task", "licence", "concept")
        self.plain = {name: _Template(getattr(mapping, name), f"{where}: {name}") for name in names}
        self.id = None if mapping.id is None else _Template(mapping.id, f"{where}: id")
        if isinstance(mapping.languages, str):
            raise ValueError(f"{where}: languages is a list, such as [en] or ['{{locale}}']")
        self.languages = [_Template(language, f"{where}: languages") for language in mapping.languages]
        self.meta = {key: _Template(value, f"{where}: meta.{key}") for key, value in mapping.meta.items()}
        messages, here = mapping.messages, f"{where}: messages"
        if isinstance(messages, list):
            self.messages: _Turns | _Conversation = _Turns(messages, here)
        else:
            spec = {"format": messages} if isinstance(messages, str) else messages
            self.messages = _Conversation(spec, here, sparse=mapping.kind in ("parquet", "hub"))

    def templates(self) -> Iterator[_Template]:
        yield from self.messages.templates()
        yield from (*self.plain.values(), *([self.id] if self.id else []), *self.languages, *self.meta.values())

    def __call__(self, row: Mapping[str, Any], number: int) -> Sample:
        plain = {name: template.text(row) for name, template in self.plain.items()}
        id = self.id.text(row) if self.id is not None else f"{plain['source']}/{number}"
        meta = {key: value.text(row) for key, value in self.meta.items()}
        if isinstance(self.messages, _Conversation) and (tools := self.messages.signatures(row)) is not None:
            meta["tools"] = tools
        return Sample(
            id=id,
            messages=self.messages.build(row, id),
            languages=tuple(language.text(row) for language in self.languages),
            meta=meta,
            **plain,
        )


# ---------------------------------------------------------------------------------------------------------------- rows


def _data_files(pattern: str, base: Path) -> list[Path]:
    path = Path(pattern).expanduser()
    files = sorted(Path(file) for file in glob.glob(str(path if path.is_absolute() else base / path), recursive=True))
    if not files:
        raise FileNotFoundError(f"no file matches {base / path}; mend `path` in the mapping")
    return files


class _JsonLines:
    """Rows of JSONL files, or of files of one JSON array, by their byte offsets."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        places: list[np.ndarray] = []  # of each file: first byte and bytes of every row
        for file in files:
            if file.suffix in (".gz", ".zst", ".bz2"):
                raise ValueError(f"{file} is compressed; unpack it for random access")
            with file.open("rb") as lines:
                head = lines.read(1000)
                if looks_like_utf16(head):
                    raise ValueError(f"{file} is not UTF-8; {encoding_hint(head)}")
                lines.seek(0)
                whole = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
                found = chain.from_iterable(_elements(file) if whole else _lines(lines))
                places.append(np.fromiter(found, np.int64).reshape(-1, 2))
        self.number = np.repeat(np.arange(len(files)), [len(rows) for rows in places])
        self.offset, self.size = np.concatenate(places).T

    def __len__(self) -> int:
        return len(self.offset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.files[self.number[index]].open("rb") as file:
            file.seek(int(self.offset[index]))
            line = file.read(int(self.size[index]))
        return parse_json(line, "the line")

    def columns(self, look_at: int | None = None) -> set[str]:
        """Those of the first rows, or of all."""
        seen: set[str] = set()
        for index in range(len(self) if look_at is None else min(look_at, len(self))):
            with suppress(BadSample):
                seen |= self[index].keys()
        return seen

    def locate(self, index: int) -> tuple[str, int]:
        file = self.number[index]
        return str(self.files[file]), index - int(np.searchsorted(self.number, file))


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of every line that is not blank."""
    at = 0
    for line in file:
        if line.strip():
            yield at, len(line)
        at += len(line)


def _elements(file: Path) -> Iterator[tuple[int, int]]:
    """(first byte, bytes) of every element of a JSON array. Raises ValueError: it is not UTF-8, or breaks off."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}); {encoding_hint(data)}") from error
    if re.fullmatch(r"[\ufeff\s]*\[\s*\]\s*", text):
        return
    at = text.index("[") + 1
    byte, decoder = len(text[:at].encode()), json.JSONDecoder()
    while True:
        start = _next_mark(text, at)
        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is an array of JSON that cannot be read: {error}") from error
        byte += len(text[at:start].encode())
        size = len(text[start:end].encode())
        yield byte, size
        at = _next_mark(text, end)
        byte += size + len(text[end:at].encode()) + 1
        mark, at = text[at : at + 1], at + 1
        if mark == "]":
            return
        if mark != ",":
            raise ValueError(f"{file} is an array of JSON that breaks off at character {at - 1}")


def _next_mark(text: str, at: int) -> int:
    """Where the first character at or behind `at` stands that is no space."""
    while text[at : at + 1].isspace():
        at += 1
    return at


class _Tars:
    """Rows of WebDataset tars: files that share a name up to its first dot are one row, columns are the extensions."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.rows: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        self.starts: list[int] = []
        self.twice: dict[tuple[int, str], str] = {}
        for index, file in enumerate(files):
            self.starts.append(len(self.rows))
            groups: dict[str, dict[str, tuple[int, int]]] = {}
            try:
                with tarfile.open(file, "r:") as tar:
                    for member in tar:
                        if member.isfile():
                            folder, _, name = member.name.rpartition("/")
                            key, _, extension = name.partition(".")
                            key, extension = f"{folder}/{key}".lstrip("/"), extension.lower()
                            places = groups.setdefault(key, {})
                            if extension in places:
                                first = f"at bytes {places[extension][0]} and {member.offset_data}"
                                self.twice[index, key] = f"{key}.{extension} stands twice in {file}, {first}"
                            places[extension] = (member.offset_data, member.size)
            except tarfile.TarError as error:
                raise ValueError(f"{file} is no plain tar ({error}); unpack it for random access") from error
            self.rows += [(index, key, places) for key, places in groups.items()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, key, places = self.rows[index]
        if (number, key) in self.twice:  # two samples of one name, or one whose names differ in case
            raise BadSample("row_invalid", self.twice[number, key] + "; give every sample a name of its own")
        row: dict[str, Any] = {"__key__": key}
        with self.files[number].open("rb") as file:
            for extension, (offset, size) in places.items():
                file.seek(offset)
                data = file.read(size)
                if len(data) < size:
                    raise BadSample("row_invalid", f"{key}.{extension} is cut off")
                row[extension] = data
        for extension in list(row):
            if extension.rpartition(".")[2] == "json":
                row[extension] = parse_json(row[extension], f"{key}.{extension}", of=object)
        return row

    def columns(self, look_at: int | None = None) -> set[str]:
        return {"__key__"}.union(*(places for _, _, places in self.rows))

    def locate(self, index: int) -> tuple[str, int]:
        number = self.rows[index][0]
        return str(self.files[number]), index - self.starts[number]


class _Table:
    """Rows of a `datasets.Dataset` as plain Arrow, so that no Image, Audio or Video column is ever decoded by it."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset.with_format("arrow"), name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _plain_row(self.dataset[index])

    def columns(self, look_at: int | None = None) -> set[str]:
        return set(self.dataset.column_names)

    def locate(self, index: int) -> tuple[str, int]:
        return self.name, index


def _plain_row(table: Any) -> dict[str, Any]:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise BadSample("text_not_utf8", f"a text column holds {error.object[:40]!r}") from error


def _hub_dataset(mapping: ColumnMapping, base: Path, streaming: bool) -> Any:
    import datasets

    options: dict[str, Any] = {"revision": mapping.revision} if mapping.revision else {}
    if mapping.data_dir:
        options["data_dir"] = str(base / mapping.data_dir)
    local = base / mapping.path  # a repository that was downloaded
    path = str(local) if local.is_dir() else mapping.path
    return datasets.load_dataset(path, mapping.config, split=mapping.hub_split, streaming=streaming, **options)


def _open_rows(mapping: ColumnMapping, base: Path) -> Any:
    """Rows with `len`, `[index]`, `columns()` and `locate(index)`."""
    if mapping.kind == "hub":
        if mapping.streaming:
            fix = "write it to shards first (`omnitrain data import --mapping FILE --out DIR`), or set streaming: false"
            raise ValueError(f"{mapping.path} is streamed and has no random access; {fix}")
        return _Table(_hub_dataset(mapping, base, False), mapping.path)
    files = _data_files(mapping.path, base)
    if mapping.kind == "parquet":
        return _Table(_parquet(files), str(files[0]) if len(files) == 1 else mapping.path)
    return (_JsonLines if mapping.kind == "jsonl" else _Tars)(files)


def _parquet(files: list[Path]) -> Any:
    """The rows of Parquet files as one `datasets.Dataset`; a column that a file lacks is null there. Raises ValueError:
    a file is no Parquet, or has a column of another type than the others."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features, first, names = datasets.Features(), dict[str, Path](), list[str]()
    for file in files:
        try:
            found = datasets.Features.from_arrow_schema(pq.read_schema(file))
            if pq.read_metadata(file).num_rows:
                names.append(str(file))
        except (pa.ArrowInvalid, OSError) as error:
            reason = "it is empty" if not file.stat().st_size else str(error).splitlines()[0]
            raise ValueError(f"{file} is no Parquet file: {reason}; remove it, or write it again") from error
        for name, feature in found.items():
            null = datasets.Value("null")
            if features.get(name, null) == null:
                features[name], first[name] = feature, file
            elif feature not in (features[name], null):
                raise ValueError(
                    f"{file}: column {name!r} is {feature}, but {features[name]} in {first[name]}; write both alike"
                )
    if not names:
        return datasets.Dataset(features.arrow_schema.empty_table())
    return datasets.load_dataset("parquet", data_files=names, split="train", features=features)


# ------------------------------------------------------------------------------------------------------------- sources


def _agrees(sample: Sample, key: str, allowed: Sequence[Any]) -> bool:
    """One condition of `read_conditions`, as `SampleSource` understands it."""
    if key == "languages":
        return set(sample.languages) <= set(allowed) or ">".join(sample.languages) in allowed
    if key == "concept_share":
        return concept_fraction(sample.concept) < allowed[0]
    return getattr(sample, key) in allowed


class MappedSource(IndexedSource):
    """Samples of a user's own data by index, described by a mapping file. The interface is that of `SampleSource`.

    JSONL and tars are indexed by one pass over the files when opened; Parquet and Hub data sets go through the
    memory-mapped Arrow cache of `datasets`. With `split` or `where` every row is looked at once when opened. Raises
    FileNotFoundError, ValueError: the mapping or its data are missing, a column is not there, nothing is left. The
    message names file, field and fix.
    """

    def __init__(
        self, mapping: str | Path, split: str | None = None, where: Where = None, name: str | None = None
    ) -> None:
        self.file = Path(mapping)
        self.mapping = load_mapping(self.file)
        self.name = name or self.mapping.source
        self._sample = _RowMapping(self.mapping, str(self.file))
        self._rows = _open_rows(self.mapping, self.file.parent)
        _check_rows(self._sample, self._rows, self.file)
        self._media = _media_reader(self.mapping, self.file.parent)
        self._kept = np.arange(len(self._rows))
        conditions = read_conditions(where, split)
        if conditions:
            self._kept = np.array([i for i in range(len(self._rows)) if self._agrees(i, conditions)], dtype=np.int64)
            if not len(self._kept):
                raise ValueError(f"{self.file}: no row has {conditions}")

    def _agrees(self, row: int, conditions: Mapping[str, Sequence[Any]]) -> bool:
        try:
            sample = self._sample(self._rows[row], row)
        except BadSample:
            return True  # met, named and counted when its turn comes
        return all(_agrees(sample, key, allowed) for key, allowed in conditions.items())

    def _read(self, index: int) -> Sample:
        row = int(self._kept[index])
        return self._sample(self._rows[row], row)

    def locate(self, index: int) -> tuple[str, int]:
        """The file and the row in it (from 0)."""
        return self._rows.locate(int(self._kept[index]))


def _media_reader(mapping: ColumnMapping, base: Path) -> MediaReader:
    if mapping.kind == "hub":
        local = base / mapping.path
        own = base / mapping.data_dir if mapping.data_dir else local if local.is_dir() else base
        return _HubMedia(base / mapping.media_root if mapping.media_root else own, mapping.path)
    return MediaReader(base / (mapping.media_root or "."))


class _HubMedia(MediaReader):
    """Media beside a Hub data set's tables: in its folder, or, streamed, in its repository alone."""

    def __init__(self, folder: Path, repository: str) -> None:
        super().__init__(folder)
        self.repository = repository

    def __call__(self, segment: Segment) -> bytes:
        path = segment.path or ""
        if segment.media is None and path.startswith("hf://"):
            if not re.match(rf"hf://datasets/{re.escape(self.repository)}[@/]", path) or "/../" in path:
                raise BadSample("media_outside", f"path {path!r} leads out of the data set {self.repository}")
            import fsspec

            with fsspec.open(path, "rb") as file:
                return file.read()
        return super().__call__(segment)


def _check_rows(mapping: _RowMapping, rows: Any, file: Path) -> None:
    """ValueError if there are none, or a column is in none of them. All are looked at only if the first lack one."""
    if not len(rows):
        raise ValueError(f"{file}: there is no row in {mapping.mapping.path}; mend `path`, or write the data again")
    try:
        _check_columns(mapping, rows.columns(_LOOK_AT), file)
    except ValueError:
        _check_columns(mapping, rows.columns(), file)


def _check_columns(rows: _RowMapping, columns: set[str], file: Path) -> None:
    for template in rows.templates():
        for alternatives in template.columns():
            if not columns & set(alternatives):
                has = f"{nearest(alternatives[0], columns)}; it has {', '.join(sorted(columns)) or 'no columns'}"
                raise ValueError(f"{file}: column {'|'.join(alternatives)!r} is not in the data{has}")


def stream_samples(mapping_file: str | Path, bad: Callable[[int, BadSample], None]) -> Iterator[Sample]:
    """All samples of a mapping, in order, with their media embedded; streamed Hub data sets too.

    Args:
        bad: called with the row number of each sample that cannot be used.
    """
    file = Path(mapping_file)
    mapping = load_mapping(file)
    to_sample = _RowMapping(mapping, str(file))
    reader = _media_reader(mapping, file.parent)
    rows: Iterable[Callable[[], Mapping[str, Any]]]
    if mapping.kind == "hub" and mapping.streaming:
        dataset = _hub_dataset(mapping, file.parent, True)
        if dataset.column_names:
            _check_columns(to_sample, set(dataset.column_names), file)
        rows = ((lambda table=table: _plain_row(table)) for table in dataset.with_format("arrow"))
    else:
        opened = _open_rows(mapping, file.parent)
        _check_rows(to_sample, opened, file)
        rows = ((lambda index=index: opened[index]) for index in range(len(opened)))
    for number, row in enumerate(rows):
        try:
            yield _embedded(to_sample(row(), number), reader)
        except BadSample as error:
            bad(number, error)


def _embedded(sample: Sample, reader: MediaReader) -> Sample:
    """`sample` with the bytes of its media in place of their paths."""

    def embed(segment: Segment) -> Segment:
        return replace(segment, media=reader(segment), path=None) if segment.path else segment

    messages = (replace(message, segments=tuple(map(embed, message.segments))) for message in sample.messages)
    return replace(sample, messages=tuple(messages))

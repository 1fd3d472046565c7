"""What lies where in a run folder, and the one way in which omnitrain writes files: whole, or not at all.

Whoever reads a path written through :func:`atomic` finds the old content or the new one, never a part of it, whatever
kills the process or the machine: the content is forced to disk before it gets its name, and the folder after it.
"""

from __future__ import annotations

import ctypes
import difflib
import json
import os
import re
import shutil
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

CONFIG = "config.yaml"
"""The whole resolved configuration; a folder with it is a run."""
TOKENIZER = "tokenizer.json"
PUBLIC = "public"
"""Folder in a run that began as a public folder: that folder's files, but the weights."""
CHECKPOINTS = "checkpoints"
LAST_CHECKPOINT = f"{CHECKPOINTS}/last.ckpt"
"""A file of one process, or a folder of several that share the model."""
PREVIOUS_CHECKPOINT = f"{CHECKPOINTS}/previous.ckpt"
METRICS = "metrics.csv"
THROUGHPUT = "throughput.csv"
HISTORY = "history.jsonl"
"""What was changed when the run was continued, one line each time."""
ROLLOUTS = "rollouts"
"""Folder of what was sampled in training, a file a step (module=gspo)."""
LOCK = ".lock"
"""Who writes into the folder (`runs.lock`)."""
ENVIRONMENT = "environment.json"
DATA = "data.json"
SKIPPED_STEPS = "skipped_steps.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
EVALUATION = "eval"
SCORES = f"{EVALUATION}/scores.json"
PREDICTIONS = f"{EVALUATION}/predictions.parquet"
TRANSCRIPTS = f"{EVALUATION}/transcripts.json"
HEARD = f"{EVALUATION}/transcripts.parquet"
"""One row per recording and attention window (`evaluation.transcripts`)."""
SPEECH = f"{EVALUATION}/speech.json"
SPOKEN = f"{EVALUATION}/speech.parquet"
"""One row per utterance (`evaluation.listening`)."""
SPOKEN_OTHERS = f"{EVALUATION}/speech_other_voices.parquet"
"""The same, of texts that were spoken in other voices than that of their recording."""
TASK_RESULTS = f"{EVALUATION}/tasks"
REPORT = "report.html"
STAGES = "stages.json"
WRITTEN = frozenset((
    CONFIG, TOKENIZER, CHECKPOINTS, METRICS, THROUGHPUT, HISTORY, LOCK, ENVIRONMENT, DATA, SKIPPED_STEPS, BAD_SAMPLES,
    EVALUATION, REPORT, STAGES, "wandb", ".hydra",
))  # fmt: skip
"""What a run puts into its folder itself; anything else there is the user's."""
_UNFINISHED = ".partial"


def last_checkpoint(run_dir: Path) -> Path | None:
    """The one that a run goes on from: where a kill came between two names (`_exchange`), the one before it."""
    return next((p for p in (run_dir / LAST_CHECKPOINT, run_dir / PREVIOUS_CHECKPOINT) if p.exists()), None)


@contextmanager
def atomic(path: str | os.PathLike[str], *, replace: bool = True) -> Generator[Path]:
    """A place beside `path` to write a file or a folder to; at the end of the block it is on disk as `path`. Without
    `replace`, what came to stand there in the meantime stays (files only). After any error in the block, or an OSError
    of the file system, `path` is as it was."""
    with unfinished(path) as partial:
        yield partial
        place(partial, path, replace=replace)


@contextmanager
def unfinished(path: str | os.PathLike[str]) -> Generator[Path]:
    """A place beside `path` for what is not whole yet. What still lies there at the end of the block is deleted; what a
    kill left there earlier is not (`sweep`)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{_UNFINISHED}")
    try:
        yield partial
    except OSError as error:  # of the place that the caller knows; a full disk names none
        if error.filename is None or str(partial) in str(error.filename):
            error.filename = str(path)
        raise
    finally:
        delete(partial)


def place(partial: Path, path: str | os.PathLike[str], *, replace: bool = True) -> None:
    """Force a file or a folder to disk, then give it the name `path` (arguments and errors as of `atomic`)."""
    path = Path(path)
    for inner in sorted(partial.rglob("*")) if partial.is_dir() else ():
        if not inner.is_symlink():  # what a link names is forced by itself, or lies elsewhere, or nowhere
            _to_disk(inner)
    _to_disk(partial)
    if not replace:
        with suppress(FileExistsError):
            os.link(partial, path)
    elif path.exists() and (partial.is_dir() or path.is_dir()):
        _exchange(partial, path)
        delete(partial)
    else:
        os.replace(partial, path)
    _to_disk(path.parent)


def linked(source: Path, target: str | os.PathLike[str]) -> None:
    """Give `source`, a file or a folder of files, a further name, which takes no space and keeps what it says of its
    age. OSError where the file system has no links."""
    with atomic(target) as partial:
        if source.is_dir():
            partial.mkdir()
            for inner in source.iterdir():
                os.link(inner, partial / inner.name)
            shutil.copystat(source, partial)
        else:
            os.link(source, partial)


def sweep(folder: Path) -> None:
    """Delete what killed writers left in `folder`. Only for who knows that nobody is writing there."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        delete(path)


def delete(path: Path) -> None:
    """Delete a file or a folder, or a link and not what it names; nothing, if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> None:
    """Two names, of a folder and of a file or a folder, are swapped: in one step on Linux, elsewhere in three."""
    with suppress(AttributeError):
        swap = 2  # RENAME_EXCHANGE; -100: relative to the working folder
        if ctypes.CDLL(None).renameat2(-100, os.fsencode(one), -100, os.fsencode(other), swap) == 0:
            return
    between = one.with_name(f"{one.name}{_UNFINISHED}")
    other.rename(between)
    one.rename(other)
    between.rename(one)


def write_text(path: str | os.PathLike[str], text: str, *, replace: bool = True) -> None:
    """Write `text` to `path`, in UTF-8, whole or not at all."""
    with atomic(path, replace=replace) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic(path) as partial:
        partial.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Any, *, replace: bool = True) -> None:
    """Write `value` as JSON that people can read, whole or not at all. What JSON does not know is written as text."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", replace=replace)


def looks_like_utf16(data: bytes) -> bool:
    """Whether text that begins so has two bytes a letter."""
    return data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:1000]


def encoding_hint(data: bytes) -> str:
    """What text that is no UTF-8 probably is, and what to do about it."""
    name, known_as = ("UTF-16", "UTF-16") if looks_like_utf16(data) else ("WINDOWS-1252", "Latin-1")
    return f"it looks like {known_as}: convert it with `iconv -f {name} -t UTF-8 OLD > NEW`"


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a file of JSON says; a ValueError names the file if it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def write_parquet(path: str | os.PathLike[str], table: pa.Table) -> None:
    """Write `table` as Parquet (zstd), whole or not at all."""
    import pyarrow.parquet as pq

    with atomic(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add one line to a log, on disk when this returns. A kill can leave a part of the last line: readers drop a line
    without its end."""
    path = Path(path)
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise
    if new:
        _to_disk(path.parent)


_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0 (escape sequences of terminals begin with one), delete, C1
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # turn the reading direction, break lines, hide
    "\ud800-\udfff\U000e0000-\U000e007f]"  # bytes of a file name that are no UTF-8
)


def printable(text: object, keep: str = "") -> str:
    """`text` for a terminal or a message of one line: what would move the cursor, colour, clear, reorder or hide is
    written as an escape, so that a file name, an id or a caption from a stranger says nothing but itself.

    >>> printable("photo\\x1b[2J.png")
    'photo\\\\x1b[2J.png'

    The characters of `keep` stay, such as the line breaks of a message of several lines.
    """
    return _UNPRINTABLE.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), str(text))


def did_you_mean(
    word: object, known: Iterable[object], *, form: str = "{}", otherwise: str = "there are {}", cutoff: float = 0.6
) -> str:
    """What a message says of an unknown `word`: ``did you mean X?``, X being the nearest one that is `known` (as in
    `form`), or else what there is (`otherwise`)."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(word), names, n=1, cutoff=cutoff)
    return f"did you mean {form.format(near[0])}?" if near else otherwise.format(", ".join(names))


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

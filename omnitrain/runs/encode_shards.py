"""``omnitrain data encode``: recordings of what the assistant says -> codec frames, shard by shard.

Every shard of the input becomes one of the same name in the output folder, with the same rows in the same order; only
the medium of `speech` segments is another (`data.speech.encode_codes`), and a medium that lay beside the shard lies in
it. A recording is encoded alone: so its codes depend on nothing but itself, and on a CPU core a batch would be slower
(50 times real time in fours, 57 one by one, for the tiny codec).

``encode.json`` in the output folder says with which codec and from which shards. It is written anew behind every shard,
so that an interrupted run continues behind the last one, and a folder never holds the frames of two codecs.
"""

from __future__ import annotations

import json
import mmap
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text
from torch import Tensor

from omnitrain.data.batch import PackedBatch
from omnitrain.data.codec_frames import decode_codes, encode_codes, heard_rows, holds_codes
from omnitrain.data.encode import SampleEncoder as ThinkerEncoder
from omnitrain.data.media import decode_audio
from omnitrain.data.mixture import one_thread
from omnitrain.data.sample import BadSample, Sample, Segment, has_medium
from omnitrain.data.shards import SampleSource, shard_files, write_shard
from omnitrain.data.workers import WorkerDied, Workers
from omnitrain.evaluation.judges import mel_distance
from omnitrain.evaluation.progress import number_table, wide_console
from omnitrain.files import printable, read_json, sweep, write_json
from omnitrain.interop.mimi import MimiCodec
from omnitrain.models.codec import Codec
from omnitrain.models.omni import OmniModel, thinker_fingerprint
from omnitrain.runs.load import SAMPLE_RATE, codec_fingerprint
from omnitrain.training.codec_losses import si_sdr

RECORD = "encode.json"
CHECKED = 4
"""Samples that are decoded again at the end."""

Thinker = tuple[OmniModel, ThinkerEncoder]
"""A model that listens, and the encoder of what it reads."""
Task = tuple[Path, int]
"""The folder of a source, and a sample in it."""


@dataclass
class Counts:
    """`samples` with codec frames, `copied` without; `seconds`, `frames` of their recordings; rows `skipped`, by
    reason."""

    samples: int = 0
    copied: int = 0
    seconds: float = 0.0
    frames: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, other: Counts) -> None:
        self.samples += other.samples
        self.copied += other.copied
        self.seconds += other.seconds
        self.frames += other.frames
        self.skipped = dict(Counter(self.skipped) + Counter(other.skipped))

    @property
    def bad(self) -> int:
        """Rows that could not be used; those without speech were not wanted."""
        return sum(count for reason, count in self.skipped.items() if reason != "no_recording")


@dataclass(frozen=True)
class Encoded:
    """A row of the output, or None and what is wrong with it; its `counts` are of this row alone."""

    sample: Sample | None
    counts: Counts
    complaint: str = ""


class SampleEncoder:
    """`encoder((folder, index))` -> :class:`Encoded`: a sample of the source in that folder, with codec frames, and
    with hidden states of the `thinker` if there is one. `only_speech` leaves out samples without a recording, and only
    the first `codebooks` of a frame are kept (None: all)."""

    def __init__(
        self,
        codec: Codec | MimiCodec,
        sources: Mapping[Path, SampleSource],
        only_speech: bool,
        thinker: Thinker | None,
        codebooks: int | None = None,
    ) -> None:
        self.codec, self.sources, self.only_speech, self.thinker = codec, sources, only_speech, thinker
        self.codebooks = codebooks
        self.fingerprint = codec_fingerprint(codec)
        self.thinker_fingerprint = thinker_fingerprint(thinker[0]) if thinker else ""

    def __call__(self, task: Task) -> Encoded:
        folder, index = task
        source = self.sources[folder]
        name = "?"
        try:
            sample = source[index]
            name = sample.id
            if any(map(is_recorded, sample.segments)):
                return self._encode(sample, source)
            if self.only_speech:
                return Encoded(None, Counts(skipped={"no_recording": 1}))
            return Encoded(self._embedded(sample, source), Counts(copied=1))
        except BadSample as error:
            reason, detail = error.reason, error.detail
        except (ValueError, OSError) as error:  # a damaged row group or media table
            reason, detail = "shard_damaged", str(error)
        file, row = source.locate(index)
        return Encoded(None, Counts(skipped={reason: 1}), f"{file} row {row} id {name}: {reason}: {detail}")

    @torch.inference_mode()
    def _encode(self, sample: Sample, source: SampleSource) -> Encoded:
        counts, heard = Counts(), self._heard(sample, source)

        def with_codes(segment: Segment) -> Segment:
            if not is_recorded(segment):
                return segment
            wav = recording(source.media_bytes(segment))
            codes = self.codec.encode(torch.from_numpy(wav)[None])[0, :, : self.codebooks].numpy()  # int64 [F, Q]
            counts.add(Counts(seconds=len(wav) / SAMPLE_RATE, frames=len(codes)))
            data = encode_codes(codes, self.fingerprint, heard.get(id(segment)), self.thinker_fingerprint)
            return replace(segment, media=data, path=None)

        encoded = self._embedded(with_segments(sample, with_codes), source)
        counts.add(Counts(samples=1) if counts.frames else Counts(copied=1))
        return Encoded(encoded, counts)

    def _heard(self, sample: Sample, source: SampleSource) -> dict[int, Tensor]:
        """The Thinker's hidden states [H, D] at the media before a recorded answer, by the `id` of its segment."""
        if self.thinker is None or sample.modality == "text":
            return {}
        model, encoder = self.thinker
        encoded = replace(encoder, loss_on="all")(sample, source.media_bytes)
        states = model(**PackedBatch.pack([encoded]).model_inputs()).accept_hidden
        answers = [m for m in sample.messages if m.role == "assistant"]
        return {
            id(segment): states[torch.from_numpy(rows)]
            for message, rows in zip(answers, heard_rows(encoded, encoder.tokenizer), strict=True)
            for segment in message.segments
            if is_recorded(segment) and len(rows)
        }

    def _embedded(self, sample: Sample, source: SampleSource) -> Sample:
        """With the bytes of media that lie in files beside the shard: the paths would lead nowhere from another."""

        def with_bytes(segment: Segment) -> Segment:
            beside = segment.path is not None and segment.media is None
            return replace(segment, media=source.media_bytes(segment), path=None) if beside else segment

        return with_segments(sample, with_bytes)


def recording(data: bytes) -> np.ndarray:
    """float32 [S] in [-1, 1] at the codec's rate, as a codec is trained on. Raises BadSample with ``already_codes``, or
    what `decode_audio` says."""
    if holds_codes(data):
        raise BadSample("already_codes", "the speech segment holds codec frames; encode the shards with the recordings")
    return np.clip(decode_audio(data, SAMPLE_RATE), -1, 1)


def with_segments(sample: Sample, change: Callable[[Segment], Segment]) -> Sample:
    """The sample with every segment changed."""
    messages = (replace(message, segments=tuple(map(change, message.segments))) for message in sample.messages)
    return replace(sample, messages=tuple(messages))


def is_recorded(segment: Segment) -> bool:
    """Whether the segment is speech with a recording, not a transcript alone."""
    return segment.type == "speech" and has_medium(segment)


@contextmanager
def _results(encoder: SampleEncoder, tasks: list[Task], workers: int) -> Generator[Iterator[Encoded]]:
    """The rows of all tasks, in order, from `workers` processes of one thread each; one worker is this process. Raises
    ValueError if a worker process died."""
    if workers == 1:
        with one_thread():
            yield map(encoder, tasks)
        return
    # The codec travels as bytes, not as a path: a run may be writing its next checkpoint.
    with closing(Workers(encoder, tasks, workers, ahead=16)) as results:
        try:
            yield results
        except WorkerDied as error:
            raise ValueError(f"{error}; the same line continues, with fewer --workers") from error


def begun(path: Path, record: str, made_with: Mapping[str, Any], verb: str) -> dict[str, dict[str, Any]]:
    """What the `record` of an output folder says of the shards that `verb` has made in it, by name; the folder is made
    when missing. Raises ValueError if they were `made_with` something else, or the folder holds shards from elsewhere.
    """
    shards: dict[str, dict[str, Any]] = {}
    if (path / record).is_file():
        before = read_json(path / record)
        shards = before.pop("shards")
        for key in {**before, **made_with}:
            value = made_with.get(key)
            if before.get(key) != value:
                raise ValueError(
                    f"{path / record}: the shards in this folder were made with {key} {before.get(key)}, not {value}; "
                    "choose another --out, or delete the folder"
                )
    elif any(path.glob("*.parquet")):
        raise ValueError(f"{path} holds shards that `{verb}` did not make; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    sweep(path)
    return shards


class Folder:
    """The output folder, made when missing, and its record. It keeps to the codec and choice of rows (`made_with`) that
    it was begun with: a ValueError refuses others, and a folder with shards from elsewhere."""

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        self.path, self.made_with = path, json.loads(json.dumps(made_with))
        self.shards = begun(path, RECORD, self.made_with, "data encode")

    def is_complete(self, file: Path, source: str) -> bool:
        """Whether the shard was made already. Raises ValueError if it was from another file of this name."""
        known = self.shards.get(file.name)
        if known is None or not (self.path / file.name).is_file():
            return False
        if known["source"] != source:
            raise ValueError(
                f"{self.path / file.name} was made from another {file.name} (CRC-32 "
                f"{known['source']}; {file} has {source}); choose another --out, or delete the folder"
            )
        return True

    def write(self, file: Path, source: str, samples: Iterable[Sample], counts: Counts) -> None:
        """The shard of this name, all or nothing, then the record."""
        write_shard(samples, self.path / file.name)
        self.shards[file.name] = {"source": source, "counts": asdict(counts)}
        write_json(self.path / RECORD, {**self.made_with, "shards": self.shards})

    def counts(self, file: Path) -> Counts:
        return Counts(**self.shards[file.name]["counts"])


def checksum(file: Path) -> str:
    """CRC-32 of a file, 8 hex digits."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return f"{zlib.crc32(content):08x}"


def encode(
    codec: Codec | MimiCodec,
    shards: Sequence[str],
    out: Path,
    *,
    thinker: Thinker | None = None,
    split: str | None = None,
    where: Mapping[str, Sequence[str]] | None = None,
    only_speech: bool = False,
    codebooks: int | None = None,
    workers: int = 1,
    progress: Callable[[str, int], Any],
) -> Counts:
    """Encode `shards` (folders, files or globs) into `out`, print a table and a check, and return the sums.

    Args:
        thinker: whose hidden states at media are written beside the codes.
        split, where: which rows, as of `SampleSource`.
        only_speech: leave out samples without a recording of speech; otherwise they are copied.
        codebooks: keep the first so many of a frame; None: all.
        progress: (title, total) -> context manager of a function that is called after every row.

    Raises FileNotFoundError for a shard that is missing; ValueError for two of one name, for more codebooks than there
    are, or if `out` holds something else.
    """
    if codebooks is not None and not 1 <= codebooks <= codec.quantizers:
        raise ValueError(f"--codebooks {codebooks}: the codec has {codec.quantizers}, of which 1 at least is needed")
    for path in shards:
        if Path(path).suffix in (".yaml", ".yml"):
            raise ValueError(f"{path}: a mapping is no shard; write it to shards with `omnitrain data import` first")
    files = list(dict.fromkeys(file.resolve() for path in shards for file in shard_files(path)))
    if twice := [name for name, count in Counter(file.name for file in files).items() if count > 1]:
        raise ValueError(f"two shards are called {twice[0]}; encode them into folders of their own")
    if out.resolve() in {file.parent for file in files}:
        raise ValueError(f"--out {out} is the folder of the recordings; choose another")
    if workers < 1:
        raise ValueError(f"--workers {workers}: one at least")
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    sources = {path: SampleSource(of_folder, split, where) for path, of_folder in folders.items()}
    rows: dict[Path, list[int]] = {file: [] for file in files}
    for source in sources.values():
        for index in range(len(source)):
            rows[Path(source.locate(index)[0])].append(index)

    encoder = SampleEncoder(codec, sources, only_speech, thinker, codebooks)
    chosen = {"split": split, "where": dict(where or {}), "only_speech": only_speech}
    made_with: dict[str, Any] = {"codec": encoder.fingerprint, "rows": chosen}
    made_with |= {"thinker": encoder.thinker_fingerprint} if thinker else {}
    folder = Folder(out, made_with | ({"codebooks": codebooks} if codebooks else {}))
    checksums = {file: checksum(file) for file in files}
    todo = [file for file in files if not folder.is_complete(file, checksums[file])]
    if len(todo) < len(files):
        print(f"{len(files) - len(todo)} of {len(files)} shards are there already")
    tasks = [(file.parent, index) for file in todo for index in rows[file]]
    told: Counter[str] = Counter()
    with (
        progress(f"encoding into {printable(out)}", sum(len(rows[file]) for file in todo)) as advance,
        _results(encoder, tasks, min(workers, max(1, len(tasks)))) as results,
    ):
        for file in todo:
            counts = Counts()

            def samples(file: Path = file, counts: Counts = counts) -> Iterator[Sample]:
                for row in islice(results, len(rows[file])):
                    counts.add(row.counts)
                    advance()
                    told.update(row.counts.skipped)
                    if row.sample is not None:
                        yield row.sample
                    elif row.complaint and max(told[reason] for reason in row.counts.skipped) <= 5:
                        print(printable(row.complaint), file=sys.stderr)

            folder.write(file, checksums[file], samples(), counts)
    by_file = {file: folder.counts(file) for file in files}
    bits = codec.bits_per_frame * (codebooks or codec.quantizers) / codec.quantizers
    print_counts(by_file, bits, f"{out}: codec {encoder.fingerprint}")
    check(encoder, out, files)
    return total(by_file.values())


def total(counts: Iterable[Counts]) -> Counts:
    """Sums over shards."""
    sums = Counts()
    for part in counts:
        sums.add(part)
    return sums


def print_counts(by_file: Mapping[Path, Counts], bits: float, title: str) -> None:
    """One row per shard and their sum. `bits`: of a frame."""
    columns = ("samples", "copied", "skipped", "seconds", "frames", "kbit/s")
    table, console = number_table(title, "shard", numbers=columns), wide_console()
    sums = total(by_file.values())
    rows = [(file.name, counts) for file, counts in by_file.items()]
    for name, counts in [*rows, ("all", sums)] if len(rows) > 1 else rows:
        if name == "all":
            table.add_section()
        rate = f"{counts.frames * bits / counts.seconds / 1000:.2f}" if counts.seconds else ""
        whole = (counts.samples, counts.copied, sum(counts.skipped.values()))
        table.add_row(
            Text(printable(name)), *(f"{n:,}" for n in whole), f"{counts.seconds:,.1f}", f"{counts.frames:,}", rate
        )
    console.print(table)
    for reason, count in sorted(sums.skipped.items()):
        console.print(printable(f"skipped: {count} {reason}"), highlight=False, markup=False)


def check(encoder: SampleEncoder, out: Path, files: Sequence[Path]) -> None:
    """Decode a few samples of the new shards in `out`, and print how far they are from their recordings in `files`."""
    made = SampleSource([out / file.name for file in files])
    folders = {file.name: file.parent for file in files}
    ids = {folder: source.light()["id"].to_pylist() for folder, source in encoder.sources.items()}
    columns = ("seconds", "mel distance dB", "SI-SDR dB")
    table = number_table("recording against its codec frames", "decoded again", numbers=columns)
    for index in _spread(made):
        sample = made[index]
        folder = folders[Path(made.locate(index)[0]).name]
        source = encoder.sources[folder]
        original = source[ids[folder].index(sample.id)]
        pairs = zip(original.segments, sample.segments, strict=True)
        recorded, encoded = next(pair for pair in pairs if is_recorded(pair[1]))
        wav = recording(source.media_bytes(recorded))
        codes = decode_codes(made.media_bytes(encoded), encoder.fingerprint)
        with torch.inference_mode():
            decoded = encoder.codec.decode(torch.from_numpy(codes)[None])[0].numpy()
        length = min(len(wav), len(decoded))
        if length < SAMPLE_RATE // 40:  # of the mel distance's window
            continue
        ratio = float(si_sdr(torch.from_numpy(decoded[None, :length]), torch.from_numpy(wav[None, :length])))
        distance = mel_distance(wav, decoded, SAMPLE_RATE)
        table.add_row(Text(printable(sample.id)), f"{len(wav) / SAMPLE_RATE:.2f}", f"{distance:.1f}", f"{ratio:.1f}")
    if table.row_count:
        wide_console().print(table)


def _spread(made: SampleSource) -> list[int]:
    """A few samples with codec frames, evenly spaced."""
    chosen: list[int] = []
    for i in range(CHECKED):
        first, end = (len(made) * i // CHECKED, len(made) * (i + 1) // CHECKED)
        spoken = (j for j in range(first, end) if any(map(is_recorded, made[j].segments)))
        chosen += islice(spoken, 1)
    return chosen

"""How large every sample of a source is, measured once, so that a training run can be laid out before it starts.

A sample's size does not depend on seed or order. `SizedSource` gives samples of the measured sizes without content:
the real `Mixture` and `PackedStream` over it make the batches of a run, in seconds and without decoding anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from omnitrain.data.batch import IGNORE, EncodedSample
from omnitrain.data.mixture import Encode
from omnitrain.data.packing import is_document
from omnitrain.data.sample import BadSample, Segment
from omnitrain.data.shards import Source
from omnitrain.vocabulary import AUDIO, TEXT

SIZES_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("source", "id", "modality")]
    + [("tokens", pa.int64()), ("targets", pa.int64()), ("document", pa.bool_())]
    + [("mel_lengths", pa.list_(pa.int64())), ("grid_thw", pa.list_(pa.list_(pa.int64())))]
    + [("bad", pa.string())]
)
"""One row per sample, source after source in order. `mel_lengths`: frames per recording; `grid_thw`: patches in time,
height and width per picture or video; `bad`: why the sample cannot be used, else null."""


def measure(sources: Mapping[str, Source], encode: Encode, *, on_sample: Callable[[], None] = lambda: None) -> pa.Table:
    """Encode every sample of `sources` once and note its size in a row of `SIZES_SCHEMA`; `on_sample` is called after
    each, for a progress bar."""
    rows: list[dict[str, Any]] = []
    for name, source in sources.items():
        for index in range(len(source)):
            row: dict[str, Any] = {"source": name}
            try:
                sample = source[index]
                row["id"] = sample.id
                encoded = encode(sample, source.media_bytes)
            except BadSample as bad:
                row["bad"] = bad.reason
            else:
                row |= {
                    "modality": encoded.modality, "tokens": len(encoded), "document": is_document(encoded),
                    "targets": int((encoded.labels != IGNORE).sum()), "mel_lengths": [len(mel) for mel in encoded.mel],
                    "grid_thw": encoded.grid_thw.tolist(),
                }  # fmt: skip
            rows.append(row)
            on_sample()
    return pa.Table.from_pylist(rows, schema=SIZES_SCHEMA)


def sized_sources(table: pa.Table) -> dict[str, SizedSource]:
    """What `measure` found out, as sources by name."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault(row["source"], []).append(row)
    return {name: SizedSource(name, of_source) for name, of_source in rows.items()}


class SizedSource:
    """A `Source` for `Mixture` whose samples are `EncodedSample`s already: of the measured sizes (`SIZES_SCHEMA` rows,
    in order), without content."""

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.name, self._rows = name, rows
        self._made: dict[int, EncodedSample] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        """The `EncodedSample` number `index`: all token ids are 0, mel frames and patches have no values. Raises
        BadSample: the real one is bad too."""
        row = self._rows[index]
        if row["bad"] is not None:
            raise BadSample(row["bad"], "found when the sizes were measured")
        if index not in self._made:
            self._made[index] = _hollow(self.name, row)
        return self._made[index]

    def locate(self, index: int) -> tuple[str, int]:
        return self.name, index

    def media_bytes(self, segment: Segment) -> bytes:
        raise ValueError(f"source {self.name!r} knows the sizes of its media, not the media")


def as_it_is(sample: Any, media_bytes: Any) -> EncodedSample:
    """`encode` of a `Mixture` of sized sources: their samples are encoded already."""
    return sample


def _hollow(name: str, row: Mapping[str, Any]) -> EncodedSample:
    n = row["tokens"]
    labels = np.full(n, IGNORE, dtype=np.int64)
    labels[: row["targets"]] = 0
    return EncodedSample(
        id=row["id"],
        source=name,
        task="",
        modality=row["modality"],
        languages=(),
        input_ids=np.zeros(n, dtype=np.int64),
        labels=labels,
        token_types=np.full(n, TEXT if row["document"] else AUDIO, dtype=np.uint8),
        position_ids=np.zeros((3, n), dtype=np.float32),
        mel=tuple(np.zeros((frames, 0), dtype=np.float32) for frames in row["mel_lengths"]),
        patches=tuple(np.zeros((t * h * w, 0), dtype=np.float32) for t, h, w in row["grid_thw"]),
        grid_thw=np.array(row["grid_thw"], dtype=np.int64).reshape(-1, 3),
    )

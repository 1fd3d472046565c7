"""Of what a source consists: samples by modality and by languages, from which follows what a mixture plans of each; and
a fingerprint of its files, by which a run that is continued knows them again."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from omnitrain.data.sample import BadSample
from omnitrain.data.shards import SampleSource, Source

_FILES, _SAMPLES, _BLOCKS, _BLOCK = 256, 16, 64, 1 << 14


def composition(source: Source) -> dict[str, Any] | None:
    """Samples of `source`: ``{"samples": n, "modality": {...}, "languages": {"es>ca": ...}}``, the keys as in the
    counters of what was trained on. None if that would need reading every sample (anything but whole shards)."""
    if not isinstance(source, SampleSource):
        return None
    table = source.light()
    modality = Counter(table["modality"].to_pylist())
    languages = Counter(">".join(row or ()) or "und" for row in table["languages"].to_pylist())
    return {"samples": len(source), "modality": dict(modality), "languages": dict(languages)}


def fingerprint(source: Source) -> str:
    """16 hex digits that are others when the files of `source` hold something else, wherever they lie.

    It reads little, whatever their size: of (up to 256, evenly spaced) files their size, their first and last 16 kB (in
    Parquet's footer stand sizes and statistics of all row groups) and 62 further such blocks between them, so a file up
    to 1 MB whole; and 16 samples with their media, which may lie elsewhere. What it does not see is a change between
    those blocks that leaves a file as long as it was.
    """
    digest = hashlib.blake2b(digest_size=8)
    indices = [i * len(source) // _FILES for i in range(_FILES)] if len(source) > _FILES else range(len(source))
    for path in dict.fromkeys(source.locate(i)[0] for i in indices):
        digest.update(Path(path).name.encode())
        if os.path.isfile(path):
            _add_file(digest, path)
    for i in indices[:: max(1, len(indices) // _SAMPLES)]:
        try:
            sample = source[i]
            digest.update(sample.id.encode())
            for segment in (s for s in sample.segments if s.path is not None):
                digest.update(source.media_bytes(segment))
        except BadSample as error:
            digest.update(error.reason.encode())
    return digest.hexdigest()


def _add_file(digest: Any, path: str) -> None:
    size = os.path.getsize(path)
    digest.update(str(size).encode())
    with open(path, "rb") as file:
        for block in range(_BLOCKS):
            if size > _BLOCKS * _BLOCK:
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))

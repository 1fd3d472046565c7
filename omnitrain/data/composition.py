"""Of what a source consists: samples by modality and by languages. What a mixture plans of each follows from it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from omnitrain.data.shards import SampleSource, Source


def composition(source: Source) -> dict[str, Any] | None:
    """Samples of `source`: ``{"samples": n, "modality": {...}, "languages": {"es>ca": ...}}``, the keys as in the
    counters of what was trained on. None if that would need reading every sample (anything but whole shards)."""
    if not isinstance(source, SampleSource):
        return None
    table = source.light()
    languages = Counter(">".join(row or ()) or "und" for row in table["languages"].to_pylist())
    return {
        "samples": len(source),
        "modality": dict(Counter(table["modality"].to_pylist())),
        "languages": dict(languages),
    }

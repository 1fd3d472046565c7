"""One configuration, one set of data: what all runs of a study must have in common, noted in its ``study.json``.

Two hashes say whether it is the same; the values beside them say which keys changed, where it is not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from omnitrain.config.run_config import RunConfig
from omnitrain.config.typed import ConfigError, changes, plain, shown_change
from omnitrain.data.datamodule import OmniDataModule
from omnitrain.data.sample import BadSample
from omnitrain.data.shards import Source
from omnitrain.evaluation.metrics import normalise
from omnitrain.files import read_json, write_json
from omnitrain.study.results import FINGERPRINT

_HASHED = ("model", "data", "module", "optim", "trainer", "callbacks", "evaluation", "study")
_NO_RESULT = {
    "data": ("num_workers", "worker_buffer", "tokenizer", "predict_sources", "voice_sources"),
    "trainer": ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler"),
    "callbacks": ("checkpoint", "throughput", "record", "progress", "media_panels"),
    "evaluation": ("report", "after_fit"),
}
"""What changes no score. (The tokenizer and what lies at the paths of the sources are in the hash of the data.)"""


def hashed_configuration(config: RunConfig) -> dict[str, Any]:
    """What the results of a study depend on besides arm, matching, seed and data."""
    whole = plain(config)
    hashed: dict[str, Any] = {key: whole[key] for key in _HASHED}
    for section, keys in _NO_RESULT.items():
        for key in keys:
            hashed[section].pop(key, None)
    for which in ("sources", "validation_sources", "test_sources"):
        for source in hashed["data"][which].values():
            if source is not None:
                source.pop("path", None)
    return hashed


def data_fingerprint(data: OmniDataModule) -> dict[str, Any]:
    """Hashes of all that is read: tokenizer, and for each source the files of its samples, the media tables beside them
    and which rows are used. (Media that lie beside a shard as files of their own are not read for this.)"""

    @cache
    def of_file(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def of_source(source: Source) -> dict[str, Any]:
        rows: dict[Path, list[int]] = {}
        for index in range(len(source)):
            file, row = source.locate(index)
            rows.setdefault(Path(file), []).append(row)
        tables = {table for file in rows for table in file.parent.glob("*.parquet") if _is_media_table(table)}
        return {
            "files": {path.name: of_file(path) for path in sorted({*rows, *tables})},
            "rows": digest([[path.name, numbers] for path, numbers in rows.items()]),
        }

    return {
        "tokenizer": hashlib.sha256(data.tokenizer.to_json().encode()).hexdigest(),
        **{
            which: {name: of_source(source) for name, source in data.opened(which).items()}
            for which in ("sources", "validation_sources", "test_sources")
        },
    }


def sentences(references: Iterable[str], sources: Iterable[Source]) -> list[str]:
    """For each reference "read" where its words stand, in this order, in a text of the training data (a document, a
    question or an answer), else "new". Case and punctuation do not count."""

    def words(text: str) -> str:
        return re.sub(r"\W+", " ", f" {normalise(text)} ")

    texts: set[str] = set()
    for source in sources:
        for index in range(len(source)):
            try:
                sample = source[index]
            except BadSample:
                continue  # training leaves it out as well
            texts |= {words(segment.text) for segment in sample.segments if segment.text}
    whole = "\n".join(texts)
    return ["read" if words(reference) in whole else "new" for reference in references]


def _is_media_table(path: Path) -> bool:
    return {"name", "bytes"} <= set(pq.read_schema(path).names)


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_same_study(study_dir: Path, configuration: dict[str, Any], data: dict[str, Any]) -> tuple[str, str]:
    """Note configuration and data in ``study.json`` of an empty study folder, or compare with those noted there, and
    return config_hash and data_hash. Raises ConfigError where they are others, naming every key that changed, the first
    dozen with their values."""
    path, hashes = study_dir / FINGERPRINT, (digest(configuration), digest(data))
    now = {"config_hash": hashes[0], "data_hash": hashes[1], "configuration": configuration, "data": data}
    write_json(path, now, replace=False)
    noted = read_json(path)
    if (noted["config_hash"], noted["data_hash"]) == hashes:
        return hashes
    changed = {
        f"{place}{key}": shown_change(values)
        for place, section in (("", "configuration"), ("data: ", "data"))
        for key, values in changes(noted[section], now[section]).items()
    }
    rows = [f"  {key}: {values}" for key, values in list(changed.items())[:12]]
    more = [f"  and {', '.join(list(changed)[12:])}"] if len(changed) > 12 else []
    raise ConfigError(
        "\n".join([f"{study_dir} holds a study of another configuration or other data:", *rows, *more])
        + "\nset these back, or begin another study with paths.study_dir=FOLDER"
    )

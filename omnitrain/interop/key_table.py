"""Which public keys are which of our tensors, as `omnitrain convert table` shows it; reads headers alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from omnitrain.interop.public_config import FILE, CheckpointError, read_config
from omnitrain.interop.public_format import TensorFiles, Track, empty_model, left_out


@dataclass(frozen=True, kw_only=True)
class Row:
    """One of our tensors with a public key that it is made from, or with several that differ in a number alone
    (`experts.{0..127}`)."""

    name: str
    shape: list[int]
    key: str
    key_shape: list[int]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class KeyTable:
    """rows; counts; and what does not fit: keys that config.json does not describe, keys that are not there, and keys
    of another shape (with what is there and what was expected)."""

    rows: list[Row]
    tensors: int
    keys: int
    parameters: int
    left_out: int
    unknown: list[str]
    missing: list[str]
    misshapen: list[str]


def key_table(folder: Path, track: Track = iter) -> KeyTable:
    """The table of a public folder. Raises CheckpointError if its configuration or a file cannot be read."""
    if not (folder / FILE).is_file():
        raise CheckpointError(f"{folder}: no folder in the public format (it has no {FILE}); `to-hf` writes one")
    config, prefix = read_config(folder)
    parameters = list(empty_model(config, folder / "config.json").named_parameters())
    rows, missing, misshapen = list[Row](), list[str](), list[str]()
    with TensorFiles(folder, prefix) as files:
        for name, parameter in track(parameters):
            alike: dict[tuple[str, str, str], list[str]] = {}
            for key, index in files.pieces(name, parameter, config):
                if key not in files.file_of:
                    missing.append(key)
                    continue
                shape, dtype = files.header(key)
                if shape != (expected := list(parameter[index].shape)):
                    misshapen.append(f"{key}: {shape}, config.json asks for {expected}")
                pattern = re.sub(r"(experts|codec_embedding|lm_head)\.\d+\.", r"\1.#.", key)
                alike.setdefault((pattern, str(shape), dtype), []).append(key)
            for (pattern, _, dtype), keys in alike.items():
                key, shape = _folded(pattern, keys), files.header(keys[0])[0]
                rows.append(Row(name=name, shape=list(parameter.shape), key=key, key_shape=shape, dtype=dtype))
        unknown, read = files.unread(left_out(config)), len(files.read_keys)
        rest = len(files.file_of) - read - len(unknown)
    total = sum(parameter.numel() for _, parameter in parameters)
    return KeyTable(
        rows=rows, tensors=len(parameters), keys=read, parameters=total, left_out=rest, unknown=unknown,
        missing=missing, misshapen=misshapen,
    )  # fmt: skip


def _folded(pattern: str, keys: list[str]) -> str:
    """One key for all that fit `pattern`, whose "#" stands for a number."""
    if len(keys) == 1:
        return keys[0]
    before, _, after = pattern.partition("#")
    numbers = [key.removeprefix(before).removesuffix(after) for key in keys]
    whole = int(numbers[-1]) - int(numbers[0]) + 1 == len(keys)
    return f"{before}{{{f'{numbers[0]}..{numbers[-1]}' if whole else ','.join(numbers)}}}{after}"

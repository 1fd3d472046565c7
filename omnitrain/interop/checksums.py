"""Whether a checkpoint still is what was written: every tensor's checksum stands in the file, that of every file in a
folder (`checkpoint_folder`).

`torch.save` writes a ZIP archive in which each tensor's storage is an entry with its CRC-32; `torch.load` never looks
at them. Here somebody does: 400 MB take 0.2 s on one core, where loading takes 0.3 s.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omnitrain.interop import checkpoint_folder

NO_CHECKPOINT = "damaged, or no checkpoint of omnitrain"


def damage(path: str | Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What a checkpoint, a file of `torch.save` or a folder, is, if it is not as it was written (None). `share`: this
    process's number, and of how many that look together, each at some of it. Raises OSError if it cannot be opened."""
    path = Path(path)
    if path.is_dir():
        return checkpoint_folder.damage(path, share)
    if share[0]:
        return None
    with path.open("rb") as file:
        if not file.read(1):
            return "empty"
        try:
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    try:
                        with archive.open(entry) as stored:
                            while stored.read(1 << 22):
                                pass
                    except Exception:  # BadZipFile for the checksum; others where the damage hits the entry's header
                        names = _names(path, entry)
                        return f"damaged: the checksum of {names} does not fit" if names else NO_CHECKPOINT
        except Exception:  # the directory of the archive, which stands at its end: which error depends on the bytes
            return NO_CHECKPOINT
    return None


def newest_whole(beside: str | Path) -> Path | None:
    """Of the other checkpoints in the folder of `beside`, the last one written that is whole."""
    path = Path(beside)
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime, reverse=True)
    return next((other for other in others if other != path and damage(other) is None), None)


def _names(path: Path, entry: zipfile.ZipInfo) -> str:
    """The tensors that lie in an entry, such as ``state_dict.model.thinker.norm.weight``."""
    try:
        with path.open("rb") as file:
            file.seek(entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        with FakeTensorMode():  # shapes and places without content
            saved = torch.load(path, map_location="cpu", weights_only=True)
        return " and ".join(name for name, x in _tensors(saved, "") if x.untyped_storage()._checkpoint_offset == start)
    except Exception:  # the damage is in what says where the tensors lie
        return ""


def _tensors(node: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield place, node
    elif isinstance(node, Mapping | Sequence) and not isinstance(node, str):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _tensors(value, f"{place}.{key}" if place else str(key))

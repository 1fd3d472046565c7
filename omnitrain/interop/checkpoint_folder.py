"""A checkpoint that many processes write together: a folder, in which each leaves its own parts of the tensors.

    shard-00001-model-00001-of-00001.safetensors ...   parts of weights and moments, and where in the whole they lie
    state.ckpt     what else a checkpoint holds: counters, schedules, the place in the data, random states
    sha256.json    the checksum of each of these files, written last

`torch.distributed.checkpoint` plans and writes the parts, in the layout of its `HuggingFaceStorageWriter`. (Its own
layout has an index that is unpickled, by which a stranger's checkpoint could run code.) Names and shapes of tensors are
those of a single process. So any number of processes reads a folder, one included, each what it needs of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from omnitrain.files import read_json, write_json
from omnitrain.interop.stored import Stored, region

STATE, SUMS = "state.ckpt", "sha256.json"
WEIGHTS = "state_dict."
"""How the names of weights begin; a moment's is ``optimizer_states.OPTIMIZER.PARAMETER.NAME``."""
FILE_BYTES = 1 << 30
"""A process writes files of about this size: `safetensors` holds each one twice while it is written."""


@dataclass(frozen=True)
class Part:
    """A piece of a tensor of `shape`: its `values` begin at `offset`."""

    values: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def on_host(self) -> Part:
        """A copy that stays as it is while training goes on."""
        return Part(self.values.detach().to("cpu", copy=True).contiguous(), self.offset, self.shape)


# ------------------------------------------------------------------------------------------------------------- writing


def parted(checkpoint: dict[str, Any]) -> dict[str, Part]:
    """Take the `Part`s out of Lightning's `checkpoint`, by the names that they have in a folder."""
    found: dict[str, Part] = {}
    checkpoint["state_dict"] = _taken(checkpoint["state_dict"], WEIGHTS, found)
    for i, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        state = {n: _taken(values, _of_moments(i, n), found) for n, values in optimizer["state"].items()}
        optimizer["state"] = state
    return found


def _of_moments(optimizer: int, parameter: int) -> str:
    return f"optimizer_states.{optimizer}.{parameter}."


def _taken(values: Mapping[str, Any], prefix: str, found: dict[str, Part]) -> dict[str, Any]:
    parts = {name: x for name, x in values.items() if isinstance(x, Part)}
    found |= {prefix + name: part for name, part in parts.items() if math.prod(part.shape)}
    whole = {name: part.values for name, part in parts.items() if not math.prod(part.shape)}  # nothing to share
    return {name: x for name, x in values.items() if name not in parts} | whole


def write(folder: Path, parts: Mapping[str, Part], rest: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Write this process's `parts`, which lie on the host; the first process also writes `rest` and the checksums. In
    it, all is in the files when this returns. A collective of `group`, made of gloo.

    Raises OSError, with the file's or the folder's name, in each process if one could not write; RuntimeError for any
    other reason."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), _files(parts, group.size()), save_distributed=True)
    try:
        dcp.save(dict(parts), storage_writer=writer, planner=_planner(), process_group=group)
    except CheckpointException as error:
        raise _of_any_process(folder, {rank: failed[0] for rank, failed in error.failures.items()}) from error
    sums: list[Any] = [None] * group.size()
    dist.all_gather_object(sums, _sums_of_mine(folder, group.rank()), group=group)
    if failures := {rank: found for rank, found in enumerate(sums) if isinstance(found, OSError)}:
        raise _of_any_process(folder, failures)
    if group.rank() == 0:
        torch.save(rest, folder / STATE)
        every = {name: value for found in sums for name, value in found.items()}
        write_json(folder / SUMS, {STATE: _sha256(folder / STATE), **dict(sorted(every.items()))})


def _files(parts: Mapping[str, Part], processes: int) -> dict[str, int]:
    """In which of its files, from 1, a process writes its part of each tensor."""
    numbers, size = {}, 0
    for name, part in parts.items():
        numbers[name] = 1 + size // FILE_BYTES
        size += math.prod(part.shape) * part.values.itemsize // processes
    return numbers


def _planner() -> Any:
    """Plans with `Part`s: of those that several processes have, one writes."""
    from torch.distributed.checkpoint import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    def item(name: str, part: Part) -> WriteItem:
        offset = torch.Size(part.offset)
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=part.values.shape),
            properties=TensorProperties.create_from_tensor(part.values),
            size=torch.Size(part.shape),
        )
        return WriteItem(index=MetadataIndex(name, offset), type=WriteItemType.SHARD, tensor_data=data)

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            self.plan = SavePlan([item(name, part) for name, part in self.state_dict.items() if part.values.numel()])
            return self.plan

        def lookup_object(self, index: MetadataIndex) -> Tensor:
            return self.state_dict[index.fqn].values

    return Planner(flatten_state_dict=False, flatten_sharded_tensors=False)


def _sums_of_mine(folder: Path, rank: int) -> dict[str, str] | OSError:
    """Name -> checksum of the files that this process has written."""
    try:
        return {path.name: _sha256(path) for path in folder.glob(f"shard-{rank + 1:05d}-*")}
    except OSError as error:
        return error


def _of_any_process(folder: Path, failures: Mapping[int, BaseException]) -> OSError | RuntimeError:
    for error in failures.values():
        if isinstance(error, OSError):
            return OSError(error.errno, error.strerror, error.filename or str(folder))
    said = "; ".join(f"process {rank}: {error}" for rank, error in failures.items())
    return RuntimeError(f"{folder} could not be written ({said})")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What a checkpoint's folder is, if it is not as it was written (None). `share`: this process's number, and of how
    many, where each looks at some of the files; that they are there, each looks at. Raises OSError if a file cannot be
    read."""
    try:
        sums = read_json(folder / SUMS)
    except (FileNotFoundError, ValueError):
        return "no whole checkpoint of omnitrain"
    if not isinstance(sums, dict) or not all(isinstance(x, str) for x in sums.values()) or STATE not in sums:
        return "no whole checkpoint of omnitrain"
    there = {path.name for path in folder.iterdir()}
    if lost := sorted(sums.keys() - there):
        return f"damaged: {lost[0]} is missing"
    if added := sorted(there - sums.keys() - {SUMS}):
        return f"damaged: {added[0]} does not belong to it"
    mine = sorted(sums)[share[0] :: share[1]]
    if strange := [name for name in sums if not (folder / name).is_file()]:
        return f"damaged: {strange[0]} is no file"
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        found = pool.map(lambda name: _sha256(folder / name), mine)
        changed = [name for name, value in zip(mine, found, strict=True) if value != sums[name]]
    return f"damaged: the checksum of {changed[0]} does not fit" if changed else None


def read(folder: Path) -> dict[str, Any]:
    """A checkpoint as Lightning has it, from a folder that is as it was written: weights and the moments of each
    parameter are `StoredTensors`. Raises ValueError (or what torch raises for a file that it does not know) if it is
    no such folder."""
    checkpoint = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    pieces = _Pieces(folder)
    checkpoint["state_dict"] = StoredTensors(pieces, WEIGHTS, checkpoint["state_dict"])
    for i, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        state = {n: StoredTensors(pieces, _of_moments(i, n), small) for n, small in optimizer["state"].items()}
        optimizer["state"] = state
    return checkpoint


class StoredTensors(Stored):
    """Tensors of a folder by the rest of their names. `small`: further ones, which it does not hold in parts."""

    def __init__(self, pieces: _Pieces, prefix: str, small: Mapping[str, Tensor]) -> None:
        self._pieces, self._prefix, self._small = pieces, prefix, small
        self.shapes = {name: tuple(x.shape) for name, x in small.items()} | pieces.shapes.get(prefix, {})

    def region(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        if name in self._small:
            return region(self._small, name, offset, shape)
        return self._pieces.region(self._prefix + name, tuple(offset), tuple(shape))


def on_disk(tensors: Mapping[str, Tensor], scratch: Path) -> dict[str, Tensor]:
    """The same tensors, each copied to a file of its own below `scratch` and mapped from there: memory holds one at a
    time."""
    return {name: _on_disk(tensors[name], scratch / str(i)) for i, name in enumerate(tensors)}


def _on_disk(tensor: Tensor, file: Path) -> Tensor:
    if not tensor.numel():
        return tensor
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return mapped.copy_(tensor)


@dataclass(frozen=True)
class _Piece:
    file: Path
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class _Pieces:
    """Where in the files of a folder the parts of tensors lie; read from the headers. `shapes`: by prefix and rest of
    the name."""

    def __init__(self, folder: Path) -> None:
        self._of: dict[str, list[_Piece]] = {}
        self._open: dict[Path, Any] = {}  # mapped, which keeps no file open
        for path in sorted(folder.glob("*.safetensors")):
            file = self._file(path)
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118  (no mapping)
                offset, shape = places[name]["saved_offsets"], tuple(file.get_slice(name).get_shape())
                if len(offset) != len(shape) or not all(isinstance(o, int) and o >= 0 for o in offset):
                    raise ValueError(f"{path}: {name} lies nowhere")
                self._of.setdefault(name, []).append(_Piece(path, tuple(offset), shape))
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, pieces in self._of.items():
            shape = tuple(max(p.offset[d] + p.shape[d] for p in pieces) for d in range(len(pieces[0].shape)))
            if sum(math.prod(p.shape) for p in pieces) != math.prod(shape):
                raise ValueError(f"{folder}: {name} is not whole")
            prefix = WEIGHTS if name.startswith(WEIGHTS) else f"{name.rpartition('.')[0]}."
            self.shapes.setdefault(prefix, {})[name.removeprefix(prefix)] = shape

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path]

    def region(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        out: Tensor | None = None
        for piece in self._of[name]:
            both = [
                (max(o, p), min(o + n, p + m))
                for o, n, p, m in zip(offset, shape, piece.offset, piece.shape, strict=True)
            ]
            if any(start >= end for start, end in both):
                continue
            stored = self._file(piece.file).get_slice(name)
            inside = [slice(a - p, b - p) for (a, b), p in zip(both, piece.offset, strict=True)]
            found: Tensor = stored[tuple(inside)]
            if found.shape == shape:
                return found
            out = found.new_empty(shape) if out is None else out
            out[tuple(slice(a - o, b - o) for (a, b), o in zip(both, offset, strict=True))] = found
        assert out is not None, f"nothing of {name} lies at {offset}"
        return out

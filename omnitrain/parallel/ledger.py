"""What a step does, written down operation by operation: messages, multiplications, and memory as storages live.

    with Ledger(H100) as ledger:
        ledger.mark(WEIGHTS, parameters)
        step()
    ledger.messages, ledger.peak, ledger.seconds

It looks on from outside, in a real process or one of a pretended world (`rehearsal.py`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from omnitrain.parallel.gpus import Gpu

WEIGHTS, GRADIENTS, MOMENTS, GATHERED, ACTIVATIONS = "weights", "gradients", "moments", "gathered", "activations"
KINDS = (WEIGHTS, GRADIENTS, MOMENTS, GATHERED, ACTIVATIONS)
"""What memory is for. `gathered`: whole units, and the buffers of messages about them. `activations`: all else."""

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"
COLLECTIVES = (ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL)


@dataclass(frozen=True, kw_only=True)
class Message:
    """A kind of message: among how many processes, of which so many are in this one's node."""

    collective: str
    processes: int
    in_node: int


@dataclass(frozen=True, kw_only=True)
class _Sort:
    """Where in the arguments of an operation of c10d its group is, and the tensors whose bytes are counted."""

    collective: str
    group: int
    counted: int


_c10d = torch.ops.c10d
_SORTS: dict[Any, _Sort] = {
    _c10d._allgather_base_.default: _Sort(collective=ALL_GATHER, group=2, counted=0),
    _c10d._reduce_scatter_base_.default: _Sort(collective=REDUCE_SCATTER, group=2, counted=1),
    _c10d.allreduce_.default: _Sort(collective=ALL_REDUCE, group=1, counted=0),
    _c10d.alltoall_base_.default: _Sort(collective=ALL_TO_ALL, group=2, counted=1),
}
"""Counted are a gathered whole, what is to be reduced, and what one process sends to all (itself too)."""


class Ledger(TorchDispatchMode):
    """Notes all that runs inside it.

    Attributes:
        messages, bytes: how many of each kind, and their bytes (see `_SORTS`).
        operations: multiplications and additions of products, convolutions and attention, as they run: what is computed
            again counts again.
        seconds: of a `gpu` that does each operation at the bound of its peak or of its memory.
        now, peak: bytes by what they are for; `peak` is when their sum was largest.
    """

    def __init__(self, gpu: Gpu, node: int = 8) -> None:
        super().__init__()
        self.gpu, self.node = gpu, node
        self.messages, self.bytes = Counter[Message](), Counter[Message]()
        self.operations, self.seconds = 0.0, 0.0
        self.now, self.peak = Counter[str](), Counter[str]()
        self._stored: dict[int, tuple[str, int]] = {}
        self._most = 0
        self._total = 0

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """From now on the memory of `tensors` is for `kind`."""
        for tensor in tensors:
            self._note(tensor, kind)

    def __enter__(self) -> Ledger:
        # A dispatch mode does not see storages change size, which is how FSDP2 frees what it has gathered.
        self._resize = torch.UntypedStorage.resize_
        resize, ledger = self._resize, self

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            ledger._keep(storage, GATHERED, size)
            return result

        storages: Any = torch.UntypedStorage
        storages.resize_ = noted
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        storages: Any = torch.UntypedStorage
        storages.resize_ = self._resize
        super().__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(issubclass(t, DTensor) for t in types) or func is torch.ops.prim.device.default:
            return NotImplemented  # what it does to local tensors comes by on its own
        out = func(*args, **(kwargs or {}))
        if (sort := _SORTS.get(func)) is not None:
            self._message(sort, args)
            return out
        for tensor in _tensors(out):
            self._note(tensor, None)
        self._work(func, args, kwargs or {}, out)
        return out

    def _message(self, sort: _Sort, args: Any) -> None:
        group = ProcessGroup.unbox(args[sort.group])
        ranks = torch.distributed.get_process_group_ranks(group)
        here = torch.distributed.get_rank() // self.node
        in_node = sum(rank // self.node == here for rank in ranks)
        message = Message(collective=sort.collective, processes=len(ranks), in_node=in_node)
        self.messages[message] += 1
        self.bytes[message] += _size(args[sort.counted])
        if sort.collective == REDUCE_SCATTER:
            self.mark(GATHERED, _tensors(args[1]))
            self.mark(GRADIENTS, _tensors(args[0]))
        elif sort.collective == ALL_GATHER:
            self.mark(GATHERED, _tensors(args[0]))
        elif sort.collective == ALL_REDUCE:
            self.mark(GRADIENTS, _tensors(args[0]))

    def _work(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        packet = func.overloadpacket
        if func.is_view or func.namespace in ("c10d", "prim") or packet in _MAKES_ROOM:
            return
        operations = _operations(packet, args, kwargs, out)
        self.operations += operations
        moved = 2 * _size(out) if packet in _READS_WHAT_IT_WRITES else _size((args, kwargs, out))
        if packet is torch.ops.aten._fused_adamw_:  # writes all that it reads but the gradients
            moved += moved * 3 // 4
        self.seconds += self.gpu.seconds(operations, moved)

    def _note(self, tensor: Tensor, kind: str | None) -> None:
        storage = tensor.untyped_storage()
        self._keep(storage, kind, storage.nbytes())

    def _keep(self, storage: torch.UntypedStorage, kind: str | None, size: int) -> None:
        key = storage._cdata
        before, had = self._stored.get(key, (None, 0))
        if before is None:
            weakref.finalize(storage, self._drop, key)
        kind = kind or before or ACTIVATIONS
        if (before, had) == (kind, size):
            return
        if before is not None:
            self.now[before] -= had
        self._stored[key] = kind, size
        self.now[kind] += size
        self._total += size - had
        if self._total > self._most:
            self._most, self.peak = self._total, self.now.copy()

    def _drop(self, key: int) -> None:
        kind, size = self._stored.pop(key)
        self.now[kind] -= size
        self._total -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tree: Any) -> int:
    """Bytes of all tensors in it."""
    return sum(t.numel() * t.itemsize for t in _tensors(tree))


_aten = torch.ops.aten
_MAKES_ROOM = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)
_READS_WHAT_IT_WRITES = (
    _aten.index, _aten.index_select, _aten.embedding, _aten.gather,
    _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones,
)  # fmt: skip


def _operations(packet: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> float:
    """Multiplications and additions of one operation."""
    if packet is _aten._grouped_mm:  # rows by experts, or the products of rows that are the experts' gradients
        return 2.0 * args[0].numel() * args[1].shape[-1]
    if packet not in flop_registry:
        return 0.0
    found = float(flop_registry[packet](*args, **kwargs, out_val=out))
    causal = str(packet).startswith("torch_attn.") and [-1, 0] in [list(a) for a in args if isinstance(a, tuple | list)]
    return found / 2 if causal else found  # half of the pairs, which the kernel leaves out

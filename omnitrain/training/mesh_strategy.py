"""Lightning's place for `omnitrain.parallel`: a model that processes share, by FSDP2 and given-out experts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from omnitrain.files import atomic
from omnitrain.interop.checkpoint_folder import Part, parted, write
from omnitrain.interop.checksums import damage
from omnitrain.interop.start_from import read_checkpoint
from omnitrain.interop.stored import region, shapes
from omnitrain.models.deferred import sources
from omnitrain.models.omni import OmniModel
from omnitrain.parallel.context import Slices
from omnitrain.parallel.experts import numbers_of_experts
from omnitrain.parallel.mesh import Mesh, MeshSizes
from omnitrain.parallel.sharding import spread
from omnitrain.parallel.state import Whole, buffers, local
from omnitrain.training.ranks import gather_objects

WRITING = timedelta(hours=1)
"""How long a process may write its part of a checkpoint longer than another."""


class MeshStrategy(ModelParallelStrategy):
    """`parallel=fsdp` and its like; the sizes are those of `MeshSizes`, of which two may be ``auto``.

    A checkpoint is a folder to which each process writes its own parts while training goes on
    (`interop.checkpoint_folder`). It says nothing of the mesh: any other one, or one process, goes on from it.

    Raises ValueError, when the processes have found each other, for sizes that do not make their number.
    """

    def __init__(
        self,
        *,
        data: int | str = "auto",
        shard: int | str = "auto",
        expert: int | str = 1,
        context: int = 1,
        offload: bool = False,
        process_group_backend: str | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_seconds),
            save_distributed_checkpoint=True,
        )
        self._sizes = partial(MeshSizes.of, data=data, shard=shard, expert=expert, context=context)
        self.offload = offload
        self.checkpoint_follows = False
        """Weights that are not there yet need not be made: a checkpoint brings all of them."""
        self._mesh: Mesh | None = None
        self._whole: Whole | None = None
        self._writers: dist.ProcessGroup | None = None  # they talk beside the training
        self._saving: _Saving | None = None

    @property
    def mesh(self) -> Mesh:
        assert self._mesh is not None, "the processes have not found each other yet"
        return self._mesh

    @property
    def whole(self) -> Whole:
        assert self._whole is not None, "the model is not spread yet"
        return self._whole

    @property
    def slices(self) -> Slices | None:
        """Whose the positions of a pack are, where processes share packs."""
        return Slices(self.mesh.context.get_group()) if self.mesh.sizes.context > 1 else None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.mesh.data_ranks, "rank": self.mesh.data_rank(self.global_rank)}

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        experts = numbers_of_experts(self._trained)
        sizes = self._sizes(self.world_size, experts=experts, neighbours=self.num_processes)
        self._mesh = Mesh.over(sizes, self.root_device.type)
        self._writers = dist.new_group(backend="gloo", timeout=WRITING)

    @property
    def _trained(self) -> torch.nn.Module:
        model = getattr(self.lightning_module, "model", None)
        assert isinstance(model, torch.nn.Module)
        return model

    def spread(self) -> None:
        """Leave this process's shards in the model that is trained, once. Of weights that are not there yet
        (`models.deferred`), it makes or reads its own, one tensor after the other."""
        if self._whole is not None:
            return
        model = self._trained
        later = sources(model)
        if isinstance(model, OmniModel):
            model.encodes_always = True
        bf16 = self.precision_plugin.precision == "bf16-mixed"
        given_out = spread(model, self.mesh, compute=torch.bfloat16 if bf16 else None, offload=self.offload)
        if later:
            device = "cpu" if self.offload else self.mesh.parameters.device_type
            model._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x)
        self._whole = Whole(model, self.mesh, given_out)
        with torch.no_grad():
            for name, source in later.items():
                here = local(self._whole.parameters[name])
                if here.numel() and not self.checkpoint_follows:
                    here.copy_(source(*self._whole.place(name)))

    def whole_state(self) -> dict[str, Tensor]:
        """The state of the module in the first process, gathered one tensor at a time; nothing in the others. A
        collective."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.whole.parameters.items():
            value = self.whole.gather(name, parameter)
            if self.is_global_zero:
                state[f"model.{name}"] = value
        if self.is_global_zero:
            state |= {f"model.{name}": value.detach().cpu() for name, value in buffers(self._trained)}
        return state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Copies of this process's `Part`s of the state, on the host."""
        state: dict[str, Any] = {f"model.{n}": self._part(n, p) for n, p in self.whole.parameters.items()}
        for name, value in buffers(self._trained):  # each process has them
            part = Part(value, (0,) * value.ndim, tuple(value.shape)).on_host()
            state[f"model.{name}"] = part if value.ndim else part.values
        return state

    def _part(self, name: str, tensor: Tensor) -> Part:
        """What is here of a tensor that is cut as parameter `name` is."""
        return Part(local(tensor), self.whole.place(name)[0], self.whole.shape(name)).on_host()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state = checkpoint["state_dict"]
        for name, parameter in self.whole.parameters.items():
            self._fill(parameter, name, state, f"model.{name}")
        for name, value in buffers(self._trained):
            value.copy_(state[f"model.{name}"])

    @torch.no_grad()
    def _fill(self, into: Tensor, name: str, stored: Mapping[str, Tensor], key: str) -> None:
        """Copy this process's part of ``stored[key]`` to `into`, which is cut as parameter `name` is."""
        if local(into).numel():
            local(into).copy_(region(stored, key, *self.whole.place(name)))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As that of one process, parameters numbered in their order; of moments, copies of this process's `Part`s."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state: dict[int, dict[str, Any]] = {}
        groups, numbers = self._numbered(optimizer)
        for name, number in numbers.items():
            if found := optimizer.state.get(self.whole.parameters[name]):
                state[number] = {k: self._part(name, v) if v.ndim else v.cpu().clone() for k, v in found.items()}
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            options = {group["name"]: group for group in saved["param_groups"]}
            for group in optimizer.param_groups:
                group |= {key: value for key, value in options[group["name"]].items() if key != "params"}
            _, numbers = self._numbered(optimizer)
            for name, number in numbers.items():
                if number in saved["state"]:
                    self._load_moments(optimizer, name, saved["state"][number])

    def _load_moments(self, optimizer: Optimizer, name: str, saved: Mapping[str, Tensor]) -> None:
        parameter = self.whole.parameters[name]
        state = optimizer.state[parameter]
        for key, shape in shapes(saved).items():
            if shape:
                state[key] = torch.zeros_like(parameter)
                self._fill(state[key], name, saved, key)
            else:
                state[key] = saved[key].clone()

    def _numbered(self, optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Groups with numbers instead of parameters, and each parameter's, as one process has them: there, groups of
        one name are one group."""
        names = {id(parameter): name for name, parameter in self.whole.parameters.items()}
        place = {name: i for i, name in enumerate(self.whole.parameters)}
        merged: dict[str, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            mine = merged.setdefault(group["name"], {**group, "params": []})
            mine["params"] = mine["params"] + [names[id(parameter)] for parameter in group["params"]]
        numbers: dict[str, int] = {}
        for group in merged.values():
            in_order = sorted(group["params"], key=place.__getitem__)
            group["params"] = list(range(len(numbers), len(numbers) + len(in_order)))
            numbers |= dict(zip(in_order, group["params"], strict=True))
        return list(merged.values()), numbers

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | Path,
        storage_options: AbstractContextManager[Path] | None = None,
    ) -> None:
        """Begin to write the folder `filepath`, which appears when it is whole; training may go on meanwhile. A
        collective.

        Args:
            storage_options: in the first process, gives the place to write to, and in the end its name to what lies
                there; default: `files.atomic`.

        Raises as `finish_saving`, which it calls for the last one; OSError if there is no such place.
        """
        self.finish_saving()
        parts = parted(checkpoint)
        writing, where, error = ExitStack(), None, None
        if self.is_global_zero:
            try:
                where = writing.enter_context(storage_options or atomic(filepath))
            except OSError as caught:
                error = caught
        where = self.broadcast(where)
        if where is None:
            raise SystemExit(1) if error is None else error
        writers = self._writers
        assert writers is not None

        def write_all() -> None:
            with writing:
                write(where, parts, checkpoint, writers)

        self._saving = _Saving(Path(filepath), write_all)

    @property
    def saving_failed(self) -> bool:
        """Whether this process knows by now that the checkpoint under way cannot be written."""
        return self._saving is not None and self._saving.error is not None

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on the disk. A collective. If it could not be written, raises OSError or
        RuntimeError, which names it, in the first process, and SystemExit in the others."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.join()
        if not any(gather_objects(saving.error is not None)):
            return
        if not self.is_global_zero:
            raise SystemExit(1)
        if isinstance(saving.error, OSError):
            raise saving.error
        raise RuntimeError(f"{saving.path} could not be written: {saving.error}") from saving.error

    def teardown(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:  # the run has failed, or nobody waited for what he saved
            saving.join()
            if saving.error is not None and sys.exception() is None:
                raise saving.error
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of any number of processes, a folder or a file, whose tensors are read as far as they are needed
        here. A collective. Raises as `read_checkpoint`."""

        def damage_seen_together(path: Path) -> str | None:
            try:
                mine = damage(path, (self.global_rank, self.world_size))
            except OSError as error:  # nobody may stay away
                mine = f"not readable for process {self.global_rank} ({error})"
            return next((wrong for wrong in gather_objects(mine) if wrong is not None), None)

        return read_checkpoint(checkpoint_path, damage_seen_together)


class _Saving(Thread):
    """A checkpoint on its way to `path`; `error`: why it did not come there."""

    def __init__(self, path: Path, write_all: Callable[[], None]) -> None:
        super().__init__(name=f"writes {path}", daemon=True)
        self.path, self.error = path, None
        self._write_all: Callable[[], None] | None = write_all
        self.start()

    def run(self) -> None:
        write_all, self._write_all = self._write_all, None  # with it go the copies
        assert write_all is not None
        try:
            write_all()
        except BaseException as error:  # raised where somebody waits
            self.error = error

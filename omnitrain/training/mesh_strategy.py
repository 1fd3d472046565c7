"""Lightning's place for `omnitrain.parallel`: a model that processes share, by FSDP2 and given-out experts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from omnitrain.models.omni import OmniModel
from omnitrain.parallel.context import Slices
from omnitrain.parallel.experts import numbers_of_experts
from omnitrain.parallel.mesh import Mesh, MeshSizes
from omnitrain.parallel.sharding import spread
from omnitrain.parallel.state import Whole, buffers


class MeshStrategy(ModelParallelStrategy):
    """`parallel=fsdp` and its like; the sizes are those of `MeshSizes`, of which two may be ``auto``.

    A checkpoint is what a single process would write: whole tensors under the names of the model that is not spread,
    gathered one at a time and kept by the first process. So it says nothing of the mesh, and any mesh goes on from it.

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
            save_distributed_checkpoint=False,
        )
        self._sizes = partial(MeshSizes.of, data=data, shard=shard, expert=expert, context=context)
        self.offload = offload
        self._mesh: Mesh | None = None
        self._whole: Whole | None = None

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

    @property
    def _trained(self) -> torch.nn.Module:
        model = getattr(self.lightning_module, "model", None)
        assert isinstance(model, torch.nn.Module)
        return model

    def spread(self) -> None:
        """Leave this process's shards in the model that is trained, once."""
        if self._whole is not None:
            return
        model = self._trained
        if isinstance(model, OmniModel):
            model.encodes_always = True
        bf16 = self.precision_plugin.precision == "bf16-mixed"
        given_out = spread(model, self.mesh, compute=torch.bfloat16 if bf16 else None, offload=self.offload)
        self._whole = Whole(model, self.mesh, given_out)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors in the first process, nothing in the others. A collective."""
        whole = self.whole
        state: dict[str, Tensor] = {}
        for name, parameter in whole.parameters.items():
            value = whole.gather(name, parameter)
            if self.is_global_zero:
                state[f"model.{name}"] = value
        if self.is_global_zero:
            state |= {f"model.{name}": value.detach().cpu() for name, value in buffers(self._trained)}
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        state = checkpoint["state_dict"]
        for name, parameter in self.whole.parameters.items():
            self.whole.cut(name, state[f"model.{name}"], parameter)
        for name, value in buffers(self._trained):
            value.copy_(state[f"model.{name}"])

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As that of one process: parameters numbered in their order, moments whole. A collective."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state: dict[int, dict[str, Any]] = {}
        groups, numbers = self._numbered(optimizer)
        for name, number in numbers.items():
            parameter = self.whole.parameters[name]
            if found := optimizer.state.get(parameter):
                values = {key: self.whole.gather(name, v) if v.ndim else v.cpu() for key, v in found.items()}
                if self.is_global_zero:
                    state[number] = values
        return {"state": state, "param_groups": groups} if self.is_global_zero else {}

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
        for key, value in saved.items():
            if value.ndim:
                state[key] = torch.zeros_like(parameter)
                self.whole.cut(name, value, state[key])
            else:
                state[key] = value.clone()

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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

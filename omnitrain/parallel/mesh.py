"""The processes of a run, laid out as a grid.

    data x shard x context      of parameters: copies, shards of a copy, slices of a pack
    data x rest  x expert       of experts: the same processes, shard * context = rest * expert

Parameters are sharded over shard and context together: who holds another slice of the same pack holds other shards.
Experts are given out over `expert` neighbouring processes of a copy, and each one's are sharded over the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """How many processes share what. ValueError, with what would fit, for sizes that do not go together.

    Attributes:
        data: copies of the model.  shard: processes that share a copy, each with data of its own.
        expert: processes that share the experts of a layer, of those that share a copy.
        context: processes that share each pack.
    """

    data: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"parallel.{name}={size}: must be at least 1")
        if self.copy % self.expert:
            fits = ", ".join(map(str, divisors(self.copy)))
            raise ValueError(
                f"parallel.expert={self.expert}: does not divide the {self.copy} processes of a copy "
                f"(parallel.shard * parallel.context); use one of {fits}"
            )

    @classmethod
    def of(
        cls,
        world_size: int,
        *,
        data: int | str = "auto",
        shard: int | str = "auto",
        expert: int | str = 1,
        context: int = 1,
        experts: Sequence[int] = (),
        neighbours: int | None = None,
    ) -> MeshSizes:
        """The sizes of a run of `world_size` processes.

        Args:
            data, shard: may be ``auto``, the one what the other leaves, or with both so one copy shared by all.
            expert: ``auto``: the most of the `neighbours` of a node that divide a copy and each of the `experts`, the
                numbers of experts of the model's layers.

        Raises ValueError: sizes that do not make `world_size`, or do not go together.
        """
        if context < 1 or world_size % context:
            fits = ", ".join(map(str, divisors(world_size)))
            raise ValueError(f"parallel.context={context}: does not divide {world_size} processes; use one of {fits}")
        left = world_size // context
        if data == "auto" and shard == "auto":
            data = 1
        given = shard if data == "auto" else data
        name = "shard" if data == "auto" else "data"
        if not isinstance(given, int) or given < 1 or left % given:
            fits = ", ".join(map(str, divisors(left)))
            raise ValueError(
                f"parallel.{name}={given}: does not divide {left} (processes / parallel.context); use one of {fits}"
            )
        if data == "auto":
            data = left // given
        elif shard == "auto":
            shard = left // given
        if expert == "auto":
            copy = int(shard) * context
            expert = max(
                n
                for n in divisors(copy)
                if n <= (neighbours or copy) and all(count % n == 0 for count in (experts or [1]))
            )
        sizes = cls(data=int(data), shard=int(shard), expert=int(expert), context=context)
        if sizes.world != world_size:
            raise ValueError(
                f"parallel.data={data} * parallel.shard={shard} * parallel.context={context} is {sizes.world}, and "
                f"there are {world_size} processes (trainer.devices * trainer.num_nodes); set one of them to auto"
            )
        return sizes

    @property
    def copy(self) -> int:
        """Processes that share a copy of the model."""
        return self.shard * self.context

    @property
    def world(self) -> int:
        return self.data * self.copy


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class Mesh:
    """parameters: [data, copy].  experts: [data, rest, expert].  context: [context], of this process's neighbours."""

    sizes: MeshSizes
    parameters: DeviceMesh
    experts: DeviceMesh
    context: DeviceMesh

    @classmethod
    def over(cls, sizes: MeshSizes, device: str) -> Mesh:
        """A collective of all processes. `device`: ``cpu`` or ``cuda``."""
        rest = sizes.copy // sizes.expert
        slices = init_device_mesh(
            device, (sizes.world // sizes.context, sizes.context), mesh_dim_names=("_", "context")
        )
        return cls(
            sizes=sizes,
            parameters=init_device_mesh(device, (sizes.data, sizes.copy), mesh_dim_names=("data", "copy")),
            experts=init_device_mesh(
                device, (sizes.data, rest, sizes.expert), mesh_dim_names=("data", "rest", "expert")
            ),
            context=slices["context"],
        )

    @property
    def shards(self) -> DeviceMesh:
        """Over which FSDP2 cuts parameters. With one copy it is not to hear of copies: it would keep a second set of
        gradients until the end of each backward pass, for a sum over one process."""
        return self.parameters if self.sizes.data > 1 else self.parameters["copy"]

    @property
    def shards_of_experts(self) -> DeviceMesh:
        """The same, of the experts that are given out."""
        return self.experts["data", "rest"] if self.sizes.data > 1 else self.experts["rest"]

    def data_rank(self, rank: int) -> int:
        """Which part of the data the process `rank` reads: those that share a pack read the same."""
        return rank // self.sizes.context

    @property
    def data_ranks(self) -> int:
        return self.sizes.data * self.sizes.shard

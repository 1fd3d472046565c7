"""A run whose first checkpoint cannot be written before two more steps are done. `test_mesh.py` starts it."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

from toy_training import Toy, train

from omnitrain.interop import checkpoint_folder
from omnitrain.training import mesh_strategy
from omnitrain.training.thinker import ThinkerModule


def held_up(out: str) -> None:
    """What happens, in order, goes to `out`/order.txt."""
    step, write, later = ThinkerModule.training_step, mesh_strategy.write, Event()
    order: list[str] = []

    def training_step(module: ThinkerModule, *arguments: Any) -> Any:
        order.append(f"step {module.global_step}")
        if module.global_step == 3:
            later.set()
        return step(module, *arguments)

    def write_late(*arguments: Any) -> None:
        assert later.wait(60), "training waits for its checkpoint"
        write(*arguments)
        order.append("written")

    checkpoint_folder.FILE_BYTES = 20_000  # several files
    ThinkerModule.training_step, mesh_strategy.write = training_step, write_late  # ty: ignore
    train(Toy(out=out, steps=4, mesh={"shard": 1}, checkpoint_every=2))
    (Path(out) / "order.txt").write_text("\n".join(order))

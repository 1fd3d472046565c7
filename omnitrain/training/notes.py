"""Means of what a training sees beside its loss, for the log: rewards, ratios, margins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from omnitrain.models.omni import OmniModel
from omnitrain.training.ranks import gather_objects
from omnitrain.training.sums import add_pairs, means, merged_pairs
from omnitrain.training.thinker import ThinkerModule


class NotingModule(ThinkerModule[OmniModel]):
    """A `ThinkerModule` whose rows of metrics have ``NOTES/NAME``, the mean of the values that `note` was given on any
    rank since the last row. They are part of the checkpoint."""

    NOTES: ClassVar[str]
    """Under which they stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._notes: dict[str, tuple[float, float]] = {}  # since the last row: sum, count

    def note(self, name: str, values: Iterable[float]) -> None:
        values = [float(value) for value in values]
        add_pairs(self._notes, {name: (sum(values), float(len(values)))})

    def own_row(self) -> dict[str, float]:
        found = means(gather_objects(self._notes))
        self._notes = {}
        return super().own_row() | {f"{self.NOTES}/{name}": found[name] for name in sorted(found)}

    def extra_state(self) -> dict[str, Any]:
        return super().extra_state() | {"notes": dict(self._notes)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        super().load_extra_state(state)
        self._notes = dict(state["notes"])

    def dealt_out(self, states: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
        merged = merged_pairs(state["notes"] for state in states)
        dealt = super().dealt_out(states, ranks)
        return [state | {"notes": {} if rank else merged} for rank, state in enumerate(dealt)]

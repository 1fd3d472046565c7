"""What a recipe says of a study: its key `study` (recipes/nondegradation.yaml), and the names that every study knows.

These are plain frozen dataclasses of types that a configuration takes; nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

UNIMODAL = ("text", "vision", "audio")
OMNI = ("omni_early", "omni_late")
ARMS = (*UNIMODAL, *OMNI)
"""The arms that the tables compare."""
MATCHES = ("data", "compute")
"""What is made equal among the arms (docs/nondegradation_matching.md)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one arm is trained on.

    Attributes:
        sources: names in `data.sources`.
        first: sources that are alone at the beginning; the others come after them. Empty: all from the start.
        kept: the share of the samples of `first` that is kept for the time when the others have come.
    """

    sources: list[str]
    first: list[str] = field(default_factory=list)
    kept: float = 0.25


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """The key `study` of a recipe.

    Attributes:
        arms: by name.
        epochs: passes over each source under ``match=data``, fractions allowed; the same in every arm that sees it.
        margins: largest difference to the unimodal arm that still counts as no worse, by row of the table (`text` in
            bits per byte, `vision` and `audio` in nats per target token).
        compute_reference: under ``match=compute`` every arm gets the operations that this arm has under ``match=data``.
        warmup_fraction: share of a run's steps over which the learning rate rises.
        validations: looks at the validation split, evenly over a run.
        lr: peak learning rate by arm, where it is not `optim.lr`.
    """

    arms: dict[str, Arm]
    epochs: dict[str, float]
    margins: dict[str, float]
    compute_reference: str
    warmup_fraction: float = 0.03
    validations: int = 8
    lr: dict[str, float] = field(default_factory=dict)

    def check(self, sources: Collection[str]) -> None:
        """Raise ValueError, naming the key, if something contradicts something else or the names in `data.sources`."""
        for name, arm in self.arms.items():
            key = f"study.arms.{name}"
            if unknown := [source for source in (*arm.sources, *arm.first) if source not in sources]:
                raise ValueError(f"{key}: no data.sources are called {unknown}; there are {', '.join(sources)}")
            if not arm.sources or set(arm.first) - set(arm.sources):
                raise ValueError(f"{key}: sources={arm.sources} must hold at least all of first={arm.first}")
            if arm.first and (not 0 <= arm.kept < 1 or set(arm.first) == set(arm.sources)):
                raise ValueError(f"{key}: with `first`, other sources must follow and kept={arm.kept} lie in [0, 1)")
            if missing := [source for source in arm.sources if not self.epochs.get(source, 0) > 0]:
                raise ValueError(f"study.epochs: give a number above 0 for {', '.join(missing)} (arm {name})")
        for key, names in (("compute_reference", [self.compute_reference]), ("lr", self.lr)):
            if unknown := [name for name in names if name not in self.arms]:
                raise ValueError(f"study.{key}: no arm is called {unknown}; arms are {', '.join(self.arms)}")
        if not 0 <= self.warmup_fraction < 1 or self.validations < 1:
            raise ValueError("study: warmup_fraction must lie in [0, 1) and validations be at least 1")

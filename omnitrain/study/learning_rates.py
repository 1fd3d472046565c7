"""What a search for learning rates (recipe nondegradation_lr) has found, arm by arm.

``SEARCH_DIR/ARM/lr=RATE`` are the trials, each the folder of a run of a study.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omnitrain.files import METRICS, read_json
from omnitrain.study.results import RUN, validation_loss


def read_search(search_dir: Path) -> dict[str, dict[float, float]]:
    """Last validation loss of every finished trial, in nats per target token: arm -> learning rate -> loss. Raises
    FileNotFoundError for no finished trial below `search_dir`; ValueError for one without a validation loss."""
    losses: dict[str, dict[float, float]] = {}
    for path in sorted(search_dir.glob(f"*/lr=*/{RUN}")):
        record = read_json(path)
        if not record["finished"]:
            continue
        loss = validation_loss(path.parent)
        if loss is None:
            raise ValueError(f"{path.parent / METRICS}: no validation/loss; the trial never looked at its split")
        losses.setdefault(record["arm"], {})[record["lr"]] = loss
    if not losses:
        raise FileNotFoundError(
            f"{search_dir}: no finished trial (ARM/lr=RATE/{RUN}); run `fit +recipe=nondegradation_lr "
            f"paths.run_dir={search_dir}`"
        )
    return losses


def best_rates(losses: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """The rate with the smallest loss, by arm; of equal ones the smaller. A loss that is not a number never wins."""
    return {
        arm: min(of_arm, key=lambda rate: (of_arm[rate] != of_arm[rate], of_arm[rate], rate))
        for arm, of_arm in losses.items()
    }

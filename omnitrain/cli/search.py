"""``omnitrain search``: what a search for learning rates (recipe nondegradation_lr) has found, arm by arm."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from omnitrain.config.errors import explains_errors


@explains_errors
def main(argv: list[str]) -> int:
    """Print the losses of a search and write the best rates. Returns the exit status: 0, or 1 with an explanation on
    stderr, also if the arms have not all had the same trials."""
    parser = argparse.ArgumentParser(
        prog="omnitrain search",
        description="Validation loss by arm and learning rate of a search (recipe nondegradation_lr), and the best "
        "rate of each arm, as the study takes it. Writes SEARCH_DIR/learning_rates.yaml.",
    )
    parser.add_argument("search_dir", type=Path, metavar="SEARCH_DIR", help="folder of the search")
    options = parser.parse_args(argv)
    losses = read_search(options.search_dir)
    best = best_rates(losses)
    rates = sorted({rate for of_arm in losses.values() for rate in of_arm})
    print("validation loss, nats per target token, by peak learning rate")
    print("          " + "".join(f"{rate:>10g}" for rate in rates))
    for arm, of_arm in losses.items():
        cells = [f"{of_arm[r]:.4f}" + ("*" if r == best[arm] else " ") if r in of_arm else "- " for r in rates]
        print(f"{arm:10}" + "".join(f"{cell:>10}" for cell in cells))
    for arm, rate in best.items():
        if len(rates) > 1 and rate in (rates[0], rates[-1]):
            print(f"{arm}: the best rate, {rate:g}, is at the edge of the grid; widen it for all arms", file=sys.stderr)
    missing = [f"{arm} at {rate:g}" for arm, of_arm in losses.items() for rate in rates if rate not in of_arm]
    if missing:
        print(f"error: not every arm has had the same trials; not finished: {', '.join(missing)}", file=sys.stderr)
        return 1
    lines = [f"    {arm}: {rate:g}   # {losses[arm][rate]:.4f} nats per target token" for arm, rate in best.items()]
    path = options.search_dir / "learning_rates.yaml"
    path.write_text("\n".join(["study:", "  lr:", *lines]) + "\n", encoding="utf-8")
    print(f"written to {path}; on the command line of the study:")
    print("  '+study.lr={" + ", ".join(f"{arm}: {rate:g}" for arm, rate in best.items()) + "}'")
    return 0


def read_search(search_dir: Path) -> dict[str, dict[float, float]]:
    """Last validation loss of every finished trial, in nats per target token: arm -> learning rate -> loss.

    Raises:
        FileNotFoundError: there is no finished trial below `search_dir`.
        ValueError: a finished trial has no validation loss.
    """
    losses: dict[str, dict[float, float]] = {}
    for path in sorted(search_dir.glob("*/lr=*/study_run.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if not record["finished"]:
            continue
        with (path.parent / "metrics.csv").open(newline="", encoding="utf-8") as file:
            found = [row["validation/loss"] for row in csv.DictReader(file) if row.get("validation/loss")]
        if not found:
            raise ValueError(f"{path.parent / 'metrics.csv'}: no validation/loss; the trial never looked at its split")
        losses.setdefault(record["arm"], {})[record["lr"]] = float(found[-1])
    if not losses:
        raise FileNotFoundError(
            f"{search_dir}: no finished trial (ARM/lr=RATE/study_run.json); run `fit +recipe=nondegradation_lr "
            f"paths.run_dir={search_dir}`"
        )
    return losses


def best_rates(losses: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """The rate with the smallest loss, by arm; of equal ones the smaller. A loss that is not a number never wins."""
    return {
        arm: min(of_arm, key=lambda rate: (of_arm[rate] != of_arm[rate], of_arm[rate], rate))
        for arm, of_arm in losses.items()
    }

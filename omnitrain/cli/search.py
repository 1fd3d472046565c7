"""``omnitrain search``: what a search for learning rates (recipe nondegradation_lr) has found, arm by arm."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omnitrain.config.errors import explains_errors
from omnitrain.files import printable, write_text


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

    from omnitrain.study.learning_rates import best_rates, read_search

    losses = read_search(options.search_dir)
    best = best_rates(losses)
    rates = sorted({rate for of_arm in losses.values() for rate in of_arm})
    print("validation loss, nats per target token, by peak learning rate")
    print("          " + "".join(f"{rate:>10g}" for rate in rates))
    for arm, of_arm in losses.items():
        cells = [f"{of_arm[r]:.4f}" + ("*" if r == best[arm] else " ") if r in of_arm else "- " for r in rates]
        print(f"{printable(arm):10}" + "".join(f"{cell:>10}" for cell in cells))
    for arm, rate in best.items():
        if len(rates) > 1 and rate in (rates[0], rates[-1]):
            print(f"{arm}: the best rate, {rate:g}, is at the edge of the grid; widen it for all arms", file=sys.stderr)
    if missing := [f"{arm} at {rate:g}" for arm, of_arm in losses.items() for rate in rates if rate not in of_arm]:
        print(f"error: not every arm has had the same trials; not finished: {', '.join(missing)}", file=sys.stderr)
        return 1
    lines = [f"    {arm}: {rate:g}   # {losses[arm][rate]:.4f} nats per target token" for arm, rate in best.items()]
    path = options.search_dir / "learning_rates.yaml"
    write_text(path, "\n".join(["study:", "  lr:", *lines]) + "\n")
    print(f"written to {path}; on the command line of the study:")
    print("  '+study.lr={" + ", ".join(f"{arm}: {rate:g}" for arm, rate in best.items()) + "}'")
    return 0

"""How long processes wait for the one with the heaviest pack, with and without `data.balance`.

    python -m speed.balance                            # the embedded pack with the tiny model, 4 and 8 ranks
    python -m speed.balance model=qwen3_omni_30b_a3b   # the same with the operations of the public sizes
    python -m speed.balance +recipe=quickstart --fit 40   # and two processes that train, by the clock

It takes the overrides of `fit`, so that a value for a mixture and a model of your own can be chosen before a run. Every
sample (at most `--samples` of each source) is encoded once to learn its sizes; the real order, mixing and packing then
run over them, a stream for each rank. A pack costs the operations that `training.flops` counts, and nothing else takes
time. *waiting* is the share of all ranks' time that passes in waiting, if they begin each pass together (as with
parallel=ddp); *by layer*, if they begin each part of the model together (as with parallel=fsdp); *dealt* as *waiting*,
if the packs of `--accumulate` passes were sorted by cost and dealt out anew, each to any rank (which nothing here does:
it would send packs between hosts). *heaviest* is the cost of the heaviest pack over the mean, *tokens* the mean of a
pack, *filling* the share of the budget nearest to its end.

With `--fit`, two processes train so many steps on this machine, each with a thread, without and with each balance, and
*waiting* is that of their `throughput.csv`, by the clock of each rank's own forward passes.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

Costs = Sequence[Mapping[str, float]]
"""Operations of each pass of a rank, by part of the model."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; see above."""

    waiting: float
    by_layer: float
    dealt: float
    heaviest: float
    tokens: float
    filling: float


def summary(ranks: Sequence[Costs], accumulate: int, tokens: float, filling: float) -> Row:
    """Of what R ranks compute in n passes each."""
    from omnitrain.training.own_time import waiting

    def total(cost: Mapping[str, float]) -> float:
        return sum(cost.values())

    passes = list(zip(*ranks, strict=True))
    anew: list[Costs] = []
    for start in range(0, len(passes) - accumulate + 1, accumulate):
        in_order = sorted((cost for each in passes[start : start + accumulate] for cost in each), key=total)
        anew += [in_order[i : i + len(ranks)] for i in range(0, len(in_order), len(ranks))]
    every = [total(cost) for each in passes for cost in each]
    return Row(
        waiting=mean(waiting(ranks, by_part=False)),
        by_layer=mean(waiting(ranks, by_part=True)),
        dealt=mean(waiting(list(zip(*anew, strict=True)), by_part=False)),
        heaviest=max(every) / mean(every),
        tokens=tokens,
        filling=filling,
    )


class Simulation:
    """The streams of a run's data (`overrides` of `fit`), over samples of known sizes; at most `samples` of each
    source."""

    def __init__(self, overrides: Sequence[str], samples: int) -> None:
        from omnitrain.config.compose import run_config
        from omnitrain.data.adapters import spaced
        from omnitrain.data.sizes import measure, sized_sources
        from omnitrain.runs.experiment import build_data
        from omnitrain.study.run import planning_model
        from omnitrain.training.flops import thinker_work

        config = run_config(overrides)
        self.data = build_data(config)
        self.data.setup("fit")
        self.model = planning_model(config)
        self.work = thinker_work(self.model)
        sources = {name: spaced(source, samples) for name, source in self.data.opened("sources").items()}
        self.sources = sized_sources(measure(sources, self.data.encoder))

    def row(self, ranks: int, packs: int, accumulate: int, balance: float | None) -> Row:
        """Of `ranks` streams of so many `packs`, packed with this `balance`."""
        from omnitrain.data.mixture import Mixture
        from omnitrain.data.sizes import as_it_is
        from omnitrain.data.stream import PackedStream
        from omnitrain.data.work import Balance
        from omnitrain.training.flops import BatchSizes, training_flops_by_part

        bound = None if balance is None else Balance(work=self.work, most=balance)
        costs, tokens, filling = [], 0, 0.0
        for rank in range(ranks):
            stream = PackedStream(
                Mixture(self.sources, as_it_is, seed=self.data.seed, rank=rank, world_size=ranks),
                weights=self.data.planned_mixture()[0]["shares"],
                packing=replace(self.data.packing, n_bytes=len, balance=bound),
                stages=self.data.stages,
                max_bad_fraction=self.data.config.max_bad_fraction,
            )
            batches = [next(stream) for _ in range(packs)]
            costs.append([training_flops_by_part(self.model, BatchSizes.of(batch)) for batch in batches])
            tokens += sum(batch.n_tokens for batch in batches)
            state = batches[-1].stream_state
            assert state is not None
            filling += state["filling"] / packs
        return summary(costs, accumulate, tokens / packs / ranks, filling / ranks)


def measure_fit(overrides: Sequence[str], steps: int, balance: float | None) -> dict[str, float]:
    """Means over the rows of `throughput.csv` of two processes that train on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "omnitrain", "fit", *overrides, "parallel=ddp", "trainer.devices=2"),
            *(f"trainer.max_steps={steps}", "trainer.limit_val_batches=0", "evaluation.after_fit=false"),
            *(f"data.balance={'null' if balance is None else balance}", f"paths.run_dir={folder}/run"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        with open(f"{folder}/run/throughput.csv", newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    names = ("waiting", "waiting_counted", "tokens_per_second", "tflops")
    return {name: mean(row[name] for row in rows[1:]) for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of `fit`")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], metavar="N", help="4 8")
    parser.add_argument("--balance", type=float, nargs="+", default=[1.0], metavar="X", help="1")
    parser.add_argument("--packs", type=int, default=200, metavar="N", help="of each rank (200)")
    parser.add_argument("--accumulate", type=int, default=4, metavar="N", help="passes of a step (4), for *dealt*")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="of each source are measured (1000)")
    parser.add_argument("--fit", type=int, default=0, metavar="N", help="steps of two processes; 0: none (0)")
    options = parser.parse_args(argv)

    balances = [None, *options.balance]
    simulation = Simulation(options.overrides, options.samples)
    columns = ("ranks", "balance", "waiting", "by layer", "dealt", "heaviest", "tokens", "filling")
    print(" ".join(f"{name:>8}" for name in columns))
    for ranks in options.ranks:
        for balance in balances:
            row = simulation.row(ranks, options.packs, options.accumulate, balance)
            print(
                f"{ranks:>8} {balance or '-':>8} {row.waiting:>8.1%} {row.by_layer:>8.1%} {row.dealt:>8.1%} "
                f"{row.heaviest:>8.2f} {row.tokens:>8.0f} {row.filling:>8.1%}",
                flush=True,
            )
    if options.fit:
        print(f"\n2 processes, {options.fit} steps")
        print(" ".join(f"{name:>8}" for name in ("balance", "waiting", "counted", "tokens/s", "TFLOP/s")))
        for balance in balances:
            found = measure_fit(options.overrides, options.fit, balance)
            print(
                f"{balance or '-':>8} {found['waiting']:>8.1%} {found['waiting_counted']:>8.1%} "
                f"{found['tokens_per_second']:>8,.0f} {found['tflops']:>8.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

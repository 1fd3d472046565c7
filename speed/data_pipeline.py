"""The data pipeline: samples/s and packed tokens/s by workers, packing efficiency, and how long training waits for it.

    python -m speed.data_pipeline                        # a few minutes on two cores
    python -m speed.data_pipeline --workers 0 2 --batches 60 --steps 0

First table: the training stream of the embedded pack (pictures, speech, sounds, video and text, mixed, decoded, packed)
alone, nothing trained. *samples/s* and *tokens/s* are counted over `--batches` packs after a warm-up. *packing* is the
mean filling of those packs by the budget that is nearest to its end (tokens, mel frames or patches); a pack is closed
when the next samples fit into none of its budgets.

Second table: a short real `fit` of the tiny preset (`+recipe=quickstart`), each with its own number of workers. *wait*
is the share of a step that the training process spends waiting for its next batch, from the run's own `throughput.csv`.

Figures of both tables come from one run on one machine; nothing else should run on it meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import mean

TOKENS, MEL_FRAMES, PATCHES = 2048, 6000, 8192  # of a pack, as conf/data/shards.yaml


def measure_stream(pack: Path, workers: int, batches: int, warm_up: int) -> dict[str, float]:
    """Rates of the packed stream with `workers` processes (0: in this one)."""
    from omnitrain.data.datamodule import OmniDataModule
    from omnitrain.data.settings import DataConfig, SourceConfig

    data = OmniDataModule(
        DataConfig(
            sources={"pack": SourceConfig(path=pack, split="train")},
            tokenizer=str(pack / "tokenizer.json"),
            num_workers=workers,
            max_tokens=TOKENS,
            max_mel_frames=MEL_FRAMES,
            max_patches=PATCHES,
        )
    )
    data.setup("fit")
    stream = data.stream()
    try:
        for _ in islice(stream, warm_up):
            pass
        samples = tokens = 0
        filling = []
        begin = time.perf_counter()
        for batch in islice(stream, batches):
            samples += len(batch)
            tokens += batch.n_tokens
            mel = 0 if batch.mel is None else len(batch.mel)
            patches = 0 if batch.patches is None else len(batch.patches)
            filling.append(
                max(
                    batch.n_tokens / TOKENS,
                    mel / MEL_FRAMES,
                    patches / PATCHES,
                )
            )
        seconds = time.perf_counter() - begin
    finally:
        data.teardown("fit")
    return {"samples": samples / seconds, "tokens": tokens / seconds, "packing": mean(filling)}


def measure_fit(workers: int, steps: int) -> dict[str, float]:
    """Seconds per step and the share of them spent waiting, from a real run of `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "omnitrain", "fit", "+recipe=quickstart"),
            *(f"trainer.max_steps={steps}", "trainer.limit_val_batches=0", "evaluation.after_fit=false"),
            *(f"data.num_workers={workers}", f"paths.run_dir={folder}/run"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                output, _ = process.communicate()
            finally:  # an interrupted benchmark leaves no training behind
                process.terminate()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{output[-4000:]}")
        with open(f"{folder}/run/throughput.csv", newline="") as file:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    rows = rows[len(rows) // 4 :]  # while workers start and fill their buffers, training waits
    seconds = sum(row["seconds_per_step"] for row in rows)
    return {
        "seconds": seconds / len(rows),
        "tokens": sum(row["tokens_per_second"] * row["seconds_per_step"] for row in rows) / seconds,
        "wait": sum(row["data_wait"] * row["seconds_per_step"] for row in rows) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes (0 1 2)")
    parser.add_argument("--batches", type=int, default=100, help="packs measured in the first table (100)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each fit; 0: no second table (40)")
    parser.add_argument("--pack", type=Path, help="folder of shards with a tokenizer.json; default: the embedded pack")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    import omnitrain

    pack = options.pack or Path(omnitrain.__file__).parent / "pack"
    print(
        f"{os.cpu_count()} cores, {pack.name}, packs of {TOKENS} tokens, {MEL_FRAMES} mel frames, {PATCHES} patches\n"
    )
    print(f"{'workers':>7} {'samples/s':>10} {'tokens/s':>10} {'packing':>8}")
    for workers in options.workers:
        row = measure_stream(pack, workers, options.batches, warm_up=10)
        print(f"{workers:>7} {row['samples']:>10,.0f} {row['tokens']:>10,.0f} {row['packing']:>8.2%}", flush=True)
    if options.steps:
        print(f"\nfit of the tiny preset, {options.steps} steps")
        print(f"{'workers':>7} {'s/step':>10} {'tokens/s':>10} {'wait':>8}")
        for workers in options.workers:
            row = measure_fit(workers, options.steps)
            print(f"{workers:>7} {row['seconds']:>10.2f} {row['tokens']:>10,.0f} {row['wait']:>8.2%}", flush=True)


if __name__ == "__main__":
    main()

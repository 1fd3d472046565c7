"""``omnitrain plan``: what a run would take on GPUs that are not here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omnitrain.config.errors import explains_errors
from omnitrain.files import printable

if TYPE_CHECKING:
    from omnitrain.config.run_config import TrainerConfig
    from omnitrain.parallel.estimate import Estimate
    from omnitrain.runs.plan import Recipe

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)


@explains_errors
def main(argv: list[str]) -> int:
    """Print a table over meshes, the fastest that fits first. Returns the exit status: 0, or 1 with an explanation on
    stderr, also if none fits."""
    parser = argparse.ArgumentParser(
        prog="omnitrain plan",
        description="What a run of a Thinker would take on GPUs that are not here, by mesh: memory of each process, "
        "messages between them, operations, and an estimate of the step's time. The model itself does a step with "
        "numbers that have shapes and no values; docs/scale.md says what is assumed.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of `fit`: +recipe=NAME, model=NAME, ...")
    parser.add_argument("--gpu", default="H100", metavar="KIND", help="H100, H200, A100 or B200; default H100")
    parser.add_argument(
        "--gpus", type=int, nargs="+", metavar="N",
        help="how many; default trainer.devices * trainer.num_nodes, or 8 to 1024 where that is 1",
    )  # fmt: skip
    parser.add_argument("--context", type=int, nargs="+", default=[], metavar="N", help="instead of parallel.context")
    parser.add_argument("--document", type=int, default=4096, metavar="N", help="positions of each document; 4096")
    parser.add_argument("--audio", type=float, default=0.125, metavar="SHARE", help="of them, of sound; 0.125")
    parser.add_argument("--picture", type=float, default=0.125, metavar="SHARE", help="of them, of a picture; 0.125")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the table as a page, with a plot")
    options = parser.parse_args(argv)

    from omnitrain.config.compose import run_config
    from omnitrain.parallel.estimate import fastest_first
    from omnitrain.reports.plan import table_of, write_page
    from omnitrain.runs.plan import Recipe

    config = run_config(options.overrides)
    recipe = Recipe.of(config, document=options.document, audio=options.audio, picture=options.picture)
    found = fastest_first(_estimates(recipe, options, _worlds(config.trainer)))
    pack = recipe.pack
    print(
        f"a pack: {pack.tokens:,} positions in documents of {pack.document:,}, of which {pack.audio:,} are sound and "
        f"{pack.picture:,} a picture; {recipe.passes} a step; {options.gpu.upper()}, bf16-mixed"
    )
    table_of(found)
    if options.out is not None:
        write_page(found, options.out, " ".join(["python -m omnitrain plan", *argv]))
        print(printable(options.out))
    return 0 if any(estimate.fits for estimate in found) else 1


def _estimates(recipe: Recipe, options: argparse.Namespace, worlds: Sequence[int]) -> list[Estimate]:
    from omnitrain.parallel.gpus import gpu
    from omnitrain.runs.plan import meshes, rehearse

    found, kind = [], gpu(options.gpu)
    for sizes in meshes(recipe, options.gpus or worlds, options.context):
        print(f"rehearsing on {sizes}", file=sys.stderr, flush=True)
        found.append(rehearse(recipe, sizes, kind))
    return found


def _worlds(trainer: TrainerConfig) -> Sequence[int]:
    devices = trainer.devices
    here = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return [here * trainer.num_nodes] if here * trainer.num_nodes > 1 else WORLDS

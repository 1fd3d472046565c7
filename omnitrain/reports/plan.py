"""A plan as a table, and as a page with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omnitrain.evaluation.progress import number_table, wide_console
from omnitrain.files import write_text
from omnitrain.parallel.estimate import Estimate
from omnitrain.parallel.gpus import REACHED
from omnitrain.parallel.ledger import COLLECTIVES, KINDS
from omnitrain.reports import figures
from omnitrain.reports.run import templates

UNITS = (
    "Mesh: data x shard x context. GB of each process at its peak, and of that what for. Number and GB of each kind of "
    "message of a step. Operations of each process as they run, 1e12. Seconds: of computing, of gathering (meanwhile), "
    "of exchanging (waited for), of a step. Positions per second, and 1e12 operations per second that the equations "
    "ask for, of each GPU"
)
MEMORY = ("fits", "peak", *KINDS, "step s", "tok/s/GPU", "TFLOP/s")
MESSAGES = (*COLLECTIVES, "operations", "compute", "gather", "exchange")


def cells(estimate: Estimate) -> dict[str, str]:
    """A row, by column; in the units of `UNITS`."""
    sizes = estimate.sizes
    row = {
        "GPUs": f"{sizes.world}",
        "mesh": " x ".join(str(n) for n in (sizes.data, sizes.shard, sizes.context)),
        "expert": f"{sizes.expert}",
        "fits": "yes" if estimate.fits else "no",
        "peak": _giga(estimate.peak),
    }
    row |= {kind: _giga(estimate.memory.get(kind, 0)) for kind in KINDS}
    for collective in COLLECTIVES:
        number, size = estimate.of(collective)
        row[collective] = f"{number:,} / {_giga(size)}" if number else "–"
    times = (estimate.compute, estimate.gathering, estimate.exchanging, estimate.seconds)
    row |= {"operations": f"{estimate.operations / 1e12:,.0f}"}
    row |= {name: f"{t:.2f}" for name, t in zip(("compute", "gather", "exchange", "step s"), times, strict=True)}
    return row | {"tok/s/GPU": f"{estimate.tokens_per_second:,.0f}", "TFLOP/s": f"{estimate.rate / 1e12:,.0f}"}


def table_of(estimates: Sequence[Estimate]) -> None:
    """Print them, in their order, in two tables: memory with speed, and messages with times."""
    rows = [cells(estimate) for estimate in estimates]
    mesh = ["GPUs", "mesh", "expert"]
    titles = ("memory, GB of each process", "messages (number / GB), 1e12 operations, seconds")
    for title, columns in zip(titles, (MEMORY, MESSAGES), strict=True):
        table = number_table(title, numbers=[*mesh, *columns])
        for row in rows:
            table.add_row(*(row[column] for column in [*mesh, *columns]))
        wide_console().print(table)


def write_page(estimates: Sequence[Estimate], out: Path, command: str) -> Path:
    """Write the page of `estimates`, in their order, which `command` has made."""
    page = templates().get_template("plan.html.j2")
    rows = [cells(estimate) for estimate in estimates]
    text = page.render(
        name=f"Plan: {estimates[0].gpu.name}", rows=rows, units=UNITS, command=command, reached=REACHED,
        gpu=estimates[0].gpu, plot=figures.plan(estimates), fits=[estimate.fits for estimate in estimates],
    )  # fmt: skip
    write_text(out, text)
    return out


def _giga(size: float) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.3f}"

"""``omnitrain report``: one HTML file about a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Write the report of a run. Returns the exit status: 0, or 1 with an explanation on stderr."""
    parser = argparse.ArgumentParser(
        prog="omnitrain report",
        description="Write one self-contained HTML file about a run: scores, learning curves, samples, data, speed.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of the run (paths.run_dir)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write; default: RUN_DIR/report.html")
    options = parser.parse_args(argv)

    from omnitrain.evaluation.report import read_run, write_report

    try:
        run = read_run(options.run_dir)
        path = write_report(run, options.out)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for part in run.missing:
        print(f"missing: {part.part} ({part.file}): {part.fix}", file=sys.stderr)
    print(path)
    return 0

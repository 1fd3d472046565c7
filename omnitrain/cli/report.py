"""``omnitrain report``: one HTML file about a run, about several side by side, or about a study."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omnitrain.config.errors import explains_errors
from omnitrain.files import printable


@explains_errors
def main(argv: list[str]) -> int:
    """Write a report. Returns the exit status: 0, or 1 with an explanation on stderr."""
    parser = argparse.ArgumentParser(
        prog="omnitrain report",
        description="Write one self-contained HTML file about a run (scores, learning curves, samples, data, speed), "
        "about several runs side by side, or about a non-degradation study.",
    )
    parser.add_argument("run_dir", type=Path, nargs="*", metavar="RUN_DIR", help="folder of a run (paths.run_dir)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write; default: report.html in RUN_DIR or the study's folder"
    )
    parser.add_argument(
        "--study", type=Path, metavar="DIR", help="folder of a study (paths.study_dir); table.md goes beside the page"
    )
    parser.add_argument(
        "--collect", type=Path, metavar="DIR", help="with --study: its scores as a few small files, the page with them"
    )
    options = parser.parse_args(argv)
    if (options.study is None) == (not options.run_dir):
        parser.error("give the folder of a run, those of several, or --study DIR")
    if options.collect is not None and options.study is None:
        parser.error("--collect is for a study: add --study DIR")
    if len(options.run_dir) > 1 and options.out is None:
        parser.error("several runs side by side need --out FILE")

    if options.study is not None:
        from omnitrain.study.report import missing_runs, write_study_report

        path, study = write_study_report(options.study, options.out, collect=options.collect)
        missing = missing_runs(study)
    elif len(options.run_dir) > 1:
        from omnitrain.reports.comparison import write_comparison

        path, missing = write_comparison(options.run_dir, options.out)
    else:
        path, missing = _run(options.run_dir[0], options.out)
    for line in missing:
        print(f"missing: {printable(line)}", file=sys.stderr)
    print(printable(path))
    return 0


def _run(run_dir: Path, out: Path | None) -> tuple[Path, list[str]]:
    """The page about a run, or about all stages of one; its path and what is missing in it."""
    from omnitrain.reports.run import read_run, write_report
    from omnitrain.runs import chain as stages

    staged = stages.stages_of(run_dir)
    if staged is not None:
        return stages.write_report(staged, run_dir, out)
    run = read_run(run_dir)
    return write_report(run, out), [str(part) for part in run.missing]

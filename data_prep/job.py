"""What every script of this package shares: arguments, running once only, the record it leaves, the table it prints.

A finished folder holds its shards and `source.json`: the script, its options, the packages with versions and
licences, and the counts. A second run with the same options finds that record and does nothing (`--force` makes it
run again).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.fetch import Opened, Package, fetch_all
from omnitrain.data.sample import SPLITS, Sample
from omnitrain.files import read_json, write_json

RECORD = "source.json"


@dataclass
class Counts:
    """Rows by (modality, task, split) and by (language of the answer, modality), and what was left out and why."""

    rows: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    languages: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def watch(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Count `samples` as they pass."""
        for sample in samples:
            self.rows[sample.modality, sample.task, sample.split] += 1
            if sample.languages:
                self.languages[sample.languages[-1], sample.modality] += 1
            yield sample

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": [[*key, count] for key, count in sorted(self.rows.items())],
            "languages": [[*key, count] for key, count in sorted(self.languages.items())],
            "left_out": dict(sorted(self.left_out.items())),
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> Counts:
        return Counts(
            rows=Counter({(modality, task, split): count for modality, task, split, count in record["rows"]}),
            languages=Counter({(language, modality): count for language, modality, count in record["languages"]}),
            left_out=Counter(record["left_out"]),
        )


def print_counts(counts: Counts, console: Console | None = None, languages: int = 20) -> None:
    """Print rows per modality, task and split, and per language of the answer (the `languages` largest)."""
    console = console or Console(width=110)
    table = Table(title="rows per modality and task", title_justify="left")
    for name in ("modality", "task"):
        table.add_column(name)
    for name in (*SPLITS, "all"):
        table.add_column(name, justify="right")
    groups = sorted({(modality, task) for modality, task, _ in counts.rows})
    for modality, task in groups:
        numbers = [counts.rows[modality, task, split] for split in SPLITS]
        table.add_row(modality, task, *(f"{n:,}" for n in (*numbers, sum(numbers))))
    totals = [sum(n for (_, _, s), n in counts.rows.items() if s == split) for split in SPLITS]
    table.add_row("all", "", *(f"{n:,}" for n in (*totals, sum(totals))), style="bold")
    console.print(table)

    modalities = sorted({modality for _, modality in counts.languages})
    table = Table(title="rows per language of the answer", title_justify="left")
    table.add_column("language")
    for name in (*modalities, "all"):
        table.add_column(name, justify="right")
    per_language: Counter[str] = Counter()
    for (language, _), count in counts.languages.items():
        per_language[language] += count
    ranked = sorted(per_language, key=lambda language: (-per_language[language], language))
    for language in ranked[:languages]:
        numbers = [counts.languages[language, modality] for modality in modalities]
        table.add_row(language, *(f"{n:,}" for n in (*numbers, per_language[language])))
    console.print(table)
    if len(ranked) > languages:
        console.print(f"and {len(ranked) - languages} more languages: {', '.join(ranked[languages:])}")
    for reason, count in counts.left_out.items():
        console.print(f"left out: {count:,} {reason}")


def add_without(parser: argparse.ArgumentParser) -> None:
    """`--without`."""
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="FILE",
        help="lists by data_prep.check_speech (misfits.json): leave out these recordings",
    )


def misfits_by_recording(files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What these lists say of each recording, by its name in the media table. Raises ValueError: a file that is no such
    list."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            found |= {misfit["recording"]: misfit for misfit in read_json(file)}
        except (TypeError, KeyError) as error:
            raise ValueError(f"--without {file} is no list by data_prep.check_speech") from error
    return found


def read_misfits(files: Iterable[str]) -> frozenset[str]:
    """The recordings that these lists name. Errors as `misfits_by_recording`."""
    return frozenset(misfits_by_recording(files))


Build = Callable[[dict[str, Opened], argparse.Namespace, Counts], None]


def run(
    argv: list[str] | None,
    *,
    name: str,
    description: str,
    packages: Callable[[argparse.Namespace], list[Package]] | list[Package],
    build: Build,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    default_out: str | None = None,
) -> int:
    """The whole of a script: parse, stop if done already, fetch, build, print, record. Returns the exit status.

    `build(opened, options, counts)` writes shards into `options.out`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m data_prep.{name}", description=description)
    parser.add_argument("--out", type=Path, default=Path(default_out or f"data/{name}"), help="folder for the shards")
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="[PACKAGE=]PATH",
        help="use this archive or unpacked folder instead of downloading; may be repeated",
    )
    parser.add_argument("--cache", type=Path, default=Path("data/packages"), help="folder for downloaded packages")
    parser.add_argument("--force", action="store_true", help="run again even if the folder is complete")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    add_options(parser)
    options = parser.parse_args(argv)
    console = Console(width=110)

    asked = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in sorted(vars(options).items())
        if key not in ("out", "cache", "force", "progress", "source")
    }
    record_path = options.out / RECORD
    if record_path.is_file() and not options.force:
        record = json.loads(record_path.read_text())
        if record["script"] == name and record["options"] == asked:
            console.print(f"{options.out} is complete ({record_path}); --force makes it again.")
            print_counts(Counts.from_json(record["counts"]), console)
            return 0
        console.print(f"{options.out} was made with other options; making it again.")
    record_path.unlink(missing_ok=True)

    wanted = packages if isinstance(packages, list) else packages(options)
    try:
        opened = fetch_all(wanted, options.cache, _sources(options.source, wanted))
        counts = Counts()
        build(opened, options, counts)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    record = {
        "script": name,
        "options": asked,
        "packages": [
            {"name": o.package.name, "manager": o.package.manager, "version": o.version, "licence": o.package.licence}
            for o in opened.values()
        ],
        "counts": counts.to_json(),
    }
    write_json(record_path, record)
    print_counts(counts, console)
    for o in opened.values():
        console.print(f"{o.package.name} {o.version}: licence {o.package.licence}", markup=False)
    size = sum(path.stat().st_size for path in options.out.glob("*.parquet"))
    console.print(f"wrote {options.out} ({size / 1e6:.1f} MB of Parquet)")
    return 0


def _sources(given: list[str], packages: list[Package]) -> dict[str, Path]:
    """`PACKAGE=PATH` entries; a plain PATH is that of the only package, or of the one with the longest name that its
    file name begins with."""
    sources: dict[str, Path] = {}
    for entry in given:
        name, _, path = entry.rpartition("=")
        if not name:
            fitting = [p.name for p in packages if len(packages) == 1 or Path(path).name.startswith(p.name)]
            if not fitting:
                raise ValueError(f"--source {entry}: say which package it is: --source PACKAGE={entry}")
            name = max(fitting, key=len)
        sources[name] = Path(path)
    return sources

"""What is shown on a terminal: the bar of everything that is scored sample by sample, and tables of numbers."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from omnitrain.files import printable


def progress_bar(shown: bool, plain: str = "") -> Progress:
    """A progress bar on the standard error. Where that is no terminal, `plain` is printed instead, once."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), disable=not shown,
    )  # fmt: skip
    if shown and plain and not bar.console.is_terminal:
        bar.console.print(plain)
    return bar


def wide_console() -> Console:
    """The standard output, with room for a table of 140 columns where it is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


def number_table(title: str, *texts: Column | str, numbers: Iterable[Text | str]) -> Table:
    """A table with columns of `texts`, then of `numbers`."""
    columns = [Column(name, justify="right") for name in numbers]
    return Table(*texts, *columns, title=Text(printable(title)), title_justify="left")

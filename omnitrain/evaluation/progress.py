"""The bar of everything that is scored sample by sample."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress_bar(shown: bool, plain: str = "") -> Progress:
    """A progress bar on the standard error. Where that is no terminal, `plain` is printed instead, once."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), disable=not shown,
    )  # fmt: skip
    if shown and plain and not bar.console.is_terminal:
        bar.console.print(plain)
    return bar

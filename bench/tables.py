"""What the benchmark prints: tables of at most 80 columns on a terminal, tab-separated lines in a pipe or file."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

NAME_WIDTH = 24  # longer names are folded


def show(console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], total: int = 0) -> None:
    """Prints `rows` under `header`: first a column of names, then numbers; the last `total` rows are sums."""
    if not console.is_terminal:
        console.file.write("\n".join([f"# {title}", *("\t".join(row) for row in (header, *rows)), ""]))
        return
    console.print(f"\n{title}", style="bold", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in header:
        names = heading == header[0]
        short = names and all(len(row[0]) <= NAME_WIDTH for row in rows)
        table.add_column(heading, justify="left" if names else "right", no_wrap=short, overflow="fold")
    for at, row in enumerate(rows):
        if total and at == len(rows) - total:
            table.add_section()
        table.add_row(*row)
    console.print(table, markup=False)


def progress() -> Progress:
    """A bar on stderr, so that a pipe gets results only; tasks have the field `left`."""
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    texts = (TextColumn("{task.description}"), TextColumn("{task.fields[left]}"))
    return Progress(*columns, *texts, console=Console(stderr=True))

"""What the commands print: a table for people on a terminal, tab-separated lines in a pipe or file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from rich.text import Text

NO_STYLES: Mapping[str, str] = MappingProxyType({})


def shown(text: object) -> str:
    """`text` on one line, as it is but for what would act on a terminal: control characters
    and parts of broken UTF-8 are escaped as in JSON.
    """
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in str(text))


def print_table(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[object]], styles: Mapping[str, str] = NO_STYLES
) -> None:
    """Prints `rows`; on a terminal, cells that begin with a key of `styles` have its style. No cell is markup,
    none is cut in a pipe. `header` may be empty.
    """
    cells = [[shown(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        encoding = getattr(console.file, "encoding", None) or "utf-8"
        for row in [[*header], *cells] if header else cells:
            line = "\t".join(row) + "\n"
            console.file.write(line.encode(encoding, "backslashreplace").decode(encoding))
        return
    table = Table(*header, show_header=bool(header))
    for row in cells:
        style = (next((s for start, s in styles.items() if cell.startswith(start)), "") for cell in row)
        table.add_row(*(Text(cell, style=s) for cell, s in zip(row, style, strict=True)))
    console.print(table)

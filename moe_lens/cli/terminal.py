"""Stdout: one compact table, sentences, JSON, and numbers as people read them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 100
"""Columns when stdout is no terminal."""
SHORT_TEXT, LEAST_TEXT = 18, 6
"""Cells to which a column of text is cut before columns are left out, and after."""


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; what is not a number becomes null."""
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def console() -> Console:
    """Stdout: as wide as the terminal, and `WIDTH` where there is none."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDTH)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, note: str = "") -> None:
    """A borderless table, one line a row, no wider than the terminal.

    Args:
        columns: names; ``>`` before one aligns it right, ``=`` keeps its text from being cut, and ``~`` before either
            lets a narrow terminal leave it out.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console()
    if title:
        out.print(Text("\n" + title, style="bold"))
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    layout = fitted(columns, cells, out.width)
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, layout.gap - 1, 0, 0))
    for at, width in layout.widths.items():
        name = columns[at].lstrip("~")
        side = "right" if name.startswith(">") else "left"
        grid.add_column(name.lstrip(">="), justify=side, width=width, no_wrap=True, overflow="ellipsis")
    for row in cells:
        grid.add_row(*(Text(row[at], no_wrap=True, overflow="ellipsis") for at in layout.widths))
    out.print(grid)
    if note:
        out.print(Text(note, style="dim"))


class Layout(NamedTuple):
    """Columns that fit: width by number, and blanks between them."""

    widths: dict[int, int]
    gap: int


def fitted(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> Layout:
    """Closer columns, then shorter text, then fewer columns, until the table is no wider than `width`.

    Numbers are never cut while a column marked ``~`` or text of more than `LEAST_TEXT` cells is left to give way.
    """
    from rich.cells import cell_len

    widths = {
        at: max(cell_len(text) for text in (name.lstrip("~>="), *(row[at] for row in cells)))
        for at, name in enumerate(columns)
    }

    def excess(gap: int) -> int:
        return sum(widths.values()) + gap * (len(widths) - 1) - width

    def shorten(least: int) -> None:
        while excess(1) > 0:
            text = [at for at in widths if columns[at].lstrip("~")[:1] not in (">", "=") and widths[at] > least]
            if not text:
                return
            widths[max(text, key=lambda at: widths[at])] -= 1

    shorten(SHORT_TEXT)
    optional = [at for at, name in enumerate(columns) if name.startswith("~")]
    while excess(1) > 0 and optional:
        del widths[optional.pop()]
    shorten(LEAST_TEXT)
    return Layout(widths, 2 if excess(2) <= 0 else 1)


def printable(text: str) -> str:
    """Text whose control characters, which a terminal would obey, are spelled out; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def say(*sentences: str) -> None:
    """What was found, broken between words at the width of the tables; several sentences as a list."""
    from rich.text import Text

    out = console()
    out.print()
    first, others = ("- ", "  ") if len(sentences) > 1 else ("", "")
    for sentence in sentences:
        for at, line in enumerate(Text(printable(sentence)).wrap(out, out.width - len(first))):
            out.print(Text(others if at else first) + line)


def aside(*remarks: str) -> None:
    """A dim line for what is elsewhere; empty remarks are left out."""
    from rich.text import Text

    if said := "; ".join(remark for remark in remarks if remark):
        console().print(Text(said, style="dim"))


def more_tables(n: int) -> str:
    """How to see the rest."""
    return f"--details prints {n} more table{'s' if n > 1 else ''}"


def number(value: Any, digits: int = 3) -> str:
    """A number without a leading zero, ``-`` where there is none."""
    if value is None or not math.isfinite(float(value)):
        return "-"
    return f"{float(value):.{digits}f}".replace("0.", ".", 1) if abs(float(value)) < 1 else f"{float(value):.{digits}f}"


def count(value: float) -> str:
    """``1.28B``, ``64.2M``, ``512``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def size(n_bytes: float) -> str:
    """``1.5 MB``, powers of 1000."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= 0.9995 * limit:
            return f"{n_bytes / limit:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def measured(value: float | None) -> str:
    """A count or a small error: ``0``, ``3``, ``4.2e-07``."""
    return "-" if value is None else f"{value:.2g}"


def interval(low: Any, high: Any, *, digits: int = 3) -> str:
    """``[.01, .05]``, ``-`` without one."""
    return "-" if number(low) == "-" else f"[{number(low, digits)}, {number(high, digits)}]"


def span(layers: Sequence[int]) -> str:
    gapless = len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if gapless else ",".join(map(str, layers))

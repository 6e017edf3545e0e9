"""An expert's card in a terminal: facts, then exemplars one under the other with their tokens aligned."""

from __future__ import annotations

import unicodedata
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_lens.capture.shading import Mark, pieces, routed_spans
from moe_lens.cli.terminal import WIDTH, number

if TYPE_CHECKING:
    from moe_lens.capture.card import ExpertCard

_PALE, _STRONG = (255, 240, 200), (255, 120, 0)
_NOT_ROUTED = "bold black on rgb(200,200,200)"
_SCORE_WIDTH = 8
_BEFORE = 0.45
"""Share of the columns that is left of the focal token, so that tokens stand in one column."""
Characters = list[tuple[str, Mark]]


def card(found: ExpertCard) -> None:
    """Print one card. Where there are no colours, the focal token stands in ``[[ ]]``."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    coloured = console.is_terminal and not console.no_color and console.color_system is not None
    token = "shaded by score" if coloured else "in [[ ]]"
    legend = f"   the token {token}; underlined: other tokens that the expert got" if console.is_terminal else ""
    console.print(Text.assemble((f"\n{found.address}", "bold"), (legend, "dim")))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in found.facts():
        facts.add_row(Text(name), Text(text, style="bold" if name == "label" else ""))
    console.print(facts)
    for name, rows in found.groups.items():
        console.print(Text(f"\n{name}", style="dim"))
        for row in rows.itertuples():
            console.print(line(row, found.largest_score, console.width, coloured=coloured), no_wrap=True, crop=True)


def line(row: Any, largest: float, width: int, *, coloured: bool) -> Text:
    """One exemplar: its score, and as much of its context as fits on a line around the focal token."""
    score = number(row.score, 3 if abs(row.score) < 1 else 1) if row.routed else ""
    text = Text(no_wrap=True)
    text.append(f"{score:>{_SCORE_WIDTH - 2}}  ", style="dim")
    before, focal, after = _around(row)
    room = max(width - _SCORE_WIDTH - (0 if coloured else 4), 8)
    focal = clip(focal, room // 2)
    left = round(room * _BEFORE)
    before = clip(before, left, from_end=True)
    after = clip(after, room - left - _cells(focal))
    text.append(" " * (left - _cells(before)))
    _append(text, before)
    shown = "".join(character for character, _ in focal)
    text.append(shown if coloured else f"[[{shown}]]", style=_shade(row, largest) if coloured else "")
    _append(text, after)
    return text


def _around(row: Any) -> tuple[Characters, Characters, Characters]:
    """Characters before the focal token, its own, and those after it."""
    cut = pieces(row.text, row.char_start, row.char_end, routed_spans(row))
    at = next(i for i, piece in enumerate(cut) if piece.mark is Mark.FOCAL)
    parts = (cut[:at], cut[at : at + 1], cut[at + 1 :])
    return tuple([(c, piece.mark) for piece in part for c in piece.text] for part in parts)  # pyright: ignore


def clip(characters: Characters, width: int, *, from_end: bool = False) -> Characters:
    """The first characters that fill at most `width` columns, or the last; ``…`` stands for what is left out."""
    if _cells(characters) <= width:
        return characters
    kept: Characters = []
    used = 1
    for character in reversed(characters) if from_end else characters:
        if used + cell_len(character[0]) > width:
            break
        used += cell_len(character[0])
        kept.append(character)
    if from_end:
        while kept and unicodedata.combining(kept[-1][0]):  # an accent whose letter was cut off
            kept.pop()
        return [("…", Mark.PLAIN), *reversed(kept)] if width else []
    return [*kept, ("…", Mark.PLAIN)] if width else []


def _cells(characters: Characters) -> int:
    return cell_len("".join(character for character, _ in characters))


def _append(text: Text, characters: Characters) -> None:
    for mark, group in groupby(characters, key=lambda pair: pair[1]):
        text.append("".join(character for character, _ in group), style="underline" if mark is Mark.ROUTED else "")


def _shade(row: Any, largest: float) -> str:
    if not row.routed:
        return _NOT_ROUTED
    share = row.score / largest if largest > 0 else 0.0
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_PALE, _STRONG, strict=True))
    return f"black on rgb({red},{green},{blue})"

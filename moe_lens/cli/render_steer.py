"""What ``moe-lens steer`` shows on stdout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from moe_lens.cli.render import WIDTH, number, table
from moe_lens.plots import signed

if TYPE_CHECKING:
    from moe_lens.causal.steering.result import Steering

N_SHOWN = 5
"""Prompts whose texts are printed."""
PROMPT_END = 60
"""Characters of a prompt that its title shows, the last ones."""


def steering(found: Steering) -> None:
    """Texts side by side, one line per arm, and what was found."""
    texts(found)
    arms(found)
    typer.echo("")
    typer.echo(found.finding())


def texts(found: Steering) -> None:
    """What the clean model, the steered one and the first control wrote."""
    shown = found.side_by_side
    prompts = found.settings["prompts"]
    for at, prompt in enumerate(prompts[:N_SHOWN]):
        end = printable(prompt).replace("\n", " ")
        end = end if len(end) <= PROMPT_END else "…" + end[1 - PROMPT_END :]
        beside(f"after {end!r}", shown.values(), [printable(found.text(at, arm)) for arm in shown])
    if len(prompts) > N_SHOWN:
        typer.echo(f"{len(prompts) - N_SHOWN} more prompts; -o DIR keeps all texts in steering.parquet")


def beside(title: str, names: Iterable[str], written: Sequence[str]) -> None:
    """Texts in columns; a text without blanks is folded, never cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(Text("\n" + title, style="bold"))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        grid.add_column(Text(name), overflow="fold")
    grid.add_row(*map(Text, written))
    console.print(grid)


def arms(found: Steering) -> None:
    """Experts, strength, KL and score of every arm."""
    scored = found.is_scored
    rows = []
    for row in found.summary().to_dict("records"):
        is_clean = not row["address"]
        strength = "-" if is_clean else "full" if math.isinf(row["strength"]) else f"{row['strength']:.2f}"
        load = "-" if is_clean else f"{row['load']:.1%}"
        kl = f"{row['kl']:.2g}" + ("" if row["reached"] else " *")
        cells = [row["arm"], row["address"] or "-", load, strength, kl]
        cells += ["-" if is_clean else str(row["changed"])]
        cells += [number(row["score"]), "-" if is_clean else signed(row["change"])] if scored else []
        rows.append(cells)
    note = (
        "tokens: share of the clean texts that visits an expert; bias: largest change of a router logit, full: never "
    )
    note += "chosen, or always"
    if "*" in "".join(cell for cells in rows for cell in cells):
        note += "; * not the KL that was sought"
    columns = [
        "arm",
        "experts",
        ">tokens",
        ">bias",
        ">KL",
        ">texts changed",
        *([">score", ">change"] if scored else []),
    ]
    table("Arms", columns, rows, note=note)


def printable(text: str) -> str:
    """Text whose control characters, which a terminal would obey, are spelled out; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plan(predicted: dict[str, Any]) -> None:
    """What a run would take."""
    p = predicted
    plural = "s" if p["prompts"] > 1 else ""
    typer.echo(
        f"{p['model']}: {p['prompts']} prompt{plural} x {len(p['arms'])} arms = {p['texts']} texts of up to "
        f"{p['max_new_tokens']} tokens; the clean texts are read at most {p['measurements']} times to find how strong "
        "each push must be, and a few times more where other experts join a control"
    )

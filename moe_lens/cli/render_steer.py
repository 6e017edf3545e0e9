"""What ``moe-lens steer`` shows on stdout."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moe_lens.cli.terminal import aside, console, more_tables, number, printable, say, table
from moe_lens.plots import signed

if TYPE_CHECKING:
    from moe_lens.causal.steering.result import Steering

N_SHOWN = 5
"""Prompts whose texts are printed."""
PROMPT_END = 60
"""Characters of a prompt that its title shows, the last ones."""


def steering(found: Steering, *, details: bool = False) -> None:
    """Texts side by side and what was found; with details also one line per arm."""
    texts(found)
    if details:
        arms(found)
    say(found.finding())
    aside("" if details else more_tables(1))


def texts(found: Steering) -> None:
    """What the clean model, the steered one and the first control wrote; a text without blanks is folded, never cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown, prompts = found.side_by_side, found.settings["prompts"]
    out = console()
    out.print(Text("\nWhat was written", style="bold"))
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("after", *shown.values()):
        grid.add_column(Text(name), overflow="fold", ratio=1)
    for at, prompt in enumerate(prompts[:N_SHOWN]):
        end = printable(prompt).replace("\n", " ")
        end = end if len(end) <= PROMPT_END else "…" + end[1 - PROMPT_END :]
        written = [printable(found.text(at, arm)) for arm in shown]
        grid.add_row(*(Text(text) for text in (repr(end), *written)), end_section=at < len(prompts) - 1)
    out.print(grid)
    if len(prompts) > N_SHOWN:
        aside(f"{len(prompts) - N_SHOWN} more prompts; -o DIR keeps all texts in steering.parquet")


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


def plan(predicted: dict[str, Any]) -> None:
    """What a run would take."""
    p = predicted
    plural = "s" if p["prompts"] > 1 else ""
    say(
        f"{p['model']}: {p['prompts']} prompt{plural} x {len(p['arms'])} arms = {p['texts']} texts of up to "
        f"{p['max_new_tokens']} tokens; the clean texts are read at most {p['measurements']} times to find how strong "
        "each push must be, and a few times more where other experts join a control"
    )

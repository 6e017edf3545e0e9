"""``moe-lens show L7.E12 -o DIR``: what a run says about an expert, with its exemplars shaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_lens.cli.ls import find_runs
from moe_lens.cli.options import Json, Verbose
from moe_lens.types import ExpertAddress


def show(
    experts: Annotated[list[str], typer.Argument(help="such as L7.E12 or 7:12", metavar="EXPERT...")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="the run, or a folder of runs: then the newest", metavar="DIR")
    ] = Path("runs"),
    n: Annotated[int, typer.Option("--n", min=1, help="exemplars in each part", metavar="N")] = 8,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Routing, label with scores, promoted tokens and best neurons of experts, and the tokens they got.

    Tokens are shaded by router weight times norm of the expert's output, other tokens of the context that the expert
    got are underlined. Without colours the token stands in [[ ]].
    """
    from moe_lens.capture.run import open_run
    from moe_lens.cli import render_card, terminal

    run = open_run(newest(output))
    cards = [run.card(address, n=n) for address in dict.fromkeys(map(ExpertAddress.parse, experts))]
    if json:
        terminal.print_json({"directory": str(run.path), "experts": [card.summary() for card in cards]})
        return
    for card in cards:
        render_card.card(card)
    typer.echo(str(run.path))


def newest(directory: Path) -> Path:
    """The directory if it is a run, else the newest run in it that has exemplars, else the newest.

    Raises:
        BadOutput: there is no run.
    """
    runs = find_runs(directory)
    return next((path for path in runs if (path / "exemplars.parquet").exists()), runs[0])

"""``moe-lens report DIR`` and ``moe-lens verify DIR``: a run as one page, and the check of its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_lens.cli.options import Json, Verbose

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="run directory, or a folder of runs: then the newest")]


def report(
    directory: Directory = Path("runs"),
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="where to write it (report.html in the run)")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a run as one HTML file that works offline: findings, routing, probing, experts, trials, provenance.

    Parts that the run does not have are left out, with the command that would add them.
    """
    import moe_lens
    from moe_lens.cli import terminal
    from moe_lens.cli.show import newest

    path = moe_lens.report(newest(directory), out=out)
    terminal.print_json({"report": str(path), "bytes": path.stat().st_size}) if json else typer.echo(str(path))


def verify(directory: Directory = Path("runs"), json: Json = False, verbose: Verbose = False) -> None:
    """Rehash the tables of a run, and take every number that its report quotes from them again."""
    from moe_lens.cli import terminal
    from moe_lens.cli.show import newest
    from moe_lens.report.verify import verify as check

    run = newest(directory)
    found = check(run)
    if json:
        terminal.print_json({"directory": str(run), **found.to_dict()})
    else:
        typer.echo(found.finding())
        for problem in found.problems[1:]:
            typer.echo(f"  {problem}")
        typer.echo(str(run))
    if not found.is_ok:
        raise typer.Exit(1)

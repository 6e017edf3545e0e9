"""``moe-lens report DIR`` and ``moe-lens verify DIR``: a run as one page, and the check of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_lens.cli.options import Json, Verbose

if TYPE_CHECKING:
    from moe_lens.report.parts import Section

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
    from moe_lens.capture.run import open_run
    from moe_lens.cli import terminal
    from moe_lens.cli.show import newest
    from moe_lens.report.page import sections_of

    run = newest(directory)
    sections = sections_of(open_run(run))
    path = moe_lens.report(run, out=out, sections=sections)
    found = contents(sections)
    if json:
        terminal.print_json({"report": str(path), "bytes": path.stat().st_size, "sections": found})
        return
    rows = [[str(row["section"]), str(row["figures"]), str(row["tables"]), str(row["missing"] or "")] for row in found]
    terminal.table("", ["=section", ">figures", ">tables", "not in this run; what adds it"], rows)
    n = sum(bool(row["missing"]) for row in found)
    left = f", and {n} say which command adds what is missing" if n else ""
    terminal.say(f"{len(found)} sections in {terminal.size(path.stat().st_size)}{left}.")
    typer.echo(str(path))


def contents(sections: Sequence[Section]) -> list[dict[str, object]]:
    """For each section of the report its figures, its tables, and the first command for what it lacks."""
    from moe_lens.report.parts import Answers, Missing, Unanswered

    found = []
    for section in sections:
        kinds = [part.kind for part in section.parts]
        lacks = [part.command for part in section.parts if isinstance(part, Missing)]
        lacks += [one.command for part in section.parts if isinstance(part, Answers) for one in part.answers
                  if isinstance(one, Unanswered)]  # fmt: skip
        found.append({"section": section.title, "figures": kinds.count("figure"), "tables": kinds.count("table"),
                      "missing": lacks[0] if lacks else None})  # fmt: skip
    return found


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

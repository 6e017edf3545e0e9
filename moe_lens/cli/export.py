"""``moe-lens export DIR --to FORMAT``: a run as a folder that is ready to be pushed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_lens.cli.options import Json, Verbose
from moe_lens.cli.report import Directory

N_SHOWN = 20
"""Files that are listed."""


def export(
    directory: Directory = Path("runs"),
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="csv, hub-dataset or neuronpedia")] = "csv",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FOLDER", help="where to write it (export-FORMAT in the run)")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a run as CSV files, as a Hugging Face data set with its card, or as Neuronpedia's bulk import."""
    from moe_lens.cli import terminal
    from moe_lens.cli.show import newest
    from moe_lens.report.export import export as write

    folder = write(newest(directory), to=to, out=out)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if json:
        terminal.print_json({"folder": str(folder), "format": to, "files": files})
        return
    sizes = {name: (folder / name).stat().st_size for name in files}
    rows = [[name, terminal.size(n)] for name, n in list(sizes.items())[:N_SHOWN]]
    more = f"and {len(files) - len(rows)} more files" if len(files) > len(rows) else ""
    terminal.table("", ["file", ">size"], rows, note=more)
    terminal.say(f"{len(files)} files of {terminal.size(sum(sizes.values()))}; README.md says how to push them.")
    typer.echo(str(folder))

"""``moe-lens ls DIR``: what a run directory holds, or which runs a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_lens.cli.options import Json, Verbose
from moe_lens.errors import BadOutput

MANIFEST = "manifest.json"


def ls(
    directory: Annotated[Path, typer.Argument(help="a run directory, or a folder of runs", metavar="DIR")] = Path(
        "runs"
    ),
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Tables of a run with rows and sizes, its model, state and time; or the runs in a folder."""
    from moe_lens.cli import render, terminal

    runs = [describe(path) for path in find_runs(directory)]
    if json:
        terminal.print_json({"directory": str(directory), "runs": runs})
    elif (directory / MANIFEST).exists():
        render.run_tables(runs[0])
        typer.echo(str(directory))
    else:
        render.runs(runs)
        typer.echo(str(directory))


def find_runs(directory: Path) -> list[Path]:
    """The directory itself if it is a run, else the runs directly inside it, newest first.

    Raises:
        BadOutput: there is no run.
    """
    if (directory / MANIFEST).exists():
        return [directory]
    if not directory.is_dir():
        raise BadOutput(f"{directory} is no folder: give the folder that a command wrote with -o, or one of runs")
    found = sorted(directory.glob(f"*/{MANIFEST}"), key=lambda p: p.stat().st_mtime, reverse=True)
    if not found:
        raise BadOutput(f"{directory} holds no run: write one with moe-lens probe ... -o {directory / 'first'}")
    return [path.parent for path in found]


def describe(path: Path) -> dict[str, Any]:
    """One run: model, baseline, corpus, seed, state, time, and every table with rows and bytes.

    Reads the parquet footers, never the tables.

    Raises:
        BadOutput: the manifest is damaged.
    """
    import json

    import pyarrow.parquet as pq

    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadOutput(f"{path / MANIFEST} cannot be read: delete the folder, or give another one") from error
    tables = []
    for file in sorted(path.glob("*.parquet")):
        try:
            rows = pq.read_metadata(file).num_rows
        except (ValueError, OSError):  # a damaged file is listed too: pyarrow's errors are either
            rows = None
        tables.append({"table": file.stem, "rows": rows, "bytes": file.stat().st_size})
    commands: dict[str, Any] = manifest.get("commands", {})
    finished = bool(commands) and all(entry.get("state", "done") == "done" for entry in commands.values())
    return {
        "path": str(path),
        "model": manifest.get("model", {}).get("name"),
        "baseline": commands.get("probe", {}).get("request", {}).get("baseline"),
        "corpus": manifest.get("corpus", {}).get("id"),
        "seed": manifest.get("seed"),
        "created": manifest.get("created"),
        "commands": list(commands),
        "status": "finished" if finished else "unfinished",
        "tables": tables,
    }

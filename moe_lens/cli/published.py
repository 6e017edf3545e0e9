"""``moe-lens probe --from-published FILE...``: released probing tables beside the controls they were printed without.

Needs no model and no torch unless ``-o`` is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moe_lens.config import parse_ints
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from moe_lens.probing.published import Published

USABLE = ("k", "seed", "output", "resume")
SOURCE = "arXiv 2604.02178"


def show(
    files: Sequence[Path] | None, more: Sequence[Path] | None, flags: Mapping[str, Any], *, json: bool, details: bool
) -> None:
    """Print the tables' controls and what is left; write ``published.parquet`` where ``-o`` says.

    Args:
        files: what ``--from-published`` was given; `more` are the words after it that belong to no option.
        flags: the options of ``probe`` as they were given, None where they were not.

    Raises:
        BadConfig: an option that does not go with released tables.
        BadPublishedTable: a file that is none.
        BadOutput: ``-o`` names something else than a new folder or an earlier run of the same files.
    """
    from moe_lens.cli import render, terminal
    from moe_lens.cli.inputs import check_output
    from moe_lens.probing.published import read_published

    if not files:
        raise BadConfig(f"unexpected argument {str((more or [''])[0])!r}: give it an option, see moe-lens probe --help")
    given = {name: value for name, value in flags.items() if value not in (None, [], False)}
    for name in given.keys() - {*USABLE}:
        raise BadConfig(f"--from-published reads finished tables: leave out --{name.replace('_', '-')}")
    output = Path(given["output"]) if "output" in given else None
    check_output(output)
    seed, k = _number("seed", given.get("seed", "0")), given.get("k")
    tables = read_published([*files, *(more or ())], seed=seed)
    k = tables.ks[0] if k is None else _number("k", k)
    if output:
        write(tables, output, k=k)
    if json:
        where = {"run": str(output)} if output else {}
        terminal.print_json({**where, "finding": tables.finding(k=k), "summary": tables.summary(k=k)})
        return
    render.published(tables, k=k)
    terminal.say(*tables.findings(k=k)) if details else terminal.say(tables.finding(k=k))
    if output:
        typer.echo(str(output))


def _number(name: str, value: str | Sequence[str]) -> int:
    found = parse_ints(value)
    if len(found) != 1:
        raise BadConfig(f"--{name} takes one number with --from-published, such as --{name} {found[0]}")
    return found[0]


def write(tables: Published, output: Path, *, k: int) -> None:
    """A run directory of its own: the tidy probes, and in the manifest the files' hashes and the summary."""
    from moe_lens.capture.run import create_run, digest

    identity = {
        "model": {"name": " + ".join(tables.sources)},
        "corpus": {"id": SOURCE, "sha256": digest(dict(tables.sources))},
        "seed": tables.seed,
    }
    run = create_run(output, identity)
    run.write("published", tables.frame)
    entry = {"state": "done", "files": dict(tables.sources), "summary": tables.summary(k=k)}
    run.update_manifest(commands={"published": entry})

"""``moe-lens inspect MODEL``: what the configuration says, without loading a weight."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_lens.cli.options import Json, LocalOnly, RemoteCode, Revision, Verbose


def inspect(
    model: Annotated[str, typer.Argument(help="a hub id, a folder, or bundled:tiny-moe", metavar="MODEL")],
    revision: Revision = None,
    local_files_only: LocalOnly = False,
    trust_remote_code: RemoteCode = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Layers, experts, gate and sizes of a model, from its configuration alone (no weights are read).

    Active parameters are those that one token uses: everything but the routed experts it does not visit.
    """
    import moe_lens
    from moe_lens.cli import render, terminal

    spec = moe_lens.inspect(
        model,
        revision=revision,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )
    if json:
        terminal.print_json(spec.to_dict())
    else:
        render.spec(spec)

"""``moe-lens doctor MODEL``: does moe-lens see this checkpoint right, and what does it offer?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moe_lens.cli.options import Json, LocalOnly, RemoteCode, Revision, Verbose
from moe_lens.config import parse_names

Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16 (as the checkpoint)")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps (the best there is)")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto spreads a large model over devices (accelerate)")
]
KernelName = Annotated[str, typer.Option("--kernel", help="experts' arithmetic: native, grouped_mm or eager")]
Experts = Annotated[
    str | None,
    typer.Option("--experts", help="experts to ablate, L1.E3,L2.E0 (the busiest of the first and last MoE layer)"),
]


def doctor(
    model: Annotated[str, typer.Argument(help="a hub id, a folder, or bundled:tiny-moe", metavar="MODEL")],
    revision: Revision = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: DeviceMap = None,
    kernel: KernelName = "native",
    experts: Experts = None,
    local_files_only: LocalOnly = False,
    trust_remote_code: RemoteCode = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check that taps and ablations tell the truth about a checkpoint; exit 1 if a check fails.

    About ten forward passes over 64 tokens; the model and its files are left as they were.
    """
    import moe_lens
    from moe_lens.cli import render, terminal
    from moe_lens.models.doctor import to_ablate
    from moe_lens.models.load import require_moe

    where: dict[str, Any] = {
        "revision": revision,
        "local_files_only": local_files_only,
        "trust_remote_code": trust_remote_code,
    }
    spec = moe_lens.inspect(model, **where)
    require_moe(spec)
    names = None if experts is None else parse_names(experts)
    if names is not None:
        to_ablate(spec, names)
    lens = moe_lens.load(
        model,
        dtype=dtype,
        device=device,
        device_map=device_map,
        kernel=kernel,  # type: ignore[arg-type]
        **where,
    )
    found = moe_lens.doctor(lens, experts=names)
    terminal.print_json(found.to_dict()) if json else render.diagnosis(found)
    for check in found.failed:
        typer.echo(f"moe-lens: check {check.check!r} failed: {check.advice}", err=True)
    if not found.ok:
        raise typer.Exit(1)

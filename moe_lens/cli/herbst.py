"""``moe-lens probe --protocol herbst2026``: the source's own protocol, in tables of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from moe_lens.cli import render, terminal
from moe_lens.errors import BadConfig, BadOutput

if TYPE_CHECKING:
    from moe_lens.config import ProbeConfig
    from moe_lens.corpus.text import Corpus
    from moe_lens.probing.herbst2026 import Herbst2026

NAME = "herbst2026"
FIXED = (
    "max_tokens", "document_tokens", "max_rows", "max_length", "all_cells", "splits", "draws", "permutations", "neurons"
)  # fmt: skip
"""Settings that the protocol decides itself."""


def check(settings: ProbeConfig) -> None:
    """Refuse settings that would make it another protocol.

    Raises:
        BadConfig: names the first of them.
    """
    for name in FIXED:
        if name in settings.model_fields_set:
            raise BadConfig(f"--protocol {NAME} fixes --{name.replace('_', '-')}: leave it out")


def show(settings: ProbeConfig, text: Corpus, *, json: bool) -> None:
    """Run it, or read a finished run back, and print what it gives and what stands beside it."""
    found = run(settings, text)
    k = found.ks[0]
    if json:
        terminal.print_json({"run": str(settings.output), "finding": found.finding(k=k), "summary": found.summary(k=k)})
        return
    render.published(found.published, k=k)
    terminal.say(found.finding(k=k))
    typer.echo(str(settings.output))


def run(settings: ProbeConfig, text: Corpus) -> Herbst2026:
    """Load the models and probe them into ``settings.output``.

    Raises:
        BadOutput: it holds such a run with other settings.
    """
    from moe_lens.capture.run import create_run, identity_of
    from moe_lens.cli.inputs import expert_addresses, load_lens
    from moe_lens.probing.herbst2026 import Herbst2026, herbst2026

    assert settings.output is not None
    lens = load_lens(settings, settings.model, revision=settings.revision)
    baseline = load_lens(settings, settings.baseline, revision=None) if settings.baseline else None
    asked: dict[str, Any] = {
        "layers": settings.layers,
        "experts": expert_addresses(lens.spec, settings.layers, settings.experts),
        "concepts": settings.concepts,
    }
    if settings.k is not None:
        asked["k"] = settings.k
    if "seed" in settings.model_fields_set:
        asked["seed"] = settings.seed
    run = create_run(settings.output, identity_of(lens, text, seed=settings.seed))
    if not settings.resume:
        run.drop(NAME, [f"{table}_{NAME}.parquet" for table in ("probe", "sampled", "comparison")])
    request = {**asked, "baseline": settings.baseline}
    entry = run.manifest["commands"].get(NAME)
    if entry is not None and entry["request"] != request:
        raise BadOutput(f"{run.path} holds a {NAME} run with other settings: give another -o, or --no-resume")
    if entry is not None and entry["state"] == "done":
        return Herbst2026(run.frame(f"probe_{NAME}"), run.frame(f"sampled_{NAME}"), entry["seed"])
    run.update_manifest(commands={NAME: {"state": "running", "request": request}})
    found = herbst2026(lens, text, baseline=baseline, max_memory=settings.max_memory, **asked)
    run.write(f"probe_{NAME}", found.cells)
    run.write(f"sampled_{NAME}", found.sampled)
    run.write(f"comparison_{NAME}", found.comparison)
    run.update_manifest(commands={NAME: {"state": "done", "request": request, "seed": found.seed}})
    return found

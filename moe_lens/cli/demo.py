"""``moe-lens demo``: the bundled MoE against its dense twin, labels for its experts, and these labels on trial."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_lens import __version__
from moe_lens.cli.options import Details, Json, Resume, Verbose
from moe_lens.config import AutointerpConfig, ProbeConfig, RunConfig, ValidateConfig
from moe_lens.errors import Underpowered

MOE, DENSE, TEXT = "bundled:tiny-moe", "bundled:tiny-dense", "bundled:"
DOCUMENT_TOKENS = 48
"""Many short texts: every document of the corpus is read, and the demo stays short."""
CONCEPTS = ["text", "code", "syntax", "script", "markup", "layout", "kind", "language_en", "register_handbook"]
"""Without the single domains and languages, which take half the time, and LaTeX, of which there is too little."""
K = [1, 2, 8, 32]
DRAWS, PERMUTATIONS = 5, 99
LABEL_TOKENS = 128
"""Tokens per document from which experts are labelled: one pass of one model, so there is time for more."""
ON_TRIAL = 16
"""Labels on trial: a sample, because each takes passes of its own."""
NULLS = ["frequent-token", "other-expert", "random-expert"]
DIRECTORY = Path("runs/demo")


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="run directory")] = DIRECTORY,
    resume: Resume = True,
    details: Details = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare the bundled MoE with its dense twin, label its experts, try the labels: two to three minutes."""
    import moe_lens
    from moe_lens.cli import autointerp, probe, validate

    shared: dict[str, Any] = {"model": MOE, "dataset": TEXT, "output": output, "resume": resume, "device": "cpu"}
    probing = ProbeConfig(
        baseline=DENSE,
        document_tokens=DOCUMENT_TOKENS,
        concepts=CONCEPTS,
        k=K,
        draws=DRAWS,
        permutations=PERMUTATIONS,
        **shared,
    )
    labelling = AutointerpConfig(labeller="lexical", document_tokens=LABEL_TOKENS, **shared)
    trying = ValidateConfig(n_labels=ON_TRIAL, nulls=NULLS, **shared)
    stamp = fingerprint(probing, labelling, trying)
    earlier = stamp_of(output)
    if earlier != stamp or not resume:
        if earlier not in (None, stamp):
            put_aside(output)
        probe.check_models(probing)
        text = probe.read_corpus(probing)
        probe.run(probing, text)
        autointerp.run(labelling, text)
        validate.run(trying, validate.check_labels(trying, moe_lens.inspect(MOE)), text)
        moe_lens.open_run(output).update_manifest(demo=stamp)
        moe_lens.report(output)
    show(output, json=json, details=details)


def show(output: Path, *, json: bool, details: bool = False) -> None:
    """Print a finished demo from its run directory, and write its report if there is none.

    Raises:
        Underpowered: more than half of the labels on trial are underpowered, so the demo shows nothing about labels.
    """
    import moe_lens
    from moe_lens.cli import render, render_demo, terminal

    run = moe_lens.open_run(output)
    probes, labels, trial = moe_lens.Probes.of(run), moe_lens.Labels.of(run), moe_lens.Trial.of(run)
    page = output / "report.html"
    if not page.exists():
        moe_lens.report(run)
    if json:
        found = {"run": str(output), "report": str(page), "finding": probes.finding(), "summary": probes.summary()}
        terminal.print_json({**found, "labels": labels.to_dict(), "trial": trial.to_dict()})
    else:
        pair = render.model_pair(moe_lens.inspect(MOE), moe_lens.inspect(DENSE))
        render_demo.demo(pair, run.frame("routing_fields"), probes, labels, trial, details=details)
        typer.echo(f"{page} shows it in a browser")
        typer.echo(str(output))
    underpowered = (trial.verdicts["verdict"] == "underpowered").mean()
    if underpowered > 0.5:
        raise Underpowered(f"{underpowered:.0%} of the labels on trial are underpowered: the demo needs a longer text")


def put_aside(output: Path) -> None:
    """Rename a demo of another version or of other bundled files: somebody may have added to it."""
    free = next(name for n in range(1, 1000) if not (name := output.with_name(f"{output.name}-{n}")).exists())
    output.rename(free)
    typer.echo(f"{output} held a demo of another version: it is {free} now", err=True)


def fingerprint(*settings: RunConfig) -> dict[str, Any]:
    """What decides the demo's numbers: version, settings, and the bundled files by content."""
    bundled = Path(__file__).parent.parent / "bundled"
    files = hashlib.sha256()
    for path in sorted(p for p in bundled.rglob("*") if p.is_file()):
        files.update(path.relative_to(bundled).as_posix().encode() + path.read_bytes())
    ignored = {"output", "resume", "concurrency", "timeout"}
    return {
        "version": __version__,
        "bundled": files.hexdigest(),
        "settings": [one.model_dump(mode="json", exclude=ignored) for one in settings],
    }


def stamp_of(output: Path) -> dict[str, Any] | None:
    """The fingerprint of the finished demo in `output`, None if there is none."""
    import json

    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest.get("demo")

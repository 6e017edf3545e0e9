"""``moe-lens probe``: which concepts single neurons of experts detect, beside a dense model.

The order of work is the order of cost: settings, then configs, then text, and only then weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import inputs
from moe_lens.cli.options import Details, Json, Verbose, options_of
from moe_lens.config import ProbeConfig

if TYPE_CHECKING:
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.spec import Spec
    from moe_lens.probing.probe import Probes


Published = Annotated[
    list[Path] | None,
    typer.Option("--from-published", metavar="FILE...", help="released probing tables to check instead; no --model"),
]
MoreFiles = Annotated[list[Path] | None, typer.Argument(metavar="FILE", hidden=True)]
"""The rest of ``--from-published a b c``, which an option cannot take."""


@options_of(ProbeConfig)
def probe(
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what a run would need, and stop")] = False,
    from_published: Published = None,
    more: MoreFiles = None,
    details: Details = False,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Probe the neurons of every expert for concepts, and compare with a baseline model."""
    from moe_lens.cli import herbst, published, render, terminal

    if from_published or more:
        flags = {"config": config, "dry_run": dry_run, **flags}
        published.show(from_published, more, flags, json=json, details=details)
        return
    settings = ProbeConfig.build(config, **{name: None if value == [] else value for name, value in flags.items()})
    if not dry_run:
        settings = settings.with_output()
    if settings.protocol == herbst.NAME:
        herbst.check(settings)
    specs = check_models(settings)
    inputs.check_tokenizers(settings, specs)
    text = read_corpus(settings)
    if dry_run:
        from moe_lens.cli.plan import make_plan

        plan = make_plan(settings, specs, text)
        terminal.print_json(plan.to_dict()) if json else render.plan(plan, details=details)
        return
    if settings.protocol == herbst.NAME:
        with inputs.refusal_leaves_nothing(settings.output):
            herbst.show(settings, text, json=json)
        return
    with inputs.refusal_leaves_nothing(settings.output):
        probes = run(settings, text)
    if json:
        found = {"finding": probes.finding(), "findings": probes.findings(), "summary": probes.summary()}
        terminal.print_json({"run": str(settings.output), **found})
        return
    render.probes(probes, details=details)
    typer.echo(str(settings.output))


def check_models(settings: ProbeConfig) -> list[Spec]:
    """Specs of the model and the baseline, from their configs alone.

    Raises:
        ModelNotFound, UnsupportedModel, NotAnMoE, OutOfRange, BadOutput: see the message.
    """
    from moe_lens.models.source import refuse_quantised
    from moe_lens.probing.settings import check_k

    specs = [inputs.check_model(settings)]
    if settings.baseline:
        specs.append(inputs.read_spec(settings, settings.baseline, revision=None))
        refuse_quantised(specs[1].name, specs[1].quantisation)
    check_k(settings.k, specs)
    return specs


def read_corpus(settings: ProbeConfig) -> Corpus:
    """The text, with its concepts checked.

    Raises:
        BadCorpus: empty, unreadable, or not what its suffix says.
        UnknownConcept: a name that nothing defines.
    """
    from moe_lens.corpus.checks import check_corpus
    from moe_lens.corpus.concepts import concepts_for
    from moe_lens.probing.settings import DOCUMENTS_NEEDED

    text = inputs.read_text(settings)
    check_corpus(text, concepts_for(text, settings.concepts), DOCUMENTS_NEEDED, seed=settings.seed)
    return text


def run(settings: ProbeConfig, text: Corpus) -> Probes:
    """Load the models and probe them into ``settings.output``."""
    import moe_lens

    lens = inputs.load_lens(settings, settings.model, revision=settings.revision)
    baseline = inputs.load_lens(settings, settings.baseline, revision=None) if settings.baseline else None
    return moe_lens.probe(
        lens,
        text,
        baseline=baseline,
        concepts=settings.concepts,
        k=settings.k,
        layers=settings.layers,
        experts=inputs.expert_addresses(lens.spec, settings.layers, settings.experts),
        max_rows=settings.max_rows,
        max_length=settings.max_length,
        max_tokens=settings.max_tokens,
        document_tokens=settings.document_tokens,
        batch_size=settings.batch_windows,
        max_memory=settings.max_memory,
        all_cells=settings.all_cells,
        draws=settings.draws,
        permutations=settings.permutations,
        neurons=settings.neurons,
        seed=settings.seed,
        splits=settings.splits,
        out=settings.output,
        resume=settings.resume,
    )

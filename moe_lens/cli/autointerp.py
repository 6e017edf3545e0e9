"""``moe-lens autointerp``: label the experts of a model, and score the labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import inputs
from moe_lens.cli.options import Details, Json, Verbose, options_of
from moe_lens.config import AutointerpConfig

if TYPE_CHECKING:
    from moe_lens.autointerp.pipeline import Asked
    from moe_lens.autointerp.result import Labels
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.spec import Spec


Published = Annotated[
    Path | None,
    typer.Option("--from-published", metavar="FILE", help="released labels and judgements to check instead"),
]


@options_of(AutointerpConfig)
def autointerp(
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="predict calls and tokens, and stop")] = False,
    from_published: Published = None,
    details: Details = False,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Label what each expert is sent, and score the labels on tokens that the labeller has not seen."""
    from moe_lens.cli import published_labels, render_labels, terminal

    if from_published is not None:
        published_labels.show(from_published, {"config": config, "dry_run": dry_run, **flags}, json=json)
        return
    settings = AutointerpConfig.build(config, **{name: None if value == [] else value for name, value in flags.items()})
    if not dry_run:
        settings = settings.with_output()
    spec = inputs.check_model(settings)
    asked = check_asked(settings, spec)
    inputs.check_tokenizers(settings, [spec])
    text = inputs.read_text(settings)
    if dry_run:
        from moe_lens.cli.label_plan import make_plan

        plan = make_plan(settings, spec, asked, text)
        terminal.print_json(plan.to_dict()) if json else render_labels.plan(plan, details=details)
        return
    with inputs.refusal_leaves_nothing(settings.output):
        labels = run(settings, text)
    if json:
        terminal.print_json(labels.to_dict())
        return
    render_labels.labels(labels, details=details)
    typer.echo(str(settings.output))


def check_asked(settings: AutointerpConfig, spec: Spec) -> Asked:
    """Who labels and who scores, checked before any weight is loaded.

    Raises:
        BadConfig, OutOfRange: see the message.
    """
    from moe_lens.autointerp.labels import read_labels
    from moe_lens.autointerp.pipeline import check_servers, settle

    given = None if settings.labels is None else read_labels(settings.labels, spec)
    asked = settle(settings.labeller, given, settings.scorer, settings.base_url, facets=settings.facets)
    check_servers(asked)
    return asked


def run(settings: AutointerpConfig, text: Corpus) -> Labels:
    """Load the model, label and score into ``settings.output``."""
    import moe_lens

    lens = inputs.load_lens(settings, settings.model, revision=settings.revision)
    return moe_lens.autointerp(
        lens,
        text,
        labeller=settings.labeller,
        labels=settings.labels,
        scorer=settings.scorer,
        base_url=settings.base_url,
        layers=settings.layers,
        experts=inputs.expert_addresses(lens.spec, settings.layers, settings.experts),
        facets=settings.facets,
        items=settings.items,
        fuzz=settings.fuzz,
        control=settings.control,
        max_calls=settings.max_calls,
        token_budget=settings.token_budget,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        reply_tokens=settings.reply_tokens,
        max_length=settings.max_length,
        max_tokens=settings.max_tokens,
        document_tokens=settings.document_tokens,
        batch_size=settings.batch_windows,
        seed=settings.seed,
        out=settings.output,
        resume=settings.resume,
    )

"""``moe-lens faithfulness``: do rankings of experts say which ones the model needs?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import inputs
from moe_lens.cli.options import Details, Json, Verbose, options_of
from moe_lens.config import FaithfulnessConfig

if TYPE_CHECKING:
    from moe_lens.causal.faithfulness.result import Faithfulness
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.spec import Spec


@options_of(FaithfulnessConfig)
def faithfulness(
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="predict passes and minutes, and stop")] = False,
    details: Details = False,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Ablate the experts that rankings put first, and all others, and compare with random and load-matched sets."""
    from moe_lens.cli import render_faithfulness, terminal

    settings = FaithfulnessConfig.build(
        config, **{name: None if value == [] else value for name, value in flags.items()}
    )
    if not dry_run:
        settings = settings.with_output()
    spec = check(settings)
    inputs.check_tokenizers(settings, [spec])
    text = inputs.read_text(settings)
    if dry_run:
        from moe_lens.cli.faithfulness_plan import make_plan

        plan = make_plan(settings, spec, text, choices(settings))
        terminal.print_json(plan.to_dict()) if json else render_faithfulness.plan(plan)
        return
    with inputs.refusal_leaves_nothing(settings.output):
        found = run(settings, text)
    if json:
        terminal.print_json(found.to_dict())
        return
    render_faithfulness.faithfulness(found, details=details)
    typer.echo(str(settings.output))


def check(settings: FaithfulnessConfig) -> Spec:
    """Names, numbers and files, checked before any weight is loaded.

    Raises:
        ModelNotFound, UnsupportedModel, NotAnMoE, OutOfRange, BadConfig, BadOutput: see the message.
    """
    from moe_lens.causal.faithfulness.rankings import check_files
    from moe_lens.causal.faithfulness.settings import settings_of
    from moe_lens.types import ExpertAddress

    asked = settings_of(**choices(settings))
    spec = inputs.check_model(settings)
    moe = [entry for entry in spec.layers if entry.layer in spec.moe_layers]
    check_files(asked.rankings, [ExpertAddress(entry.layer, e) for entry in moe for e in range(entry.n_experts)])
    return spec


def choices(settings: FaithfulnessConfig) -> dict[str, Any]:
    """What is scored and how, as `moe_lens.faithfulness` takes it."""
    from moe_lens.causal.faithfulness.settings import MODES, RANKINGS

    same = ("routing", "universe", "axis", "n_random", "n_matched", "naopc", "draws", "seed")
    return {
        "rankings": settings.rankings or RANKINGS,
        "modes": settings.modes or MODES,
        "bins": settings.shares,
        **{name: getattr(settings, name) for name in same},
    }


def run(settings: FaithfulnessConfig, text: Corpus) -> Faithfulness:
    """Load the model and score rankings into ``settings.output``."""
    import moe_lens

    lens = inputs.load_lens(settings, settings.model, revision=settings.revision)
    return moe_lens.faithfulness(
        lens,
        text,
        **choices(settings),
        layers=settings.layers,
        experts=inputs.expert_addresses(lens.spec, settings.layers, settings.experts),
        max_tokens=settings.max_tokens,
        document_tokens=settings.document_tokens,
        max_length=length(settings, lens.spec),
        batch_tokens=batch_tokens(settings, lens.spec),
        include_first=settings.include_first,
        out=settings.output,
        resume=settings.resume,
    )


def length(settings: FaithfulnessConfig, spec: Spec) -> int:
    """Tokens per window: no more than the model has positions."""
    return min(settings.max_length, spec.max_positions or settings.max_length)


def batch_tokens(settings: FaithfulnessConfig, spec: Spec) -> int | None:
    """Tokens of a pass, None for what suits the device."""
    longest = min(length(settings, spec), settings.document_tokens)
    return None if settings.batch_windows is None else settings.batch_windows * longest

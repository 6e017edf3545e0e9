"""``moe-lens steer``: generate with experts suppressed, forced or biased, beside experts of like load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import inputs
from moe_lens.cli.options import Details, Json, Verbose, options_of
from moe_lens.config import SteerConfig

if TYPE_CHECKING:
    from moe_lens.causal.steering.prompts import Given
    from moe_lens.causal.steering.result import Steering
    from moe_lens.models.spec import Spec


@options_of(SteerConfig)
def steer(
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="count texts and passes, and stop")] = False,
    details: Details = False,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Let a model go on from prompts while its router is kept from some experts, or pushed to them.

    The push is made as strong as it must be for the next token to move by a common KL, and experts of like load are
    pushed to the same KL, so that what any disturbance of that size does is seen beside it.
    """
    from moe_lens.cli import render_steer, terminal

    settings = SteerConfig.build(config, **{name: None if value == [] else value for name, value in flags.items()})
    spec = inputs.check_moe(settings)
    prompts = check_asked(settings, spec)
    if dry_run:
        plan = predicted(settings, prompts)
        terminal.print_json(plan) if json else render_steer.plan(plan)
        return
    with inputs.refusal_leaves_nothing(settings.output):
        found = run(settings, prompts)
    if json:
        terminal.print_json(found.to_dict())
        return
    render_steer.steering(found, details=details)
    if settings.output is not None:
        typer.echo(str(settings.output))


def check_asked(settings: SteerConfig, spec: Spec) -> list[Given]:
    """The prompts, after a look at them and at experts and target; no weight is loaded.

    Raises:
        BadConfig, BadCorpus, OutOfRange, UnsupportedModel: see the message.
    """
    from moe_lens.causal.steering import prompts as reading
    from moe_lens.causal.steering.direction import check_direction, direction_of
    from moe_lens.causal.steering.score import goal_of
    from moe_lens.errors import BadConfig
    from moe_lens.models import source

    goal_of(settings.target, settings.target_text)
    check_direction(direction_of(settings.suppress or (), settings.force or (), settings.bias), spec)
    given: list[Given] = [*(settings.prompt or [])]
    if settings.prompts is not None:
        given += reading.read_prompts(settings.prompts)
    if not given:
        raise BadConfig("there is no prompt: give --prompt TEXT or --prompts FILE")
    prompts = reading.as_prompts(given)
    options = source.Options(spec.revision, settings.local_files_only, settings.trust_remote_code)
    tokenizer = source.read_tokenizer(source.resolve(spec.name), options)
    reading.tokenised(tokenizer, prompts, spec, more=settings.max_new_tokens)
    return prompts


def predicted(settings: SteerConfig, prompts: list[Given]) -> dict[str, Any]:
    """How many texts and passes a run takes at most; controls that others join may need a few more passes."""
    from moe_lens.causal.steering.strength import STEPS

    arms = 1 + settings.controls
    return {
        "model": settings.model,
        "prompts": len(prompts),
        "arms": ["clean", "steered", *(f"control_{number}" for number in range(1, settings.controls + 1))],
        "texts": len(prompts) * (1 + arms),
        "max_new_tokens": settings.max_new_tokens,
        "measurements": arms * (1 if settings.kl is None else STEPS),
    }


def run(settings: SteerConfig, prompts: list[Given]) -> Steering:
    """Load the model and steer it."""
    import moe_lens

    lens = inputs.load_lens(settings, settings.model, revision=settings.revision)
    return moe_lens.steer(
        lens,
        prompts,
        suppress=settings.suppress or (),
        force=settings.force or (),
        bias=settings.bias,
        kl=settings.kl,
        controls=settings.controls,
        max_new_tokens=settings.max_new_tokens,
        target=settings.target,
        target_text=settings.target_text,
        temperature=settings.temperature,
        seed=settings.seed,
        out=settings.output,
        resume=settings.resume,
    )

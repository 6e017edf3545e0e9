"""``moe-lens validate --triggers DIR``: do experts raise the targets of their cases at the triggers?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from moe_lens.cli import inputs
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from moe_lens.causal.triggers.plan import TriggerPlan
    from moe_lens.causal.triggers.result import Triggers
    from moe_lens.config import ValidateConfig
    from moe_lens.models.spec import Spec

ALL = "all"
N_SHOWN = 20
"""Experts that are shown without --details."""
NOTE = (
    "effect: nats of log p(target) that go with the expert at its triggers; then what is left beyond experts chosen "
    "beside it, experts with like gates elsewhere, and its effect on other targets (* q < .05)"
)
LONG_NOTE = (
    "routed: usable cases with the expert at the trigger; first: share in which it writes most to the target's logit "
    "among the experts chosen there (in brackets: others with a like gate, at other tokens); effect: nats of "
    "log p(target), in the mode where it is smaller; then what is left of it beyond experts chosen beside it, experts "
    "with like gates, and its own effect on other experts' targets (* q < .05)"
)


def show(settings: ValidateConfig, *, json: bool, dry_run: bool, details: bool) -> None:
    """Check the cases, measure them into ``settings.output``, and print what was found.

    Raises:
        BadConfig, BadOutput, OutOfRange: see the message.
    """
    from moe_lens.causal.triggers.run import check_modes
    from moe_lens.cli import terminal

    assert settings.triggers is not None
    if settings.labels is not None:
        raise BadConfig("--triggers tests cases in place of labels: leave out --labels, or --triggers")
    check_modes(settings.modes)
    spec = inputs.check_model(settings.model_copy(update={"experts": None}))
    experts = None if settings.experts in (None, [ALL]) else settings.experts
    addresses = inputs.expert_addresses(spec, settings.layers, experts)
    plan = make_plan(settings, spec, addresses)
    if dry_run:
        terminal.print_json(plan.to_dict()) if json else show_plan(plan)
        return
    with inputs.refusal_leaves_nothing(settings.output):
        found = run(settings, addresses)
    if json:
        terminal.print_json(found.to_dict())
        return
    show_result(found, details=details)
    typer.echo(str(settings.output))


def make_plan(settings: ValidateConfig, spec: Spec, experts: list[str] | None) -> TriggerPlan:
    """Read the cases and find them among the tokens; no weight is loaded."""
    from moe_lens.causal.triggers.cases import locate
    from moe_lens.causal.triggers.plan import plan_triggers
    from moe_lens.causal.triggers.run import chosen_cases
    from moe_lens.models import source

    assert settings.triggers is not None
    cases = chosen_cases(settings.triggers, spec, experts=experts, layers=settings.layers)
    options = source.Options(spec.revision, settings.local_files_only, settings.trust_remote_code)
    tokenizer = source.read_tokenizer(source.resolve(spec.name), options)
    return plan_triggers(locate(cases, tokenizer, context=spec.max_positions), spec, settings.modes)


def run(settings: ValidateConfig, experts: list[str] | None) -> Triggers:
    """Load the model and measure the cases."""
    from moe_lens.causal.triggers.run import trigger_target

    assert settings.triggers is not None
    text = inputs.read_text(settings)
    return trigger_target(
        inputs.load_lens(settings, settings.model, revision=settings.revision),
        settings.triggers,
        modes=settings.modes,
        experts=experts,
        layers=settings.layers,
        corpus=text,
        draws=settings.draws,
        seed=settings.seed,
        out=settings.output,
        resume=settings.resume,
    )


def show_plan(plan: TriggerPlan) -> None:
    """Cases, defects and passes."""
    from moe_lens.cli import terminal

    show_defects(plan.defects)
    terminal.say(
        f"{plan.model}: {plan.n_used:,} of {plan.n_cases:,} cases of {plan.n_experts} experts in layers "
        f"{', '.join(map(str, plan.layers))} can be measured; "
        f"{plan.texts:,} clean passes over one text each, then {plan.passes} ablated passes, each over the windows of "
        f"its layer ({plan.windows:,} in all, {plan.tokens:,} tokens, at most)."
    )


def show_result(found: Triggers, *, details: bool) -> None:
    """One line per expert and the finding; with details also cases by defect."""
    from moe_lens.causal.triggers.statistics import Q
    from moe_lens.cli import terminal

    rows = []
    for row in found.weakest.to_dict("records"):
        contrasts = [
            terminal.number(row[name]) + ("*" if row[f"q_{name}"] < Q else "")
            for name in ("over_co_selected", "over_matched", "over_other_targets")
        ]
        first, like = terminal.number(row["rank1"], 2), terminal.number(row["rank1_matched"], 2)
        interval = terminal.interval(row["effect_low"], row["effect_high"])
        routed = f"{row['n_routed']}/{row['n_used']}"
        effect = terminal.number(row["effect"])
        rows.append([row["address"], row["outcome"], routed, f"{first} ({like})", effect, interval, *contrasts])
    columns = ["expert", "outcome", ">routed", ">first", ">effect", "~>95 % interval", ">beside", ">gates", ">targets"]
    shown = rows if details else rows[:N_SHOWN]
    note = LONG_NOTE if details else NOTE
    if len(shown) < len(rows):
        note += f"; {len(rows) - len(shown)} more experts with --details"
    terminal.table("Triggers and targets", columns, shown, note=note)
    if details:
        show_defects(found.defects)
    terminal.say(*found.findings()) if details else terminal.say(found.finding())
    terminal.aside(terminal.more_tables(1) if found.defects and not details else "")


def show_defects(defects: Mapping[str, int]) -> None:
    """Cases by defect."""
    from moe_lens.cli import terminal

    if defects:
        terminal.table("Cases by defect", ["defect", ">cases"], [[name, f"{n:,}"] for name, n in defects.items()])

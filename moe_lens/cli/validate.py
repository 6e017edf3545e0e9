"""``moe-lens validate``: put labels of experts on trial."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_lens.cli import inputs
from moe_lens.cli.options import Details, Json, Verbose, options_of
from moe_lens.config import ValidateConfig
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from moe_lens.autointerp.focal_judge import FocalJudge
    from moe_lens.causal.trial.plan import TrialPlan
    from moe_lens.causal.trial.result import Trial
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.spec import Spec

RULE, LEXICAL, ALL, NONE = "rule", "lexical", "all", "none"


@dataclass(frozen=True)
class OnTrial:
    """What is tried and who judges, settled before any weight is loaded."""

    labels: pd.DataFrame
    experts: list[str] | None
    n_labels: int | None
    """None tries all labels of `experts`, or all there are."""


@options_of(ValidateConfig)
def validate(
    config: Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="load the model, time one pass, say what a run would take")
    ] = False,
    details: Details = False,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Try labels: is the expert visited where its label says, and does the model need it there?"""
    from moe_lens.cli import render_trial, terminal

    settings = ValidateConfig.build(config, **{name: None if value == [] else value for name, value in flags.items()})
    settings = settings.with_output()
    if settings.batch_size != "auto":
        raise BadConfig("--batch-size has no part in a trial, whose passes are cut to the processor: leave it out")
    if settings.triggers is not None:
        from moe_lens.cli import triggers

        triggers.show(settings, dry_run=dry_run, json=json, details=details)
        return
    spec = inputs.check_model(settings.model_copy(update={"experts": None}))
    on_trial = check_labels(settings, spec)
    inputs.check_tokenizers(settings, [spec])
    text = inputs.read_text(settings)
    if dry_run:
        plan = make_plan(settings, on_trial, text)
        counted = calls(settings, plan.asked)
        terminal.print_json(plan.to_dict() | {"calls": counted}) if json else render_trial.plan(plan, counted)
        return
    with inputs.refusal_leaves_nothing(settings.output):
        trial = run(settings, on_trial, text)
    if json:
        terminal.print_json(trial.to_dict())
        return
    render_trial.trial(trial, details=details)
    typer.echo(str(settings.output))


def check_labels(settings: ValidateConfig, spec: Spec) -> OnTrial:
    """Labels, experts and judges, checked before any weight is loaded.

    Raises:
        BadConfig, BadConcept, BadOutput, OutOfRange, UnknownConcept: see the message.
    """
    from moe_lens.causal.trial.job import check_settings

    check_settings(
        settings.modes,
        null_kinds(settings),
        horizon=settings.horizon,
        draws=settings.draws,
        judge_positions=settings.judge_positions,
    )
    table = labels_of(settings, spec)
    if settings.layers is not None:
        table = table[table["layer"].isin(settings.layers)]
    if not len(table):
        raise BadConfig("there is no label for an expert of these --layers: name layers whose experts have labels")
    for name in (settings.judge, settings.second_judge):  # their keys and files; nobody is called
        make_judge(settings, name, keep=False)
    has = [name for name in ("rule", "concept") if name in table and table[name].notna().any()]
    if settings.judge == RULE and not has:
        raise BadConfig(
            "none of these labels has a rule: give --judge openai:MODEL to say where they hold, or add rules"
        )
    everyone = settings.experts == [ALL]
    experts = None if everyone else inputs.expert_addresses(spec, settings.layers, settings.experts)
    n_labels = None if everyone or experts is not None else settings.n_labels
    return OnTrial(table.reset_index(drop=True), experts, n_labels)


def null_kinds(settings: ValidateConfig) -> tuple[str, ...]:
    """Kinds of false labels that the trial makes itself."""
    from moe_lens.causal.trial.nulls import NULL_LABELS, SHUFFLED

    if settings.nulls is None:
        return tuple(NULL_LABELS)
    return () if settings.nulls == [NONE] else tuple(kind for kind in settings.nulls if kind != SHUFFLED)


def is_shuffled(settings: ValidateConfig, on_trial: OnTrial) -> bool:
    """Whether the labeller makes labels of shuffled activations too: if asked to, or if that takes no LLM."""
    from moe_lens.causal.trial.nulls import SHUFFLED

    if settings.nulls is not None:
        return SHUFFLED in settings.nulls
    return settings.labels is None and set(on_trial.labels["labeller"]) == {LEXICAL}


def labels_of(settings: ValidateConfig, spec: Spec) -> pd.DataFrame:
    """Labels of ``--labels``, else of the run directory.

    Raises:
        BadConfig, BadConcept, OutOfRange, UnknownConcept: what `read_labels` refuses.
        BadOutput: the run directory has no labels, or none of ``--labeller``.
    """
    from moe_lens.autointerp.labels import read_labels

    if settings.labels is None:
        return labels_of_run(settings)
    if settings.labeller is not None:
        raise BadConfig("--labels and --labeller exclude each other: name a file, or a labeller of the run directory")
    return read_labels(settings.labels, spec)


def labels_of_run(settings: ValidateConfig) -> pd.DataFrame:
    """The labels that ``moe-lens autointerp`` wrote into the run directory: those of one labeller."""
    from moe_lens.autointerp.labels import usable, with_none
    from moe_lens.capture.run import Run
    from moe_lens.errors import BadOutput

    assert settings.output is not None
    run = Run(settings.output)
    if not run.has("labels"):
        raise BadOutput(
            f"{run.path} holds no labels: run moe-lens autointerp --model {settings.model} -o {run.path} first, or "
            "give --labels FILE.csv"
        )
    table = with_none(run.frame("labels"))
    known = list(dict.fromkeys(table["labeller"]))
    labeller = settings.labeller or known[-1]
    if labeller not in known:
        raise BadOutput(f"{run.path} holds no labels of {labeller!r}: it has those of {', '.join(known)}")
    table = usable(table[table["labeller"] == labeller])
    if not len(table):
        raise BadOutput(f"{labeller} found no label for any expert in {run.path}: give --labels FILE.csv")
    return table.reset_index(drop=True)


def make_judge(settings: ValidateConfig, name: str | None, *, keep: bool = True) -> FocalJudge | None:
    """A language model as judge, None for ``rule`` or nobody. Replies are kept in the run directory.

    Raises:
        BadConfig: a name that cannot be read, a key that is missing, a file that cannot be served.
    """
    if name in (None, RULE):
        return None
    from moe_lens.autointerp import focal_judge
    from moe_lens.autointerp.pipeline import REPLIES

    cache = settings.output / REPLIES if keep and settings.output is not None else None
    return focal_judge.make_judge(
        name,
        base_url=settings.base_url,
        cache=cache,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        max_calls=settings.max_calls,
        token_budget=settings.token_budget,
        seed=settings.seed,
    )


def run(settings: ValidateConfig, on_trial: OnTrial, text: Corpus) -> Trial:
    """Load the model and try the labels into ``settings.output``."""
    import moe_lens
    from moe_lens.causal.trial.nulls import SHUFFLED
    from moe_lens.cli.shuffled import shuffled

    lens = inputs.load_lens(settings, settings.model, revision=settings.revision)
    null_tables = {SHUFFLED: shuffled(settings, on_trial, lens, text)} if is_shuffled(settings, on_trial) else {}
    with ExitStack() as stack:
        made = [make_judge(settings, name) for name in (settings.judge, settings.second_judge)]
        judge, second_judge = (None if one is None else stack.enter_context(one) for one in made)
        return moe_lens.validate(
            lens,
            text,
            on_trial.labels,
            judge=judge,
            second_judge=second_judge,
            null_tables=null_tables,
            **asked(settings, on_trial),
            **reading(settings),
            draws=settings.draws,
            out=settings.output,
            resume=settings.resume,
        )


def make_plan(settings: ValidateConfig, on_trial: OnTrial, text: Corpus) -> TrialPlan:
    """Load the model and look ahead; nothing is written and no language model is called."""
    from moe_lens.causal.trial.job import text_of
    from moe_lens.causal.trial.plan import plan_trial

    lens = inputs.load_lens(settings, settings.model, revision=settings.revision)
    return plan_trial(
        lens,
        text_of(lens, text, **reading(settings)),
        on_trial.labels,
        is_asked=settings.judge != RULE,
        n_tables=int(is_shuffled(settings, on_trial)),
        **asked(settings, on_trial),
        seed=settings.seed,
    )


def asked(settings: ValidateConfig, on_trial: OnTrial) -> dict[str, Any]:
    """What is tried and against what, as a trial and its plan take it."""
    return {
        "experts": on_trial.experts,
        "n_labels": on_trial.n_labels,
        "modes": settings.modes,
        "null_labels": null_kinds(settings),
        "controls": settings.matched,
        "positions": settings.positions,
        "horizon": settings.horizon,
        "max_tokens": settings.max_tokens,
        "judge_positions": settings.judge_positions,
    }


def reading(settings: ValidateConfig) -> dict[str, Any]:
    """How the text is cut."""
    return {"document_tokens": settings.document_tokens, "max_length": settings.max_length, "seed": settings.seed}


def calls(settings: ValidateConfig, n_asked: Sequence[int]) -> dict[str, dict[str, int]]:
    """By judge: the tokens that it would be asked about, and the calls."""
    from moe_lens.autointerp.focal_judge import PER_PROMPT
    from moe_lens.causal.trial.hearing import TWICE

    found = {}
    if settings.judge != RULE:
        found[settings.judge] = list(n_asked)
    if settings.second_judge is not None:
        found[settings.second_judge] = [round(TWICE * n) for n in n_asked]
    return {
        name: {"tokens": sum(each), "calls": sum(-(-n // PER_PROMPT) for n in each)} for name, each in found.items()
    }

"""What ``moe-lens demo`` shows on stdout: who does what, and what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_lens.cli import render, render_labels, render_trial, terminal
from moe_lens.cli.terminal import number
from moe_lens.types import Status

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.autointerp.result import Labels
    from moe_lens.causal.trial.result import Trial
    from moe_lens.probing.result import Probes

_AT = ["layer", "expert"]


def demo(
    pair: str, by_field: pd.DataFrame, probes: Probes, labels: Labels, trial: Trial, *, details: bool = False
) -> None:
    """One row per expert on trial, then the findings; with details all tables of the three commands instead."""
    terminal.say(f"{pair}.")
    if details:
        render.top_experts(by_field)
        render.probes(probes, details=True)
        render_labels.labels(labels, details=True)
        render_trial.trial(trial, details=True)
        return
    who_does_what(by_field, probes, labels, trial)
    terminal.say(probes.finding(), labels.finding(), trial.finding())
    terminal.aside("--details prints every table of probe, autointerp and validate")


def who_does_what(by_field: pd.DataFrame, probes: Probes, labels: Labels, trial: Trial) -> None:
    """Every expert on trial: its domain, its best neuron, its label, what that predicts, and the verdict."""
    domains, neurons = top_domains(by_field), best_concepts(probes.cells)
    scores = {
        (row["address"], row["facet"]): f"{number(row['auroc'], 2)} ({number(row['bigram'], 2)})"
        for row in labels.frame.to_dict("records")
    }
    rows = []
    for row in trial.verdicts.to_dict("records"):
        at = row["address"]
        auroc = scores.get((at, row["facet"]), "-")
        rows.append(
            [at, *domains.get(at, ("-", "-")), *neurons.get(at, ("-", "-")), auroc, row["verdict"], row["label"]]
        )
    terminal.table(
        "Who does what",
        ["=expert", "domain", ">lift", "best neuron", ">F1", ">AUROC", "=verdict", "label"],
        rows,
        note="lift: share of the domain's tokens that visit the expert, over that of the whole text; F1: held out, in "
        "brackets that of always saying yes; AUROC: of the label for the routing of one token id, in brackets that of "
        "a table of token pairs",
    )


def top_domains(by_field: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """By expert the domain that it is most enriched for, and its lift; only where it gets enough tokens to say."""
    enough = by_field[(by_field["visits"] >= render.MIN_VISITS) & (by_field["share"] >= render.MIN_SHARE)]
    best = enough[enough["field"] == "domain"].sort_values("lift", ascending=False, kind="stable").drop_duplicates(_AT)
    return {
        f"L{row['layer']}.E{row['expert']}": (str(row["value"]), f"{row['lift']:.1f}x")
        for row in best.to_dict("records")
    }


def best_concepts(cells: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """By expert the single neuron that reads a concept best on validation documents, with its F1 on test documents."""
    mine = cells[(cells["role"] == "moe") & (cells["k"] == 1) & (cells["seed"] == cells["seed"].min())]
    mine = mine[mine["status"].isin([str(Status.OK), str(Status.SEPARABLE)]) & mine["f1_balanced_validate"].notna()]
    best = mine.sort_values("f1_balanced_validate", ascending=False, kind="stable").drop_duplicates(_AT)
    return {
        f"L{row['layer']}.E{row['expert']}": (
            f"N{row['neurons'][0]} {row['concept']}",
            f"{number(row['f1'], 2)} ({number(row['f1_always_positive'], 2)})",
        )
        for row in best.to_dict("records")
    }

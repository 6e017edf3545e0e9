"""What neurons read, and how much of the gap between two models is left once the comparison is fair."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from moe_lens.probing.compare import MEAN
from moe_lens.probing.result import Probes
from moe_lens.report.claims import Claim
from moe_lens.report.missing import command
from moe_lens.report.parts import Figure, Missing, Part, Section, Table

if TYPE_CHECKING:
    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_METRIC = "f1_balanced"
_ARMS = ["arm", "metric", "k", "moe", "moe_low", "moe_high", "chance_moe", "dense", "dense_low", "dense_high",
         "chance_dense", "gap", "ci_low", "ci_high", "p_value", "n_cells_moe", "n_cells_dense"]  # fmt: skip
_BEST = ["concept", "category", "role", "address", "neurons", "f1_balanced", "f1", "f1_always_positive", "auroc",
         "prevalence", "n_test", "n_pos_test", "status"]  # fmt: skip
_HEADINGS = {
    "moe": "MoE", "chance_moe": "chance, MoE", "chance_dense": "chance, dense", "p_value": "p",
    "gap": "MoE minus dense", "n_cells_moe": "cells, MoE", "n_cells_dense": "cells, dense",
}  # fmt: skip
N_BEST = 5
"""Neurons that are listed for each concept and model."""


def section(run: Run, say: Claims) -> Section:
    """The waterfall first, then the arms, concepts one by one, and scores against the number of neurons."""
    if not (run.has("probe") and run.has("comparison")):
        missing = Missing("Probes", command(run, "probe", baseline=True))
        return Section("probing", "Probing", "", (missing,))
    probes = Probes.of(run)
    k = int(probes.comparison.k.min())
    means = probes.comparison[probes.comparison.concept == MEAN]
    means = means[means.metric.isin([_METRIC, "auroc"]) & means.arm.isin(["raw", "held_out", "null"])]
    scatter = probes.scatter(metric=_METRIC)
    parts: list[Part] = []
    if len(probes.steps):
        steps = probes.steps[(probes.steps.metric == _METRIC) & (probes.steps.k == k)]
        rows = steps[steps.group == MEAN].drop(columns=["metric", "group"])
        figure = probes.waterfall()
        parts.append(Figure.of("probing-waterfall", figure, rows=rows, source="waterfall.parquet", least=760))
    else:
        parts.append(Missing("A dense model to compare with", command(run, "probe", baseline=True)))
    arms = pd.concat([probes.arms(metric=metric) for metric in (_METRIC, "f1", "auroc")])
    arms = arms[[column for column in _ARMS if column in arms]]
    forms = {c: "+.3f" if c in ("gap", "ci_low", "ci_high") else ".3f" for c in _ARMS[3:15]}
    parts.append(
        Table("probing-arms", "All arms, mean over concepts", arms, "comparison.parquet", forms=forms,
              headings=_HEADINGS, filters=("metric",),
              intervals={"moe": ("moe_low", "moe_high"), "dense": ("dense_low", "dense_high"),
                         "gap": ("ci_low", "ci_high")})
    )  # fmt: skip
    one_by_one = Figure.of("probing-concepts", scatter, rows=_concepts(probes, k), source="comparison.parquet")
    best = _best(probes, k)
    parts += [
        Figure(**{**vars(one_by_one), "picks": ("probing-best", "concept")}),
        Table("probing-best", f"Best neurons of a concept (k = {k}, chosen on validate, scored on test)", best,
              "probe.parquet", forms=dict.fromkeys(_BEST[5:10], ".3f"), headings={"f1_always_positive": "always yes",
              "n_pos_test": "positives", "n_test": "tokens", "role": "model"}, filters=("concept", "role"), search=True,
              links="address" if run.has("exemplars") else None),
        Figure.of("probing-k", probes.against_k(metric=_METRIC), rows=means, source="comparison.parquet", least=820),
    ]  # fmt: skip
    if probes.neurons is not None:
        parts.append(
            Figure.of("probing-neurons", probes.neurons.plot(), rows=run.frame("neuron_layers"),
                      source="neuron_layers.parquet")
        )  # fmt: skip
    elif run.manifest["commands"].get("probe", {}).get("request", {}).get("neurons") is False:
        parts.append(Missing("How many concept groups a neuron serves", command(run, "probe", without=("neurons",))))
    lead = Markup("{} concepts in {} probes. {}Click a concept in the scatter to see its best neurons.").format(
        say.count("probe", distinct=("concept",)), say.count("probe"), _scores(say, k)
    )
    return Section("probing", "Probing", lead, tuple(parts))


def _scores(say: Claims, k: int) -> Markup:
    """What the best neuron reaches on other documents, beside what the same search finds without any relation."""
    held: dict[str, Any] = {"arm": "held_out", "concept": MEAN, "metric": "auroc", "k": k}

    def score(role: str, arm: str = "held_out") -> Markup:
        return say.interval("comparison", (role, f"{role}_low", f"{role}_high"), where=held | {"arm": arm})

    def is_there(column: str, arm: str = "held_out") -> bool:
        return not math.isnan(say.number(Claim("comparison", held | {"arm": arm}, "max", column)))

    if not is_there("moe"):
        return Markup("No concept has enough tokens and documents to score: use a larger corpus. ")
    said = Markup("On other documents than it was chosen on, the best neuron reaches AUROC {} in the MoE{}").format(
        score("moe"), Markup(" and {} in the dense model").format(score("dense")) if is_there("dense") else ""
    )
    if not is_there("moe", "null"):
        return said + Markup(" (no null was drawn). ")
    tested = {"arm": "null", "metric": "auroc", "k": k, "concept": {"!=": MEAN}}
    said += Markup("; with labels exchanged the same search reaches {}.").format(score("moe", "null"))
    return said + Markup(" {} of {} concepts of spans and documents beat that null (q ≤ 0.05). ").format(
        say.count("comparison", where=tested | {"q_value": {"<=": 0.05}}),
        say.count("comparison", where=tested | {"q_value": {"<=": 1}}),
    )


def _concepts(probes: Probes, k: int) -> pd.DataFrame:
    table = probes.comparison
    rows = table[(table.arm == "held_out") & (table.metric == _METRIC) & (table.k == k) & (table.concept != MEAN)]
    return rows[[c for c in ("concept", *_ARMS[3:14], "q_value", "status") if c in rows]]


def _best(probes: Probes, k: int) -> pd.DataFrame:
    """The cells that score highest on validate, of each concept and model."""
    cells = probes.cells
    cells = cells[(cells.k == k) & (cells.seed == cells.seed.min()) & cells[f"{_METRIC}_validate"].notna()]
    cells = cells.sort_values(f"{_METRIC}_validate", ascending=False, kind="stable")
    cells = cells.groupby(["role", "concept"], sort=False).head(N_BEST)
    address = [
        f"L{a}.E{b}" if role == "moe" else f"dense L{a}"
        for role, a, b in zip(cells.role, cells.layer, cells.expert, strict=True)
    ]
    cells = cells.assign(address=address, neurons=[", ".join(map(str, found)) for found in cells.neurons])
    return cells.sort_values(["concept", "role"], kind="stable")[_BEST]

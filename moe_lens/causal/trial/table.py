"""``validation_table(...)``: from cases and measured effects to one row per (label, mode), and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.causal.trial import cells
from moe_lens.causal.trial.assignment import assignment, standardised_effects
from moe_lens.causal.trial.judge import ABSTAINS, YES
from moe_lens.causal.trial.matching import load_matched, load_strata
from moe_lens.causal.trial.need import Beside, GateCurve, Need, needed
from moe_lens.causal.trial.nulls import REAL, Case
from moe_lens.causal.trial.verdict import VERDICT_MODES, Evidence, exclusive, q_values, verdict

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.causal.trial.measured import Measured
    from moe_lens.types import ExpertAddress

VALIDATION_COLUMNS = (
    "label_kind", "layer", "expert", "facet", "mode", "routing", "label", "split", "horizon", "positions", "n_docs",
    *(f"n_tokens_{cell}" for cell in cells.CELLS), *(f"n_docs_{cell}" for cell in ("z1", "r1", "z1r1", "z0r1")),
    "abstained", "load", "gate_mass", "contrast", "contrast_routed", "specificity", "n_controls", "need", "need_low",
    "need_high", "basis", "gate_advantage", "exclusivity", "exclusivity_low", "exclusivity_high", "p", "q",
    "auroc_routing", "auroc_routing_low", "auroc_routing_high", "auroc_effect", "lift", "kappa_judge",
    "p_assignment", "p_assignment_floor", "exclusive", "verdict",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Court:
    """Everything that labels are judged by."""

    measured: Mapping[tuple[ExpertAddress, str], Measured]
    modes: Sequence[str]
    document: Int[ndarray, "prediction"]
    """Number of the document, from 0 without gaps."""
    used: Bool[ndarray, "prediction"]
    """Predictions that count: those with the whole horizon before them."""
    load: Mapping[int, Float[ndarray, "expert"]]
    """Visits of every expert, by layer."""
    mass: Mapping[int, Float[ndarray, "expert"]]
    """Gate mass of every expert, by layer."""
    times: Float[ndarray, "draw document"]
    delta: float
    seed: int = 0

    @property
    def n_documents(self) -> int:
        return self.times.shape[1]

    def everywhere(self, expert: ExpertAddress, mode: str) -> Float[ndarray, "prediction"]:
        return self.measured[expert, mode].everywhere(len(self.document))

    def measured_in(self, layer: int) -> list[ExpertAddress]:
        return sorted({expert for expert, _ in self.measured if expert.layer == layer})


def validation_table(cases: Sequence[Case], court: Court, constants: Mapping[str, Any]) -> pd.DataFrame:
    """One row per case and mode, `VALIDATION_COLUMNS`; every row of a case has its one verdict.

    q is over the powered labels of one kind under one mode, so a kind of false labels is held against itself.

    Args:
        constants: columns with one value: routing, split, horizon, positions.
    """
    curves = {mode: _curves(court, mode) for mode in court.modes}
    evidence, rows, needs = [], [], []
    for case in cases:
        found, shared = _evidence(case, court)
        evidence.append(found)
        needs.append({mode: _need(case, court, mode, curves[mode]) for mode in court.modes})
        rows += [{**constants, **shared, **_effects(case, court, mode, needs[-1][mode])} for mode in court.modes]
    table = pd.DataFrame(rows)
    table["q"] = _q(table, np.repeat([e.is_powered for e in evidence], len(court.modes)))
    q = table["q"].to_numpy().reshape(len(cases), -1)
    votes = [list(court.modes).index(mode) for mode in VERDICT_MODES]
    for number, (found, by_mode) in enumerate(zip(evidence, needs, strict=True)):
        voting = [by_mode[mode] for mode in VERDICT_MODES]
        at = slice(number * len(court.modes), (number + 1) * len(court.modes))
        table.loc[table.index[at], "verdict"] = str(verdict(found, voting, q[number, votes], delta=court.delta))
        table.loc[table.index[at], "exclusive"] = str(exclusive(voting, delta=court.delta))
    table = table.merge(_assignments(cases, court), how="left", on=["label_kind", "layer", "mode"])
    return table.reindex(columns=list(VALIDATION_COLUMNS))


def _q(table: pd.DataFrame, powered: Bool[ndarray, "row"]) -> Float[ndarray, "row"]:
    q = np.full(len(table), np.nan)
    for at in table.groupby(["label_kind", "mode"]).indices.values():
        q[at] = q_values(table["p"].to_numpy()[at], powered[at].tolist())
    return q


def _evidence(case: Case, court: Court) -> tuple[Evidence, dict[str, Any]]:
    """What does not depend on a mode."""
    judged = court.used & (case.z != ABSTAINS)
    visited = np.zeros(len(judged), bool)
    visited[court.measured[case.expert, court.modes[0]].at] = True
    z, r = case.z[judged] == YES, visited[judged]
    counts = cells.cell_counts(z, r, court.document[judged], court.n_documents)
    has = {"z1": counts[:, :2], "r1": counts[:, [0, 2]], "z1r1": counts[:, :1], "z0r1": counts[:, 2:3]}
    documents = {name: int((part.sum(1) > 0).sum()) for name, part in has.items()}
    abstained = 1 - judged.sum() / court.used.sum()
    routing = cells.routing_auroc(counts, court.times)
    found = Evidence(documents["z1"], documents["r1"], int(counts[:, [0, 2]].sum()), float(abstained), routing)
    row = {
        "label_kind": case.kind, "layer": case.expert.layer, "expert": case.expert.expert, "facet": case.facet,
        "label": case.label, "n_docs": court.n_documents, "abstained": float(abstained), "kappa_judge": np.nan,
        **{f"n_tokens_{name}": int(n) for name, n in zip(cells.CELLS, counts.sum(0), strict=True)},
        **{f"n_docs_{name}": n for name, n in documents.items()},
        "load": int(court.load[case.expert.layer][case.expert.expert]),
        "gate_mass": float(court.mass[case.expert.layer][case.expert.expert]),
        **_columns("auroc_routing", routing),
    }  # fmt: skip
    return found, row


def _effects(case: Case, court: Court, mode: str, need: Need) -> dict[str, Any]:
    """Columns of one mode."""
    judged = court.used & (case.z != ABSTAINS)
    z, effect = case.z[judged] == YES, court.everywhere(case.expert, mode)[judged]
    layer, own = case.expert.layer, case.expert.expert
    others = court.measured_in(layer)
    matched = load_matched(own, court.load[layer], court.mass[layer], among=[e.expert for e in others])
    controls = [cells.contrast(court.everywhere(e, mode)[judged], z) for e in others if e.expert in matched]
    at = court.measured[case.expert, mode].at
    visited = np.zeros(len(judged), bool)
    visited[at] = True
    c = cells.contrast(effect, z)
    return {
        "mode": mode, "contrast": c, "contrast_routed": cells.conditional_contrast(effect, z, visited[judged]),
        "specificity": cells.specificity(c, controls), "n_controls": len(controls), **_columns("need", need.need),
        "basis": need.basis, "gate_advantage": need.gate_advantage, **_columns("exclusivity", need.exclusivity),
        "p": need.p,
        "auroc_effect": cells.effect_auroc(effect, z), "lift": cells.lift(effect, z),
    }  # fmt: skip


def _need(case: Case, court: Court, mode: str, curves: Mapping[int, Sequence[GateCurve]]) -> Need:
    found = court.measured[case.expert, mode]
    keep = court.used[found.at] & (case.z[found.at] != ABSTAINS)
    at = found.at[keep]
    beside = None
    if found.beside is not None:
        other, curve = found.beside, curves[case.expert.layer][case.expert.expert]
        beside = Beside(other.effect[keep], other.gate[keep], found.gate[keep], curve)
    return needed(found.effect[keep], case.z[at] == YES, court.document[at], court.times, beside=beside)


def _curves(court: Court, mode: str) -> dict[int, list[GateCurve]]:
    """By layer: for every expert the gate curve of the co-selected ones."""
    found: dict[int, list[tuple[ndarray, ...]]] = {}
    for (expert, of_mode), own in court.measured.items():
        if of_mode == mode and (other := own.beside) is not None:
            keep = court.used[own.at]
            columns = (other.expert, other.gate, other.effect, court.document[own.at])
            found.setdefault(expert.layer, []).append(tuple(column[keep] for column in columns))
    size = {"n_documents": court.n_documents}
    return {
        layer: GateCurve.of_layer(
            *map(np.concatenate, zip(*parts, strict=True)), n_experts=len(court.load[layer]), **size
        )
        for layer, parts in found.items()
    }


def _assignments(cases: Sequence[Case], court: Court) -> pd.DataFrame:
    """p of the assignment of real labels, by layer and mode."""
    rows = []
    real = [c for c in cases if c.kind == REAL and (c.z != ABSTAINS).any()]
    for layer in sorted({c.expert.layer for c in real}):
        here = [c for c in real if c.expert.layer == layer]
        if len(here) < 2:
            continue
        z = np.stack([c.z[court.used] == YES for c in here], axis=1)
        strata = load_strata(np.array([court.load[layer][c.expert.expert] for c in here]))
        for mode in court.modes:
            effects = np.stack([court.everywhere(c.expert, mode)[court.used] for c in here], axis=1)
            matrix = standardised_effects(effects, z, court.document[court.used], court.n_documents)
            found = assignment(matrix, stratum=strata, seed=court.seed)
            rows.append((REAL, layer, mode, found.p, found.p_floor))
    return pd.DataFrame(rows, columns=["label_kind", "layer", "mode", "p_assignment", "p_assignment_floor"])


def _columns(name: str, interval: cells.Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}

"""``validation_table(...)``: from cases and measured effects to one row per (label, mode), and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.causal.trial import cells
from moe_lens.causal.trial.assignment import assignment, standardised_effects
from moe_lens.causal.trial.claims import REAL, Case
from moe_lens.causal.trial.judge import NOT_ASKED, YES
from moe_lens.causal.trial.matching import load_matched, load_strata
from moe_lens.causal.trial.need import Beside, GateCurve, Need, needed
from moe_lens.causal.trial.verdict import VERDICT_MODES, Evidence, exclusive, q_values, verdict

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.causal.trial.measured import Measured
    from moe_lens.types import ExpertAddress

VALIDATION_COLUMNS = (
    "label_kind", "layer", "expert", "facet", "mode", "routing", "label", "split", "horizon", "positions", "n_docs",
    *(f"n_tokens_{cell}" for cell in cells.CELLS), *(f"n_docs_{cell}" for cell in ("z1", "r1", "z1r1", "z0r1")),
    "judge", "abstained", "load", "gate_mass", "contrast", "contrast_routed", "specificity", "n_controls",
    *(f"effect_{cell}{end}" for cell in ("z1r1", "z0r1") for end in ("", "_low", "_high")), "need", "need_low",
    "need_high", "basis", "gate_advantage", "exclusivity", "exclusivity_low", "exclusivity_high", "p", "q",
    "need_8", "contrast_8", "auroc_routing", "auroc_routing_low", "auroc_routing_high", "auroc_effect", "pr_auc",
    "dose_response", "lift", "replaceability", "kappa_judge", "p_assignment", "p_assignment_floor", "exclusive",
    "verdict",
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
    later: Bool[ndarray, "prediction"]
    """Of these, with the secondary horizon of 8 before them."""
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

    def everywhere(self, expert: ExpertAddress, mode: str, *, later: bool = False) -> Float[ndarray, "prediction"]:
        return self.measured[expert, mode].everywhere(len(self.document), later=later)

    def measured_in(self, layer: int) -> list[ExpertAddress]:
        return sorted({expert for expert, _ in self.measured if expert.layer == layer})


def validation_table(cases: Sequence[Case], court: Court, constants: Mapping[str, Any]) -> pd.DataFrame:
    """One row per case and mode, `VALIDATION_COLUMNS`; every row of a case has its one verdict.

    q is over the powered labels of one kind under one mode, so a kind of false labels is held against itself.

    Args:
        constants: columns with one value: routing, split, horizon, positions.
    """
    curves = {mode: _curves(court, mode) for mode in court.modes}
    curves_8 = {mode: _curves(court, mode, later=True) for mode in court.modes}
    evidence, rows, needs = [], [], []
    for case in cases:
        found, shared = _evidence(case, court)
        evidence.append(found)
        needs.append({mode: _need(case, court, mode, curves[mode]) for mode in court.modes})
        for mode in court.modes:
            later = {"need_8": _need(case, court, mode, curves_8[mode], later=True).need.value}
            rows.append({**constants, **shared, **_effects(case, court, mode, needs[-1][mode]), **later})
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
    judged, asked = court.used & (case.z >= 0), court.used & (case.z != NOT_ASKED)
    visited = np.zeros(len(judged), bool)
    visited[court.measured[case.expert, court.modes[0]].at] = True
    z, r = case.z[judged] == YES, visited[judged]
    counts = cells.cell_counts(z, r, court.document[judged], court.n_documents)
    has = {"z1": counts[:, :2], "r1": counts[:, [0, 2]], "z1r1": counts[:, :1], "z0r1": counts[:, 2:3]}
    documents = {name: int((part.sum(1) > 0).sum()) for name, part in has.items()}
    abstained = float(1 - judged.sum() / max(asked.sum(), 1))
    routing = cells.routing_auroc(counts, court.times)
    found = Evidence(documents["z1"], documents["r1"], int((visited & court.used).sum()), abstained, routing)
    row = {
        "label_kind": case.kind, "layer": case.expert.layer, "expert": case.expert.expert, "facet": case.facet,
        "label": case.label, "n_docs": court.n_documents, "judge": case.judge, "abstained": abstained,
        "kappa_judge": case.kappa,
        **{f"n_tokens_{name}": int(n) for name, n in zip(cells.CELLS, counts.sum(0), strict=True)},
        **{f"n_docs_{name}": n for name, n in documents.items()},
        "load": int(court.load[case.expert.layer][case.expert.expert]),
        "gate_mass": float(court.mass[case.expert.layer][case.expert.expert]),
        "replaceability": _replaceability(case, court), **_columns("auroc_routing", routing),
    }  # fmt: skip
    return found, row


def _replaceability(case: Case, court: Court) -> float:
    """NaN without the modes that it compares."""
    zero, refilled = (court.measured.get((case.expert, mode)) for mode in ("zero", "mask_refill_keep"))
    if zero is None or refilled is None:
        return np.nan
    holds = court.used[zero.at] & (case.z[zero.at] == YES)
    return cells.replaceability(zero.effect[holds], refilled.effect[holds], court.document[zero.at[holds]])


def _effects(case: Case, court: Court, mode: str, need: Need) -> dict[str, Any]:
    """Columns of one mode."""
    judged = court.used & (case.z >= 0)
    z, effect = case.z[judged] == YES, court.everywhere(case.expert, mode)[judged]
    weight = None if case.weight is None else case.weight[judged]
    layer, own = case.expert.layer, case.expert.expert
    others = court.measured_in(layer)
    matched = load_matched(own, court.load[layer], court.mass[layer], among=[e.expert for e in others])
    controls = [cells.contrast(court.everywhere(e, mode)[judged], z, weight) for e in others if e.expert in matched]
    at = court.measured[case.expert, mode].at
    visited = np.zeros(len(judged), bool)
    visited[at] = True
    c = cells.contrast(effect, z, weight)
    auroc, average_precision = cells.effect_ranking(effect, z, weight)
    later = judged & court.later
    w = None if case.weight is None else case.weight[later]
    effect_8 = court.everywhere(case.expert, mode, later=True)[later]
    graded = np.nan
    if case.grade is not None:
        graded = cells.dose_response(effect, case.grade[judged], weight)
    return {
        "mode": mode, "contrast": c, "contrast_routed": cells.conditional_contrast(effect, z, visited[judged]),
        "specificity": cells.specificity(c, controls), "n_controls": len(controls), **_columns("need", need.need),
        **_columns("effect_z1r1", need.effect), **_columns("effect_z0r1", need.effect_off),
        "basis": need.basis, "gate_advantage": need.gate_advantage, **_columns("exclusivity", need.exclusivity),
        "p": need.p, "contrast_8": cells.contrast(effect_8, case.z[later] == YES, w), "auroc_effect": auroc,
        "pr_auc": average_precision, "dose_response": graded, "lift": cells.lift(effect, z, weight),
    }  # fmt: skip


def _need(
    case: Case, court: Court, mode: str, curves: Mapping[int, Sequence[GateCurve]], *, later: bool = False
) -> Need:
    """At the horizon of the trial with intervals, or at the secondary one without."""
    found = court.measured[case.expert, mode]
    used, times = (court.later, np.ones((1, court.n_documents))) if later else (court.used, court.times)
    keep = used[found.at] & (case.z[found.at] >= 0)
    at, beside = found.at[keep], None
    if found.beside is not None:
        curve = curves[case.expert.layer][case.expert.expert]
        effect = found.beside.effect_8 if later else found.beside.effect
        beside = Beside(effect[keep], found.beside.gate[keep], found.gate[keep], curve)
    own = found.effect_8 if later else found.effect
    return needed(own[keep], case.z[at] == YES, court.document[at], times, beside=beside)


def _curves(court: Court, mode: str, *, later: bool = False) -> dict[int, list[GateCurve]]:
    """By layer: for every expert the gate curve of the co-selected ones."""
    found: dict[int, list[tuple[ndarray, ...]]] = {}
    for (expert, of_mode), own in court.measured.items():
        if of_mode == mode and (other := own.beside) is not None:
            keep = (court.later if later else court.used)[own.at]
            effect = other.effect_8 if later else other.effect
            columns = (other.expert, other.gate, effect, court.document[own.at])
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
    real = [c for c in cases if c.kind == REAL and (c.z >= 0).any()]
    for layer in sorted({c.expert.layer for c in real}):
        here = [c for c in real if c.expert.layer == layer]
        if len(here) < 2:
            continue
        z = np.stack([c.z[court.used] == YES for c in here], axis=1)
        weight = np.stack([(c.z >= 0) * (1.0 if c.weight is None else c.weight) for c in here], axis=1)
        strata = load_strata(np.array([court.load[layer][c.expert.expert] for c in here]))
        for mode in court.modes:
            effects = np.stack([court.everywhere(c.expert, mode)[court.used] for c in here], axis=1)
            matrix = standardised_effects(effects, z, court.document[court.used], weight[court.used])
            found = assignment(matrix, stratum=strata, seed=court.seed)
            rows.append((REAL, layer, mode, found.p, found.p_floor))
    return pd.DataFrame(rows, columns=["label_kind", "layer", "mode", "p_assignment", "p_assignment_floor"])


def _columns(name: str, interval: cells.Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}

"""The comparison with a dense model, arm by arm (METRICS 1.3; ``moe_lens.probing.arms``).

Intervals resample whole test documents, the same ones for every arm and both models, so that arms and models can
be subtracted draw by draw. They are conditional on the fitted probes and on the chosen cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.probing.arms import LADDER, METRICS, REGISTRY, Arm, Estimates, ModelScores, Part
from moe_lens.stats import document_multiplicities, percentile_interval
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from moe_lens.corpus.concepts import Concept

MEAN = "__mean__"


def compare(
    moe: Sequence[ModelScores],
    dense: Sequence[ModelScores],
    concepts: Sequence[Concept],
    test_documents: Sequence[Int[ndarray, "document"]],
    *,
    joint: Mapping[str, Mapping[str, Sequence[Estimates]]] | None = None,
    n_resamples: int = 1000,
) -> pd.DataFrame:
    """All arms, metrics, concepts and k in one tidy table (``comparison.parquet``).

    Args:
        moe: scores of the MoE, one per seed.
        dense: scores of the dense baseline in the same order; empty when there is none.
        test_documents: documents of the test split, one array per seed.
        joint: arms that score both models together: name, then role (``moe``, ``dense``), then one per seed. Their
            draws must be paired between the roles.

    ``chance_moe`` and ``chance_dense`` are what a probe without any neuron scores in the same place: the
    always-positive F1, 2/3 for the balanced F1, and .5 for AUROC. ``one_cell_moe`` and ``one_cell_dense`` are what
    ``homogeneous`` expects of a cell without any search. ``routing_only`` is the same at every k. Concept
    ``__mean__`` averages over concept groups, so that duplicates count once, and over the same concepts in every
    arm: those that ``raw`` could score in both models. An arm that was not run has no rows.

    A positive gap in ``raw`` shows that a larger search found a better test score; it does not show that the
    MoE's neurons are cleaner. ``held_out`` removes the reuse of test data, not the larger choice of cells.
    """
    rows: list[dict[str, Any]] = []
    averaged: dict[tuple[str, int], set[str]] = {}
    group_of = {c.name: c.group or c.name for c in concepts}
    ks = sorted(set(moe[0].cells.k))
    by_arm = dict(joint or {})
    for arm in REGISTRY.values():
        both = {role: _estimates(arm, m, test_documents, n_resamples) for role, m in (("moe", moe), ("dense", dense))}
        if all(len(found) == len(models) for found, models in zip(both.values(), (moe, dense), strict=True)):
            by_arm[arm.name] = {role: found for role, found in both.items() if found}
    for arm in sorted(by_arm, key=LADDER.index):
        both = {role: _side(found) for role, found in by_arm[arm].items()}
        for metric in METRICS:
            sides = {role: side[metric] for role, side in both.items()}
            for k in ks:
                per_concept = [_row(arm, metric, name, k, sides) for name in group_of]
                rows += [row for row, _ in per_concept]
                scored = averaged.setdefault((metric, k), _scored([row for row, _ in per_concept]))
                kept = [(row, found) for row, found in per_concept if row["concept"] in scored]
                rows.append(_mean_row(arm, metric, k, kept, group_of))
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Estimate:
    """One metric of one (concept, k) in one model, over seeds."""

    value: Float[ndarray, "seed"]
    draws: Float[ndarray, "resample"]
    chance: float
    n_cells: int
    n_neurons: int
    one_cell: float


_Side = dict[str, dict[tuple[str, int], _Estimate]]


def _estimates(
    arm: Arm, scores: Sequence[ModelScores], test_documents: Sequence[Int[ndarray, "document"]], n_resamples: int
) -> list[Estimates]:
    """One arm of one model, per seed; seeds that the arm was not run under are missing."""
    out = []
    for model, documents in zip(scores, test_documents[: len(scores)], strict=True):
        times = document_multiplicities(len(documents), n_resamples, seed=model.seed).astype(np.float64)
        out.append(arm.estimates(model, documents, times))
    return [found for found in out if found is not None]


def _side(seeds: Sequence[Estimates]) -> _Side:
    """One arm of one model, seeds put together, by metric and (concept, k)."""
    parts: dict[str, dict[tuple[str, int], list[Part]]] = {metric: {} for metric in METRICS}
    for found in seeds:
        for metric, by_key in found.items():
            for key, part in by_key.items():
                parts[metric].setdefault(key, []).append(part)
    return {metric: {key: _join(found) for key, found in by_key.items()} for metric, by_key in parts.items()}


def _join(parts: Sequence[Part]) -> _Estimate:
    last = parts[-1]
    return _Estimate(
        np.array([p.value for p in parts]), np.concatenate([p.draws for p in parts]),
        float(np.mean([p.chance for p in parts])), last.n_cells, last.n_neurons,
        float(np.mean([p.one_cell for p in parts])),
    )  # fmt: skip


def _row(
    arm: str, metric: str, concept: str, k: int, sides: Mapping[str, Mapping[tuple[str, int], _Estimate]]
) -> tuple[dict[str, Any], dict[str, _Estimate]]:
    found = {role: side[concept, k] for role, side in sides.items() if (concept, k) in side}
    return _fill(arm, metric, concept, k, found, complete=len(found) == len(sides)), found


def _fill(
    arm: str, metric: str, concept: str, k: int, found: Mapping[str, _Estimate], *, complete: bool
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "concept": concept, "k": k, "metric": metric}
    for role in ("moe", "dense"):
        estimate = found.get(role)
        low, high = percentile_interval(estimate.draws) if estimate else (np.nan, np.nan)
        row |= {
            role: float(estimate.value.mean()) if estimate else np.nan,
            f"{role}_low": float(low), f"{role}_high": float(high),
            f"chance_{role}": estimate.chance if estimate else np.nan,
            f"one_cell_{role}": estimate.one_cell if estimate else np.nan,
            f"n_cells_{role}": estimate.n_cells if estimate else 0,
            f"n_distinct_neurons_{role}": estimate.n_neurons if estimate else 0,
        }  # fmt: skip
    gaps, low, high = np.array([np.nan]), np.nan, np.nan
    if len(found) == 2 and len(found["moe"].value) == len(found["dense"].value):
        gaps = found["moe"].value - found["dense"].value
        low, high = percentile_interval(found["moe"].draws - found["dense"].draws)
    n_seeds = max((len(e.value) for e in found.values()), default=0)
    return row | {
        "gap": float(gaps.mean()), "ci_low": float(low), "ci_high": float(high),
        "p_value": np.nan, "null_mean": np.nan, "n_seeds": n_seeds,
        "sd_seeds": float(gaps.std(ddof=1)) if len(gaps) > 1 else np.nan,
        "status": (Status.OK if complete and found else Status.TOO_FEW).value,
    }  # fmt: skip


def _scored(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Concepts with a number in every model and seed."""
    n_seeds = max((row["n_seeds"] for row in rows), default=0)
    return {row["concept"] for row in rows if row["status"] == Status.OK.value and row["n_seeds"] == n_seeds}


def _mean_row(
    arm: str,
    metric: str,
    k: int,
    per_concept: Sequence[tuple[dict[str, Any], dict[str, _Estimate]]],
    group_of: Mapping[str, str],
) -> dict[str, Any]:
    """Average over concept groups, of the concepts that every model could be scored on."""
    scored = _scored([row for row, _ in per_concept])
    groups: dict[str, list[dict[str, _Estimate]]] = {}
    for row, found in per_concept:
        if row["concept"] in scored:
            groups.setdefault(group_of[row["concept"]], []).append(found)
    roles = {role for members in groups.values() for found in members for role in found}
    mean = {role: _average([[f[role] for f in members] for members in groups.values()]) for role in roles}
    row = _fill(arm, metric, MEAN, k, mean, complete=True)
    return row | {"n_concepts": len(groups)}


def _average(groups: Sequence[Sequence[_Estimate]]) -> _Estimate:
    def mean(get: Any) -> Any:
        return np.mean([np.mean([get(e) for e in members], axis=0) for members in groups], axis=0)

    everyone = [e for members in groups for e in members]
    return _Estimate(
        mean(lambda e: e.value), mean(lambda e: e.draws), float(mean(lambda e: e.chance)),
        max(e.n_cells for e in everyone), max(e.n_neurons for e in everyone), float(mean(lambda e: e.one_cell)),
    )  # fmt: skip

"""The comparison with a dense model, arm by arm (METRICS 1.3).

``raw``       the best cell by test score, as arXiv 2604.02178 reports it: search and scoring share the test data.
``held_out``  the cell is chosen by AUROC on validate and scored once on test.

Intervals resample whole test documents, the same ones for both models. They are conditional on the fitted
probes and on the chosen cells: they show how far the gap depends on the documents, not on the search. They are
percentile intervals; where a concept has few test documents, F1 is concave in what is drawn, and most draws lie
below the point estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.probing.evaluate import COUNTS
from moe_lens.stats import document_multiplicities, f1_balanced, percentile_interval
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from moe_lens.corpus.concepts import Concept

ARMS = ("raw", "held_out")
METRICS = ("f1", "f1_balanced", "auroc")
MEAN = "__mean__"
WinnerKey = tuple[int, int, str, int]  # layer, expert, concept, k


@dataclass(frozen=True)
class ModelScores:
    """All probes of one model under one seed, and per-document counts of the cells an arm chose."""

    role: str
    seed: int
    d_ff: int
    cells: pd.DataFrame
    counts: Mapping[WinnerKey, Float[ndarray, "document count"]]
    """Keyed by (layer, expert, concept, k); columns are ``evaluate.COUNTS``."""


def usable(cells: pd.DataFrame) -> pd.DataFrame:
    """The rows that carry numbers."""
    return cells[cells.status.isin([Status.OK.value, Status.SEPARABLE.value])]


def winners(cells: pd.DataFrame, arm: str, metric: str) -> pd.DataFrame:
    """The cell each arm reports, one row per (concept, k).

    Ties go to the larger test set, then to the lower layer and expert.
    """
    by = metric if arm == "raw" else "auroc_validate"
    ordered = usable(cells).sort_values(
        [by, "n_test", "layer", "expert"], ascending=[False, False, True, True], kind="stable"
    )
    return ordered.groupby(["concept", "k"], sort=False).head(1)


def winner_keys(cells: pd.DataFrame) -> set[WinnerKey]:
    """Every cell that some arm reports under some metric."""
    keys: set[WinnerKey] = set()
    for arm in ARMS:
        for metric in METRICS:
            best = winners(cells, arm, metric)
            keys |= set(zip(best.layer, best.expert, best.concept, best.k, strict=True))
    return keys


def compare(
    moe: Sequence[ModelScores],
    dense: Sequence[ModelScores],
    concepts: Sequence[Concept],
    test_documents: Sequence[Int[ndarray, "document"]],
    *,
    n_resamples: int = 1000,
) -> pd.DataFrame:
    """All arms, metrics, concepts and k in one tidy table (``comparison.parquet``).

    Args:
        moe: scores of the MoE, one per seed.
        dense: scores of the dense baseline in the same order; empty when there is none.
        test_documents: documents of the test split, one array per seed.

    ``chance_moe`` and ``chance_dense`` are what a probe without any neuron scores in the chosen cell: the
    always-positive F1, 2/3 for the balanced F1, and .5 for AUROC. Concept ``__mean__`` averages over concept
    groups, so that duplicates count once.

    A positive gap in ``raw`` shows that a larger search found a better test score; it does not show that the
    MoE's neurons are cleaner. ``held_out`` removes the reuse of test data, not the larger choice of cells.
    """
    rows: list[dict[str, Any]] = []
    group_of = {c.name: c.group or c.name for c in concepts}
    ks = sorted(set(moe[0].cells.k))
    for arm in ARMS:
        for metric in METRICS:
            sides = {"moe": _side(moe, arm, metric, test_documents, n_resamples)}
            if dense:
                sides["dense"] = _side(dense, arm, metric, test_documents, n_resamples)
            for k in ks:
                per_concept = [_row(arm, metric, name, k, sides) for name in group_of]
                rows += [row for row, _ in per_concept]
                rows.append(_mean_row(arm, metric, k, per_concept, group_of))
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Estimate:
    value: Float[ndarray, "seed"]
    draws: Float[ndarray, "resample"]
    chance: float
    n_cells: int
    n_neurons: int


def _side(
    scores: Sequence[ModelScores],
    arm: str,
    metric: str,
    test_documents: Sequence[Int[ndarray, "document"]],
    n_resamples: int,
) -> dict[tuple[str, int], _Estimate]:
    """Value, bootstrap draws and search size of one model, per (concept, k)."""
    parts: dict[tuple[str, int], list[tuple[float, ndarray, float]]] = {}
    cells_of: dict[tuple[str, int], int] = {}
    d_ff = scores[0].d_ff
    for model, documents in zip(scores, test_documents, strict=True):
        times = document_multiplicities(len(documents), n_resamples, seed=model.seed).astype(np.float64)
        best = winners(model.cells, arm, metric)
        if not len(best):
            continue
        sizes = usable(model.cells).groupby(["concept", "k"]).size()
        keys = list(zip(best.layer, best.expert, best.concept, best.k, strict=True))
        counts = np.stack([model.counts[key][documents] for key in keys])
        draws = resampled(counts, times, metric)
        for i, (key, value, prevalence) in enumerate(zip(keys, best[metric], best.prevalence, strict=True)):
            at = (key[2], key[3])
            chance = {"f1": 2 * prevalence / (1 + prevalence), "f1_balanced": 2 / 3, "auroc": 0.5}[metric]
            parts.setdefault(at, []).append((float(value), draws[i], float(chance)))
            cells_of[at] = int(sizes[at])
    return {
        at: _Estimate(
            np.array([p[0] for p in found]), np.concatenate([p[1] for p in found]),
            float(np.mean([p[2] for p in found])), cells_of[at], cells_of[at] * d_ff,
        )
        for at, found in parts.items()
    }  # fmt: skip


def resampled(
    counts: Float[ndarray, "winner document count"], times: Float[ndarray, "resample document"], metric: str
) -> Float[ndarray, "winner resample"]:
    """The metric of every winner under every bootstrap sample of documents.

    F1 and balanced F1 are exact; AUROC is its first-order (Hajek) expansion around the full sample, which
    needs no re-ranking. NaN where a resample holds only one class.
    """
    total = np.matmul(times, counts)
    tp, fp, fn, tn, placed_pos, placed_neg = (total[..., i] for i in range(len(COUNTS)))
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric == "f1":
            return 2 * tp / (2 * tp + fp + fn)
        if metric == "f1_balanced":
            return f1_balanced(tp / (tp + fn), fp / (fp + tn))
        full = counts.sum(1)
        area = full[:, 4] / (full[:, 0] + full[:, 2])
        return placed_pos / (tp + fn) + placed_neg / (fp + tn) - area[:, None]


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


def _mean_row(
    arm: str,
    metric: str,
    k: int,
    per_concept: Sequence[tuple[dict[str, Any], dict[str, _Estimate]]],
    group_of: Mapping[str, str],
) -> dict[str, Any]:
    """Average over concept groups, of the concepts that every model could be scored on."""
    groups: dict[str, list[dict[str, _Estimate]]] = {}
    n_seeds = max((row["n_seeds"] for row, _ in per_concept), default=0)
    for row, found in per_concept:
        if row["status"] == Status.OK.value and row["n_seeds"] == n_seeds:
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
        max(e.n_cells for e in everyone), max(e.n_neurons for e in everyone),
    )  # fmt: skip

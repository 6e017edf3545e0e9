"""Comparison rows of the ``equal_*`` arms, with intervals over draws x documents (METRICS 1.3, item 4).

A bootstrap sample draws test documents with replacement, the same for both models, and independently of them
draws of cells. The score of a sample is the mean over its draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moe_lens.probing.equal import METRICS, ROLES, EqualScores
from moe_lens.probing.matched import ARMS
from moe_lens.stats import document_multiplicities, f1_balanced, percentile_interval
from moe_lens.types import Status

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.corpus.concepts import Concept

MEAN = "__mean__"
_CHUNK = 256  # entries resampled at a time


@dataclass(frozen=True)
class EqualEstimate:
    """One model in one (arm, metric, concept, k)."""

    by_draw: Float[ndarray, "draw"]
    """NaN in draws without a pair that could be scored; the same ones in both models."""
    resampled: Float[ndarray, "resample"]
    chance: float
    n_cells: int
    """Mean over the draws that could be scored, rounded, like `n_neurons`."""
    n_neurons: int

    @property
    def value(self) -> float:
        return float(np.nanmean(self.by_draw))


Key = tuple[str, str, str, int, str]  # arm, metric, concept, k, role


def equal_estimates(
    scores: EqualScores, *, n_resamples: int = 1000, times: Float[ndarray, "resample document"] | None = None
) -> dict[Key, EqualEstimate]:
    """Score and bootstrap samples of every (arm, metric, concept, k, role) that at least half of the draws reach.

    Args:
        times: how often each of ``scores.documents`` occurs in each sample, to pair these arms with others.
    """
    if times is None:
        times = document_multiplicities(len(scores.documents), n_resamples, seed=scores.seed)
    times = np.asarray(times, np.float64)
    picked = document_multiplicities(scores.draws, len(times), seed=scores.seed + 1).astype(np.float64)
    tables = _resampled(scores.counts, times)
    found: dict[Key, EqualEstimate] = {}
    scored = scores.frame[scores.frame.entry >= 0]
    for key, rows in scored.groupby(["arm", "metric", "concept", "k", "role"], sort=False):
        if 2 * len(rows) < scores.draws:
            continue
        arm, metric, concept, k, role = cast(Key, key)
        draw = rows.draw.to_numpy()
        by_draw = np.full(scores.draws, np.nan)
        by_draw[draw] = rows.value
        weight = picked[:, draw]
        with np.errstate(invalid="ignore"):
            mean = (weight * tables[metric][rows.entry.to_numpy()].T).sum(1) / weight.sum(1)
        found[arm, metric, concept, k, role] = EqualEstimate(
            by_draw, mean, float(rows.chance.mean()), round(rows.n_cells.mean()), round(rows.n_neurons.mean())
        )
    return found


def _resampled(
    counts: Float[ndarray, "entry document count"], times: Float[ndarray, "resample document"]
) -> dict[str, Float[ndarray, "entry resample"]]:
    """Every metric under every bootstrap sample of documents; AUROC by its first-order (Hajek) expansion."""
    out = {metric: np.empty((len(counts), len(times)), np.float32) for metric in METRICS}
    for start in range(0, len(counts), _CHUNK):
        some = counts[start : start + _CHUNK].astype(np.float64)
        at = slice(start, start + len(some))
        tp, fp, fn, tn, placed_pos, placed_neg = np.moveaxis(np.matmul(times, some), -1, 0)
        full = some.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            out["f1"][at] = 2 * tp / (2 * tp + fp + fn)
            out["f1_balanced"][at] = f1_balanced(tp / (tp + fn), fp / (fp + tn))
            area = full[:, 4] / (full[:, 0] + full[:, 2])
            out["auroc"][at] = placed_pos / (tp + fn) + placed_neg / (fp + tn) - area[:, None]
    return out


def equal_comparison(
    scores: EqualScores, concepts: Sequence[Concept], *, n_resamples: int = 1000, metrics: Sequence[str] = METRICS
) -> pd.DataFrame:
    """Rows of ``comparison.parquet`` for both arms, every metric, concept and k (DESIGN 7).

    ``n_draws`` are the draws that could be scored, ``sd_draws`` the spread of their gaps. Concept ``__mean__``
    averages over concept groups, so that duplicates count once. The interval is a percentile interval over
    draws x documents; it does not hold the spread from another split of the documents, nor from another fit.
    """
    import pandas as pd

    found = equal_estimates(scores, n_resamples=n_resamples)
    group_of = {c.name: c.group or c.name for c in concepts}
    rows = []
    for arm in ARMS:
        for metric in metrics:
            for k in sorted(set(scores.frame.k)):
                sides = {
                    name: {role: found[at] for role in ROLES if (at := (arm, metric, name, k, role)) in found}
                    for name in group_of
                }
                rows += [_row(arm, metric, name, k, side) for name, side in sides.items()]
                rows.append(_mean_row(arm, metric, k, sides, group_of))
    return pd.DataFrame(rows)


def _row(arm: str, metric: str, concept: str, k: int, found: Mapping[str, EqualEstimate]) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "concept": concept, "k": k, "metric": metric}
    for role in ROLES:
        one = found.get(role)
        low, high = percentile_interval(one.resampled) if one else (np.nan, np.nan)
        row |= {
            role: one.value if one else np.nan, f"{role}_low": float(low), f"{role}_high": float(high),
            f"chance_{role}": one.chance if one else np.nan, f"n_cells_{role}": one.n_cells if one else 0,
            f"n_distinct_neurons_{role}": one.n_neurons if one else 0,
        }  # fmt: skip
    gaps, low, high = np.zeros(0), np.nan, np.nan
    if len(found) == len(ROLES):
        moe, dense = (found[role] for role in ROLES)
        gaps = moe.by_draw - dense.by_draw
        gaps = gaps[~np.isnan(gaps)]
        low, high = percentile_interval(moe.resampled - dense.resampled)
    return row | {
        "gap": float(gaps.mean()) if len(gaps) else np.nan, "ci_low": float(low), "ci_high": float(high),
        "p_value": np.nan, "null_mean": np.nan, "n_seeds": int(len(gaps) > 0), "sd_seeds": np.nan,
        "n_draws": len(gaps), "sd_draws": float(gaps.std(ddof=1)) if len(gaps) > 1 else np.nan,
        "status": (Status.OK if len(gaps) else Status.TOO_FEW).value,
    }  # fmt: skip


def _mean_row(
    arm: str, metric: str, k: int, sides: Mapping[str, Mapping[str, EqualEstimate]], group_of: Mapping[str, str]
) -> dict[str, Any]:
    """Average over the concept groups that could be scored."""
    groups: dict[str, list[Mapping[str, EqualEstimate]]] = {}
    for name, side in sides.items():
        if len(side) == len(ROLES):
            groups.setdefault(group_of[name], []).append(side)
    mean = {role: _average([[s[role] for s in members] for members in groups.values()]) for role in ROLES if groups}
    return _row(arm, metric, MEAN, k, mean) | {"n_concepts": len(groups)}


def _average(groups: Sequence[Sequence[EqualEstimate]]) -> EqualEstimate:
    weight = np.concatenate([np.full(len(members), 1 / len(members)) for members in groups])
    everyone = [one for members in groups for one in members]

    def mean(values: Sequence[Any]) -> Any:
        """Weighted, NaN left out."""
        table = np.array(values, np.float64)
        w = weight.reshape(-1, *(1,) * (table.ndim - 1)) * ~np.isnan(table)
        with np.errstate(invalid="ignore"):
            return (np.where(w > 0, table, 0) * w).sum(0) / w.sum(0)

    return EqualEstimate(
        mean([one.by_draw for one in everyone]), mean([one.resampled for one in everyone]),
        float(mean([one.chance for one in everyone])), max(one.n_cells for one in everyone),
        max(one.n_neurons for one in everyone),
    )  # fmt: skip

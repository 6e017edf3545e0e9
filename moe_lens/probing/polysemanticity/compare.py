"""MoE against dense, neurons matched on firing rate, with intervals over documents (METRICS 1.4).

1. Keep the neurons that are significant for a group.
2. Cut their firing rates into ten bins. Weight the neurons so that both models have the same share in every bin, the
   smaller of their two, scaled to 1; a bin that one model does not fill is left out.
3. Weighted means per depth; over all depths their plain mean.
4. Repeat without each of ten folds of documents, significance and all: ``SE^2 = (F - 1) / F * sum (x_f - mean)^2``, and
   an interval of Student's t with 9 degrees of freedom.

Neurons are not resampled: all of a model's are there, and they share the documents. So the intervals are for these
neurons and these concept groups on other documents. Ranks are not taken anew without a fold, and ten folds give the
interval's width itself an error of about a quarter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.probing.polysemanticity.neurons import FDR, N_FOLDS, LayerAurocs, NeuronTable, describe

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

N_BINS = 10
MEASURES = ("participation_ratio", "participation_ratio_all", "two_or_more", "selectivity", "n_groups", "firing_rate")
"""``two_or_more`` is the share of neurons with two detected groups; ``n_groups`` and ``firing_rate`` show what was
made equal."""
_ROLES = ("moe", "dense")
_T9 = 2.2621571628
"""97.5 % quantile of Student's t with N_FOLDS - 1 degrees of freedom."""


def firing_bins(rate: Float[ndarray, "neuron"], moe: Bool[ndarray, "neuron"]) -> Float[ndarray, "edge"]:
    """Inner edges of ten bins of firing rate: quantiles of both models' neurons, each model counting half."""
    sides = [np.sort(rate[side]) for side in (moe, ~moe) if side.any()]
    values = np.concatenate([np.interp(np.linspace(0, 1, 1001), np.linspace(0, 1, len(s)), s) for s in sides])
    return np.unique(np.quantile(values, np.arange(1, N_BINS) / N_BINS))


def match_weights(
    rate: Float[ndarray, "neuron"], moe: Bool[ndarray, "neuron"], edges: Float[ndarray, "edge"]
) -> Float[ndarray, "neuron"]:
    """Weights, of sum 1 in each model, under which both have the same share of neurons in every bin of firing rate.

    0 in bins that only one model fills; all 0 where no bin is shared. Within a bin rates may still differ a little.
    """
    place = np.searchsorted(edges, rate, side="right")
    counts = np.stack([np.bincount(place[side], minlength=len(edges) + 1) for side in (moe, ~moe)])
    share = (counts / np.maximum(counts.sum(1, keepdims=True), 1)).min(0)
    total = share.sum()
    if not total:
        return np.zeros(len(rate))
    return share[place] / total / np.maximum(counts[np.where(moe, 0, 1), place], 1)


@dataclass(frozen=True)
class LayerComparison:
    """One depth: the neurons with all documents, and weighted means with and without each fold."""

    neurons: NeuronTable
    weight: Float[ndarray, "neuron"]
    """After matching; NaN for neurons that are not significant."""
    means: Mapping[tuple[bool, str, str], Float[ndarray, "out"]]
    """By matched or not, measure and role."""
    counts: Mapping[tuple[bool, str], int]
    """Significant neurons that were used, by matched or not and role."""


def compare_layer(layer: LayerAurocs) -> LayerComparison:
    """Describe the neurons of one depth and compare the models; without a baseline only the MoE's means are known."""
    moe, rate = layer.moe, layer.firing_rate
    full = describe(layer)
    real = np.nan_to_num(full.q_value, nan=1.0) <= FDR
    edges = firing_bins(rate[real], moe[real]) if real.any() else np.zeros(0)
    both = bool(moe.any() and (~moe).any())
    means: dict[tuple[bool, str, str], Float[ndarray, "out"]] = {
        (matched, measure, role): np.full(N_FOLDS + 1, np.nan)
        for matched in (False, True) for measure in MEASURES for role in _ROLES
    }  # fmt: skip
    weight, counts = np.full(len(moe), np.nan), {}
    for out in range(N_FOLDS + 1):
        table = full if out == 0 else describe(layer, out)
        kept = np.flatnonzero(np.nan_to_num(table.q_value, nan=1.0) <= FDR)
        matching = match_weights(rate[kept], moe[kept], edges) if both else np.ones(len(kept))
        if out == 0:
            weight[kept] = matching
        values = _values(table, rate)
        for matched, given in ((False, np.ones(len(kept))), (True, matching)):
            for role, side in zip(_ROLES, (moe[kept], ~moe[kept]), strict=True):
                if out == 0:
                    counts[matched, role] = int((given[side] > 0).sum())
                for measure in MEASURES:
                    means[matched, measure, role][out] = _mean(values[measure][kept[side]], given[side])
    return LayerComparison(full, weight, means, counts)


def _values(table: NeuronTable, rate: Float[ndarray, "neuron"]) -> dict[str, Float[ndarray, "neuron"]]:
    return {
        "participation_ratio": table.participation_ratio, "participation_ratio_all": table.participation_ratio_all,
        "two_or_more": (table.n_groups_detected >= 2).astype(float), "selectivity": table.selectivity,
        "n_groups": table.n_groups.astype(float), "firing_rate": rate,
    }  # fmt: skip


def _mean(value: Float[ndarray, "neuron"], weight: Float[ndarray, "neuron"]) -> float:
    known = np.isfinite(value)
    total = weight[known].sum()
    return float((value[known] * weight[known]).sum() / total) if total > 0 else np.nan


def layer_table(found: Sequence[LayerComparison], layers: Sequence[tuple[int, int | None]]) -> pd.DataFrame:
    """One row per depth, measure and matched or not, then the same over all depths (``pair`` -1)."""
    rows = []
    n_models = 1 if all(dense is None for _, dense in layers) else 2
    for matched in (True, False):
        for measure in MEASURES:
            sides = [{role: c.means[matched, measure, role] for role in _ROLES} for c in found]
            for pair, (both, c, at) in enumerate(zip(sides, found, layers, strict=True)):
                rows.append(_row(pair, at, measure, matched, both, [c]))
            used = [i for i, s in enumerate(sides) if sum(np.isfinite(s[role][0]) for role in _ROLES) == n_models]
            mean = {role: _mean_over([sides[i][role] for i in used]) for role in _ROLES}
            rows.append(_row(-1, (None, None), measure, matched, mean, [found[i] for i in used]))
    frame = pd.DataFrame(rows)
    frame[["layer", "dense_layer"]] = frame[["layer", "dense_layer"]].astype("Int64")
    return frame


def _mean_over(values: Sequence[Float[ndarray, "out"]]) -> Float[ndarray, "out"]:
    """Mean over depths, of those that are known in each leave-out."""
    if not len(values):
        return np.full(N_FOLDS + 1, np.nan)
    known = np.isfinite(values)
    n = known.sum(0)
    return np.divide(np.where(known, values, 0).sum(0), n, out=np.full(N_FOLDS + 1, np.nan), where=n > 0)


def _row(
    pair: int, at: tuple[int | None, int | None], measure: str, matched: bool,
    both: Mapping[str, Float[ndarray, "out"]], used: Sequence[LayerComparison],
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {
        "pair": pair, "layer": at[0], "dense_layer": at[1], "measure": measure, "matched": matched,
    }  # fmt: skip
    for role in _ROLES:
        row[role] = both[role][0]
        row[f"{role}_low"], row[f"{role}_high"] = jackknife_interval(both[role])
    gap = both["moe"] - both["dense"]
    row["gap"] = gap[0]
    row["ci_low"], row["ci_high"] = jackknife_interval(gap)
    for role in _ROLES:
        row[f"n_{role}"] = sum(c.counts[matched, role] for c in used)
    return row


def jackknife_interval(values: Float[ndarray, "out"]) -> tuple[float, float]:
    """95 % interval from the value with all folds and those without each in turn; NaN where one is unknown."""
    without = values[1:]
    se = np.sqrt((len(without) - 1) / len(without) * np.square(without - without.mean()).sum())
    return float(values[0] - _T9 * se), float(values[0] + _T9 * se)

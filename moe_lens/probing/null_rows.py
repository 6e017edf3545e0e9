"""Rows of arm ``null``: what the pipeline reports when labels are exchanged (METRICS 1.3, item 7).

``moe`` and ``dense`` are the mean over permutations of the held-out score of the chosen cell, ``gap`` of their
difference; ``..._low`` and ``..._high``, ``ci_low`` and ``ci_high`` are the range that holds 95 % of the
``n_permutations``. Rows of metric ``auroc`` at k = 1 carry p-values of either model's studentised maximum over cells:
``p_value`` and ``p_value_dense``, within the concept; ``q_value`` by Benjamini-Hochberg and ``p_adjusted`` by max-T
over the concepts, for the MoE. In row ``__mean__`` the p-values are those of the mean held-out score. ``kept`` is the
share of labels that an exchange leaves where they were; the more, the less power.

At k > 1 nothing is tested: the rows say where scores fall, and only tests at k = 1 are counted in a family. Both the
real run and the null search the same few cells there (`moe_lens.probing.nulls`), so a band belongs to its own k;
``n_cells_moe`` and ``n_cells_dense`` are those of the concept, at k = 1 those of any.

Rows of arm ``held_out`` get ``null_mean``, at k = 1 also ``p_value``, of the MoE from here: the p of the studentised
maximum over cells, not of the one held-out score.

The null says that activations and routing tell nothing about the concept. To reject it is not to show that two
models differ.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.stats import benjamini_hochberg, percentile_interval, permutation_p
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.probing.nulls import NullDistribution

METRICS = ("f1_balanced", "auroc")
"""Metrics that do not move with the prevalence, which an exchange changes in every cell."""
_MEAN = "__mean__"


def null_rows(
    rows: Sequence[Mapping[str, Any]],
    nulls: Mapping[str, NullDistribution],
    group_of: Mapping[str, str],
    averaged: Mapping[str, Collection[str]],
    types: Collection[str] = (),
    *,
    k: int = 1,
) -> list[dict[str, Any]]:
    """The comparison's rows with those of the null at `k` behind them, and what ``held_out`` says of the null.

    Args:
        nulls: by role, of this `k`.
        averaged: concepts that the mean is over, by metric.
        types: concepts that are functions of the token type. Their p-values come out too small (see
            `exchange_labels`): they get no q-value and no adjusted p, and are no part of the others' families.
    """
    out = []
    scored = {row["concept"] for row in rows if row["arm"] == "held_out" and row["k"] == k and np.isfinite(row["moe"])}
    tested = _tests(nulls, scored, types) if k == 1 else {}
    kept = dict(zip(nulls["moe"].names, nulls["moe"].kept, strict=True))
    for metric in METRICS:
        for concept in group_of:
            row = _row(metric, concept, k, {role: _scores(null, metric, [concept], {}) for role, null in nulls.items()})
            if concept not in scored:
                row["status"] = Status.TOO_FEW.value
            if metric == "auroc":
                row |= {name: by_concept[concept] for name, by_concept in tested.items()}
            out.append(row | {"kept": kept[concept]} | _sizes(nulls, [concept], k))
        among = sorted(averaged[metric])
        mean = {role: _scores(null, metric, among, group_of) for role, null in nulls.items()}
        row = _row(metric, _MEAN, k, mean) | {"n_concepts": len({group_of[name] for name in among})}
        if k == 1:
            for role, (observed, null) in mean.items():
                row[f"p_value{_suffix(role)}"] = float(permutation_p(np.array([observed]), null[:, None])[0])
        out.append(row | _sizes(nulls, among, k))
    by_key = {(row["concept"], row["metric"], row["k"]): row for row in out}
    return [_with_null(row, by_key) for row in rows] + out


def _tests(
    nulls: Mapping[str, NullDistribution], scored: Collection[str], types: Collection[str]
) -> dict[str, dict[str, float]]:
    """p, q and adjusted p by concept."""
    p = {f"p_value{_suffix(role)}": _known_p(null, scored) for role, null in nulls.items()}
    known = p["p_value"]
    family = np.array([name in scored and name not in types for name in known])
    q = benjamini_hochberg(np.where(family, list(known.values()), np.nan))
    adjusted = nulls["moe"].adjusted(family)
    return {**p, "q_value": dict(zip(known, q, strict=True)), "p_adjusted": dict(zip(known, adjusted, strict=True))}


def _sizes(nulls: Mapping[str, NullDistribution], concepts: Sequence[str], k: int) -> dict[str, int]:
    """What a row rests on; cells where any concept has a probe at k = 1, where one of `concepts` does beyond."""
    sizes = {"n_permutations": min(null.n_permutations for null in nulls.values()), "n_draws": 0}
    for role in ("moe", "dense"):
        sizes |= {f"n_distinct_neurons_{role}": 0, f"n_cells_{role}": 0}
        if (null := nulls.get(role)) is not None:
            counted = np.zeros(len(null.names), int) if null.n_cells is None else null.n_cells
            most = max((int(counted[null.names.index(name)]) for name in concepts), default=0)
            sizes[f"n_cells_{role}"] = len(null.address) if k == 1 else most
    return sizes


def _known_p(null: NullDistribution, scored: Collection[str]) -> dict[str, float]:
    """p of the studentised maximum, for concepts that some cell was scored on."""
    return {name: float(p) if name in scored else np.nan for name, p in zip(null.names, null.p, strict=True)}


def mean_null_gap(
    nulls: Mapping[str, NullDistribution], metric: str, concepts: Collection[str], group_of: Mapping[str, str]
) -> Float[ndarray, "permutation"]:
    """The mean gap over concept groups under each permutation; both models share the exchanges."""
    moe, dense = (_scores(nulls[role], metric, sorted(concepts), group_of)[1] for role in ("moe", "dense"))
    return moe - dense


def _suffix(role: str) -> str:
    return "" if role == "moe" else f"_{role}"


def _scores(
    null: NullDistribution, metric: str, concepts: Sequence[str], group_of: Mapping[str, str]
) -> tuple[float, Float[ndarray, "permutation"]]:
    """Held-out score under the true labels and under each permutation: the mean over groups of concepts."""
    groups: dict[str, list[int]] = {}
    for name in concepts:
        groups.setdefault(group_of.get(name, name), []).append(null.names.index(name))
    every = np.concatenate([getattr(null.observed, metric), getattr(null.null, metric)])
    if not groups:
        return np.nan, np.full(len(every) - 1, np.nan)
    table = np.stack([_known_mean(every[:, members]) for members in groups.values()], 1)
    mean = _known_mean(table)
    return float(mean[0]), mean[1:]


def _known_mean(values: Float[ndarray, "row column"]) -> Float[ndarray, "row"]:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


def _row(
    metric: str, concept: str, k: int, found: Mapping[str, tuple[float, Float[ndarray, "permutation"]]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": "null", "concept": concept, "k": k, "metric": metric}
    for role in ("moe", "dense"):
        row |= _band(found[role][1] if role in found else None, role, f"{role}_low", f"{role}_high")
    gap = found["moe"][1] - found["dense"][1] if "dense" in found else None
    row |= _band(gap, "gap", "ci_low", "ci_high")
    missing = any(np.isnan(observed) for observed, _ in found.values())
    return row | {"n_seeds": 1, "status": (Status.TOO_FEW if missing else Status.OK).value}


def _band(values: Float[ndarray, "permutation"] | None, mean: str, low: str, high: str) -> dict[str, float]:
    if values is None or not np.isfinite(values).any():
        return dict.fromkeys((mean, low, high), np.nan)
    bounds = percentile_interval(values)
    return {mean: float(np.nanmean(values)), low: float(bounds[0]), high: float(bounds[1])}


def _with_null(row: Mapping[str, Any], nulls: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> dict[str, Any]:
    key = row["concept"], row["metric"], row["k"]
    if row["arm"] != "held_out" or key not in nulls:
        return dict(row)
    null = nulls[key]
    return {**row, "null_mean": null["moe"], "p_value": null.get("p_value", np.nan)}

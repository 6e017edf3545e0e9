"""The comparison with a dense model, arm by arm (METRICS 1.3; ``moe_lens.probing.arms``).

Intervals resample whole test documents, the same ones for every arm and both models, so that arms and models can
be subtracted draw by draw. They are bias-corrected and accelerated (BCa; percentile intervals over several splits),
and conditional on the fitted probes and on the chosen cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.probing.arms import LADDER, METRICS, REGISTRY, Arm, Estimates, ModelScores, Part
from moe_lens.probing.null_rows import null_rows
from moe_lens.stats import Bootstrap, average_over_groups, document_weights
from moe_lens.types import Granularity, Status

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float, Int
    from numpy import ndarray

    from moe_lens.corpus.concepts import Concept
    from moe_lens.probing.nulls import NullDistribution

MEAN = "__mean__"
ROLES = ("moe", "dense")
SEARCH = "search"
"""Name of the part of ``homogeneous`` that picking the best cell makes, among the gaps."""


@dataclass(frozen=True)
class Estimate:
    """One metric of one (concept, k) in one model, over seeds."""

    value: Float[ndarray, "seed"]
    boot: Bootstrap
    """The mean over seeds. Draws of several seeds follow one another; there is a jackknife for one seed only."""
    chance: float
    n_cells: int
    n_neurons: int
    n_tokens: float
    one_cell: float
    lift: Bootstrap | None
    """`boot` minus what a single cell is expected to score."""
    by_draw: Float[ndarray, "draw"] | None


Side = dict[str, dict[tuple[str, int], Estimate]]
"""By metric, then by (concept, k)."""
ArmScores = dict[str, dict[str, Side]]
"""By arm, then by role. Also holds what only figures show, such as arms with the cell chosen on test."""


def compare(
    moe: Sequence[ModelScores],
    dense: Sequence[ModelScores],
    concepts: Sequence[Concept],
    test_documents: Sequence[Int[ndarray, "document"]],
    *,
    joint: Mapping[str, Mapping[str, Sequence[Estimates]]] | None = None,
    n_resamples: int = 1000,
) -> pd.DataFrame:
    """All arms, metrics, concepts and k in one tidy table; see `arm_scores` and `comparison_table`."""
    scores = arm_scores(moe, dense, test_documents, joint=joint, n_resamples=n_resamples)
    return comparison_table(scores, moe, dense, concepts)


def arm_scores(
    moe: Sequence[ModelScores],
    dense: Sequence[ModelScores],
    test_documents: Sequence[Int[ndarray, "document"]],
    *,
    joint: Mapping[str, Mapping[str, Sequence[Estimates]]] | None = None,
    n_resamples: int = 1000,
) -> ArmScores:
    """Every arm of both models with its bootstrap samples.

    Args:
        moe: scores of the MoE, one per seed.
        dense: scores of the dense baseline in the same order; empty when there is none.
        test_documents: documents of the test split, one array per seed.
        joint: arms that score both models together: name, then role (``moe``, ``dense``), then one per seed, under
            the weights that `document_weights` gives for the seed.
    """
    by_arm: dict[str, dict[str, Sequence[Estimates]]] = {name: dict(both) for name, both in (joint or {}).items()}
    sides = dict(zip(ROLES, (moe, dense), strict=True))
    for arm in REGISTRY.values():
        both = {role: _estimates(arm, models, test_documents, n_resamples) for role, models in sides.items()}
        if all(len(both[role]) == len(models) for role, models in sides.items()):
            by_arm[arm.name] = {role: found for role, found in both.items() if found}
    return {
        name: {role: _side(found, n_resamples) for role, found in both.items()}
        for name, both in sorted(by_arm.items(), key=lambda item: (*LADDER, item[0]).index(item[0]))
    }


def comparison_table(
    scores: ArmScores, moe: Sequence[ModelScores], dense: Sequence[ModelScores], concepts: Sequence[Concept]
) -> pd.DataFrame:
    """The rows of ``comparison.parquet``.

    ``chance_moe`` and ``chance_dense`` are what a probe without any neuron scores in the same place: the
    always-positive F1, 2/3 for the balanced F1, .5 for AUROC, and in ``whole_population`` the score of the routing
    alone. ``one_cell_moe`` and ``one_cell_dense`` are what ``homogeneous`` expects of a cell without any search.
    ``n_tokens_moe`` and ``n_tokens_dense`` are the test tokens behind the chosen cell. ``routing_only`` is the same
    at every k. ``sd_seeds`` is the spread of the gap over document splits,
    ``sd_draws`` that over random draws of cells.

    Concept ``__mean__`` averages over concept groups, so that duplicates count once, and over the same concepts in
    every arm: those that all arms with any score could score in both models, so that arms can be subtracted. Its
    ``ci_low_groups`` and ``ci_high_groups`` resample concept groups as well as documents. An arm that was not run
    has no rows. The columns of arm ``null`` are explained in `probing.null_rows`.

    A positive gap in ``raw`` shows that a larger search found a better test score; it does not show that the
    MoE's neurons are cleaner. ``held_out`` removes the reuse of test data, not the larger choice of cells. No arm
    shows that a model uses a neuron for the concept. Intervals need documents: with positives in 5, 10 or 25 of 100
    test documents a 95 % interval of balanced F1 covers 88, 92 or 94 % (simulated).
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    group_of = {c.name: c.group or c.name for c in concepts}
    ks = sorted(set(moe[0].cells.k))
    tables: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    averaged: dict[tuple[str, int], set[str]] = {}
    for arm in (name for name in LADDER if name in scores):
        both = scores[arm]
        for metric, k in product(_metrics(both), ks):
            found = {name: _found(both, metric, name, k) for name in group_of}
            tables[arm, metric, k] = table = _rows(arm, metric, k, found, complete=len(both))
            if whole := _whole(table):
                averaged[metric, k] = averaged.get((metric, k), whole) & whole
    for (arm, metric, k), table in tables.items():
        kept = _whole(table) & averaged.get((metric, k), set())
        found = {name: _found(scores[arm], metric, name, k) for name in group_of if name in kept}
        rows += [*table, _mean_row(arm, metric, k, found, group_of)]
    for k in ks:
        if nulls := nulls_of(moe, dense, k):
            types = set(moe[0].cells.concept[moe[0].cells.granularity == Granularity.TYPE.value])
            rows = null_rows(rows, nulls, group_of, {m: averaged.get((m, k), set()) for m in METRICS}, types, k=k)
    return pd.DataFrame(rows)


def _whole(table: Sequence[Mapping[str, Any]]) -> set[str]:
    """Concepts with a number in every model and seed."""
    n_seeds = max((row["n_seeds"] for row in table), default=0)
    return {row["concept"] for row in table if row["status"] == Status.OK.value and row["n_seeds"] == n_seeds}


def nulls_of(moe: Sequence[ModelScores], dense: Sequence[ModelScores], k: int = 1) -> dict[str, NullDistribution]:
    """The null of either model at `k` by role, under the first seed; empty where one of them was not run."""
    models = {role: scores[0] for role, scores in zip(ROLES, (moe, dense), strict=True) if scores}
    first = {role: model.null for role, model in models.items() if model.null is not None}
    found = {role: null if k == 1 else null.larger[k] for role, null in first.items() if k == 1 or k in null.larger}
    return found if len(found) == len(models) else {}


def gap_bootstraps(scores: ArmScores, metric: str, k: int) -> dict[str, dict[str, Bootstrap]]:
    """The gap, MoE minus dense, of every arm and concept, paired over arms and concepts by bootstrap sample.

    `SEARCH` is the gap of ``homogeneous`` in what picking the best cell adds to a single one.
    """
    out: dict[str, dict[str, Bootstrap]] = {}
    for arm, both in scores.items():
        if len(both) < len(ROLES):
            continue
        moe, dense = (both[role].get(metric, {}) for role in ROLES)
        shared = [key for key in moe if key[1] == k and key in dense and _paired(moe[key], dense[key])]
        out[arm] = {key[0]: moe[key].boot - dense[key].boot for key in shared}
        lifts = {key[0]: (moe[key].lift, dense[key].lift) for key in shared}
        if lifted := {name: a - b for name, (a, b) in lifts.items() if a is not None and b is not None}:
            out[SEARCH] = lifted
    return out


def _metrics(both: Mapping[str, Side]) -> list[str]:
    """What an arm was scored in, in the usual order first."""
    every = dict.fromkeys(metric for side in both.values() for metric in side) or METRICS
    return [*(m for m in METRICS if m in every), *(metric for metric in every if metric not in METRICS)]


def _found(both: Mapping[str, Side], metric: str, concept: str, k: int) -> dict[str, Estimate]:
    return {role: side[metric][concept, k] for role, side in both.items() if (concept, k) in side.get(metric, {})}


def _estimates(
    arm: Arm, scores: Sequence[ModelScores], test_documents: Sequence[Int[ndarray, "document"]], n_resamples: int
) -> list[Estimates]:
    """One arm of one model, per seed; seeds that the arm was not run under are missing."""
    out = []
    for model, documents in zip(scores, test_documents[: len(scores)], strict=True):
        out.append(arm.estimates(model, documents, document_weights(len(documents), n_resamples, seed=model.seed)))
    return [found for found in out if found is not None]


def _side(seeds: Sequence[Estimates], n_resamples: int) -> Side:
    """One arm of one model, seeds put together, by metric and (concept, k)."""
    parts: dict[str, dict[tuple[str, int], list[Part]]] = {}
    for found in seeds:
        for metric, by_key in found.items():
            for key, part in by_key.items():
                parts.setdefault(metric, {}).setdefault(key, []).append(part)
    return {metric: {key: _join(p, n_resamples) for key, p in by_key.items()} for metric, by_key in parts.items()}


def _join(parts: Sequence[Part], n_resamples: int) -> Estimate:
    last = parts[-1]
    value = np.array([p.value for p in parts])
    boot = _bootstrap(value, [p.draws for p in parts], n_resamples)
    one_cell = float(np.mean([p.one_cell for p in parts]))
    lift = None
    if all(p.one_cell_draws is not None for p in parts):
        single = [p.one_cell_draws for p in parts if p.one_cell_draws is not None]
        lift = boot - _bootstrap(np.array([p.one_cell for p in parts]), single, n_resamples)
    draws = [p.by_draw for p in parts if p.by_draw is not None]
    by_draw = np.concatenate(draws) if draws else None
    chance = float(np.mean([p.chance for p in parts]))
    return Estimate(value, boot, chance, last.n_cells, last.n_neurons, last.n_tokens, one_cell, lift, by_draw)


def _bootstrap(value: Float[ndarray, "seed"], draws: Sequence[Float[ndarray, "weight"]], n_resamples: int) -> Bootstrap:
    left_out = (draws[0][n_resamples:],) if len(draws) == 1 else ()
    return Bootstrap(np.asarray(value.mean()), np.concatenate([d[:n_resamples] for d in draws]), left_out)


def _paired(a: Estimate, b: Estimate) -> bool:
    return len(a.value) == len(b.value)


def _intervals(boots: Sequence[Bootstrap]) -> tuple[Float[ndarray, "problem"], Float[ndarray, "problem"]]:
    """95 % intervals of problems of as many draws each."""
    if not boots:
        return np.zeros(0), np.zeros(0)
    jackknives = tuple(np.stack(j, 1) for j in zip(*(b.jackknives for b in boots), strict=True))
    every = Bootstrap(np.stack([b.estimate for b in boots]), np.stack([b.draws for b in boots], 1), jackknives)
    return every.bca() if jackknives else every.percentile()


def _rows(
    arm: str, metric: str, k: int, found: Mapping[str, Mapping[str, Estimate]], *, complete: int
) -> list[dict[str, Any]]:
    """One row per concept; a row with a number for all of `complete` models is ok."""
    gaps = {
        name: both["moe"].boot - both["dense"].boot
        for name, both in found.items()
        if len(both) == len(ROLES) and _paired(both["moe"], both["dense"])
    }
    bounds: dict[tuple[str, str], tuple[float, float]] = {}
    for what in (*ROLES, "gap"):
        boots = gaps if what == "gap" else {n: both[what].boot for n, both in found.items() if what in both}
        sizes = {name: len(boot.draws) for name, boot in boots.items()}
        for n_draws in set(sizes.values()):
            names = [name for name in boots if sizes[name] == n_draws]
            low, high = _intervals([boots[name] for name in names])
            bounds |= {(what, n): (float(a), float(b)) for n, a, b in zip(names, low, high, strict=True)}
    rows = []
    for name, both in found.items():
        row: dict[str, Any] = {"arm": arm, "concept": name, "k": k, "metric": metric}
        for role in ROLES:
            row |= _one_model(role, both.get(role), bounds.get((role, name), (np.nan, np.nan)))
        row |= _gap(both, bounds.get(("gap", name), (np.nan, np.nan)))
        status = Status.OK if both and len(both) == complete else Status.TOO_FEW
        rows.append(row | {"status": status.value})
    return rows


def _one_model(role: str, found: Estimate | None, bounds: tuple[float, float]) -> dict[str, Any]:
    return {
        role: float(found.value.mean()) if found else np.nan, f"{role}_low": bounds[0], f"{role}_high": bounds[1],
        f"chance_{role}": found.chance if found else np.nan, f"one_cell_{role}": found.one_cell if found else np.nan,
        f"n_cells_{role}": found.n_cells if found else 0,
        f"n_distinct_neurons_{role}": found.n_neurons if found else 0,
        f"n_tokens_{role}": found.n_tokens if found else np.nan,
    }  # fmt: skip


def _gap(found: Mapping[str, Estimate], bounds: tuple[float, float]) -> dict[str, Any]:
    gaps, draws = np.array([np.nan]), np.zeros(0)
    if len(found) == len(ROLES) and _paired(*(found[role] for role in ROLES)):
        moe, dense = (found[role] for role in ROLES)
        gaps = moe.value - dense.value
        if moe.by_draw is not None and dense.by_draw is not None:
            draws = moe.by_draw - dense.by_draw
            draws = draws[np.isfinite(draws)]
    return {
        "gap": float(gaps.mean()), "ci_low": bounds[0], "ci_high": bounds[1], "p_value": np.nan, "null_mean": np.nan,
        "n_seeds": max((len(e.value) for e in found.values()), default=0),
        "sd_seeds": float(gaps.std(ddof=1)) if len(gaps) > 1 else np.nan,
        "n_draws": len(draws), "sd_draws": float(draws.std(ddof=1)) if len(draws) > 1 else np.nan,
    }  # fmt: skip


def _mean_row(
    arm: str, metric: str, k: int, found: Mapping[str, Mapping[str, Estimate]], group_of: Mapping[str, str]
) -> dict[str, Any]:
    """Average over concept groups, of the concepts that every model could be scored on."""
    members: dict[str, list[int]] = {}
    for i, name in enumerate(found):
        members.setdefault(group_of[name], []).append(i)
    weight = np.zeros((len(found), len(members)))
    for j, own in enumerate(members.values()):
        weight[own, j] = 1 / len(own)
    roles = [role for role in ROLES if found and all(role in both for both in found.values())]
    by_role = {role: [both[role] for both in found.values()] for role in roles}
    mean = {role: _average(estimates, weight.mean(1)) for role, estimates in by_role.items()}
    (row,) = _rows(arm, metric, k, {MEAN: mean}, complete=len(mean))
    low, high = np.nan, np.nan
    if len(roles) == len(ROLES) and all(map(_paired, *by_role.values())):
        moe, dense = (_weighted([e.boot for e in by_role[role]], weight) for role in ROLES)
        wide = average_over_groups(moe - dense, resample_groups=True)
        low, high = map(float, wide.bca() if moe.jackknives else wide.percentile())
    return row | {"ci_low_groups": low, "ci_high_groups": high, "n_concepts": len(members)}


def _weighted(boots: Sequence[Bootstrap], weight: Float[ndarray, "concept *out"]) -> Bootstrap:
    jackknives = tuple(np.stack(j, -1) @ weight for j in zip(*(b.jackknives for b in boots), strict=True))
    estimate = np.stack([b.estimate for b in boots], -1)
    return Bootstrap(estimate @ weight, np.stack([b.draws for b in boots], -1) @ weight, jackknives)


def _average(estimates: Sequence[Estimate], weight: Float[ndarray, "concept"]) -> Estimate:
    """Weighted mean over concepts."""

    def mean(values: Sequence[Any]) -> Any:
        return np.tensordot(weight, np.stack(values), 1)

    by_draw = None
    if all(e.by_draw is not None for e in estimates):
        known = np.stack([e.by_draw for e in estimates if e.by_draw is not None])
        here = np.isfinite(known) * weight[:, None]
        with np.errstate(invalid="ignore"):
            by_draw = (np.nan_to_num(known) * here).sum(0) / here.sum(0)
    return Estimate(
        mean([e.value for e in estimates]), _weighted([e.boot for e in estimates], weight),
        float(mean([e.chance for e in estimates])), max(e.n_cells for e in estimates),
        max(e.n_neurons for e in estimates), float(mean([e.n_tokens for e in estimates])),
        float(mean([e.one_cell for e in estimates])), None, by_draw,
    )  # fmt: skip

"""Tokens by (marked z, routed r), and what the effects D in the four cells say (METRICS 3, items 1 to 4).

D is read where the token is routed to the expert and is 0 elsewhere, so `decomposition` is exact. All functions take
the positions that were judged. A judge that was asked about some tokens only was asked about visits and other tokens
at two rates; `weight` is how many tokens each one stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.stats import percentile_interval

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

CELLS = ("z1r1", "z1r0", "z0r1", "z0r0")


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval over documents; NaN where there is none."""

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan


def cell_counts(
    z: Bool[ndarray, "token"], r: Bool[ndarray, "token"], document: Int[ndarray, "token"], n_documents: int
) -> Int[ndarray, "document cell"]:
    """Tokens of every document in each of `CELLS`."""
    cell = np.where(z, np.where(r, 0, 1), np.where(r, 2, 3))
    return np.bincount(document * 4 + cell, minlength=4 * n_documents).reshape(n_documents, 4)


def routing_auroc(counts: Float[ndarray, "document cell"], times: Float[ndarray, "draw document"]) -> Interval:
    """AUROC of the label for the routing, percentile interval over documents.

    A yes-or-no label has one threshold, so this is its balanced accuracy: (P(z|r) + 1 - P(z|not r)) / 2. It does not
    show that the expert does anything at these tokens.
    """
    counts = counts.astype(np.float64)
    value = _balanced(counts.sum(0))
    low, high = percentile_interval(_balanced(times @ counts))
    return Interval(float(value), float(low), float(high))


def _balanced(totals: Float[ndarray, "*draw cell"]) -> Float[ndarray, "*draw"]:
    z1r1, z1r0, z0r1, z0r0 = np.moveaxis(totals, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (z1r1 / (z1r1 + z0r1) + z0r0 / (z1r0 + z0r0)) / 2


def contrast(
    effect: Float[ndarray, "token"], z: Bool[ndarray, "token"], weight: Float[ndarray, "token"] | None = None
) -> float:
    """C = E[D | z=1] - E[D | z=0], nats.

    Positive for every label that predicts the routing of an expert that does anything: see `conditional_contrast`.
    """
    if weight is None:
        return _mean(effect[z]) - _mean(effect[~z])
    return _mean(effect[z], weight[z]) - _mean(effect[~z], weight[~z])


def conditional_contrast(
    effect: Float[ndarray, "token"], z: Bool[ndarray, "token"], r: Bool[ndarray, "token"]
) -> float:
    """C given r=1: whether the expert does more where the label holds, among the tokens it serves.

    Does not show that another expert would not have done the same.
    """
    return contrast(effect[r], z[r])


def decomposition(
    effect: Float[ndarray, "token"], z: Bool[ndarray, "token"], r: Bool[ndarray, "token"]
) -> tuple[float, float]:
    """The two terms of C: what follows from the routing, and what is beyond it.

    ``(P(r|z=1) - P(r|z=0)) E[D|r=1,z=1]`` and ``P(r|z=0) (C given r=1)``; their sum is C where D = 0 off the route.
    A term whose probability is 0 is 0. Neither term shows whether another expert would have done the same.
    """
    on, off = _mean(r[z]), _mean(r[~z])
    if on == 0:  # nothing is routed at z=1, so all of C is what is missing there
        return 0.0, -off * _mean(effect[~z & r]) if off > 0 else 0.0
    beyond = off * conditional_contrast(effect, z, r) if off > 0 else 0.0
    return (on - off) * _mean(effect[z & r]), beyond


def specificity(own: float, controls: Sequence[float]) -> float:
    """C of the expert minus the mean C of its load-matched controls, on the same label. NaN without controls.

    Controls are matched on load and gate mass, not on what they do: a control of the same speciality hides it.
    """
    return own - _mean(np.asarray(controls, np.float64))


def effect_ranking(
    effect: Float[ndarray, "token"], z: Bool[ndarray, "token"], weight: Float[ndarray, "token"] | None = None
) -> tuple[float, float]:
    """AUROC and average precision (area under precision-recall) of the effect for the label; NaN if z is constant.

    Average precision is at the natural prevalence of the label, which is what a ranking without information gets.
    Both mix routing and effect: tokens off the route are ties at 0.
    """
    if z.all() or not z.any():
        return np.nan, np.nan
    mass = np.ones(len(z)) if weight is None else np.asarray(weight, np.float64)
    order = np.argsort(-effect, kind="stable")
    last = np.flatnonzero(np.append(np.diff(effect[order]) != 0, True))  # of each run of ties
    tp, seen = np.cumsum((mass * z)[order])[last], np.cumsum(mass[order])[last]
    d_tp, fp = np.diff(tp, prepend=0), seen - tp
    d_fp = np.diff(fp, prepend=0)
    auroc = (d_fp * (tp - d_tp / 2)).sum() / (tp[-1] * fp[-1])
    return float(auroc), float((d_tp * tp / np.where(seen > 0, seen, 1)).sum() / tp[-1])


def dose_response(
    effect: Float[ndarray, "token"], grade: Float[ndarray, "token"], weight: Float[ndarray, "token"] | None = None
) -> float:
    """Spearman correlation of the effect with how well the label fits (0 to 4); NaN if either is constant.

    Most tokens have no effect and a grade of 0, so it is small even for a good label; and like every number that
    mixes routing and effect it is positive for a label that says where the expert is visited.
    """
    mass = np.ones(len(grade)) if weight is None else np.asarray(weight, np.float64)
    if not mass.sum() > 0:
        return np.nan
    ranks = [_midranks(values, mass) for values in (effect, grade)]
    a, b = (rank - np.average(rank, weights=mass) for rank in ranks)
    spread = np.sqrt((mass * a * a).sum() * (mass * b * b).sum())
    return float((mass * a * b).sum() / spread) if spread > 0 else np.nan


def _midranks(values: Float[ndarray, "token"], mass: Float[ndarray, "token"]) -> Float[ndarray, "token"]:
    """Mass below each value and half of that at it, in units of the whole."""
    _, code = np.unique(values, return_inverse=True)
    at = np.bincount(code, mass) / mass.sum()
    return (np.cumsum(at) - at / 2)[code]


def lift(
    effect: Float[ndarray, "token"], z: Bool[ndarray, "token"], weight: Float[ndarray, "token"] | None = None
) -> float:
    """Share of the total positive effect that falls on z=1, over the share of tokens with z=1.

    1 for a label that has nothing to do with the expert; NaN where nothing is marked or nothing hurts. A few tokens
    with a large effect decide it, and a label that says where the expert is visited lifts it as well.
    """
    weight = np.ones(len(z)) if weight is None else np.asarray(weight, np.float64)
    mass = np.maximum(effect.astype(np.float64), 0) * weight
    if not z.any() or not mass.sum():
        return np.nan
    return float(mass[z].sum() / mass.sum() / np.average(z, weights=weight))


def replaceability(
    zero: Float[ndarray, "visit"], refilled: Float[ndarray, "visit"], document: Int[ndarray, "visit"]
) -> float:
    """1 - D(mask_refill_keep) / D(zero), means over documents of means over visits (METRICS 2.3).

    1 if the expert that the router would take instead does as well, 0 if it does no more than nothing. NaN where the
    effect of nothing in its place lies below three standard errors. The stand-in keeps its own, smaller gate, so
    a value below 1 does not show that it could not do the work.
    """
    n = np.bincount(document)
    has = n > 0
    lost, left = (np.bincount(document, effect)[has] / n[has] for effect in (zero, refilled))
    if len(lost) < 2 or lost.mean() <= 0 or lost.mean() < 3 * lost.std(ddof=1) / np.sqrt(len(lost)):
        return np.nan
    return float(1 - left.mean() / lost.mean())


def _mean(values: ndarray, weight: ndarray | None = None) -> float:
    if weight is not None:
        return float(np.average(values.astype(np.float64), weights=weight)) if weight.sum() > 0 else np.nan
    return float(np.mean(values, dtype=np.float64)) if len(values) else np.nan

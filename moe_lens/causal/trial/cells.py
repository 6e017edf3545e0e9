"""Tokens by (marked z, routed r), and what the effects D in the four cells say (METRICS 3, items 1 to 4).

D is read where the token is routed to the expert and is 0 elsewhere, so `decomposition` is exact. All functions take
the positions that were judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.stats import percentile_interval, ranking_scores

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


def contrast(effect: Float[ndarray, "token"], z: Bool[ndarray, "token"]) -> float:
    """C = E[D | z=1] - E[D | z=0], nats.

    Positive for every label that predicts the routing of an expert that does anything: see `conditional_contrast`.
    """
    return _mean(effect[z]) - _mean(effect[~z])


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
    A term whose probability is 0 is 0.
    """
    on, off = _mean(r[z]), _mean(r[~z])
    if on == 0:  # nothing is routed at z=1, so all of C is what is missing there
        return 0.0, -off * _mean(effect[~z & r]) if off > 0 else 0.0
    beyond = off * conditional_contrast(effect, z, r) if off > 0 else 0.0
    return (on - off) * _mean(effect[z & r]), beyond


def specificity(own: float, controls: Sequence[float]) -> float:
    """C of the expert minus the mean C of its load-matched controls, on the same label. NaN without controls."""
    return own - _mean(np.asarray(controls, np.float64))


def effect_auroc(effect: Float[ndarray, "token"], z: Bool[ndarray, "token"]) -> float:
    """AUROC of the effect for the label. It mixes routing and effect: tokens off the route are ties at 0."""
    return float(ranking_scores(effect[:, None], z[:, None])[0][0]) if len(z) else np.nan


def lift(effect: Float[ndarray, "token"], z: Bool[ndarray, "token"]) -> float:
    """Share of the total positive effect that falls on z=1, over the share of tokens with z=1.

    1 for a label that has nothing to do with the expert; NaN where nothing is marked or nothing hurts.
    """
    mass = np.maximum(effect.astype(np.float64), 0)
    if not z.any() or not mass.sum():
        return np.nan
    return float(mass[z].sum() / mass.sum() / z.mean())


def _mean(values: ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else np.nan

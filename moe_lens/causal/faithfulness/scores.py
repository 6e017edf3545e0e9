"""Scores of a ranking under a set function F, which is what a model achieves with a set of units intact.

Comp_q = F(U) - F(U without top_q), Suff_q = F(U) - F(top_q) (DeYoung et al. 2020, ERASER), their means over bins
(AOPC), how good any ranking could be (Edin et al. 2024, NAOPC), and the circuit family f, CPR, CMD (Marks et al. 2024;
MIB). METRICS 2.2. No model here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.causal.faithfulness.sets import Bins
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

SetFunction = Callable[[frozenset[int]], float]
"""Value of the model with these units intact and the others ablated; larger is better."""
EXACT_UNITS = 8
"""Candidates up to which limits are exact over all orders."""
BEAM_UNITS = 30
MIN_SE = 3.0
"""F(U) - F(empty) must be this many standard errors from zero to divide by."""


def curves(
    value: SetFunction, order: Sequence[int], sizes: Iterable[int]
) -> tuple[Float[ndarray, "bin"], Float[ndarray, "bin"]]:
    """Comprehensiveness and sufficiency of the first k units of `order`, for each k of `sizes`."""
    whole = frozenset(order)
    tops = [frozenset(order[:k]) for k in sizes]
    comp = np.array([value(whole) - value(whole - top) for top in tops])
    suff = np.array([value(whole) - value(top) for top in tops])
    return comp, suff


def aopc(
    values: Float[ndarray, "*shape bin"], bins: Bins, *, at_zero: Float[ndarray, "*shape"] | float = 0.0
) -> Float[ndarray, "*shape"]:
    """Mean of a score over bins, or its area over their span.

    Args:
        at_zero: the score of the empty set, used if `bins` include it: 0 for comprehensiveness, F(U) - F(empty) for
            sufficiency.

    An AOPC does not compare models: how high or low it can go depends on the model (Edin et al. 2024).
    """
    values, shares = np.asarray(values, np.float64), np.asarray(bins.shares)
    if bins.include_zero:
        first = np.broadcast_to(np.asarray(at_zero, np.float64), values.shape[:-1])
        values, shares = np.concatenate([first[..., None], values], axis=-1), np.append(0.0, shares)
    if bins.aggregate == "mean" or len(shares) < 2:
        return values.mean(axis=-1)
    return np.trapezoid(values, shares, axis=-1) / (shares[-1] - shares[0])


@dataclass(frozen=True)
class Limits:
    """Lowest and highest AOPC that any order of the candidates reaches. With a beam the true limits lie outside."""

    low: float
    high: float
    width: int | None
    """Beam width; None means exact over all orders."""

    def normalised(self, score: float) -> float:
        """NAOPC: where `score` lies between the limits, 0 to 1; beyond them only if a beam missed them."""
        span = self.high - self.low
        return (score - self.low) / span if span > 0 else float("nan")


def limits(
    score: Callable[[frozenset[int]], float],
    units: Sequence[int],
    *,
    sizes: Sequence[int] | None = None,
    width: int | None = None,
) -> Limits:
    """Extremes over all orders of `units` of the mean of `score` over their prefixes.

    Args:
        score: comprehensiveness or sufficiency of a set of units that come first.
        sizes: prefixes that count; None means 1 to all.
        width: orders followed at a time; None follows one for each set, which is exact.

    Raises:
        BadConfig: too many units, or a size that no prefix has.

    The limits are those of these candidates with everything else intact, not of the model.
    """
    most = EXACT_UNITS if width is None else BEAM_UNITS
    if not 0 < len(units) <= most:
        raise BadConfig(f"limits over {len(units)} candidates: give 1 to {EXACT_UNITS}, or a beam and {BEAM_UNITS}")
    counted = set(range(1, len(units) + 1) if sizes is None else sizes)
    if not counted or not counted <= set(range(1, len(units) + 1)):
        raise BadConfig(f"sizes={sorted(counted)}: give prefixes of {len(units)} candidates, 1 to {len(units)}")
    ends = [_extreme(score, units, counted, width, sign) / len(counted) for sign in (-1, 1)]
    return Limits(ends[0], ends[1], width)


def _extreme(
    score: Callable[[frozenset[int]], float], units: Sequence[int], counted: set[int], width: int | None, sign: int
) -> float:
    """Largest (sign 1) or smallest sum of scores along one chain of sets, each one unit larger.

    The best chain through a set does not depend on what comes after, so one sum for each set is enough.
    """
    best: dict[frozenset[int], float] = {frozenset(): 0.0}
    for size in range(1, len(units) + 1):
        longer: dict[frozenset[int], float] = {}
        for members, total in best.items():
            for unit in units:
                if unit not in members:
                    grown = members | {unit}
                    longer[grown] = max(longer.get(grown, -np.inf), total)
        if size in counted:
            longer = {members: total + sign * score(members) for members, total in longer.items()}
        kept = sorted(longer.items(), key=lambda item: (-item[1], sorted(item[0])))
        best = dict(kept if width is None else kept[:width])
    return sign * max(best.values())


def circuit_faithfulness(
    kept: Float[ndarray, "*shape"], full: float, empty: float, *, standard_error: float = 0.0
) -> Float[ndarray, "*shape"]:
    """f = (F(S) - F(empty)) / (F(U) - F(empty)), a ratio of means: 1 like the model, 0 like nothing (Marks et al.).

    Of S = U without top_q it is the completeness of top_q, where low is good. NaN where F(U) - F(empty) is less than
    3 standard errors from zero: there is nothing to be a share of.
    """
    kept = np.asarray(kept, np.float64)
    if not abs(full - empty) > MIN_SE * standard_error:
        return np.full(kept.shape, np.nan)
    return (kept - empty) / (full - empty)


def cpr(f: Float[ndarray, "*shape bin"], q: Float[ndarray, "bin"]) -> Float[ndarray, "*shape"]:
    """Area under f over q, trapezoids on a linear axis (MIB: circuit performance ratio). High is good."""
    return np.trapezoid(f, q, axis=-1)


def cmd(f: Float[ndarray, "*shape bin"], q: Float[ndarray, "bin"]) -> Float[ndarray, "*shape"]:
    """Area between f and 1 over q (MIB: circuit-model distance). 0 is best."""
    return np.trapezoid(np.abs(1 - f), q, axis=-1)


def rank_p(
    observed: Float[ndarray, "*shape"] | float, random: Float[ndarray, "draw *shape"], *, low_is_good: bool = False
) -> Float[ndarray, "*shape"]:
    """p = (1 + #{random at least as good}) / (R + 1); never below 1 / (R + 1). NaN without draws (METRICS 2.5).

    It says that the ranking beats drawing lots, not that it is a good ranking.
    """
    observed, random = np.asarray(observed, np.float64), np.asarray(random, np.float64)
    if not len(random):
        return np.full(observed.shape, np.nan)
    as_good = random <= observed if low_is_good else random >= observed
    return (1 + as_good.sum(axis=0)) / (len(random) + 1)


def top_jaccard(a: Int[ndarray, "k"], b: Int[ndarray, "k"]) -> float:
    """Units in both over units in either."""
    return len(np.intersect1d(a, b)) / max(1, len(np.union1d(a, b)))

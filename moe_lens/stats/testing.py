"""p-values from permutations, and what to do with many of them.

Screening many units: `benjamini_hochberg`. At most some 20 confirmatory hypotheses: `holm`. A grid of dependent
statistics under one permutation null: `max_t` (METRICS 2.5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_lens.errors import BadConfig
from moe_lens.stats.normal import normal_quantile

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray


def permutation_p(
    observed: Float[ndarray, "*problem"] | float,
    null: Float[ndarray, "permutation *problem"],
    *,
    tolerance: float = 0.0,
) -> Float[ndarray, "*problem"]:
    """``p = (1 + #{null >= observed}) / (B + 1)``: the share of labellings, the observed one included, that do as well.

    Args:
        null: the statistic under each of B permutations; NaN counts as smaller than everything.
        tolerance: null values this little below the observed one count as ties, so that rounding cannot make
            a tie significant.

    Returns:
        one-sided p, large statistics are evidence; NaN where `observed` is.

    The smallest p is 1 / (B + 1). Valid exactly where permuting leaves the joint distribution of the data
    alone if there is no effect: it says nothing if the permuted units were not exchangeable.
    """
    observed, null = np.asarray(observed, np.float64), np.asarray(null, np.float64)
    if not len(null):
        raise BadConfig("a permutation p-value needs permutations and was given none: ask for 99 or more")
    with np.errstate(invalid="ignore"):
        p = (1 + (null >= observed - tolerance).sum(0)) / (len(null) + 1)
    return np.where(np.isnan(observed), np.nan, p)


def max_t(
    observed: Float[ndarray, "hypothesis"], null: Float[ndarray, "permutation hypothesis"], *, tolerance: float = 0.0
) -> Float[ndarray, "hypothesis"]:
    """Single-step max-T adjusted p-values (Westfall & Young 1993): compare each statistic with the null maximum.

    Controls the chance of any false rejection in the family and, other than Bonferroni, uses how the statistics
    move together; all columns of a row must come from the same permutation. Statistics should be on one scale
    (studentised): the widest null sets the bar for all. NaN hypotheses are not members of the family.

    A large adjusted p does not show that there is no effect, only that the family is too large to tell.
    """
    observed, null = np.asarray(observed, np.float64), np.asarray(null, np.float64)
    member = ~np.isnan(observed)
    if not member.any():
        return np.full(observed.shape, np.nan)
    largest = np.where(np.isnan(null[:, member]), -np.inf, null[:, member]).max(1)
    return permutation_p(observed, np.broadcast_to(largest[:, None], null.shape), tolerance=tolerance)


def benjamini_hochberg(p: Float[ndarray, "*family hypothesis"]) -> Float[ndarray, "*family hypothesis"]:
    """q-values of Benjamini & Hochberg (1995) along the last axis: reject q <= .05 for a false discovery rate of 5 %.

    NaN hypotheses stay NaN and are not counted.

    Raises:
        BadConfig: a p-value outside [0, 1].

    Controls the expected share of false discoveries, for independent or positively dependent statistics. It does
    not bound the chance that a given discovery is false.
    """
    ordered, order, rank, m = _ordered(p)
    raw = np.where(rank <= m, ordered * m / rank, 1.0)
    q = np.minimum.accumulate(raw[..., ::-1], axis=-1)[..., ::-1]
    return _restored(q, order, p)


def holm(p: Float[ndarray, "*family hypothesis"]) -> Float[ndarray, "*family hypothesis"]:
    """Adjusted p-values of Holm (1979) along the last axis, valid under any dependence. NaN are not counted.

    Raises:
        BadConfig: a p-value outside [0, 1].

    Controls the chance of any false rejection; with hundreds of hypotheses it finds next to nothing.
    """
    ordered, order, rank, m = _ordered(p)
    adjusted = np.maximum.accumulate(np.where(rank <= m, ordered * (m - rank + 1), 1.0), axis=-1)
    return _restored(adjusted, order, p)


def _ordered(p: ndarray) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """p-values by size with NaN last (as 1), the order, the ranks from 1, and how many are not NaN."""
    p = np.asarray(p, np.float64)
    known = ~np.isnan(p)
    if ((p < 0) | (p > 1))[known].any():
        raise BadConfig(f"p-values lie between 0 and 1, and {p[known].min()} to {p[known].max()} were given")
    order = np.argsort(p, axis=-1, kind="stable")
    ordered = np.nan_to_num(np.take_along_axis(p, order, -1), nan=1.0)
    return ordered, order, np.arange(1, p.shape[-1] + 1), known.sum(-1, keepdims=True)


def _restored(ordered: ndarray, order: ndarray, p: ndarray) -> ndarray:
    out = np.empty(ordered.shape)
    np.put_along_axis(out, order, np.minimum(ordered, 1.0), -1)
    return np.where(np.isnan(p), np.nan, out)


def wilson_interval(
    successes: Int[ndarray, "*shape"] | int, n: Int[ndarray, "*shape"] | int, level: float = 0.95
) -> tuple[Float[ndarray, "*shape"], Float[ndarray, "*shape"]]:
    """Score interval of a proportion (Wilson 1927); stays inside [0, 1], NaN where `n` is 0.

    For independent trials: experts or labels, not tokens of a document, for which it is far too narrow.
    """
    k, n = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    z = normal_quantile((1 + level) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (k + z**2 / 2) / (n + z**2)
        half = z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)

"""Do labels fit their own experts better than one another's? A permutation of labels (METRICS 3, item 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from math import factorial, prod
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.errors import BadConfig
from moe_lens.stats import permutation_p

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

PERMUTATIONS = 9_999
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Assignment:
    """How well labels fit the experts they are of.

    It speaks of all labels of a layer together and never of one of them.
    """

    trace: float
    """Sum of the diagonal."""
    score: float
    """Mean of the diagonal after double-centring: 0 for labels that fit all experts alike."""
    reciprocal_rank: float
    """Mean reciprocal rank of a label's own expert among all, by effect."""
    p: float
    p_floor: float
    """The smallest p that these strata allow; above .05 the test cannot find anything."""
    is_exact: bool


def assignment(
    matrix: Float[ndarray, "expert label"],
    *,
    stratum: Int[ndarray, "expert"] | None = None,
    n_permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Assignment:
    """Test the diagonal of `matrix` against other assignments of labels to experts.

    Args:
        matrix: standardised effect of expert i on the contexts of label j.
        stratum: labels change places only within a stratum of experts (of like load); None means one stratum.
        n_permutations: drawn where there are more assignments than this; else all are taken.

    Raises:
        BadConfig: the matrix is not square.
    """
    matrix = np.asarray(matrix, np.float64)
    n = len(matrix)
    if matrix.shape != (n, n) or not n:
        raise BadConfig(f"the assignment matrix has shape {matrix.shape}: give one label for each of its experts")
    groups = [np.arange(n)] if stratum is None else [np.flatnonzero(stratum == s) for s in np.unique(stratum)]
    n_all = prod(factorial(len(group)) for group in groups)
    centred = matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()
    rows = np.arange(n)
    is_exact = n_all <= n_permutations + 1
    orders = _all(groups, n) if is_exact else _drawn(groups, n, n_permutations, seed)
    traces = np.concatenate([centred[rows, np.array(part)].sum(-1) for part in orders])
    own = float(centred.trace())
    if is_exact:
        p = float((traces >= own - _ROUNDING).mean())
    else:
        p = float(permutation_p(own, traces, tolerance=_ROUNDING))
    rank = 1 + (matrix > matrix.diagonal()).sum(0)
    floor = 1 / n_all if is_exact else 1 / (n_permutations + 1)
    return Assignment(float(matrix.trace()), own / n, float((1 / rank).mean()), p, floor, is_exact)


def _all(groups: list[Int[ndarray, "member"]], n: int) -> Iterator[list[Int[ndarray, "label"]]]:
    for choice in product(*(permutations(group.tolist()) for group in groups)):
        order = np.arange(n)
        for group, new in zip(groups, choice, strict=True):
            order[group] = new
        yield [order]


def _drawn(
    groups: list[Int[ndarray, "member"]], n: int, n_permutations: int, seed: int
) -> Iterator[Int[ndarray, "permutation label"]]:
    rng = np.random.default_rng(seed)
    orders = np.tile(np.arange(n), (n_permutations, 1))
    for group in groups:
        orders[:, group] = rng.permuted(np.tile(group, (n_permutations, 1)), axis=1)
    yield orders


def standardised_effects(
    effects: Float[ndarray, "token expert"],
    z: Bool[ndarray, "token label"],
    document: Int[ndarray, "token"],
    weight: Float[ndarray, "token label"] | None = None,
) -> Float[ndarray, "expert label"]:
    """E[D_i | z_j=1] - E[D_i | z_j=0] over its standard error between documents; 0 where that is 0 or undefined.

    Args:
        weight: tokens that each one stands for, 0 where the label was not judged; None means 1.

    Experts that are visited more have larger numbers for all labels: compare within columns, or double-centre.
    """
    order = np.argsort(document, kind="stable")
    starts = np.flatnonzero(np.diff(document[order], prepend=-1))
    values = effects[order].astype(np.float64)
    out = np.zeros((effects.shape[1], z.shape[1]))
    for label in range(z.shape[1]):
        w = np.ones(len(order)) if weight is None else weight[order, label]
        difference, influence = 0.0, 0.0
        for at, sign in ((z[order, label], 1), (~z[order, label], -1)):
            mass = w * at
            if not mass.sum() > 0:
                break
            of_documents = np.add.reduceat(values * mass[:, None], starts, axis=0) / mass.sum()
            mean = of_documents.sum(0)
            difference = difference + sign * mean
            influence = influence + sign * (of_documents - np.add.reduceat(mass, starts)[:, None] / mass.sum() * mean)
        else:
            error = np.sqrt(np.square(influence).sum(0))
            # a spread that is rounding alone is none
            known = error > _ROUNDING * np.abs(difference)
            out[:, label] = np.divide(difference, error, out=np.zeros(len(error)), where=known)
    return out

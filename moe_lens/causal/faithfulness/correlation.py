"""Rank correlations and the spread of a load, on numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray


def ranks(x: Float[ndarray, "*problem unit"]) -> Float[ndarray, "*problem unit"]:
    """Ranks from 1 along the last axis, ties at their mean. NaN are not supported."""
    x = np.asarray(x, np.float64)
    below = (x[..., None, :] < x[..., :, None]).sum(-1)
    equal = (x[..., None, :] == x[..., :, None]).sum(-1)
    return below + (equal + 1) / 2


def pearson(x: Float[ndarray, "*problem unit"], y: Float[ndarray, "*problem unit"]) -> Float[ndarray, "*problem"]:
    """Correlation along the last axis; NaN where one side is constant."""
    x, y = (v - v.mean(-1, keepdims=True) for v in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.divide((x * y).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def spearman(x: Float[ndarray, "*problem unit"], y: Float[ndarray, "*problem unit"]) -> Float[ndarray, "*problem"]:
    """Correlation of ranks along the last axis."""
    return pearson(ranks(x), ranks(y))


def kendall(x: Float[ndarray, "*problem unit"], y: Float[ndarray, "*problem unit"]) -> Float[ndarray, "*problem"]:
    """Kendall's tau-b along the last axis, corrected for ties; NaN where one side is constant."""
    a, b = (np.sign(v[..., :, None] - v[..., None, :]) for v in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    scale = np.sqrt((a**2).sum((-2, -1)) * (b**2).sum((-2, -1)))
    return np.divide((a * b).sum((-2, -1)), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def partial_spearman(
    x: Float[ndarray, "*problem unit"], y: Float[ndarray, "*problem unit"], given: Float[ndarray, "*problem unit"]
) -> Float[ndarray, "*problem"]:
    """Correlation of the ranks of x and y with what the ranks of `given` explain linearly taken out.

    NaN where `given` explains one side completely. It removes a monotone effect of load, not every effect.
    """
    xy, xz, yz = spearman(x, y), spearman(x, given), spearman(y, given)
    left = (1 - xz**2) * (1 - yz**2)
    explained = left <= 1e-12
    return np.where(explained, np.nan, (xy - xz * yz) / np.sqrt(np.where(explained, 1, left)))


def entropy(weights: Float[ndarray, "*problem unit"]) -> Float[ndarray, "*problem"]:
    """Entropy of shares proportional to `weights`, nats."""
    w = np.asarray(weights, np.float64)
    total = w.sum(-1, keepdims=True)
    p = np.divide(w, total, out=np.full(w.shape, np.nan), where=total > 0)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def variation(load: Float[ndarray, "*problem unit"]) -> Float[ndarray, "*problem"]:
    """Coefficient of variation, ddof 0."""
    load = np.asarray(load, np.float64)
    mean = load.mean(-1)
    return np.divide(load.std(-1), mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def gini(load: Float[ndarray, "*problem unit"]) -> Float[ndarray, "*problem"]:
    """Gini coefficient: 0 all equal, (n - 1) / n everything on one unit."""
    ordered = np.sort(np.asarray(load, np.float64), axis=-1)
    n, total = ordered.shape[-1], ordered.sum(-1)
    weighted = (ordered * (2 * np.arange(1, n + 1) - n - 1)).sum(-1)
    return np.divide(weighted, n * total, out=np.full(total.shape, np.nan), where=total > 0)

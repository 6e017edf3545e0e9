"""Bootstrap over whole documents, from per-document sufficient counts.

1. Sum what the statistic needs per document once (`counts`). Nothing is fitted or ranked again afterwards.
2. Draw documents with replacement: a resample is a row of multiplicities, its totals are ``times @ counts``.
3. The jackknife leaves one document out: its totals are ``total - counts``.
4. Percentile interval of the draws, or BCa, which corrects their bias and skew (Efron 1987, JASA 82:171).

Tokens of one document are not independent, so documents, never tokens, are drawn (METRICS 2.5).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.errors import BadConfig
from moe_lens.stats.normal import normal_cdf, normal_quantile

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

Interval = tuple["Float[ndarray, '*problem']", "Float[ndarray, '*problem']"]


def document_multiplicities(n_documents: int, n_resamples: int, *, seed: int) -> Int[ndarray, "resample document"]:
    """How often each document is drawn in each of `n_resamples` bootstrap samples of whole documents."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=n_resamples)


def document_weights(
    n_documents: int, n_resamples: int, *, seed: int, most: int = 400
) -> Float[ndarray, "weight document"]:
    """Weights for one pass over a statistic: `n_resamples` bootstrap samples, then what a jackknife leaves.

    The jackknife leaves out one document at a time, or one of `most` random groups of documents where there are
    more of them: the acceleration needs the skewness of the influences, which groups show as well.
    """
    groups = min(n_documents, most)
    member = np.random.default_rng([seed, 1]).permutation(n_documents) % groups if groups else np.zeros(0, np.int64)
    if groups == n_documents:
        member = np.arange(n_documents)
    left = member != np.arange(groups)[:, None]
    return np.concatenate([document_multiplicities(n_documents, n_resamples, seed=seed), left]).astype(np.float64)


def percentile_interval(
    draws: Float[ndarray, "resample *problem"], level: float = 0.95
) -> tuple[Float[ndarray, "*problem"], Float[ndarray, "*problem"]]:
    """Percentile interval over the first axis, NaN draws ignored.

    Does not show bias of the statistic: a maximum chosen on the same data stays inflated inside it.
    """
    tail = (1 - level) / 2 * 100
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=0)
    return low, high


def bca_interval(
    estimate: Float[ndarray, "*problem"],
    draws: Float[ndarray, "resample *problem"],
    *jackknives: Float[ndarray, "unit *problem"],
    level: float = 0.95,
) -> tuple[Float[ndarray, "*problem"], Float[ndarray, "*problem"]]:
    """Bias-corrected and accelerated interval of every problem (Efron 1987; scipy's ``bootstrap`` method BCa).

    Args:
        estimate: the statistic on the full sample.
        draws: the statistic on each bootstrap sample, NaN ignored.
        jackknives: the statistic with one unit left out; one array for each kind of unit that was resampled
            (documents; or documents and concept groups). Their influence values are pooled.

    The correction is second order: it needs some 20 units or more. An estimate outside all draws is treated as
    half a draw from the edge. Where all draws are equal the interval is that value; NaN where `estimate` is NaN.

    Does not show the spread from what was fixed before resampling: the fit, the choice of neuron and cell.
    """
    n = np.isfinite(draws).sum(0)
    with np.errstate(invalid="ignore"):
        below = ((draws < estimate).sum(0) + (draws <= estimate).sum(0)) / 2
    edge = 0.5 / np.maximum(n, 1)
    bias = normal_quantile(np.clip(below / np.maximum(n, 1), edge, 1 - edge))
    skew = _acceleration(jackknives)
    z = normal_quantile((1 - level) / 2)
    low, high = (normal_cdf(bias + (bias + tail) / (1 - skew * (bias + tail))) for tail in (z, -z))
    ordered = np.sort(draws, axis=0)  # NaN last
    known = np.isfinite(estimate)
    low, high = (np.where(known, _quantile(ordered, n, at), np.nan) for at in (low, high))
    return low, high


def _acceleration(jackknives: tuple[Float[ndarray, "unit *problem"], ...]) -> Float[ndarray, "*problem"]:
    """A sixth of the skewness of the influence values, pooled over the kinds of unit (Davison & Hinkley 5.3.2)."""
    cubes, squares = 0.0, 0.0
    for values in jackknives:
        known = np.isfinite(values)
        n = np.maximum(known.sum(0), 1)
        mean = np.where(known, values, 0).sum(0) / n
        influence = np.where(known, (n - 1) * (mean - values), 0)
        cubes = cubes + (influence**3).sum(0) / n**3
        squares = squares + (influence**2).sum(0) / n**2
    squares = np.asarray(squares, np.float64)
    return np.divide(cubes, 6 * squares**1.5, out=np.zeros_like(squares), where=squares > 0)


def _quantile(
    ordered: Float[ndarray, "resample *problem"], n: Int[ndarray, "*problem"], level: Float[ndarray, "*problem"]
) -> Float[ndarray, "*problem"]:
    """Quantile of each column at its own level, linear between the first `n` sorted values."""
    at = level * np.maximum(n - 1, 0)
    below = np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(n - 1, 0))
    a, b = (np.take_along_axis(ordered, i[None], 0)[0] for i in (below, above))
    return np.where(a == b, a, a + (at - below) * (b - a))  # equal infinities stay what they are


@dataclass(frozen=True)
class Bootstrap:
    """A statistic of many problems: on the full sample, on bootstrap samples, and with one unit left out."""

    estimate: Float[ndarray, "*problem"]
    draws: Float[ndarray, "resample *problem"]
    jackknives: tuple[Float[ndarray, "unit *problem"], ...]
    """One array for each kind of unit that was resampled."""

    def percentile(self, level: float = 0.95) -> tuple[Float[ndarray, "*problem"], Float[ndarray, "*problem"]]:
        return percentile_interval(self.draws, level)

    def bca(self, level: float = 0.95) -> tuple[Float[ndarray, "*problem"], Float[ndarray, "*problem"]]:
        """See `bca_interval`."""
        return bca_interval(self.estimate, self.draws, *self.jackknives, level=level)

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        """Difference of two statistics of the same resamples: a paired gap."""
        jackknives = tuple(a - b for a, b in zip(self.jackknives, other.jackknives, strict=True))
        return Bootstrap(self.estimate - other.estimate, self.draws - other.draws, jackknives)


def cluster_bootstrap(
    counts: Float[ndarray, "*problem document count"],
    statistic: Callable[[Float[ndarray, "*problem resample count"]], Float[ndarray, "*problem resample"]],
    *,
    n_resamples: int = 10_000,
    seed: int = 0,
    times: Int[ndarray, "resample document"] | None = None,
) -> Bootstrap:
    """Bootstrap any function of totals over documents, for many problems at once (METRICS 2.5).

    Args:
        counts: sufficient counts of every document, as in ``probing.document_sums.COUNTS``.
        statistic: maps totals (counts along the last axis) to the statistic.
        times: multiplicities to use instead of `n_resamples` fresh ones, to pair two models.

    Raises:
        BadConfig: fewer than two documents.

    Documents must be independent: those of one source file are not, sum their counts first where that matters.
    The intervals do not show what was fixed before: the fitted probes and the chosen cells.
    """
    n_documents = counts.shape[-2]
    if n_documents < 2:
        raise BadConfig(f"a bootstrap over documents needs at least two of them and was given {n_documents}")
    if times is None:
        times = document_multiplicities(n_documents, n_resamples, seed=seed)
    total = counts.sum(-2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        estimate = np.asarray(statistic(total))[..., 0]
        draws = np.asarray(statistic(np.matmul(times.astype(np.float64), counts)))
        jackknife = np.asarray(statistic(total - counts))
    return Bootstrap(estimate, np.moveaxis(draws, -1, 0), (np.moveaxis(jackknife, -1, 0),))


def average_over_groups(boot: Bootstrap, *, resample_groups: bool = False, seed: int = 0) -> Bootstrap:
    """Mean over the last problem axis (concept groups), NaN left out.

    Args:
        resample_groups: also draw the groups with replacement, independently of the documents: the pigeonhole
            bootstrap (Owen 2007, Ann. Appl. Stat. 1:386). Intervals over documents are primary, over
            documents x groups secondary (METRICS 1.3).

    Over documents alone the interval speaks of these concepts; over both, of concepts like these, and errs on
    the wide side. Neither shows that the concepts are a fair sample of anything.
    """
    n_groups = boot.estimate.shape[-1]
    times = np.ones((len(boot.draws), n_groups))
    if resample_groups:
        times = document_multiplicities(n_groups, len(boot.draws), seed=seed).astype(np.float64)
    shape = (len(times),) + (1,) * (boot.draws.ndim - 2) + (n_groups,)
    draws = _weighted_mean(boot.draws, times.reshape(shape))
    estimate = _weighted_mean(boot.estimate, np.ones(n_groups))
    jackknives = tuple(_weighted_mean(j, np.ones(n_groups)) for j in boot.jackknives)
    if resample_groups:
        without = 1 - np.eye(n_groups).reshape((n_groups,) + (1,) * (boot.estimate.ndim - 1) + (n_groups,))
        jackknives += (_weighted_mean(boot.estimate[None], without),)
    return Bootstrap(estimate, draws, jackknives)


def _weighted_mean(values: Float[ndarray, "*shape group"], weight: Float[ndarray, "*#shape group"]) -> ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return (np.where(known, values, 0) * weight).sum(-1) / (known * weight).sum(-1)

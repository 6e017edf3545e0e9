"""``homogeneous``: the best of cells that are all alike (METRICS 1.3, item 2).

1. Pool over the usable cells of a concept and k: true positive rate, false positive rate (total hits by total
   positives of the test tokens, and so on), and AUROC (weighted by pairs of a positive and a negative token).
2. Give every cell these rates. Each draws its own hits and false alarms, binomial, from its own n+ and n-; its
   AUROC is drawn from a beta distribution with the pooled mean and the variance of Hanley & McNeil (1982,
   Radiology 143:29). That variance is exact for a useless score and close for bell-shaped ones; the beta keeps
   the draw in [0, 1], which a normal does not where AUROC is high and n+ small.
3. The score is the mean over draws of the maximum over cells, with a Monte Carlo error below .0015.

The interval resamples documents in the pooled rates, carried to the maximum by its derivative; n+ and n- of the
cells stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.probing.arms.base import METRICS, Estimates, Evidence, ModelScores, Part, Scanned, usable
from moe_lens.probing.threads import chunks, in_threads
from moe_lens.stats import f1_always_positive

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

TOLERANCE = 0.0015
"""Largest Monte Carlo standard error of an expected maximum."""
_FIRST_DRAWS = 256  # enough to tell how many more are needed
_PROBES_AT_ONCE = 128
_BLOCK = 1 << 20  # cells x draws at a time


@dataclass(frozen=True)
class Rates:
    """Pooled quality of the cells of one concept and k; single numbers, or one entry per bootstrap sample."""

    tpr: Float[ndarray, "*shape"] | float
    fpr: Float[ndarray, "*shape"] | float
    auroc: Float[ndarray, "*shape"] | float


@dataclass(frozen=True)
class Maximum:
    """The best of cells that are all alike, one metric."""

    mean: float
    sd: float
    """How far the maximum of one search lies from `mean`."""
    one_cell: float
    """Expected score of a cell taken at random: no search."""
    slope: tuple[float, float, float]
    """Derivative of `mean` by TPR, FPR and AUROC."""
    one_cell_slope: tuple[float, float, float]
    error: float
    """Monte Carlo standard error of `mean`."""


class Homogeneous:
    """Arm ``homogeneous``."""

    name = "homogeneous"

    def collect(self, scanned: Scanned) -> Evidence:
        """Counts pooled over the cells of every (concept, k): tp, fp, fn, tn, influence on the pooled AUROC.

        The influence of a document sums, over cells, ``n+ n-`` times the cell's Hajek term.
        """
        names = usable(scanned.cells)[["concept", "k"]].drop_duplicates().sort_values(["concept", "k"])
        at = {key: i for i, key in enumerate(zip(names.concept, names.k, strict=True))}
        pooled = np.zeros((len(at), scanned.n_documents, 5))
        pieces = [probes for _, probes in chunks(scanned.usable_probes, _PROBES_AT_ONCE)]
        found = in_threads(lambda probes: scanned.evaluator.document_counts(probes, scanned.n_documents), pieces)
        for probes, counts in zip(pieces, found, strict=True):
            entry = [at[scanned.concepts[p.concept], p.k] for p in probes]
            pooled[entry, :, :4] += counts[..., :4]  # a piece has one probe at most for each entry
            pooled[entry, :, 4] += _auroc_influence(counts)
        return Evidence(names.reset_index(drop=True), pooled)

    def estimates(
        self, model: ModelScores, documents: Int[ndarray, "document"], times: Float[ndarray, "resample document"]
    ) -> Estimates | None:
        """Expected best test score if all cells of the model had the pooled rates.

        ``chance`` is the best always-positive score over the same cells.

        Does not show how much of a raw score is noise in general. Pooling makes every cell average, so what a
        search gains among cells that really differ is not in it; tokens count as independent, so where positives
        come in runs the search gains more by chance than this. A gap between two models mixes the larger search
        with the better average cell: compare with ``one_cell``.
        """
        if self.name not in model.evidence:
            return None
        evidence = model.evidence[self.name]
        cells = dict(iter(usable(model.cells).groupby(["concept", "k"])))
        out: Estimates = {metric: {} for metric in METRICS}
        for (concept, k), counts in zip(
            evidence.frame.itertuples(index=False, name=None), evidence.counts, strict=True
        ):
            group = cells[concept, k].sort_values(["layer", "expert"])
            n_pos = group.n_pos_test.to_numpy(np.int64)
            n_neg = group.n_test.to_numpy(np.int64) - n_pos
            pairs = n_pos * n_neg
            auroc = float(np.average(group.auroc, weights=pairs))
            point, drawn = pooled_rates(counts[documents], times, auroc, float(pairs.sum()))
            best = expected_maximum(n_pos, n_neg, point, seed=model.seed)
            f1_yes = float(f1_always_positive(n_pos / (n_pos + n_neg)).max())
            for metric, chance in (("f1", f1_yes), ("f1_balanced", 2 / 3), ("auroc", 0.5)):
                m = best[metric]
                out[metric][concept, int(k)] = Part(
                    m.mean, moved(m.mean, m.slope, point, drawn), chance, len(group), len(group) * model.d_ff,
                    m.one_cell, moved(m.one_cell, m.one_cell_slope, point, drawn),
                )  # fmt: skip
        return out


def _auroc_influence(counts: Float[ndarray, "probe document count"]) -> Float[ndarray, "probe document"]:
    tp, fp, fn, tn, placed_pos, placed_neg = np.moveaxis(counts, -1, 0)
    pos, neg = tp + fn, fp + tn
    n_pos, n_neg = pos.sum(1, keepdims=True), neg.sum(1, keepdims=True)
    area = placed_pos.sum(1, keepdims=True) / n_pos
    return n_neg * (placed_pos - area * pos) + n_pos * (placed_neg - area * neg)


def pooled_rates(
    counts: Float[ndarray, "document count"], times: Float[ndarray, "resample document"], auroc: float, n_pairs: float
) -> tuple[Rates, Rates]:
    """Pooled rates on all documents, and under each bootstrap sample of them.

    Args:
        counts: tp, fp, fn, tn and influence on AUROC, summed over cells.
        auroc: mean over cells, weighted by pairs of a positive and a negative.
        n_pairs: such pairs in all cells.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        total, drawn = counts.sum(0), times @ counts
        point = Rates(float(total[0] / (total[0] + total[2])), float(total[1] / (total[1] + total[3])), auroc)
        tpr, fpr = drawn[:, 0] / (drawn[:, 0] + drawn[:, 2]), drawn[:, 1] / (drawn[:, 1] + drawn[:, 3])
        return point, Rates(tpr, fpr, np.clip(auroc + drawn[:, 4] / n_pairs, 0, 1))


def moved(value: float, slope: tuple[float, float, float], point: Rates, drawn: Rates) -> Float[ndarray, "resample"]:
    """An expected score at other pooled rates, to first order."""
    steps = np.stack([drawn.tpr - point.tpr, drawn.fpr - point.fpr, drawn.auroc - point.auroc], axis=-1)
    return np.clip(value + steps @ np.array(slope), 0, 1)


def expected_maximum(
    n_pos: Int[ndarray, "cell"],
    n_neg: Int[ndarray, "cell"],
    rates: Rates,
    *,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> dict[str, Maximum]:
    """Expected best F1, balanced F1 and AUROC over cells of equal quality, by simulation.

    Every call starts the same random numbers, so a result depends on nothing but its own cells, and two models
    with equal cells score equal. Draws are added until every Monte Carlo error is below `tolerance`.

    Does not show what a real search finds: real cells differ, and this is the part of it that chance explains.
    """
    rng = np.random.default_rng([seed, 2])
    parts: dict[str, list[ndarray]] = {metric: [] for metric in METRICS}
    done, missing = 0, _FIRST_DRAWS
    while True:
        n_draws = min(missing, max(_FIRST_DRAWS, _BLOCK // len(n_pos)))
        for metric, columns in _draw(n_pos, n_neg, rates, n_draws, rng).items():
            parts[metric].append(columns)
        done += n_draws
        found = {metric: _summary(np.concatenate(columns)) for metric, columns in parts.items()}
        missing = int(np.ceil((max(m.sd for m in found.values()) / tolerance) ** 2)) - done
        if missing <= 0:
            return found


def _draw(
    n_pos: Int[ndarray, "cell"], n_neg: Int[ndarray, "cell"], rates: Rates, n_draws: int, rng: np.random.Generator
) -> dict[str, Float[ndarray, "draw column"]]:
    """Per draw: maximum, its derivative by TPR, FPR and AUROC; mean over cells, and its derivative."""
    p, n = n_pos[:, None], n_neg[:, None]
    shape = (len(n_pos), n_draws)
    recall, fallout = rng.binomial(p, rates.tpr, shape) / p, rng.binomial(n, rates.fpr, shape) / n
    area = _draw_auroc(float(rates.auroc), n_pos, n_neg, n_draws, rng)
    by_tpr, by_fpr = _rate_slope(recall, float(rates.tpr)), _rate_slope(fallout, float(rates.fpr))
    nothing = np.zeros(shape)
    out: dict[str, ndarray] = {}
    for metric, a, b in (("f1", p, n), ("f1_balanced", 1, 1)):
        bottom = recall * a + fallout * b + a
        square = bottom * bottom
        slopes = (2 * a * (fallout * b + a) / square * by_tpr, -2 * recall * a * b / square * by_fpr, nothing)
        out[metric] = _best_and_mean(2 * recall * a / bottom, slopes)
    out["auroc"] = _best_and_mean(area, (nothing, nothing, _rate_slope(area, float(rates.auroc))))
    return out


def _best_and_mean(
    score: Float[ndarray, "cell draw"], slopes: tuple[Float[ndarray, "cell draw"], ...]
) -> Float[ndarray, "draw column"]:
    every = np.stack([score, *slopes])
    return np.concatenate([every[:, score.argmax(0), np.arange(score.shape[1])], every.mean(1)]).T


def _rate_slope(rate: Float[ndarray, "cell draw"], mean: float) -> Float[ndarray, "cell draw"]:
    """How a drawn rate moves with its mean: the deviation grows as ``sqrt(mean (1 - mean))`` does."""
    spread = mean * (1 - mean)
    if spread <= 0:
        return np.ones_like(rate)
    return 1 + (0.5 - mean) / spread * (rate - mean)


def _draw_auroc(
    auroc: float, n_pos: Int[ndarray, "cell"], n_neg: Int[ndarray, "cell"], n_draws: int, rng: np.random.Generator
) -> Float[ndarray, "cell draw"]:
    shape = (len(n_pos), n_draws)
    if not 0 < auroc < 1:
        return np.full(shape, auroc)
    weight = auroc * (1 - auroc) / auroc_variance(auroc, n_pos, n_neg) - 1
    weight = np.maximum(weight, 1e-3)[:, None]
    return rng.beta(auroc * weight, (1 - auroc) * weight, shape)


def auroc_variance(auroc: float, n_pos: Int[ndarray, "cell"], n_neg: Int[ndarray, "cell"]) -> Float[ndarray, "cell"]:
    """Sampling variance of a measured AUROC (Hanley & McNeil 1982, from negative exponential scores).

    Does not show the spread between documents: tokens count as independent.
    """
    q_pos, q_neg = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    square = auroc * auroc
    return (auroc * (1 - auroc) + (n_pos - 1) * (q_pos - square) + (n_neg - 1) * (q_neg - square)) / (n_pos * n_neg)


def _summary(columns: Float[ndarray, "draw column"]) -> Maximum:
    best, *slope = columns.mean(0)[:4].tolist()
    one_cell, *one_slope = columns.mean(0)[4:].tolist()
    sd = float(columns[:, 0].std())
    return Maximum(best, sd, one_cell, tuple(slope), tuple(one_slope), sd / len(columns) ** 0.5)

"""The ``equal_*`` arms as `moe_lens.probing.compare` takes them, over draws x documents (METRICS 1.3, item 4).

A bootstrap sample draws test documents with replacement, the same for both models, and independently of them
draws of cells. The score of a sample is the mean over its draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from moe_lens.probing.arms.base import METRICS, Estimates, Part, weighted_totals
from moe_lens.probing.arms.best_cell import scored
from moe_lens.probing.equal.rows import ARMS
from moe_lens.stats import document_multiplicities

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.probing.equal.scores import EqualScores

_CHUNK = 64  # (concept, k) resampled at a time; bounds memory


def equal_arms(
    scores: EqualScores,
    times: Float[ndarray, "resample document"],
    *,
    n_jackknife: int = 0,
    cell_choice: str = "validate",
) -> dict[str, dict[str, Estimates]]:
    """Both arms by name, then by role (``moe``, ``dense``): every (concept, k) that half of the draws could score.

    Args:
        times: weights of ``scores.documents``: bootstrap samples of documents, then documents left out.
        n_jackknife: last rows of `times` that are not bootstrap samples; they use all draws of cells alike, the rows
            before them a bootstrap sample of the draws, the same in both models.
        cell_choice: ``validate``, or ``test`` for cells chosen by the very score that is reported.

    Raises:
        OutOfRange: unknown `cell_choice`.

    ``Part.by_draw`` holds the value of each draw of cells, ``chance`` and the sizes are means over draws. AUROC
    under `times` is its first-order (Hajek) expansion. The spread is over draws x documents: it does not show the
    spread from another split of the documents, nor from another fit.
    """
    picked = np.ones((len(times), scores.draws), np.float32)
    n = len(times) - n_jackknife
    picked[:n] = document_multiplicities(scores.draws, n, seed=scores.seed + 1)
    weight = np.asarray(times, np.float32)
    out: dict[str, dict[str, Estimates]] = {
        arm: {role: {metric: {} for metric in METRICS} for role in scores.frame.role.unique()} for arm in ARMS
    }
    found = scores.chosen(cell_choice)
    at = found.groupby(["arm", "role", "concept", "k"], sort=False).ngroup().to_numpy()
    for start in range(0, int(at.max(initial=-1)) + 1, _CHUNK):
        some = found[(at >= start) & (at < start + _CHUNK)]
        entries, line = np.unique(some.entry, return_inverse=True)
        resampled = _resampled(scores.counts[entries], weight)
        some = some.assign(line=line)
        for key, rows in some.groupby(["arm", "role", "metric", "concept", "k"], sort=False):
            arm, role, metric, concept, k = cast("tuple[str, str, str, str, int]", key)
            if 2 * len(rows) >= scores.draws:
                out[arm][role][metric][concept, k] = _part(rows, resampled[metric], picked)
    return out


def _resampled(
    counts: Float[ndarray, "entry document count"], times: Float[ndarray, "resample document"]
) -> dict[str, Float[ndarray, "entry resample"]]:
    """Every metric under every row of `times`."""
    total, full = weighted_totals(times, counts), counts.sum(1, dtype=np.float64)
    return {metric: scored(total, full, metric).astype(np.float32) for metric in METRICS}


def _part(
    rows: pd.DataFrame, resampled: Float[ndarray, "entry resample"], picked: Float[ndarray, "resample draw"]
) -> Part:
    """One metric of one (concept, k) in one model; `rows` are its draws."""
    draw = rows.draw.to_numpy()
    by_draw = np.full(picked.shape[1], np.nan)
    by_draw[draw] = rows.value
    value = resampled[rows.line.to_numpy()].T
    known = np.isfinite(value) * picked[:, draw]
    with np.errstate(invalid="ignore"):
        draws = (np.nan_to_num(value) * known).sum(1) / known.sum(1)
    sizes = round(rows.n_cells.mean()), round(rows.n_neurons.mean())
    return Part(
        float(np.nanmean(by_draw)), draws.astype(np.float64), float(rows.chance.mean()), *sizes,
        n_tokens=float(rows.n_test.mean()), by_draw=by_draw,
    )  # fmt: skip

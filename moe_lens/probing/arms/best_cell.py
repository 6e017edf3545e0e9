"""``raw`` and ``held_out``: one cell per concept, chosen by its test score or on validate.

``raw`` is the best cell by test score, as arXiv 2604.02178 reports it. In ``held_out`` the cell with the highest
validate AUROC is scored once on test.

Intervals are conditional on the fitted probes and on the chosen cells: they show how far a score depends on the
documents, not on the search. Where a concept has few test documents, F1 is concave in what is drawn, and most
draws lie below the point estimate; the bias correction of the intervals takes that up in part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.probing.arms.base import (
    METRICS,
    Estimates,
    Evidence,
    ModelScores,
    Part,
    Scanned,
    WinnerKey,
    chance_scores,
    f1_of_counts,
    usable,
    weighted_totals,
)

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float, Int
    from numpy import ndarray


@dataclass(frozen=True)
class BestCell:
    """Arm ``raw`` or ``held_out``."""

    name: str

    def collect(self, scanned: Scanned) -> Evidence | None:
        """Nothing: the counts of the winners of both arms are in ``ModelScores.counts``."""

    def estimates(
        self, model: ModelScores, documents: Int[ndarray, "document"], times: Float[ndarray, "resample document"]
    ) -> Estimates:
        """Test score of the chosen cell of every (concept, k).

        ``raw`` shows that the search found a high test score, not that there is a good cell. ``held_out`` removes
        the reuse of test data, not the larger choice of cells that one model may have.
        """
        sizes = usable(model.cells).groupby(["concept", "k"]).size()
        out: Estimates = {}
        for metric in METRICS:
            best = winners(model.cells, self.name, metric)
            keys = list(zip(best.layer, best.expert, best.concept, best.k, strict=True))
            if not keys:
                continue
            draws = resampled(np.stack([model.counts[key][documents] for key in keys]), times, metric)
            columns = best[metric], best.prevalence, best.n_test
            for i, (key, value, prevalence, n_test) in enumerate(zip(keys, *columns, strict=True)):
                at = key[2], key[3]
                n = int(sizes[at])
                chance = chance_scores(prevalence)[metric]
                part = Part(float(value), draws[i], chance, n, n * model.d_ff, n_tokens=float(n_test))
                out.setdefault(metric, {})[at] = part
        return out


def winners(cells: pd.DataFrame, arm: str, metric: str) -> pd.DataFrame:
    """The cell that ``raw`` or ``held_out`` reports, one row per (concept, k).

    Ties go to the larger test set, then to the lower layer and expert.
    """
    by = metric if arm == "raw" else "auroc_validate"
    ordered = usable(cells).sort_values(
        [by, "n_test", "layer", "expert"], ascending=[False, False, True, True], kind="stable"
    )
    return ordered.groupby(["concept", "k"], sort=False).head(1)


def winner_keys(cells: pd.DataFrame) -> set[WinnerKey]:
    """Every cell that ``raw`` or ``held_out`` reports under some metric."""
    keys: set[WinnerKey] = set()
    for arm in ("raw", "held_out"):
        for metric in METRICS:
            best = winners(cells, arm, metric)
            keys |= set(zip(best.layer, best.expert, best.concept, best.k, strict=True))
    return keys


def resampled(
    counts: Float[ndarray, "winner document count"], times: Float[ndarray, "resample document"], metric: str
) -> Float[ndarray, "winner resample"]:
    """The metric of every winner under every bootstrap sample of documents.

    F1 and balanced F1 are exact; AUROC is its first-order (Hajek) expansion around the full sample, which
    needs no re-ranking. NaN where a resample holds only one class.
    """
    return scored(weighted_totals(times, counts), counts.sum(1), metric)


def scored(
    total: Float[ndarray, "entry resample count"], full: Float[ndarray, "entry count"], metric: str
) -> Float[ndarray, "entry resample"]:
    """The metric of `document_sums.COUNTS` added up under weights; `full` is their plain sum."""
    if metric != "auroc":
        return f1_of_counts(total[..., :4], metric)
    tp, fp, fn, tn, placed_pos, placed_neg = np.moveaxis(total, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        area = full[:, 4] / (full[:, 0] + full[:, 2])
        return placed_pos / (tp + fn) + placed_neg / (fp + tn) - area[:, None]

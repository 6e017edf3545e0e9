"""Binary-classification metrics of many problems at once: arrays carry the axes ``(row, problem)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray


def f1_always_positive(prevalence: Float[ndarray, "*shape"] | float) -> Float[ndarray, "*shape"]:
    """F1 of the probe that says yes to everything, ``2 pi / (1 + pi)`` (METRICS 1.2).

    Does not show anything about a model: it is the score that class balance alone hands out, and the
    number to read beside every F1.
    """
    pi = np.asarray(prevalence, dtype=np.float64)
    return 2 * pi / (1 + pi)


def f1_balanced(
    recall: Float[ndarray, "*shape"] | float, false_positive_rate: Float[ndarray, "*shape"] | float
) -> Float[ndarray, "*shape"]:
    """F1 that the same true and false positive rates would give at prevalence one half (METRICS 1.2).

    ``F1_bal = 2 R / (R + FPR + 1)``. Comparable between cells of different class balance.
    Does not show performance at the natural prevalence of a rare concept, which is usually far lower.
    """
    r, fpr = np.asarray(recall, np.float64), np.asarray(false_positive_rate, np.float64)
    return 2 * r / (r + fpr + 1)


@dataclass(frozen=True)
class Confusion:
    """Counts of the four outcomes, any shape; the rates follow from them (NaN where undefined)."""

    tp: Float[ndarray, "*shape"]
    fp: Float[ndarray, "*shape"]
    fn: Float[ndarray, "*shape"]
    tn: Float[ndarray, "*shape"]

    @classmethod
    def count(
        cls,
        predicted: Bool[ndarray, "row problem"],
        truth: Bool[ndarray, "row problem"],
        used: Bool[ndarray, "row problem"] | None = None,
    ) -> Confusion:
        """Count outcomes over rows; `used` marks the rows that belong to each problem, all by default."""
        u = np.ones(predicted.shape, bool) if used is None else used
        yes, positive = (predicted & u).sum(0), (truth & u).sum(0)
        tp = (predicted & truth & u).sum(0)
        return cls(*(n.astype(np.float64) for n in (tp, yes - tp, positive - tp, u.sum(0) - yes - positive + tp)))

    @property
    def precision(self) -> Float[ndarray, "*shape"]:
        """Share of yes answers that are right; 0 when the probe never says yes."""
        return _ratio(self.tp, self.tp + self.fp, empty=0.0)

    @property
    def recall(self) -> Float[ndarray, "*shape"]:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def false_positive_rate(self) -> Float[ndarray, "*shape"]:
        return _ratio(self.fp, self.fp + self.tn)

    @property
    def f1(self) -> Float[ndarray, "*shape"]:
        """Harmonic mean of precision and recall. Depends on prevalence: read it beside f1_always_positive."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def f1_balanced(self) -> Float[ndarray, "*shape"]:
        return f1_balanced(self.recall, self.false_positive_rate)

    @property
    def balanced_accuracy(self) -> Float[ndarray, "*shape"]:
        return (self.recall + 1 - self.false_positive_rate) / 2

    @property
    def mcc(self) -> Float[ndarray, "*shape"]:
        """Matthews correlation; 0 when a row or column of the table is empty, as scikit-learn has it."""
        p, n = self.tp + self.fn, self.fp + self.tn
        yes, no = self.tp + self.fp, self.fn + self.tn
        return _ratio(self.tp * self.tn - self.fp * self.fn, np.sqrt(p * n * yes * no), empty=0.0)

    @property
    def prevalence(self) -> Float[ndarray, "*shape"]:
        return _ratio(self.tp + self.fn, self.tp + self.fp + self.fn + self.tn)


def _ratio(a: ndarray, b: ndarray, empty: float = np.nan) -> ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, empty), where=b > 0)


def ranking_scores(
    score: Float[ndarray, "row problem"],
    truth: Bool[ndarray, "row problem"],
    used: Bool[ndarray, "row problem"] | None = None,
) -> tuple[Float[ndarray, "problem"], Float[ndarray, "problem"]]:
    """AUROC and average precision of every column, ties handled exactly.

    The score (as float32) and the class are packed into one integer, so that a column costs one sort of plain
    integers and a few cumulative sums.

    Args:
        score: higher means more positive; compared in float32.
        truth: class of each row.
        used: rows that belong to each problem, all by default.

    Returns:
        ``(auroc, average_precision)``, NaN where one class is empty.

    Equal to scikit-learn's ``roc_auc_score`` and ``average_precision_score``. Does not show where a useful
    threshold lies, nor that one exists: AUROC ignores prevalence altogether.
    """
    bits = (np.ascontiguousarray(score.T, np.float32) + np.float32(0)).view(np.uint32)  # + 0 turns -0.0 into 0.0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # unsigned order = order of the floats
    keys = ordered.astype(np.uint64) << np.uint64(1)
    keys |= truth.T.astype(np.uint64)
    if used is not None:
        keys = np.where(used.T, keys, _UNUSED)
    keys.sort(axis=1)
    keys = keys[:, ::-1]
    member = np.ones(keys.shape, bool) if used is None else keys != _UNUSED
    positive = ((keys & np.uint64(1)) != 0) & member
    last = np.ones(keys.shape, bool)  # last row of each run of tied scores
    last[:, :-1] = (keys[:, 1:] >> np.uint64(1)) != (keys[:, :-1] >> np.uint64(1))
    tp, seen = positive.cumsum(1, dtype=np.int32), member.cumsum(1, dtype=np.int32)
    return _scores_of_ranked(tp, seen, last)


_UNUSED = np.uint64(1 << 63)  # above every packed score


def _scores_of_ranked(
    tp: Int[ndarray, "problem row"], seen: Int[ndarray, "problem row"], last: Bool[ndarray, "problem row"]
) -> tuple[Float[ndarray, "problem"], Float[ndarray, "problem"]]:
    """AUROC and average precision from cumulative counts by falling score."""
    n_pos, n = tp[:, -1].astype(np.float64), seen[:, -1].astype(np.float64)
    tp_before = _previous_run(tp, last)
    d_tp = tp - tp_before
    d_fp = (seen - _previous_run(seen, last)) - d_tp
    area = (d_fp * (tp + tp_before).astype(np.float64)).sum(1, where=last) / 2
    auroc = _ratio(area, n_pos * (n - n_pos))
    ap = _ratio((d_tp * _ratio(tp, seen, empty=0.0)).sum(1, where=last), n_pos)
    return auroc, ap


def _previous_run(cumulative: Int[ndarray, "problem row"], last: Bool[ndarray, "problem row"]) -> ndarray:
    """Value of a non-decreasing `cumulative` at the end of the run of ties before each row's run."""
    before = np.zeros_like(cumulative)
    np.maximum.accumulate(np.where(last, cumulative, 0)[:, :-1], axis=1, out=before[:, 1:])
    return before

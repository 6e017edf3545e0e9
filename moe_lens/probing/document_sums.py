"""Per-document sums from which every metric of an arm follows, for many problems and with one sort each.

Score, document and class of a row are packed into one integer, as in ``stats.ranking_scores``: a problem is sorted
as plain integers, and nothing has to be put back in order afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

COUNTS = ("tp", "fp", "fn", "tn", "placement_pos", "placement_neg")
_UNUSED = np.uint64(0xFFFFFFFFFFFFFFFF)  # above every packed row


def document_sums(
    score: Float[ndarray, "row problem"],
    truth: Bool[ndarray, "row problem"],
    used: Bool[ndarray, "row problem"],
    document: Int[ndarray, "row #problem"],
    n_documents: int,
) -> Float[ndarray, "problem document count"]:
    """tp, fp, fn, tn at score 0, and the summed placements of the positives and of the negatives of every document.

    The placement of a positive is the share of all negatives that it outranks (ties count half), and the other way
    round; the mean of either is the AUROC. From these six sums F1 is exact and AUROC first-order correct under any
    resampling of documents. Placements are 0 where a problem has one class only.

    Args:
        score: compared in float32; a row is called positive from 0 on.
        used: rows that belong to each problem.
        document: number of each row's document, below `n_documents`.

    Does not show how the fit would move with the documents.
    """
    n_problems = score.shape[1]
    if not score.size:
        return np.zeros((n_problems, n_documents, len(COUNTS)))
    keys = _packed(score, truth, used, document)
    keys.sort(axis=1)
    member = keys != _UNUSED
    positive = ((keys & np.uint64(1)) != 0) & member
    rank = (keys >> np.uint64(32)).astype(np.uint32)
    placed = _placements(rank, positive, member)
    own = ((keys & np.uint64(0xFFFFFFFF)) >> np.uint64(1)).astype(np.int64)
    at = (np.arange(n_problems)[:, None] * n_documents + own)[member]
    negative, no = ~positive[member], rank[member] < 1 << 31
    size = n_problems * n_documents
    outcomes = np.bincount(4 * at + 2 * no + negative, minlength=4 * size)
    sums = np.bincount(2 * at + negative, placed[member], minlength=2 * size)
    shape = (n_problems, n_documents, -1)
    return np.concatenate([outcomes.reshape(shape), sums.reshape(shape)], -1)


def _packed(score: ndarray, truth: ndarray, used: ndarray, document: ndarray) -> ndarray:
    bits = (np.ascontiguousarray(score.T, np.float32) + np.float32(0)).view(np.uint32)  # + 0 turns -0.0 into 0.0
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # unsigned order = order of the floats
    keys = ordered.astype(np.uint64) << np.uint64(32)
    keys |= np.broadcast_to(document, score.shape).T.astype(np.uint64) << np.uint64(1)
    keys |= truth.T.astype(np.uint64)
    return np.where(used.T, keys, _UNUSED)


def _placements(
    rank: Int[ndarray, "problem row"], positive: Bool[ndarray, "problem row"], member: Bool[ndarray, "problem row"]
) -> Float[ndarray, "problem row"]:
    """Placement of every row; rows lie by rising rank, those that are not used last."""
    first = np.ones(rank.shape, bool)  # first row of each run of ties
    first[:, 1:] = (rank[:, 1:] != rank[:, :-1]) | ~member[:, 1:]
    start = np.flatnonzero(first)
    run = np.cumsum(first.reshape(-1)) - 1
    n_pos, n = positive.sum(1), member.sum(1)
    problem = start // rank.shape[1]
    middle = []
    for of_class in (positive, member & ~positive):
        here = np.add.reduceat(of_class.reshape(-1), start, dtype=np.int64)
        before = (of_class.cumsum(1) - of_class).reshape(-1)[start]
        middle.append(before + here / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        as_positive = middle[1] / (n - n_pos)[problem]
        as_negative = 1 - middle[0] / n_pos[problem]
    both = (n_pos > 0) & (n > n_pos)
    placed = np.where(positive.reshape(-1), as_positive[run], as_negative[run]).reshape(rank.shape)
    return np.where(member & both[:, None], placed, 0.0)

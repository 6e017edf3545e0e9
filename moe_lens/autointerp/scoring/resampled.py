"""Scores of many labels against one kind of negatives, on the sample and on draws of its documents."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.autointerp.labels import KEY
from moe_lens.autointerp.scoring.items import same_ids
from moe_lens.stats.classification import Confusion

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

FITS = 3
"""The lowest grade that says that a label fits; 2 is "could be either", and doubt is no claim."""
MIN_ITEMS = 5
MIN_DOCUMENTS = 3
"""On either side. Of fewer documents too many draws are empty, and the others are too much alike."""
JUDGES = ("score", "unigram", "bigram")
"""What is compared: the answer and the two baselines."""


def weighted_auroc(
    positive: Float[ndarray, "pos judge"],
    negative: Float[ndarray, "neg judge"],
    pos_times: Float[ndarray, "pos draw"],
    neg_times: Float[ndarray, "neg draw"],
) -> Float[ndarray, "judge draw"]:
    """AUROC where each item counts as often as `*_times` says, ties as half; NaN where a side is empty.

    Exact: the share of (positive, negative) pairs in the right order among all pairs of the draw. Work grows with
    ``pos * neg * draw``.

    Does not show whether any threshold is a good one.
    """
    a, b = positive.T[:, None, :], negative.T[:, :, None]
    wins = (a > b).astype(np.float32) + np.float32(0.5) * (a == b)
    n_judges, n_neg, n_pos = wins.shape
    beaten = (wins.reshape(-1, n_pos) @ pos_times).reshape(n_judges, n_neg, -1)
    # whole and half numbers: exact in float32 up to 8 million pairs
    right = np.einsum("jnd,nd->jd", beaten, neg_times).astype(np.float64)
    pairs = np.broadcast_to((pos_times.sum(0) * neg_times.sum(0)).astype(np.float64), right.shape)
    return np.divide(right, pairs, out=np.full(right.shape, np.nan), where=pairs > 0)


@dataclass(frozen=True)
class Resampled:
    """Labels that one scorer judged, against one kind of negatives. NaN where there were too few items."""

    table: pd.DataFrame
    """One row per label: ``layer, expert, facet, base_rate, n_abstain, n_pos, n_neg, n_documents, enough``."""
    confusion: Confusion
    """Counts of every label, with grades of 3 and 4 as yes."""
    auroc: Float[ndarray, "label judge"]
    draws: Float[ndarray, "label judge draw"]
    """AUROC of each draw of documents."""

    @classmethod
    def of(cls, rows: pd.DataFrame, negatives: str, times: Float[ndarray, "document draw"]) -> Resampled:
        """Score every label of `rows`.

        Args:
            rows: answers of one scorer, one row each: ``layer, expert, facet, negatives, token_id, document`` (row of
                `times`), ``score`` (NaN for no answer), ``unigram, bigram, base_rate``, and ``turn``, the order in
                which items are taken where token ids are matched.
            negatives: the kind.
            times: how often each document is drawn.
        """
        rows = rows[rows["negatives"].isin(("", negatives))]
        by_label = rows.groupby(list(KEY))
        rows = rows.assign(label=by_label.ngroup())
        table = by_label["base_rate"].first().reset_index()
        missing = rows["score"].isna()
        table["n_abstain"] = np.bincount(rows["label"][missing], minlength=len(table))
        judged = rows[~missing]
        if negatives == "same_token":
            judged = _matched(judged)
        judged = judged.sort_values("label", kind="stable")
        confusion = _confusion(judged, len(table))
        table["n_pos"] = (confusion.tp + confusion.fn).astype(np.int64)
        table["n_neg"] = (confusion.fp + confusion.tn).astype(np.int64)
        table["n_documents"], auroc, draws = _aurocs(judged, len(table), times)
        table["enough"] = ~np.isnan(auroc[:, 0])
        return cls(table, confusion, auroc, draws)

    def mean(self) -> tuple[Float[ndarray, "judge"], Float[ndarray, "judge draw"]]:
        """Means over labels; NaN if there is none."""
        return _mean(self.auroc), _mean(self.draws)

    def mean_over(self, other: Resampled) -> tuple[float, Float[ndarray, "draw"]]:
        """Mean of the answers' AUROC minus `other`'s, over the labels that both could score."""
        both = self.table.reset_index().merge(other.table.reset_index(), on=list(KEY))
        mine, theirs = both["index_x"].to_numpy(), both["index_y"].to_numpy()
        gap = self.auroc[mine, 0] - other.auroc[theirs, 0]
        return float(_mean(gap)), _mean(self.draws[mine, 0] - other.draws[theirs, 0])


def _confusion(judged: pd.DataFrame, n_labels: int) -> Confusion:
    positive, fits = judged["negatives"] == "", judged["score"] >= FITS
    label = judged["label"]
    kinds = (positive & fits, ~positive & fits, positive & ~fits, ~positive & ~fits)
    return Confusion(*(np.bincount(label[kind], minlength=n_labels).astype(np.float64) for kind in kinds))


def _aurocs(
    judged: pd.DataFrame, n_labels: int, times: Float[ndarray, "document draw"]
) -> tuple[Int[ndarray, "label"], Float[ndarray, "label judge"], Float[ndarray, "label judge draw"]]:
    """Documents, AUROCs and their draws of every label; `judged` is sorted by label."""
    values, document = judged[list(JUDGES)].to_numpy(np.float64), judged["document"].to_numpy()
    positive, label = (judged["negatives"] == "").to_numpy(), judged["label"].to_numpy()
    bounds = np.searchsorted(label, np.arange(n_labels + 1))
    n_documents = np.zeros(n_labels, np.int64)
    auroc = np.full((n_labels, len(JUDGES)), np.nan)
    draws = np.full((*auroc.shape, times.shape[1]), np.nan, np.float32)
    times = np.concatenate([np.ones((len(times), 1), np.float32), times], axis=1)  # first the sample itself
    for i in range(n_labels):
        at = np.arange(bounds[i], bounds[i + 1])
        sides = at[positive[at]], at[~positive[at]]
        n_documents[i] = len(np.unique(document[at]))
        fewest = min(len(np.unique(document[side])) for side in sides)
        if min(map(len, sides)) >= MIN_ITEMS and fewest >= MIN_DOCUMENTS:
            found = weighted_auroc(*(values[side] for side in sides), *(times[document[side]] for side in sides))
            auroc[i], draws[i] = found[:, 0], found[:, 1:]
    return n_documents, auroc, draws


def _mean(values: Float[ndarray, "label *rest"]) -> Float[ndarray, "*rest"]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.asarray(np.nanmean(values, axis=0, dtype=np.float64))


def _matched(judged: pd.DataFrame) -> pd.DataFrame:
    """Of every label and token id as many positives as negatives, those whose turn comes first."""
    judged = judged.sort_values("turn", kind="stable")
    judged = judged.assign(alike=judged.groupby(["label", "token_id"]).ngroup())
    positive = judged["negatives"] == ""
    sides = judged[positive], judged[~positive]
    return pd.concat([same_ids(sides[0], sides[1], "alike"), same_ids(sides[1], sides[0], "alike")])

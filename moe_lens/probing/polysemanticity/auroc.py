"""AUROC of every neuron against every concept: ranks, then one product with the labels.

1. Rank each neuron over the rows once, ties by their mean rank, centred: ``r = 2 rank - n - 1``, whole, of sum 0.
2. ``AUROC - 1/2 = (r @ positive) / (2 n+ n-)`` for all concepts that use these rows (Mann & Whitney 1947).
3. Per document, the same product gives a variance that knows that tokens of a document are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.probing.equal.pairing import Sample
from moe_lens.stats import auroc_null_se

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

_CHUNK = 1 << 22
"""Ranks held at a time; each needs some 40 bytes while it is made."""
_PORTION = 1 << 19
"""The same where ranks are used up at once: they then stay near the processor."""
_EXACT_ROWS = 5792
"""Up to here no partial sum of centred ranks, at most n^2 / 2, leaves the whole numbers of float32."""


def centred_ranks(
    x: Float[ndarray, "*batch row"], n: Int[ndarray, "*batch"] | int | None = None
) -> Float[Tensor, "*batch row"]:
    """Ranks along the last axis as ``2 rank - n - 1``, ties by their mean rank: whole numbers of sum 0, in float32.

    Args:
        n: how many rows are real, all by default; the others hold +inf, and what is returned for them means nothing.
    """
    length = x.shape[-1]
    real = np.asarray(length if n is None else n)[..., None]
    order = torch.from_numpy(np.argsort(x, axis=-1))
    ordered = torch.from_numpy(x).gather(-1, order).numpy()
    place = np.arange(length)
    tied = np.zeros(x.shape, bool)  # with the next one; ties of padding are not worth the time
    tied[..., :-1] = (ordered[..., 1:] == ordered[..., :-1]) & (place[1:] < real)
    centred = np.empty(x.shape, np.float32)
    centred[...] = 2 * place - (real - 1)
    _share_ranks(centred.reshape(-1), np.flatnonzero(tied))
    ranks = torch.from_numpy(centred)
    return torch.empty_like(ranks).scatter_(-1, order, ranks)


def _share_ranks(ordered: Float[ndarray, "place"], tied: Int[ndarray, "tied"]) -> None:
    """Give every run of ties the mean of its ranks; `tied` are the places that are tied with the next one."""
    starts = np.flatnonzero(np.diff(tied, prepend=-2) > 1)
    first = tied[starts]
    length = np.diff(starts, append=len(tied)) + 1
    run = np.repeat(np.arange(len(first)), length)
    member = np.arange(len(run)) - (np.cumsum(length) - length)[run] + first[run]
    ordered[member] = ((ordered[first] + ordered[first + length - 1]) / 2)[run]


def neuron_aurocs(
    h: Float[Tensor, "row neuron"],
    positive: Bool[Tensor, "row concept"],
    used: Bool[Tensor, "row concept"] | None = None,
) -> Float[Tensor, "neuron concept"]:
    """AUROC of every neuron for every concept, ties counted half; equal to scikit-learn's ``roc_auc_score``.

    Args:
        h: activations; compared in float32.
        used: rows that each concept is scored on, all by default. Concepts with the same rows share one ranking and
            one product, so one column that differs costs one ranking more.

    Returns:
        float64, NaN where one class is empty. Exact up to the last division: ranks are whole numbers, added in
        float64 where there are too many rows for float32.

    A block of equal rows needs ``rows * neurons`` ranks, held in chunks of neurons of some 170 MB (one neuron at
    least). Does not show that a neuron is for the concept: the rows of one document are alike, and some neuron of
    many scores high by chance.
    """
    out = torch.full((h.shape[1], positive.shape[1]), torch.nan, dtype=torch.float64)
    if not h.shape[0]:
        return out
    for rows, concepts in _blocks(positive, used):
        labels = positive[:, concepts] if rows is None else positive[rows][:, concepts]
        here = h if rows is None else h[rows]
        wide = torch.float32 if len(here) <= _EXACT_ROWS else torch.float64
        n_pos = labels.sum(0).double()
        scale = 2 * n_pos * (len(here) - n_pos)
        step = max(1, _CHUNK // max(1, len(here)))
        for start in range(0, h.shape[1], step):
            ranks = centred_ranks(here[:, start : start + step].T.float().contiguous().numpy())
            sums = (ranks.to(wide) @ labels.to(wide)).double()
            out[start : start + step, concepts] = torch.where(scale > 0, 0.5 + sums / scale, torch.nan)
    return out


def _blocks(
    positive: Bool[Tensor, "row concept"], used: Bool[Tensor, "row concept"] | None
) -> list[tuple[Int[Tensor, "used"] | None, Int[Tensor, "member"]]]:
    """Sets of concepts that use the same rows, and these rows (None: all)."""
    if used is None:
        return [(None, torch.arange(positive.shape[1]))]
    packed = np.packbits(used.numpy(), axis=0)
    _, first, member = np.unique(packed, axis=1, return_index=True, return_inverse=True)
    member = member.reshape(-1)
    return [
        (used[:, c].nonzero().squeeze(1), torch.from_numpy(np.flatnonzero(member == block)))
        for block, c in enumerate(first.tolist())
    ]


@dataclass(frozen=True)
class ClusteredAurocs:
    """AUROC of every neuron of a cell, with its uncertainty over documents."""

    excess: Float[ndarray, "out concept neuron"]
    """AUROC minus 1/2: of all rows, then without each fold of documents in turn; NaN where that empties a class."""
    se: Float[ndarray, "concept neuron"]
    df: Int[ndarray, "concept"]
    """Documents behind the class that has fewer of them, minus 1."""


def clustered_aurocs(
    h: Float[Tensor, "row neuron"], sample: Sample, fold: Int[Tensor, "document"], n_folds: int
) -> ClusteredAurocs:
    """AUROC of every neuron on the drawn rows of every concept, its standard error, and its delete-a-fold values.

    The standard error is that of the difference between the mean ranks of the two classes with documents as
    clusters: per document, the sum of its rows' deviations from their class's mean rank, ``t_d``; variance
    ``sum_d t_d^2 * D / (D - 1)``, D the documents of the class with fewer. It is never taken below the null
    standard error of independent rows (`auroc_null_se`). Ranks are taken as given; the deviations include those
    from rows of the own class, which DeLong's placements leave out, so it errs on the wide side for AUROC far from
    1/2. Without a fold the ranks of all rows are kept, and the mean rank of what is left is compared.

    Args:
        fold: of every document of the corpus.

    Does not cover what documents share: neurons that read the source of a text, or the one word of a
    ``type`` concept, are found in every document of it.
    """
    n_concepts, n_neurons = len(sample.row), h.shape[1]
    n = sample.used.sum(1)
    by_neuron = h.T.float().contiguous()
    excess = np.full((n_folds + 1, n_concepts, n_neurons), np.nan)
    se = np.full((n_concepts, n_neurons), np.nan)
    for lines in _of_like_length(n, n_neurons):
        length = int(n[lines].max())
        row, positive, used, document = (
            part[lines, :length] for part in (sample.row, sample.positive, sample.used, sample.document)
        )
        x = by_neuron[:, row].masked_fill_(~used, torch.inf)
        ranks = centred_ranks(x.numpy(), n[lines].numpy()).masked_fill_(~used, 0).transpose(0, 1)
        at = lines.numpy()
        documents = torch.from_numpy(sample.documents[at]).amin(1)
        excess[:, at] = _delete_folds(ranks, positive, used, fold[document], n_folds)
        se[at] = _document_se(ranks, positive, used, document, documents)
    null = auroc_null_se(sample.n_pos, sample.n - sample.n_pos)
    df = np.maximum(sample.documents.min(1) - 1, 1) if n_concepts else np.zeros(0, int)
    return ClusteredAurocs(excess, np.maximum(se, null[:, None]), df)


def _of_like_length(n: Int[Tensor, "concept"], n_neurons: int) -> list[Int[Tensor, "line"]]:
    """Lines in portions of nearly equal length, so that little is padding."""
    order = n.argsort(stable=True)
    portions, start = [], 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * int(n[order[stop]]) * n_neurons <= _PORTION:
            stop += 1
        portions.append(order[start:stop])
        start = stop
    return portions


def _delete_folds(
    ranks: Float[Tensor, "concept neuron row"],
    positive: Bool[Tensor, "concept row"],
    used: Bool[Tensor, "concept row"],
    fold: Int[Tensor, "concept row"],
    n_folds: int,
) -> Float[Tensor, "out concept neuron"]:
    part = fold + n_folds * (~positive)
    member = torch.zeros(*part.shape, 2 * n_folds).scatter_(2, part[..., None], used.float()[..., None])
    sums = (ranks @ member).double().unflatten(2, (2, n_folds))
    counts = member.sum(1).double().unflatten(1, (2, n_folds))[:, None]
    left = torch.cat([sums.sum(3, keepdim=True), sums.sum(3, keepdim=True) - sums], 3)
    rows = torch.cat([counts.sum(3, keepdim=True), counts.sum(3, keepdim=True) - counts], 3)
    mean = torch.where(rows > 0, left / rows, torch.nan)
    n = used.sum(1).double()[:, None, None]
    return ((mean[:, :, 0] - mean[:, :, 1]) / (2 * n)).permute(2, 0, 1)


def _document_se(
    ranks: Float[Tensor, "concept neuron row"],
    positive: Bool[Tensor, "concept row"],
    used: Bool[Tensor, "concept row"],
    document: Int[Tensor, "concept row"],
    documents: Int[Tensor, "concept"],
) -> Float[Tensor, "concept neuron"]:
    yes = (positive & used).float()
    no = used.float() - yes
    n_pos, n_neg = yes.sum(1, keepdim=True), no.sum(1, keepdim=True)
    n = n_pos + n_neg
    at = _numbered(document.masked_fill(~used, -1))
    by_document = torch.zeros(*at.shape, int(at.max()) + 1)
    sums = ranks @ by_document.scatter(2, at[..., None], (yes / n_pos - no / n_neg)[..., None])
    difference = sums.sum(2, keepdim=True)  # of the mean ranks; each class's own mean follows, the ranks add up to 0
    share = torch.zeros(by_document.shape[::2]).scatter_add_(
        1, at, yes * n_neg / (n_pos * n) + no * n_pos / (n_neg * n)
    )
    deviation = sums - difference * share[:, None]
    few = documents.float().clamp(min=2)[:, None]
    return (deviation.square().sum(2) * few / (few - 1)).sqrt() / (2 * n)


def _numbered(document: Int[Tensor, "concept row"]) -> Int[Tensor, "concept row"]:
    """Number the distinct documents of each line from 0."""
    ordered, order = document.sort(1)
    new = torch.zeros_like(ordered)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(ordered).scatter_(1, order, new.cumsum(1))


def t_tail(t: Float[ndarray, "*shape"], df: Int[ndarray, "*#shape"]) -> Float[ndarray, "*shape"]:
    """Upper tail of Student's t, ``P(T >= t)``, by Wallace's normal approximation (1959, Ann. Math. Stat. 30:1121).

    ``z = (8 df + 1) / (8 df + 3) * sqrt(df ln(1 + t^2 / df))``. In the far tail it errs on the cautious side: with
    4 degrees of freedom a true 1e-2 reads 3 % and a true 1e-6 reads 70 % too large, with 20 less than 5 %.
    """
    z = np.sign(t) * (8 * df + 1) / (8 * df + 3) * np.sqrt(df * np.log1p(np.square(t) / df))
    return torch.special.ndtr(torch.from_numpy(np.asarray(-z, np.float64))).numpy()

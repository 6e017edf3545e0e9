"""Rank, fit and score the k-sparse probes of one cell on rows that were drawn for it (``pairing.Sample``).

The same steps as in `moe_lens.probing.fit` and `moe_lens.probing.evaluate`, but every concept has its own rows:
neurons are ranked on the very rows that the probe is fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.capture.moments import Moments
from moe_lens.probing.arms.base import METRICS, f1_of_counts
from moe_lens.probing.document_sums import document_sums
from moe_lens.probing.select import neuron_scores, top_neurons
from moe_lens.probing.solve import fit_standardised
from moe_lens.stats import ranking_scores

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.probing.equal.pairing import Sample

_CHUNK_BYTES = 12 << 20  # the solver is several times faster on what fits the cache


@dataclass(frozen=True)
class Fitted:
    """Probes of one cell at one k: ``logit = h[neurons] @ coef + intercept`` on raw activations."""

    concepts: Int[ndarray, "concept"]
    neurons: Int[Tensor, "concept k"]
    """Among all neurons of the expert or FFN."""
    coef: Float[Tensor, "concept k"]
    intercept: Float[Tensor, "concept"]
    usable: Bool[ndarray, "concept"]
    """False where no neuron varies, or the fit did not converge."""
    separable: Bool[ndarray, "concept"]
    """The drawn rows are separated without an error."""

    def lines(self, concepts: Int[ndarray, "some"]) -> Fitted:
        """Some of the concepts, in the order given."""
        at = np.searchsorted(self.concepts, concepts)
        return Fitted(
            self.concepts[at], self.neurons[at], self.coef[at], self.intercept[at], self.usable[at], self.separable[at]
        )


def fit_cell(
    h: Float[Tensor, "row d_ff"], neurons: Int[ndarray, "w"], sample: Sample, ks: Sequence[int], *, rank: str
) -> dict[int, Fitted]:
    """Rank `neurons` of a cell for every concept of `sample` and fit the best k of them, for every k.

    Args:
        h: all rows of the expert that `sample` numbers.
    """
    seen = torch.zeros(len(h), dtype=torch.bool)
    seen[sample.row[sample.used]] = True
    number = seen.cumsum(0) - 1
    x = h[seen][:, torch.from_numpy(neurons)].float()
    row = number[sample.row].clamp(min=0)
    order = _ranked(x, row, sample, max(ks), rank)
    ids, by_neuron = torch.from_numpy(neurons), x.T.contiguous()
    found = {}
    for k in ks:
        step = max(1, _CHUNK_BYTES // max(1, row.shape[1] * (k + 1) * 8 * 3))
        parts = [
            _fit(by_neuron, row[i : i + step], sample, i, order[i : i + step, :k]) for i in range(0, len(row), step)
        ]
        coef, intercept, usable, separable = (torch.cat(column) for column in zip(*parts, strict=True))
        chosen = ids[order[:, :k]]
        found[k] = Fitted(sample.concepts, chosen, coef, intercept, usable.numpy(), separable.numpy())
    return found


def _ranked(
    x: Float[Tensor, "row w"], row: Int[Tensor, "concept drawn"], sample: Sample, k: int, rank: str
) -> Int[Tensor, "concept k"]:
    """The `k` best neurons of every concept, from moments over its drawn rows."""
    n_concepts, width = len(row), x.shape[1]
    line = torch.arange(n_concepts)[:, None].expand_as(row)
    member = torch.zeros(2, n_concepts, len(x))
    for side, mask in enumerate((sample.positive, sample.used & ~sample.positive)):
        member[side, line[mask], row[mask]] = 1.0
    centred = x - x.mean(0)
    total = member.view(2 * n_concepts, -1) @ torch.cat([centred, centred * centred], 1)
    n = member.sum(-1).double()
    mean, square = (total.double().view(2, n_concepts, -1) / n[..., None]).split(width, dim=-1)
    var = (square - mean * mean).clamp(min=0)
    spread = (centred.double() ** 2).mean(0)
    moments = Moments(
        n[0][None], n[1][None], mean[0][None], mean[1][None], var[0][None], var[1][None],
        n=torch.tensor([float(len(x))]), mean=torch.zeros(1, width), var=spread[None],
    )  # fmt: skip
    return top_neurons(neuron_scores(moments, rank=rank), k)[0]


def _fit(
    x: Float[Tensor, "w row"], row: Int[Tensor, "concept drawn"], sample: Sample, start: int, order: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients and intercepts on raw activations, whether they can be used, whether they make no error."""
    stop = start + len(row)
    used, positive = sample.used[start:stop], sample.positive[start:stop]
    values = x[order[:, :, None], row[:, None, :]].double().transpose(1, 2)
    fit = fit_standardised(values, positive.double(), used)
    lowest = fit.logit.masked_fill(~positive, torch.inf).amin(1)
    separable = lowest > fit.logit.masked_fill(positive | ~used, -torch.inf).amax(1)
    return fit.coef, fit.intercept, fit.converged & (fit.sd > 0).any(1), separable


def logits(h: Float[Tensor, "row d_ff"], sample: Sample, fitted: Fitted) -> Float[ndarray, "drawn concept"]:
    """Scores of the drawn rows; `fitted` holds the concepts of `sample` in the same order."""
    x = h[sample.row[:, :, None], fitted.neurons[:, None, :]].float()
    out = torch.bmm(x, fitted.coef.float()[..., None]).squeeze(-1) + fitted.intercept.float()[:, None]
    return out.T.numpy()


def auroc(score: Float[ndarray, "drawn concept"], sample: Sample) -> Float[ndarray, "concept"]:
    """Of every concept over its drawn rows."""
    return ranking_scores(score, sample.positive.T.numpy(), sample.used.T.numpy())[0]


def document_counts(
    score: Float[ndarray, "drawn concept"], sample: Sample, place: Int[ndarray, "corpus_document"], n_documents: int
) -> Float[ndarray, "concept document count"]:
    """`document_sums` of the drawn rows.

    Args:
        place: where each document of the corpus goes on the document axis.
    """
    truth, used = sample.positive.T.numpy(), sample.used.T.numpy()
    return document_sums(score, truth, used, np.where(used, place[sample.document.T.numpy()], 0), n_documents)


def metrics(counts: Float[ndarray, "concept document count"]) -> Float[ndarray, "metric concept"]:
    """``METRICS`` of every concept from its `document_counts`; NaN where a class is missing."""
    total = counts.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        area = total[:, 4] / (total[:, 0] + total[:, 2])
    return np.stack([*(f1_of_counts(total[:, :4], name) for name in METRICS[:-1]), area])

"""Fit the k-sparse probes of one layer on the select split.

1. Rank the neurons of every (expert, concept) by streamed moments.
2. Draw at most ``max_rows`` stored rows per (expert, concept), half of them positive where there are enough.
3. Fit k = 1 for every concept of an expert in one batch; score it by AUROC on the same rows.
4. Larger k are fitted later, only in the cells that are among a concept's best at k = 1.

A fit is kept on the scale of the raw activations, so scoring new rows is one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.probing.select import neuron_scores, top_neurons
from moe_lens.probing.settings import MINIMUM_SELECT, ProbeSettings
from moe_lens.probing.solve import balanced_weights, fit_logistic
from moe_lens.stats import ranking_scores
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from moe_lens.capture.moments import Moments
    from moe_lens.capture.rows import Rows
    from moe_lens.capture.tokens import TokenTable

_CHUNK_BYTES = 256 << 20


@dataclass
class Probe:
    """One fitted probe: ``logit = h[neurons] @ coef + intercept`` on raw activations."""

    layer: int
    expert: int
    concept: int
    k: int
    status: Status
    neurons: Int[np.ndarray, "k"]
    coef: Float[np.ndarray, "k"]
    intercept: float
    n_select: int
    n_pos_select: int
    auroc_select: float = np.nan

    @property
    def fitted(self) -> bool:
        return self.status in (Status.OK, Status.SEPARABLE)


@dataclass(frozen=True)
class CellRows:
    """The rows one expert's probes are fitted on."""

    activation: Float[Tensor, "row d_ff"]
    positive: Bool[Tensor, "row concept"]
    used: Bool[Tensor, "row concept"]
    """Rows drawn for each concept; at most ``max_rows`` per column."""
    n_documents: tuple[Int[Tensor, "concept"], Int[Tensor, "concept"]]
    """Distinct documents behind the drawn (positives, negatives)."""


def draw_rows(rows: Rows, tokens: TokenTable, max_rows: int) -> CellRows:
    """Draw the fitting rows of every concept from an expert's stored rows, smallest keys first.

    Positives first, up to half of `max_rows`; negatives fill the rest; positives take what negatives leave.
    """
    in_scope = tokens.in_scope[rows.token]
    positive = tokens.labels[rows.token] & in_scope
    negative = in_scope & ~positive
    half = max_rows // 2
    n_pos, n_neg = positive.sum(0), negative.sum(0)
    take_neg = torch.minimum(n_neg, max_rows - n_pos.clamp(max=half))
    take_pos = torch.minimum(n_pos, max_rows - take_neg)
    used_pos = positive & (positive.cumsum(0, dtype=torch.int32) <= take_pos)
    used_neg = negative & (negative.cumsum(0, dtype=torch.int32) <= take_neg)
    document = tokens.document[rows.token]
    spread = (distinct_documents(document, used_pos), distinct_documents(document, used_neg))
    return CellRows(rows.activation.float(), positive, used_pos | used_neg, spread)


def distinct_documents(document: Int[Tensor, "row"], member: Bool[Tensor, "row problem"]) -> Int[Tensor, "problem"]:
    """How many different documents the member rows of each column come from."""
    if not len(document):
        return torch.zeros(member.shape[1], dtype=torch.long)
    _, which = torch.unique(document, return_inverse=True)
    hit = torch.zeros(int(which.max()) + 1, member.shape[1])
    return (hit.index_add_(0, which, member.float()) > 0).sum(0)


class LayerFitter:
    """Fits the probes of one layer. Holds the ranking of its neurons and reads rows on demand."""

    def __init__(self, layer: int, moments: Moments, tokens: TokenTable, settings: ProbeSettings) -> None:
        self.layer = layer
        self.moments = moments
        self.tokens = tokens
        self.settings = settings
        d_ff = moments.mean.shape[-1]
        scores = neuron_scores(moments, rank=settings.rank)
        self.order = top_neurons(scores, min(max(settings.k), d_ff)).cpu()

    def fit(self, expert: int, rows: Rows, concepts: Sequence[int], ks: Sequence[int]) -> list[Probe]:
        """Fit `concepts` of one expert at every k of `ks`."""
        drawn = draw_rows(rows, self.tokens, self.settings.max_rows)
        enough = self._enough(expert, drawn)
        probes = [self._empty(expert, c, k, Status.TOO_FEW) for c in concepts if not enough[c] for k in ks]
        todo = [c for c in concepts if enough[c]]
        for k in ks:
            per_problem = max(1, int(drawn.used[:, todo].sum(0).max()) if todo else 1) * (k + 1) * 8 * 3
            step = max(1, _CHUNK_BYTES // per_problem)
            for start in range(0, len(todo), step):
                probes += self._fit_batch(expert, drawn, todo[start : start + step], k)
        return probes

    def _enough(self, expert: int, drawn: CellRows) -> Bool[Tensor, "concept"]:
        need = MINIMUM_SELECT
        n_pos, n_neg = self.moments.n_pos[expert].cpu(), self.moments.n_neg[expert].cpu()
        docs_pos, docs_neg = drawn.n_documents
        tokens = (n_pos >= need.tokens) & (n_neg >= need.tokens)
        return tokens & (docs_pos >= need.documents) & (docs_neg >= need.documents)

    def _empty(self, expert: int, concept: int, k: int, status: Status) -> Probe:
        n_pos = int(self.moments.n_pos[expert, concept])
        n = n_pos + int(self.moments.n_neg[expert, concept])
        nothing = np.zeros(0)
        return Probe(self.layer, expert, concept, k, status, nothing.astype(int), nothing, 0.0, n, n_pos)

    def _fit_batch(self, expert: int, drawn: CellRows, concepts: list[int], k: int) -> list[Probe]:
        x, y, used = _gather(drawn, self.order[expert, concepts, :k], concepts)
        mean, sd = _masked_moments(x, used)
        standard = ((x - mean) / torch.where(sd > 0, sd, 1.0)) * used[..., None]
        fit = fit_logistic(standard, y, balanced_weights(y, used))
        logit = torch.bmm(standard, fit.coef[..., None]).squeeze(-1)
        auroc, _ = ranking_scores(logit.T.numpy(), (y.T > 0.5).numpy(), used.T.numpy())
        coef = fit.coef / torch.where(sd > 0, sd, 1.0).squeeze(1)
        intercept = fit.intercept - (coef * mean.squeeze(1)).sum(1)
        constant = (sd.squeeze(1) == 0).all(1)
        probes = []
        for i, concept in enumerate(concepts):
            probe = self._empty(expert, concept, k, Status.OK)
            probe.neurons = self.order[expert, concept, :k].numpy()
            probe.coef, probe.intercept = coef[i].numpy(), float(intercept[i])
            probe.auroc_select = float(auroc[i])
            if constant[i]:
                probe.status, probe.auroc_select = Status.CONSTANT, np.nan
            elif not fit.converged[i]:
                probe.status = Status.NOT_CONVERGED
            elif auroc[i] == 1.0:
                probe.status = Status.SEPARABLE
            probes.append(probe)
        return probes


def _gather(
    drawn: CellRows, columns: Int[Tensor, "problem k"], concepts: list[int]
) -> tuple[Float[Tensor, "problem row k"], Float[Tensor, "problem row"], Bool[Tensor, "problem row"]]:
    """Drawn rows of each concept side by side, padded to the longest, in float64."""
    index = [drawn.used[:, c].nonzero().squeeze(1) for c in concepts]
    rows = torch.nn.utils.rnn.pad_sequence(index, batch_first=True, padding_value=-1)
    used = rows >= 0
    rows = rows.clamp(min=0)
    x = drawn.activation[rows[:, :, None], columns[:, None, :]].double()
    y = drawn.positive[rows, torch.tensor(concepts)[:, None]].double()
    return x * used[..., None], y * used, used


def _masked_moments(
    x: Float[Tensor, "problem row k"], used: Bool[Tensor, "problem row"]
) -> tuple[Float[Tensor, "problem 1 k"], Float[Tensor, "problem 1 k"]]:
    n = used.sum(1)[:, None, None].clamp(min=1)
    mean = x.sum(1, keepdim=True) / n
    centred = (x - mean) * used[..., None]
    return mean, ((centred * centred).sum(1, keepdim=True) / n).sqrt()

"""Fit the k-sparse probes of one layer on the select split.

1. Rank the neurons of every (expert, concept) by streamed moments.
2. Draw at most ``max_rows`` stored rows per (expert, concept), half of them positive where there are enough.
3. Fit k = 1 for every concept of an expert in one batch; score it by AUROC on the same rows.
4. Larger k are fitted later, only in the cells that are among a concept's best at k = 1.
5. Beside every probe goes the two-part score of METRICS 1.3, item 6: the same neurons, times the router weight.

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
from moe_lens.probing.solve import balanced_weights, fit_standardised
from moe_lens.stats import ranking_scores
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from moe_lens.capture.moments import Moments
    from moe_lens.capture.rows import Rows
    from moe_lens.capture.tokens import TokenTable

_CHUNK_BYTES = 24 << 20  # the solver's steps are fastest in the cache


@dataclass(frozen=True)
class TwoPart:
    """Log-odds of a concept for any token: ``(g * h[neurons]) @ coef + intercept`` if routed here, else `off_route`.

    ``g`` is the router weight, 1 in a dense layer. The score is the logistic regression on (routed indicator,
    ``g * h`` or 0) at natural prevalence (METRICS 1.3, item 6). The indicator is unpenalised, so that the fit falls
    apart into the two kinds of token.
    """

    coef: Float[np.ndarray, "k"]
    intercept: float
    off_route: float


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
    two_part: TwoPart | None = None
    """At the smallest k that was asked for; None where nothing was fitted, or that fit did not converge."""

    @property
    def fitted(self) -> bool:
        return self.status in (Status.OK, Status.SEPARABLE)


@dataclass(frozen=True)
class CellRows:
    """The rows one expert's probes are fitted on."""

    activation: Float[Tensor, "row d_ff"]
    weight: Float[Tensor, "row"]
    """Router weight."""
    positive: Bool[Tensor, "row concept"]
    used: Bool[Tensor, "row concept"]
    """Rows drawn for each concept; at most ``max_rows`` per column."""
    n_documents: tuple[Int[Tensor, "concept"], Int[Tensor, "concept"]]
    """Distinct documents behind the drawn (positives, negatives)."""


def draw_rows(rows: Rows, tokens: TokenTable, max_rows: int, concepts: Sequence[int] | None = None) -> CellRows:
    """Draw the fitting rows of some concepts (all by default) from an expert's stored rows, smallest keys first.

    Positives first, up to half of `max_rows`; negatives fill the rest; positives take what negatives leave.
    """
    wanted = slice(None) if concepts is None else list(concepts)
    in_scope = tokens.in_scope[rows.token][:, wanted]
    positive = tokens.labels[rows.token][:, wanted] & in_scope
    negative = in_scope & ~positive
    half = max_rows // 2
    n_pos, n_neg = positive.sum(0), negative.sum(0)
    take_neg = torch.minimum(n_neg, max_rows - n_pos.clamp(max=half))
    take_pos = torch.minimum(n_pos, max_rows - take_neg)
    used_pos = positive & (positive.cumsum(0, dtype=torch.int32) <= take_pos)
    used_neg = negative & (negative.cumsum(0, dtype=torch.int32) <= take_neg)
    document = tokens.document[rows.token]
    spread = (distinct_documents(document, used_pos), distinct_documents(document, used_neg))
    return CellRows(rows.activation.float(), rows.weight.double(), positive, used_pos | used_neg, spread)


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
        self.n_pos, self.n_neg = moments.n_pos.cpu(), moments.n_neg.cpu()  # the moments themselves are large
        self.tokens = tokens
        self.settings = settings
        d_ff = moments.mean.shape[-1]
        scores = neuron_scores(moments, rank=settings.rank)
        self.order = top_neurons(scores, min(max(settings.k), d_ff)).cpu()
        self.off_route = off_route_logits(moments, tokens)

    def fit(self, expert: int, rows: Rows, concepts: Sequence[int], ks: Sequence[int]) -> list[Probe]:
        """Fit `concepts` of one expert at every k of `ks`."""
        drawn = draw_rows(rows, self.tokens, self.settings.max_rows, concepts)
        enough = self._enough(expert, concepts, drawn).tolist()
        probes = [
            self._empty(expert, c, k, Status.TOO_FEW)
            for c, ok in zip(concepts, enough, strict=True)
            if not ok
            for k in ks
        ]
        todo = [i for i, ok in enumerate(enough) if ok]
        for k in ks:
            per_problem = max(1, int(drawn.used[:, todo].sum(0).max()) if todo else 1) * (k + 1) * 8 * 3
            step = max(1, _CHUNK_BYTES // per_problem)
            for start in range(0, len(todo), step):
                at = todo[start : start + step]
                probes += self._fit_batch(expert, drawn, at, [concepts[i] for i in at], k)
        return probes

    def _enough(self, expert: int, concepts: Sequence[int], drawn: CellRows) -> Bool[Tensor, "concept"]:
        need = MINIMUM_SELECT
        n_pos, n_neg = self.n_pos[expert, concepts], self.n_neg[expert, concepts]
        docs_pos, docs_neg = drawn.n_documents
        tokens = (n_pos >= need.tokens) & (n_neg >= need.tokens)
        return tokens & (docs_pos >= need.documents) & (docs_neg >= need.documents)

    def _empty(self, expert: int, concept: int, k: int, status: Status) -> Probe:
        n_pos = int(self.n_pos[expert, concept])
        n = n_pos + int(self.n_neg[expert, concept])
        nothing = np.zeros(0)
        return Probe(self.layer, expert, concept, k, status, nothing.astype(int), nothing, 0.0, n, n_pos)

    def _fit_batch(self, expert: int, drawn: CellRows, at: list[int], concepts: list[int], k: int) -> list[Probe]:
        """Fit `concepts`, which are columns `at` of the drawn rows."""
        x, y, used, g = _gather(drawn, self.order[expert, concepts, :k], at)
        line = fit_standardised(x, y, used)
        constant = (line.sd == 0).all(1)
        auroc, _ = ranking_scores(line.logit.T.numpy(), (y.T > 0.5).numpy(), used.T.numpy())
        two_parts = (
            self._two_parts(expert, concepts, x.mul_(g[..., None]), y, used) if k == self.settings.k[0] else None
        )
        probes = []
        for i, concept in enumerate(concepts):
            probe = self._empty(expert, concept, k, Status.OK)
            probe.neurons = self.order[expert, concept, :k].numpy()
            probe.coef, probe.intercept = line.coef[i].numpy(), float(line.intercept[i])
            probe.auroc_select = float(auroc[i])
            probe.two_part = two_parts[i] if two_parts else None
            if constant[i]:
                probe.status, probe.auroc_select = Status.CONSTANT, np.nan
            elif not line.converged[i]:
                probe.status = Status.NOT_CONVERGED
            elif auroc[i] == 1.0:
                probe.status = Status.SEPARABLE
            probes.append(probe)
        return probes

    def _two_parts(
        self,
        expert: int,
        concepts: list[int],
        x: Float[Tensor, "problem row k"],
        y: Float[Tensor, "problem row"],
        used: Bool[Tensor, "problem row"],
    ) -> list[TwoPart | None]:
        """Fits of router-weighted activations `x`, at the class balance of the cell."""
        n_pos, n_neg = self.n_pos[expert, concepts], self.n_neg[expert, concepts]
        fit = fit_standardised(x, y, used, natural_weights(y, used, n_pos, n_neg))
        return [
            TwoPart(fit.coef[i].numpy(), float(fit.intercept[i]), float(self.off_route[expert, concept]))
            if fit.converged[i]
            else None
            for i, concept in enumerate(concepts)
        ]


def off_route_logits(moments: Moments, tokens: TokenTable) -> Float[Tensor, "expert concept"]:
    """Log-odds of every concept among the eligible tokens that an expert does not see.

    Half a token is added to either class where one is empty; 0 where every token visits the expert.
    """
    positive = tokens.labels & tokens.in_scope & tokens.eligible[:, None]
    negative = ~tokens.labels & tokens.in_scope & tokens.eligible[:, None]
    off_pos, off_neg = positive.sum(0) - moments.n_pos.cpu(), negative.sum(0) - moments.n_neg.cpu()
    half = torch.where((off_pos == 0) | (off_neg == 0), 0.5, 0.0)
    return ((off_pos + half) / (off_neg + half)).log()


def natural_weights(
    y: Float[Tensor, "problem row"],
    used: Bool[Tensor, "problem row"],
    n_pos: Float[Tensor, "problem"],
    n_neg: Float[Tensor, "problem"],
) -> Float[Tensor, "problem row"]:
    """Sample weights that give the drawn rows the class balance of the cell; they sum to the rows drawn.

    Args:
        n_pos, n_neg: tokens of each class that the cell sees; the drawn rows are a sample of them, class by class.
    """
    share = (n_pos / (n_pos + n_neg))[:, None]
    return 2 * balanced_weights(y, used) * torch.where(y > 0.5, share, 1 - share)


def _gather(
    drawn: CellRows, columns: Int[Tensor, "problem k"], at: list[int]
) -> tuple[
    Float[Tensor, "problem row k"],
    Float[Tensor, "problem row"],
    Bool[Tensor, "problem row"],
    Float[Tensor, "problem row"],
]:
    """Drawn rows of each concept side by side, padded to the longest, in float64.

    Returns:
        Activations, truth, which rows there are, router weights.
    """
    index = [drawn.used[:, i].nonzero().squeeze(1) for i in at]
    rows = torch.nn.utils.rnn.pad_sequence(index, batch_first=True, padding_value=-1)
    used = rows >= 0
    rows = rows.clamp(min=0)
    x = drawn.activation[rows[:, :, None], columns[:, None, :]].double()
    y = drawn.positive[rows, torch.tensor(at)[:, None]].double()
    return x * used[..., None], y * used, used, drawn.weight[rows]

"""Need and exclusivity of an expert under its label (METRICS 3, "The verdict").

    basis        need: mean over documents of the mean over (z=1, r=1) tokens of ...
    co-selected  D(t) minus the effect of a random expert that was chosen beside it at t, at equal gates
    off-label    D(t), minus the same mean over (z=0, r=1): where each token has one expert
    absolute     D(t): where also fewer than 30 documents hold (z=0, r=1)

An expert with the larger gate loses more when it is taken away, whatever it does. So each of the two effects is taken
relative to `GateCurve`: what co-selected experts of the layer lose on average at such a gate. The curve is a step
function of ln gate, because a straight line goes below 0 at small gates and would credit an expert that does nothing
with what others do at larger ones; and it leaves out the expert under test, whose own work it would explain away.
Curves are drawn with the documents, so intervals contain their error.

Exclusivity is the same at z=1 minus at z=0, given r=1.

Need says more or less than another expert; ``effect`` is D(t) itself at (z=1, r=1). The two can disagree: where the
others chosen there matter little, a curve of the whole layer expects less than nothing at a small gate, and an expert
that costs nothing seems needed. So `verdict` asks both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from moe_lens.causal.trial.cells import Interval
from moe_lens.stats import percentile_interval

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

Basis = Literal["co-selected", "off-label", "absolute"]
ENOUGH_DOCUMENTS = 30
"""Documents with (z=0, r=1) that exclusivity needs."""
STEPS = 10
"""Of the gate curve, with as many visits each."""
_SMALLEST = 1e-9


@dataclass(frozen=True, eq=False)
class GateCurve:
    """Mean effect of experts at each step of ln gate, by document, so that documents can be drawn."""

    edges: Float[ndarray, "edge"]
    """Of ln gate, between steps."""
    visits: Float[ndarray, "document step"]
    effect: Float[ndarray, "document step"]
    """Sum over visits, nats."""

    @classmethod
    def of_layer(
        cls,
        expert: Int[ndarray, "visit"],
        gate: Float[ndarray, "visit"],
        effect: Float[ndarray, "visit"],
        document: Int[ndarray, "visit"],
        *,
        n_experts: int,
        n_documents: int,
    ) -> list[GateCurve]:
        """For every expert of a layer the curve of all others; the steps are the same."""
        edges = np.quantile(log_gate(gate), np.arange(1, STEPS) / STEPS) if len(gate) else np.zeros(STEPS - 1)
        cell = (expert * n_documents + document) * STEPS + np.searchsorted(edges, log_gate(gate), side="right")
        shape = n_experts, n_documents, STEPS
        n, y = (np.bincount(cell, w, n_experts * n_documents * STEPS).reshape(shape) for w in (None, effect))
        return [cls(edges, n.sum(0) - n[e], y.sum(0) - y[e]) for e in range(n_experts)]

    def steps(self, gate: Float[ndarray, "visit"]) -> Float[ndarray, "visit step"]:
        """1 at the step of each gate."""
        return np.eye(len(self.edges) + 1)[np.searchsorted(self.edges, log_gate(gate), side="right")]

    def heights(self, times: Float[ndarray, "draw document"]) -> Float[ndarray, "draw step"]:
        """Mean effect at each step; over all visits where a step has none; 0 without visits."""
        n, y = times @ self.visits, times @ self.effect
        all_n, all_y = n.sum(1, keepdims=True), y.sum(1, keepdims=True)
        average = np.divide(all_y, all_n, out=np.zeros_like(all_y), where=all_n > 0)
        return np.where(n > 0, y / np.maximum(n, 1), average)


def log_gate(gate: Float[ndarray, "visit"]) -> Float[ndarray, "visit"]:
    return np.log(np.maximum(gate, _SMALLEST, dtype=np.float64))


@dataclass(frozen=True, eq=False)
class Beside:
    """The co-selected expert at every visit."""

    effect: Float[ndarray, "visit"]
    gate: Float[ndarray, "visit"]
    """Of the other expert."""
    own_gate: Float[ndarray, "visit"]
    curve: GateCurve


@dataclass(frozen=True)
class Need:
    """Nats per token. `p` is one-sided, for a need of 0 or less."""

    need: Interval
    p: float
    basis: Basis
    exclusivity: Interval
    """NaN if too few documents hold (z=0, r=1): the label says where the expert is visited, "by routing"."""
    documents: int
    """With (z=1, r=1)."""
    documents_off: int
    """With (z=0, r=1)."""
    gate_advantage: float = 0.0
    """Nats that were taken off the need for the larger gate (added for a smaller one)."""
    effect: Interval = field(default_factory=Interval)
    """D itself at (z=1, r=1), beside no other expert."""
    effect_off: Interval = field(default_factory=Interval)
    """And at (z=0, r=1)."""


def needed(
    effect: Float[ndarray, "visit"],
    z: Bool[ndarray, "visit"],
    document: Int[ndarray, "visit"],
    times: Float[ndarray, "draw document"],
    *,
    beside: Beside | None = None,
) -> Need:
    """Need and exclusivity from the visits of one expert.

    Args:
        effect: of the expert at each visit, nats.
        z: whether the label marks the token.
        times: bootstrap multiplicities of documents; all labels should share them.
        beside: None means that there is no co-selected expert.

    The need is against the experts that are there. It does not show that the model could not have learnt to do
    without, and experts that stand in for each other hide each other's need.
    """
    n_documents = times.shape[1]
    y = np.asarray(effect, np.float64)
    x = np.zeros((len(y), 0))
    once = np.ones((1, n_documents))
    heights = [np.zeros((len(weights), 0)) for weights in (once, times)]
    if beside is not None:
        y = y - beside.effect
        x = beside.curve.steps(beside.own_gate) - beside.curve.steps(beside.gate)
        heights = [beside.curve.heights(weights) for weights in (once, times)]
    on, off = (_Cell.of(y, x, document, n_documents, at) for at in (z, ~z))
    enough = off.n >= ENOUGH_DOCUMENTS
    basis: Basis = "co-selected" if beside is not None else "off-label" if enough else "absolute"
    cells = [on, off] if basis == "off-label" else [on]
    with np.errstate(invalid="ignore", divide="ignore"):
        (value, error), (draws, errors) = (
            _difference(cells, weights, height) for weights, height in zip((once, times), heights, strict=True)
        )
        exclusivity = Interval()
        if enough:
            pairs = zip((once, times), heights, strict=True)
            exclusivity = _interval(*(on.mean(w, h) - off.mean(w, h) for w, h in pairs))
        advantage = float(on.of_gates(heights[0]).sum() / on.n) if on.n else np.nan
    p = studentised_p(float(value[0]), float(error[0]), draws, errors) if on.n > 1 else 1.0
    alone = [_alone(np.asarray(effect, np.float64), document, times, at) for at in (z, ~z)]
    return Need(_interval(value, draws), p, basis, exclusivity, on.n, off.n, advantage, *alone)


def _alone(
    effect: Float[ndarray, "visit"],
    document: Int[ndarray, "visit"],
    times: Float[ndarray, "draw document"],
    at: Bool[ndarray, "visit"],
) -> Interval:
    """Mean over documents of the mean effect at some visits."""
    cell = _Cell.of(effect, np.zeros((len(effect), 0)), document, times.shape[1], at)
    with np.errstate(invalid="ignore", divide="ignore"):
        value, draws = ((w @ cell.y) / (w @ cell.has) for w in (np.ones((1, times.shape[1])), times))
    return _interval(value, draws)


def studentised_p(value: float, error: float, draws: Float[ndarray, "draw"], errors: Float[ndarray, "draw"]) -> float:
    """One-sided p of value <= 0: how often (draw - value) / its error reaches value / error (Hall 1992).

    A draw without spread (one document again and again) counts as one that reaches. 1 where there is no value.
    """
    if not np.isfinite(value) or not np.isfinite(error):
        return 1.0
    if error == 0:  # the same number in all documents
        return 1.0 if value <= 0 else 1 / (1 + len(draws))
    with np.errstate(invalid="ignore", divide="ignore"):
        t, drawn = value / error, (draws - value) / errors
    reach = (drawn >= t) | ~(errors > 0)
    return float((1 + reach.sum()) / (1 + len(draws)))


@dataclass(frozen=True, eq=False)
class _Cell:
    """Visits with one z, as means of the documents that have some."""

    has: Float[ndarray, "document"]
    """1 for these documents, 0 for others."""
    y: Float[ndarray, "document"]
    x: Float[ndarray, "document step"]
    """Mean of own step minus the other's step."""

    @classmethod
    def of(
        cls,
        y: Float[ndarray, "visit"],
        x: Float[ndarray, "visit step"],
        document: Int[ndarray, "visit"],
        n_documents: int,
        at: Bool[ndarray, "visit"],
    ) -> _Cell:
        n = np.bincount(document[at], minlength=n_documents)
        columns = [np.bincount(document[at], column[at], n_documents) for column in (y, *x.T)]
        means = np.stack(columns) / np.maximum(n, 1)
        return cls((n > 0).astype(np.float64), means[0], means[1:].T)

    @property
    def n(self) -> int:
        return int(self.has.sum())

    def of_gates(self, heights: Float[ndarray, "draw step"]) -> Float[ndarray, "draw document"]:
        """What the gates alone lead to expect of every document."""
        return heights @ self.x.T

    def mean(
        self, weights: Float[ndarray, "draw document"], heights: Float[ndarray, "draw step"]
    ) -> Float[ndarray, "draw"]:
        return (weights @ self.y - ((weights @ self.x) * heights).sum(1)) / (weights @ self.has)


def _difference(
    cells: Sequence[_Cell], weights: Float[ndarray, "draw document"], heights: Float[ndarray, "draw step"]
) -> tuple[Float[ndarray, "draw"], Float[ndarray, "draw"]]:
    """Mean of the first cell, minus that of the second if there is one, and its standard error for a given curve."""
    value: ndarray = np.zeros(len(weights))
    influence: ndarray = np.zeros_like(weights)
    for sign, cell in zip((1, -1), cells, strict=False):
        mean = cell.mean(weights, heights)
        value = value + sign * mean
        off = (cell.y - cell.of_gates(heights) - mean[:, None]) * cell.has
        influence += sign * off / (weights @ cell.has)[:, None]
    return value, np.sqrt(np.einsum("bd,bd,bd->b", weights, influence, influence))


def _interval(value: Float[ndarray, "1"], draws: Float[ndarray, "draw"]) -> Interval:
    if not np.isfinite(value[0]):
        return Interval()
    low, high = percentile_interval(draws)
    return Interval(float(value[0]), float(low), float(high))

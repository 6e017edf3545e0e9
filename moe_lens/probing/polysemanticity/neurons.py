"""What each neuron serves: noise-corrected participation ratio, groups detected, selectivity (METRICS 1.4).

Validate decides which (neuron, group) pairs are real (Benjamini-Hochberg over all pairs of both models at one
depth, so that one p-value threshold holds for both), each neuron's signs and its two strongest groups; test, which
nothing was chosen on, gives the numbers.

METRICS 1.4 corrects each group alone, ``max(0, (AUROC - .5)^2 - SE^2)``. Cutting at 0 leaves noise that adds up over
groups: a true one-concept neuron among 58 at 10 % prevalence has 1.4 uncorrected and 1.2 corrected at n = 1,300, but
9.8 and 4.6 at n = 80. The ratio here is therefore taken over the groups that validate found, and is 1 at both; the
one of METRICS is kept beside it as ``participation_ratio_all``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.probing.polysemanticity.auroc import t_tail
from moe_lens.probing.polysemanticity.cells import CellAurocs
from moe_lens.stats import benjamini_hochberg
from moe_lens.types import Role

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

FDR = 0.05
DETECTS = 0.65
"""AUROC that the lower 95 % bound must exceed for a group to count as detected."""
N_FOLDS = 10


@dataclass(frozen=True)
class SplitAurocs:
    """One split; NaN where a neuron is not scored on a group."""

    excess: Float[ndarray, "out group neuron"]
    """AUROC minus 1/2 of all documents, then without each fold."""
    se: Float[ndarray, "group neuron"]
    df: Int[ndarray, "group neuron"]


@dataclass(frozen=True)
class LayerAurocs:
    """All neurons of both models at one depth, those of `cells` one after the other."""

    cells: Sequence[CellAurocs]
    considered: Bool[ndarray, "group neuron"]
    """Groups that count for a neuron; see `join`."""
    validate: SplitAurocs
    test: SplitAurocs

    @property
    def moe(self) -> Bool[ndarray, "neuron"]:
        return np.repeat([c.cell.role is Role.MOE for c in self.cells], [len(c.firing_rate) for c in self.cells])

    @property
    def firing_rate(self) -> Float[ndarray, "neuron"]:
        return np.concatenate([c.firing_rate for c in self.cells])


def join(cells: Sequence[CellAurocs], n_groups: int, *, seed: int) -> LayerAurocs:
    """Put the cells of one depth side by side, and give every dense neuron the groups of one expert.

    An expert is scored only on groups that the router sends it; a dense neuron sees all, and would have more chances
    to serve several. So each dense neuron is given a partner, an expert of the same depth (all experts equally often,
    drawn with `seed`), and is considered for the groups that its partner is scored on.
    """
    widths = [len(c.firing_rate) for c in cells]
    scored = np.zeros((len(cells), n_groups), bool)
    for c, groups in zip(scored, (cell.groups for cell in cells), strict=True):
        c[groups] = True
    experts = [i for i, c in enumerate(cells) if c.cell.role is Role.MOE]
    considered = np.repeat(scored, widths, axis=0)
    start = 0
    for c, width in zip(cells, widths, strict=True):
        if c.cell.role is not Role.MOE and experts:
            rng = np.random.default_rng([seed, c.cell.layer, c.cell.expert])
            partner = rng.permutation(np.resize(rng.permutation(experts), width))
            considered[start : start + width] &= scored[partner]
        start += width
    changes = ~np.isnan(np.concatenate([c.firing_rate for c in cells]))
    splits = (_side_by_side(cells, name, n_groups, widths) for name in ("validate", "test"))
    return LayerAurocs(cells, considered.T & changes, *splits)


def _side_by_side(cells: Sequence[CellAurocs], name: str, n_groups: int, widths: Sequence[int]) -> SplitAurocs:
    n_neurons = sum(widths)
    excess = np.full((N_FOLDS + 1, n_groups, n_neurons), np.nan, np.float32)
    se, df = np.full((n_groups, n_neurons), np.nan, np.float32), np.ones((n_groups, n_neurons), np.int32)
    start = 0
    for cell, width in zip(cells, widths, strict=True):
        found, here = getattr(cell, name), slice(start, start + width)
        excess[:, cell.groups, here] = found.excess
        se[cell.groups, here] = found.se
        df[cell.groups, here] = found.df[:, None]
        start += width
    return SplitAurocs(excess, se, df)


@dataclass(frozen=True)
class NeuronTable:
    """One value per neuron; NaN where it says nothing."""

    n_groups: Int[ndarray, "neuron"]
    """Groups considered."""
    best_group: Int[ndarray, "neuron"]
    """Largest |AUROC - .5| on validate; -1 if none is considered."""
    best_auroc: Float[ndarray, "neuron"]
    """Of the best group, on test."""
    sign: Int[ndarray, "neuron"]
    """1 if the neuron is higher on the best group, on validate."""
    participation_ratio: Float[ndarray, "neuron"]
    """Over the groups found on validate; NaN if none of them holds up on test."""
    participation_ratio_all: Float[ndarray, "neuron"]
    """Over all groups considered: the formula of METRICS 1.4 to the letter."""
    n_groups_found: Int[ndarray, "neuron"]
    """Significant on validate."""
    n_groups_detected: Int[ndarray, "neuron"]
    """Lower 95 % bound of AUROC above .65 on test, in the direction seen on validate."""
    selectivity: Float[ndarray, "neuron"]
    """|AUROC - .5| of the best group minus that of the second on test, both chosen and signed on validate."""
    p_value: Float[ndarray, "neuron"]
    """Smallest of the neuron's groups on validate, not adjusted for their number."""
    q_value: Float[ndarray, "neuron"]


def describe(layer: LayerAurocs, out: int = 0) -> NeuronTable:
    """Every neuron of one depth, with all documents or without one fold.

    Args:
        out: 0 for all documents, ``1 + f`` without fold f; the squared standard errors then grow by
            ``F / (F - 1)``.

    A neuron with one group serves one of *these* groups on the tokens it sees; concepts that nobody listed, and
    what it does for the output, are not looked at. A weak second group that validate does not find is not counted,
    so ratios are comparable only at equal n, and rise with more text. Groups that exclude each other lower each other's
    AUROC, and that counts as signal: a neuron for one of eight such groups reads up to 1.3, for three of them 3.5.
    """
    scale = 1.0 if out == 0 else np.sqrt(N_FOLDS / (N_FOLDS - 1))
    validate, test = (side.excess[out].astype(np.float64) for side in (layer.validate, layer.test))
    se_validate, se_test = (side.se.astype(np.float64) * scale for side in (layer.validate, layer.test))
    known = layer.considered & np.isfinite(validate) & np.isfinite(test)
    with np.errstate(invalid="ignore"):
        p = np.where(known, 2 * t_tail(np.abs(validate / se_validate), layer.validate.df), np.nan)
        q = benjamini_hochberg(np.minimum(p, 1).ravel()).reshape(p.shape)
        found = q <= FDR
        toward = np.where(known, np.sign(validate) * test, 0)
        signal = np.where(known, np.maximum(test**2 - se_test**2, 0), 0)
        bound = t_tail((toward - (DETECTS - 0.5)) / se_test, layer.test.df)
    detected = known & (bound < 0.025)
    strength = np.where(known, np.abs(validate), -1)
    best = strength.argmax(0)
    every = np.arange(len(best))
    first = toward[best, every]
    others = strength.copy()
    others[best, every] = -1
    second = toward[others.argmax(0), every]
    n_groups = known.sum(0)
    sign = np.where(n_groups > 0, np.sign(validate[best, every]), 0)
    return NeuronTable(
        n_groups, np.where(n_groups > 0, best, -1), np.where(n_groups > 0, 0.5 + test[best, every], np.nan),
        np.nan_to_num(sign).astype(int), participation_ratio(signal * (found & (toward > 0))),
        participation_ratio(signal), found.sum(0), detected.sum(0), np.where(n_groups > 1, first - second, np.nan),
        _least(p), _least(q),
    )  # fmt: skip


def participation_ratio(signal: Float[ndarray, "group *shape"]) -> Float[ndarray, "*shape"]:
    """``(sum s)^2 / sum s^2`` over the first axis: how many groups share the signal. NaN where there is none.

    1 if one group has all of it, G if G groups have equal parts. Noise in `signal` counts as further groups.
    """
    total, squares = signal.sum(0), np.square(signal).sum(0)
    return np.divide(np.square(total), squares, out=np.full(total.shape, np.nan), where=squares > 0)


def _least(p: Float[ndarray, "group neuron"]) -> Float[ndarray, "neuron"]:
    least = np.where(np.isnan(p), np.inf, p).min(0, initial=np.inf)
    return np.where(np.isinf(least), np.nan, least)

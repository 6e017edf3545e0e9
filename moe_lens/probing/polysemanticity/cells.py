"""Rows that every cell of one pair of layers is scored on: equally many in both models.

1. Per concept group and split, count the positives and negatives that each cell sees.
2. A cell can be scored if both splits hold 25 of each from 5 documents (METRICS 1.1).
3. n+ is the lower decile over those cells, at most 100; n- the same, at most 200 and twice n+. Cells with fewer are
   left out of the group, the others are cut to it.

A tenth of the cells that could be scored are thus given up, so that one poor cell does not make all others noisy.
Within a group all neurons of both models then have the same null standard error; between groups, layers and splits
it differs. What documents share is not made equal: 30 tokens of 5 documents say less than 30 of 30.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from moe_lens.probing.equal.pairing import Visits
from moe_lens.probing.polysemanticity.auroc import ClusteredAurocs, clustered_aurocs
from moe_lens.probing.settings import MINIMUM_EVAL
from moe_lens.probing.threads import in_threads
from moe_lens.types import Role

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.probing.equal.rows import SplitRows

MOST = (100, 200)
"""Positives and negatives that are used at most: beyond, documents and not tokens set the precision."""
DECILE = 0.1
_VALUES = 1 << 22
"""Activations whose firing is counted at a time."""


@dataclass(frozen=True)
class Cell:
    """One expert, or one dense layer, with its rows on validate and on test."""

    role: Role
    layer: int
    expert: int
    splits: tuple[SplitRows, SplitRows]

    def visits(self, split: int, allowed: Bool[Tensor, "document"]) -> Visits:
        rows = self.splits[split]
        return Visits.of(rows.tokens, rows.token(self.layer, self.expert), allowed)

    def activation(self, split: int) -> Float[Tensor, "row neuron"]:
        return self.splits[split].activation(self.layer, self.expert)


def common_counts(
    n: Int[ndarray, "cell split class group"],
) -> tuple[Int[ndarray, "split class group"], Bool[ndarray, "cell group"]]:
    """How many positives and negatives every cell is cut to, and which cells have them (see the module).

    Args:
        n: what each cell of both models sees.
    """
    reaches = np.all(n >= MINIMUM_EVAL.tokens, axis=(1, 2))
    known = np.where(reaches[:, None, None], n, -1)
    n_reaching = reaches.sum(0)
    at = len(n) - n_reaching + np.floor(DECILE * np.maximum(n_reaching - 1, 0)).astype(int)
    decile = np.take_along_axis(np.sort(known, 0), np.minimum(at, len(n) - 1)[None, None, None], 0)[0]
    take = np.minimum(decile, np.array(MOST)[None, :, None])
    take[:, 1] = np.minimum(take[:, 1], 2 * take[:, 0])
    return take, reaches & np.all(n >= take, axis=(1, 2))


@dataclass(frozen=True)
class CellAurocs:
    """AUROCs of one cell's neurons; group axes are those of ``groups``."""

    cell: Cell
    firing_rate: Float[ndarray, "neuron"]
    """Share of the eligible tokens of both splits with |h| above the neuron's standard deviation; NaN if constant."""
    groups: Int[ndarray, "scored"]
    """Which groups the cell is scored on, as numbers of the list of groups."""
    validate: ClusteredAurocs
    test: ClusteredAurocs


def score_cells(
    cells: Sequence[Cell],
    concepts: Int[ndarray, "group"],
    allowed: Bool[Tensor, "document"],
    fold: Int[Tensor, "document"],
    n_folds: int,
) -> list[CellAurocs]:
    """AUROC of every neuron of every cell for every group it can be scored on, on equally many rows.

    Args:
        cells: of both models, at one depth.
        concepts: the concept that stands for each group.
        allowed: documents that both models read.
    """
    visits = [[cell.visits(split, allowed) for split in range(2)] for cell in cells]
    take, usable = common_counts(np.stack([[v.n[:, concepts].numpy() for v in both] for both in visits]))

    def score(i: int) -> CellAurocs:
        cell, both = cells[i], visits[i]
        groups = np.flatnonzero(usable[i])
        wanted = torch.from_numpy(take[:, :, groups])
        samples = [v.draw(concepts[groups], n) for v, n in zip(both, wanted, strict=True)]
        spread = np.logical_and.reduce([(s.documents >= MINIMUM_EVAL.documents).all(1) for s in samples])
        h = [cell.activation(split) for split in range(2)]
        found = [clustered_aurocs(a, s.lines(spread), fold, n_folds) for a, s in zip(h, samples, strict=True)]
        return CellAurocs(cell, _firing_rates(h), groups[spread], *found)

    return list(in_threads(score, range(len(cells))))


def _firing_rates(h: Sequence[Float[Tensor, "row neuron"]]) -> Float[ndarray, "neuron"]:
    """`firing_rate` over the rows of all splits, some neurons at a time: a dense layer's rows are all tokens."""
    step = max(1, _VALUES // max(1, sum(map(len, h))))
    columns = range(0, h[0].shape[1], step)
    return np.concatenate([firing_rate(torch.cat([part[:, at : at + step] for part in h])) for at in columns])


def firing_rate(h: Float[Tensor, "row neuron"]) -> Float[ndarray, "neuron"]:
    """Share of rows with |h| above one standard deviation of the neuron; NaN where it never changes (METRICS 1.4)."""
    if not len(h):
        return np.full(h.shape[1], np.nan)
    h = h.to(torch.float32, copy=True)
    changes = h.amax(0) > h.amin(0)
    sd = (h - h.mean(0)).square_().mean(0).sqrt()
    rate = (h.abs_() > sd).float().mean(0).double()  # h is a copy
    return torch.where(changes, rate, torch.nan).numpy()

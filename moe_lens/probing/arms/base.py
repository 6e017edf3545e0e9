"""What an arm is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd

from moe_lens.stats import f1_always_positive, f1_balanced
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from moe_lens.probing.evaluate import Evaluator
    from moe_lens.probing.fit import Probe
    from moe_lens.probing.nulls import NullDistribution

METRICS = ("f1", "f1_balanced", "auroc")
WinnerKey = tuple[int, int, str, int]  # layer, expert, concept, k


@dataclass(frozen=True)
class Evidence:
    """What one arm keeps of one model, ready to be written to disk."""

    frame: pd.DataFrame
    """What each entry of `counts` belongs to, no index."""
    counts: Float[ndarray, "entry document count"]


@dataclass(frozen=True)
class ModelScores:
    """All probes of one model under one seed, and per-document counts of what the arms report."""

    role: str
    seed: int
    d_ff: int
    cells: pd.DataFrame
    counts: Mapping[WinnerKey, Float[ndarray, "document count"]]
    """Keyed by (layer, expert, concept, k), the cells that raw or held_out chose; columns ``document_sums.COUNTS``."""
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    """By name of the arm; an arm without its evidence is left out of the comparison."""
    null: NullDistribution | None = None
    """The pipeline under exchanged labels, where it was run."""


@dataclass(frozen=True)
class Scanned:
    """A model whose probes were fitted and scored, its evaluation rows still in memory."""

    evaluator: Evaluator
    probes: Sequence[Probe]
    cells: pd.DataFrame
    """One row per probe, as ``ModelScores.cells``."""
    addresses: Sequence[tuple[int, int]]
    """Every (layer, expert) that was asked for, ascending."""
    concepts: Sequence[str]
    """By number."""
    n_documents: int

    @cached_property
    def usable_probes(self) -> dict[tuple[int, int], list[Probe]]:
        """Probes that carry numbers, by cell."""
        found = usable(self.cells)
        keys = set(zip(found.layer, found.expert, found.concept, found.k, strict=True))
        out: dict[tuple[int, int], list[Probe]] = {}
        for p in self.probes:
            if (p.layer, p.expert, self.concepts[p.concept], p.k) in keys:
                out.setdefault((p.layer, p.expert), []).append(p)
        return dict(sorted(out.items()))


@dataclass(frozen=True)
class Part:
    """One metric of one (concept, k) in one model under one seed."""

    value: float
    draws: Float[ndarray, "resample"]
    """The value under each row of ``times``: bootstrap samples of test documents, then each document left out."""
    chance: float
    """What a probe without any neuron scores in the same place."""
    n_cells: int
    n_neurons: int
    one_cell: float = np.nan
    """The same score expected of a single cell, without any choice between cells."""
    one_cell_draws: Float[ndarray, "resample"] | None = None
    """`one_cell` under each row of ``times``."""
    n_tokens: float = np.nan
    """Test tokens that the chosen cell is scored on."""
    by_draw: Float[ndarray, "draw"] | None = None
    """The value in each random draw of cells, NaN where it could not be scored; None without such draws."""


Estimates = dict[str, dict[tuple[str, int], Part]]
"""By metric, then by (concept, k); what could not be scored is missing."""


class Arm(Protocol):
    """One way to score a model."""

    @property
    def name(self) -> str: ...

    def collect(self, scanned: Scanned) -> Evidence | None:
        """What to keep of a scanned model, None if ``ModelScores`` holds it anyway."""
        ...

    def estimates(
        self, model: ModelScores, documents: Int[ndarray, "document"], times: Float[ndarray, "resample document"]
    ) -> Estimates | None:
        """Score one model; None where its evidence is missing.

        Args:
            documents: the test documents.
            times: weights of the documents, one row for each bootstrap sample or left-out document, the same for
                both models.
        """
        ...


def usable(cells: pd.DataFrame) -> pd.DataFrame:
    """The rows that carry numbers."""
    return cells[cells.status.isin([Status.OK.value, Status.SEPARABLE.value])]


def chance_scores(prevalence: float) -> dict[str, float]:
    """What saying yes to every token scores, by metric."""
    return {"f1": float(f1_always_positive(prevalence)), "f1_balanced": 2 / 3, "auroc": 0.5}


def weighted_totals(
    times: Float[ndarray, "resample document"], counts: Float[ndarray, "entry document count"]
) -> Float[ndarray, "entry resample count"]:
    """Counts summed over documents under every row of weights: one product for all entries, in float32."""
    flat = np.swapaxes(counts, 0, 1).reshape(counts.shape[1], -1).astype(np.float32)
    total = times.astype(np.float32) @ flat
    return np.moveaxis(total.reshape(len(times), len(counts), counts.shape[2]), 0, 1).astype(np.float64)


def f1_of_counts(total: Float[ndarray, "*shape count"], metric: str) -> Float[ndarray, "*shape"]:
    """``f1`` or ``f1_balanced`` from tp, fp, fn, tn along the last axis; NaN where a class is missing."""
    tp, fp, fn, tn = (total[..., i] for i in range(4))
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric == "f1":
            return 2 * tp / (2 * tp + fp + fn)
        return f1_balanced(tp / (tp + fn), fp / (fp + tn))

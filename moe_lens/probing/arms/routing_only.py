"""``routing_only``: read the concept off the router, without any neuron (METRICS 1.3, item 5).

For every cell, ``r`` says whether a token visits it. Predict the concept where r = 1, over all eligible tokens of
the documents on which the concept is defined: F1, balanced F1, and AUROC = (1 + TPR - FPR) / 2. The cell with the
highest AUROC of r on validate is scored on test (ties: lower layer, lower expert). It need not be a cell whose
neurons could be probed: an expert that sees next to nothing but the concept has too few negatives for that.

In a dense layer r = 1 everywhere: AUROC .5, and F1 of the always-positive probe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.probing.arms.base import (
    Estimates,
    Evidence,
    ModelScores,
    Part,
    Scanned,
    chance_scores,
    f1_of_counts,
    weighted_totals,
)
from moe_lens.probing.settings import MINIMUM_EVAL
from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray


class RoutingOnly:
    """Arm ``routing_only``."""

    name = "routing_only"

    def collect(self, scanned: Scanned) -> Evidence:
        """The chosen cell of every concept, with tp, fp, fn, tn per test document."""
        evaluator = scanned.evaluator
        total = evaluator.class_counts(scanned.n_documents)
        validate, test = (evaluator.split_of == split.value for split in (Split.VALIDATE, Split.TEST))
        enough = _enough(total[validate]) & _enough(total[test])
        n_concepts = len(scanned.concepts)
        chosen = np.full((n_concepts, 2), -1)
        best, routed = np.full(n_concepts, -np.inf), np.zeros_like(total)
        for address in scanned.addresses:
            visits = evaluator.class_counts(scanned.n_documents, *address)
            auroc = np.where(enough, routing_auroc(visits[validate].sum(0), total[validate].sum(0)), -np.inf)
            better = auroc > best
            chosen[better], best[better] = address, auroc[better]
            routed[:, better] = visits[:, better]
        keep = np.flatnonzero(best > -np.inf).tolist()
        counts = np.concatenate([routed, total - routed], -1)[:, keep]
        counts[~test] = 0
        names = {
            "concept": [scanned.concepts[i] for i in keep], "layer": chosen[keep, 0], "expert": chosen[keep, 1],
            "auroc_validate": best[keep], "n_cells": len(scanned.addresses),
        }  # fmt: skip
        return Evidence(pd.DataFrame(names), np.moveaxis(counts, 0, 1))

    def estimates(
        self, model: ModelScores, documents: Int[ndarray, "document"], times: Float[ndarray, "resample document"]
    ) -> Estimates | None:
        """Test scores of "visits the chosen cell", the same for every k.

        Shows what the choice of expert alone tells about the concept. It is over all tokens at natural prevalence,
        so its F1 cannot be held against the F1 of a probe inside one cell; AUROC and balanced F1 can.
        """
        if self.name not in model.evidence:
            return None
        evidence = model.evidence[self.name]
        counts = evidence.counts[:, documents]
        full, drawn = counts.sum(1), weighted_totals(times, counts)
        out: Estimates = {}
        for metric in ("f1", "f1_balanced", "auroc"):
            value, draws = (_score(c, metric) for c in (full, drawn))
            for i, concept in enumerate(evidence.frame.concept):
                chance = chance_scores((full[i, 0] + full[i, 2]) / full[i].sum())[metric]
                part = Part(float(value[i]), draws[i], chance, int(evidence.frame.n_cells[i]), 0)
                out.setdefault(metric, {}).update({(concept, int(k)): part for k in set(model.cells.k)})
        return out


def routing_auroc(
    visits: Float[ndarray, "*shape class"], total: Float[ndarray, "*shape class"]
) -> Float[ndarray, "*shape"]:
    """AUROC of "is routed here", from the tokens of either class (positive first) that are, and from all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share = visits / total
    return (1 + share[..., 0] - share[..., 1]) / 2


def _score(counts: Float[ndarray, "*shape count"], metric: str) -> Float[ndarray, "*shape"]:
    if metric != "auroc":
        return f1_of_counts(counts, metric)
    return routing_auroc(counts[..., :2], counts[..., :2] + counts[..., 2:])


def _enough(counts: Float[ndarray, "document concept class"]) -> Bool[ndarray, "concept"]:
    """Whether both classes have the tokens and documents that a probe needs (METRICS 1.1)."""
    need = MINIMUM_EVAL
    return ((counts.sum(0) >= need.tokens) & ((counts > 0).sum(0) >= need.documents)).all(-1)

"""``whole_population``: what a neuron adds to the routing, over all tokens (METRICS 1.3, item 6).

A cell sees some of the tokens only. The two-part score ranks all of them: by the logit of the probe's neurons, times
the router weight, where the token visits the cell, and by one common logit where it does not (``fit.TwoPart``).

1. Choose the cell with the highest AUROC of the two-part score over all validate tokens, at natural prevalence
   (ties: lower layer, lower expert). The routing alone, as ``routing_only`` chose it, stands as a candidate too: it
   is the two-part score without a slope.
2. Score the choice over all test tokens: AUROC and average precision.
3. Subtract what ``routing_only`` scores on the same tokens: the increments.

Filling the activation with 0 off the route and fitting one line instead is wrong: a neuron of pure noise that is
never negative then separates routed tokens from the others, and is credited with what the router knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moe_lens.probing.arms.base import Estimates, Evidence, ModelScores, Part, Scanned, weighted_totals
from moe_lens.stats import ranking_scores
from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.probing.evaluate import Evaluator, Routed
    from moe_lens.probing.fit import Probe

METRICS = ("auroc", "average_precision")
COUNTS = ("positives", "negatives", "placement_pos", "placement_neg", "precision")
_Winners = dict[tuple[int, int], tuple["Probe", float]]  # by (concept, k): the probe and its AUROC on validate


class WholePopulation:
    """Arm ``whole_population``."""

    name = "whole_population"

    def collect(self, scanned: Scanned) -> Evidence | None:
        """The chosen cell of every (concept, k) with its `token_sums`; None if no probe has a two-part score."""
        evaluator = scanned.evaluator
        total = evaluator.class_counts(scanned.n_documents)
        validate, test = (evaluator.split_of == split.value for split in (Split.VALIDATE, Split.TEST))
        best, n_cells = _choose(scanned, total[validate].sum(0))
        if not best:
            return None
        total[~test] = 0
        sums = _test_sums(evaluator, [probe for probe, _ in best.values()], total)
        frame = pd.DataFrame([
            {"concept": scanned.concepts[concept], "k": k, "layer": probe.layer, "expert": probe.expert,
             "auroc_validate": auroc, "n_cells": n_cells[concept, k]}
            for (concept, k), (probe, auroc) in best.items()
        ])  # fmt: skip
        return Evidence(frame, np.stack([sums[key] for key in best]))

    def estimates(
        self, model: ModelScores, documents: Int[ndarray, "document"], times: Float[ndarray, "resample document"]
    ) -> Estimates | None:
        """Test scores of the chosen two-part score, and its increments over ``routing_only``.

        ``chance`` is the score of ``routing_only``, and 0 for the increments. Draws are first-order in the document
        weights, in both terms of an increment alike, so that errors of the expansion cancel where the neuron adds
        nothing.

        Does not show that the increment is due to one clean neuron: it grows with everything that the routing
        leaves open, so a dense layer, where routing tells nothing, has all of its score as increment. The two-part
        score may also read "not routed here" as evidence, which ``routing_only`` never does. At k > 1 only the cells
        that were fitted at that k compete, few of them unless all cells were asked for.
        """
        if self.name not in model.evidence or "routing_only" not in model.evidence:
            return None
        evidence, routing = model.evidence[self.name], model.evidence["routing_only"]
        names = [name for name in routing.frame.concept if name in set(evidence.frame.concept)]
        known = routing.frame.concept.isin(names).to_numpy()
        if not names:
            return {}
        auroc_alone = dict(zip(names, routing.frame.auroc_validate[known], strict=True))
        alone = np.stack([routing_sums(counts) for counts in routing.counts[known]])
        alone = dict(zip(names, _scores(alone[:, documents], times), strict=True))
        columns = evidence.frame[["concept", "k", "auroc_validate", "n_cells"]].itertuples(index=False, name=None)
        out: Estimates = {}
        for (concept, k, auroc, n), two_part in zip(
            columns, _scores(evidence.counts[:, documents], times), strict=True
        ):
            if concept not in alone:
                continue
            chosen = alone[concept] if auroc_alone[concept] >= auroc else two_part
            for metric in METRICS:
                (value, draws), (chance, chance_draws) = chosen[metric], alone[concept][metric]
                parts = {
                    metric: Part(value, draws, chance, n, n * model.d_ff),
                    f"{metric}_increment": Part(value - chance, draws - chance_draws, 0.0, n, n * model.d_ff),
                }
                for name, part in parts.items():
                    out.setdefault(name, {})[concept, int(k)] = part
        return out


def _choose(scanned: Scanned, total: Int[ndarray, "concept class"]) -> tuple[_Winners, Counter[tuple[int, int]]]:
    """The best cell of every (concept, k) on validate, and how many there were; `total` counts validate tokens."""
    best: _Winners = {}
    n_cells: Counter[tuple[int, int]] = Counter()
    for probes in scanned.usable_probes.values():
        candidates = [p for p in probes if p.two_part is not None]
        for some, routed in scanned.evaluator.routed(candidates, Split.VALIDATE):
            everyone = total[[p.concept for p in some]]
            auroc = population_auroc(routed, _off_route(some), everyone)
            for probe, value in zip(some, auroc.tolist(), strict=True):
                key = probe.concept, probe.k
                n_cells[key] += 1
                if key not in best or value > best[key][1]:
                    best[key] = probe, value
    return best, n_cells


def _test_sums(
    evaluator: Evaluator, winners: Sequence[Probe], total: Int[ndarray, "document concept class"]
) -> dict[tuple[int, int], Float[ndarray, "document count"]]:
    by_cell: dict[tuple[int, int], list[Probe]] = {}
    for probe in winners:
        by_cell.setdefault((probe.layer, probe.expert), []).append(probe)
    out = {}
    for probes in by_cell.values():
        for some, routed in evaluator.routed(probes, Split.TEST):
            for i, (probe, off_route) in enumerate(zip(some, _off_route(some).tolist(), strict=True)):
                used = routed.used[:, i]
                out[probe.concept, probe.k] = token_sums(
                    routed.logit[used, i], routed.truth[used, i], routed.document[used],
                    off_route, total[:, probe.concept],
                )  # fmt: skip
    return out


def _off_route(probes: Sequence[Probe]) -> Float[ndarray, "probe"]:
    return np.array([p.two_part.off_route for p in probes if p.two_part is not None], np.float32)


def population_auroc(
    routed: Routed, off_route: Float[ndarray, "probe"], total: Int[ndarray, "probe class"]
) -> Float[ndarray, "probe"]:
    """AUROC of two-part scores over all tokens, those off the route being one block of ties.

    Args:
        off_route: score of that block.
        total: tokens of either class, positive first, whether routed or not.

    Does not show what the neurons contribute: routing alone may reach as much.
    """
    pos, neg = routed.truth, routed.used & ~routed.truth
    n_pos, n_neg = pos.sum(0), neg.sum(0)
    off_pos, off_neg = total[:, 0] - n_pos, total[:, 1] - n_neg
    above, level = routed.logit > off_route, routed.logit == off_route
    pos_above, neg_above = ((above & c).sum(0) + (level & c).sum(0) / 2 for c in (pos, neg))
    inside = np.nan_to_num(ranking_scores(routed.logit, routed.truth, routed.used)[0]) * n_pos * n_neg
    across = pos_above * off_neg + (n_neg - neg_above) * off_pos
    with np.errstate(divide="ignore", invalid="ignore"):
        return (inside + across + off_pos * off_neg / 2) / total.prod(1)


def token_sums(
    logit: Float[ndarray, "row"],
    truth: Bool[ndarray, "row"],
    document: Int[ndarray, "row"],
    off_route: float,
    total: Int[ndarray, "document class"],
) -> Float[ndarray, "document count"]:
    """Per document, over all of its tokens: positives, negatives, placements of either, terms of average precision.

    Args:
        logit: of the routed tokens.
        total: tokens of either class, positive first, whether routed or not.

    A placement is the share of the other class that a token is on the right side of (``document_sums``).
    """
    group = np.unique(np.append(logit, np.float32(off_route)), return_inverse=True)[1]
    side = (~truth).astype(np.int64)
    off = total - np.bincount(2 * document + side, minlength=total.size).reshape(total.shape)
    size = np.bincount(2 * group[:-1] + side, minlength=2 * (int(group.max()) + 1)).reshape(-1, 2).astype(np.float64)
    size[group[-1]] += off.sum(0)
    placement, precision = _token_values(size)
    at_off = precision[group[-1]]
    columns = [total[:, 0], total[:, 1]]
    for c in (0, 1):
        mine = side == c
        placed = np.bincount(document[mine], placement[group[:-1][mine], c], len(total))
        columns.append(placed + off[:, c] * placement[group[-1], c])
    terms = np.bincount(document, precision[group[:-1], side], len(total))
    return np.stack([*columns, terms + off @ at_off], -1)


def routing_sums(counts: Float[ndarray, "document outcome"]) -> Float[ndarray, "document count"]:
    """The same for the score "visits the cell", from its tp, fp, fn, tn per document."""
    tp, fp, fn, tn = counts.T
    total = counts.sum(0)
    (off_placed, on_placed), (off_term, on_term) = _token_values(np.stack([total[2:], total[:2]]))
    placed = [counts[:, c] * on_placed[c] + counts[:, 2 + c] * off_placed[c] for c in (0, 1)]
    return np.stack([tp + fn, fp + tn, *placed, counts[:, :2] @ on_term + counts[:, 2:] @ off_term], -1)


def _token_values(
    size: Float[ndarray, "group class"],
) -> tuple[Float[ndarray, "group class"], Float[ndarray, "group class"]]:
    """Placement, and term of average precision, of a token by its group of ties (rising score) and class.

    With weights w, ``AP = sum_i w_i y_i P_i / sum_i w_i y_i``, ``P_i`` the precision among the ``N_i`` tokens that
    score at least ``s_i``. The term of token j, ``y_j P_j + sum_(i: s_i <= s_j) y_i (y_j - P_i) / N_i``, is the
    derivative of the numerator by ``w_j``; as the numerator grows in proportion to w, the terms add up to it.
    """
    n_pos, n_neg = size.sum(0)
    pos, neg = size.T
    through = size.cumsum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        placement = np.stack([(through[:, 1] - neg / 2) / n_neg, 1 - (through[:, 0] - pos / 2) / n_pos], 1)
    at_least = size[::-1].cumsum(0)[::-1]
    n = np.maximum(at_least.sum(1), 1)  # an empty group on top has no tokens to divide by
    precision = at_least[:, 0] / n
    gain, loss = (pos / n).cumsum(), (pos * precision / n).cumsum()
    return placement, np.stack([precision + gain - loss, -loss], 1)


def population_scores(
    full: Float[ndarray, "count"], drawn: Float[ndarray, "resample count"]
) -> dict[str, tuple[float, Float[ndarray, "resample"]]]:
    """AUROC and average precision of all documents, and to first order under document weights.

    Args:
        full: `token_sums` added up over documents.
        drawn: the same under every row of weights.

    Exact where all weights are equal; NaN where the positives, or for AUROC either class, have no weight.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        n_pos, _, placed, _, terms = full
        auroc = float(placed / n_pos)
        draws = drawn[:, 2] / drawn[:, 0] + drawn[:, 3] / drawn[:, 1] - auroc
        precision = drawn[:, 4] / np.where(drawn[:, 0] > 0, drawn[:, 0], np.nan)
        return {"auroc": (auroc, draws), "average_precision": (float(terms / n_pos), precision)}


def _scores(
    sums: Float[ndarray, "entry document count"], times: Float[ndarray, "resample document"]
) -> list[dict[str, tuple[float, Float[ndarray, "resample"]]]]:
    return [population_scores(*both) for both in zip(sums.sum(1), weighted_totals(times, sums), strict=True)]

"""What stands beside the scores: agreement with leave-one-out, churn, NAOPC, a table of units, and notes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.causal.faithfulness import alignment, sets
from moe_lens.causal.faithfulness.correlation import kendall, spearman
from moe_lens.causal.faithfulness.rankings import GRADIENT, LEAVE_ONE_OUT, is_file, rank, read_scores
from moe_lens.causal.faithfulness.scores import EXACT_UNITS, limits, top_jaccard
from moe_lens.causal.faithfulness.settings import BEAMS, SAMPLED
from moe_lens.causal.screen import screen_recall

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

    from moe_lens.causal.effects import Effects
    from moe_lens.causal.faithfulness.kept import KeptSets
    from moe_lens.causal.faithfulness.measure import Measured
    from moe_lens.causal.faithfulness.rankings import Ranking
    from moe_lens.causal.faithfulness.settings import Settings
    from moe_lens.causal.faithfulness.tables import Case
    from moe_lens.causal.faithfulness.visits import Visits
    from moe_lens.causal.screen import ScreenRecall
    from moe_lens.types import ExpertAddress


def agreement(ranked: dict[str, Ranking], member: Bool[ndarray, "unit"]) -> pd.DataFrame:
    """Agreement of each ranking with leave-one-out over the units of the universe; empty without it.

    Columns: ranking, kendall (tau-b), spearman, top_jaccard of the highest tenth, n_top. Leave-one-out is itself no
    truth: two experts that do the same have none of it each.
    """
    columns = ["ranking", "kendall", "spearman", "top_jaccard", "n_top"]
    if LEAVE_ONE_OUT not in ranked:
        return pd.DataFrame(columns=columns)
    exact = ranked[LEAVE_ONE_OUT].score[member]
    n_top = max(1, round(0.1 * len(exact)))
    rows = []
    for name, ranking in ranked.items():
        if name != LEAVE_ONE_OUT:
            score = _last(ranking.score[member])
            shared = top_jaccard(sets.ranked(score)[:n_top], sets.ranked(exact)[:n_top])
            rows.append((name, float(kendall(score, exact)), float(spearman(score, exact)), shared, n_top))
    return pd.DataFrame(rows, columns=columns)


def recall(
    ranked: dict[str, Ranking], effects: Effects, v: Visits, member: Bool[ndarray, "unit"], kept: KeptSets | None, *,
    seed: int,
) -> ScreenRecall | None:  # fmt: skip
    """Of the largest tenth of exact effects on the ranking text, how many the gradient screen's first tenth holds.

    On all units where leave-one-out is ranked, else on a random tenth of them that is measured for this. None where
    the screen is not ranked. What it does not show: see `screen_recall`.
    """
    if GRADIENT not in ranked:
        return None
    if LEAVE_ONE_OUT in ranked:
        exact = ranked[LEAVE_ONE_OUT].score
    else:
        eligible = np.flatnonzero(member)
        drawn = np.random.default_rng([seed, 43]).permutation(eligible)[: max(1, math.ceil(SAMPLED * len(eligible)))]
        chosen = np.isin(np.arange(len(member)), drawn)
        exact = rank([LEAVE_ONE_OUT], effects, v, member=chosen, kept=kept)[LEAVE_ONE_OUT].score
    table = pd.DataFrame({"layer": v.layer, "expert": [unit.expert for unit in v.units]})
    measured = table.assign(effect=exact)[np.isfinite(exact) & member]
    return screen_recall(measured, table.assign(effect=ranked[GRADIENT].score)[member])


def churn(measured: Measured, settings: Settings, cases: Sequence[Case]) -> pd.DataFrame:
    """Churn of the top-k when the largest bin is ablated, by layer; empty under frozen routing."""
    rows = []
    for mode in settings.modes if settings.routing == "live" else ():
        for case in (case for case in cases if case.super_experts == "included"):
            removed = case.chosen[-1]
            if not removed.any():
                continue
            for layer, share in alignment.churn(measured.effects, measured.makers[mode](removed)).items():
                lost = float(removed[measured.layer == layer].mean())
                rows.append((case.ranking, mode, settings.bins.shares[-1], layer, share, lost))
    return pd.DataFrame(rows, columns=["ranking", "mode", "bin", "layer", "churn", "share_ablated"])


def naopc(
    settings: Settings, measured: Measured, rankings: Sequence[Ranking], member: Bool[ndarray, "unit"]
) -> pd.DataFrame:
    """AOPC in KL over candidates drawn by lot, between the lowest and highest of any order; empty unless asked for.

    Columns: ranking, mode, score, n_candidates, width (of the beam, NA where exact), aopc, low, high, naopc. The
    limits hold for these candidates with everything else intact (METRICS 2.2, Edin et al. 2024).
    """
    columns = ["ranking", "mode", "score", "n_candidates", "width", "aopc", "low", "high", "naopc"]
    n_units, eligible = len(measured.units), np.flatnonzero(member)
    n = min(settings.naopc, len(eligible))
    if not n:
        return pd.DataFrame(columns=columns)
    candidates = np.sort(np.random.default_rng([settings.seed, 41]).permutation(eligible)[:n]).tolist()
    is_exact = n <= EXACT_UNITS
    rows: list[tuple[Any, ...]] = []
    for mode in settings.modes:
        if is_exact:
            subsets = [s for size in range(n + 1) for s in combinations(candidates, size)]
            measured.run((mode, np.isin(np.arange(n_units), subset)) for subset in subsets)

        def without(members: frozenset[int], mode: str = mode) -> float:
            effect = measured.of(mode, np.isin(np.arange(n_units), list(members)))
            return float(effect.kl.sum() / measured.n_tokens.sum())

        def only(members: frozenset[int], mode: str = mode) -> float:
            return without(frozenset(candidates) - members, mode)

        for score, value in (("comprehensiveness_kl", without), ("sufficiency_kl", only)):
            found = [limits(value, candidates, width=width) for width in ((None,) if is_exact else BEAMS)]
            for ranking in rankings:
                order = [candidates[i] for i in sets.ranked(ranking.score[candidates])]
                area = float(np.mean([value(frozenset(order[:k])) for k in range(1, n + 1)]))
                for limit in found:
                    width = pd.NA if limit.width is None else limit.width
                    rows.append((ranking.name, mode, score, n, width, area, limit.low, limit.high,
                                 limit.normalised(area)))  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"width": "Int64"})


def _last(score: Float[ndarray, "unit"]) -> Float[ndarray, "unit"]:
    """Scores with those that are missing below all others."""
    return np.nan_to_num(score, nan=np.nanmin(score) - 1) if np.isfinite(score).any() else np.zeros(len(score))


def with_naopc(frame: pd.DataFrame, found: pd.DataFrame, constant: dict[str, Any]) -> pd.DataFrame:
    """`frame` with a row of NAOPC for each ranking and mode, that of the wider beam; logp and intervals are NaN."""
    if not len(found):
        return frame
    best = found[found["width"].isna() | (found["width"] == max(BEAMS))]
    rows = best.pivot(index=["ranking", "mode"], columns="score", values="naopc").reset_index()
    rows = rows.assign(**constant, super_experts="included", quantity="naopc", control="none")
    return pd.concat([frame, rows.reindex(columns=frame.columns).astype(frame.dtypes)], ignore_index=True)


def unit_frame(
    ranked: dict[str, Ranking], v: Visits, supers: Sequence[ExpertAddress], member: Bool[ndarray, "unit"]
) -> pd.DataFrame:
    """Columns: layer, expert, load, gate_mass, max_output, is_super, in_universe, and score_NAME of each ranking."""
    scores: dict[str, Float[ndarray, "unit"]] = {f"score_{name}": ranking.score for name, ranking in ranked.items()}
    return pd.DataFrame({
        "layer": v.layer, "expert": [unit.expert for unit in v.units], "load": v.load.sum(0).astype(np.int64),
        "gate_mass": v.mass.sum(0), "max_output": v.peak.max(0), "is_super": [unit in supers for unit in v.units],
        "in_universe": member, **scores,
    })  # fmt: skip


def notes(settings: Settings, measured: Measured, v: Visits) -> tuple[str, ...]:
    """What limits the numbers of this run, in words."""
    found = list(measured.effects.notes)
    if 0 < settings.random_draws < 19:
        least = 1 / (settings.random_draws + 1)
        found.append(f"with {settings.random_draws} random sets p cannot fall below {least:.2f}: draw 20")
    for name in settings.rankings:
        if is_file(name) and (left := int(np.isnan(read_scores(Path(name), v.units)).sum())):
            found.append(f"{Path(name).name} leaves {left} of {len(v.units)} experts out: they come last, in the order "
                         "of their addresses")  # fmt: skip
    if idle := int((v.load.sum(0) == 0).sum()):
        found.append(f"{idle} of {len(v.units)} experts are never visited by the ranking text: bins that hold them "
                     "remove little")  # fmt: skip
    if len(measured.documents) < 30:
        found.append(f"{len(measured.documents)} documents are few: intervals are too narrow below 30")
    return tuple(found)

"""Scores that a released table gives away without a better neuron: one model at one k, and one pair of models.

What each of them holds fixed is said at the function; ``published`` puts them side by side.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.stats import document_multiplicities, f1_balanced, percentile_interval
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

N_RESAMPLES = 10_000


@dataclass(frozen=True)
class ModelControls:
    """One model at one k: every control per concept, and facts about its cells."""

    model: str
    role: str
    concepts: tuple[str, ...]
    values: Mapping[str, Float[ndarray, "concept"]]
    """Expectations where chance is in it."""
    sd: Mapping[str, float]
    """How far the mean over concepts moves from one random draw to the next."""
    facts: Mapping[str, float]
    cells: pd.DataFrame
    """The fitted probes."""

    def row(self) -> dict[str, Any]:
        """Means over concepts."""
        means = {name: float(value.mean()) for name, value in self.values.items()}
        sd = {f"{name}_sd": value for name, value in self.sd.items()}
        return {"model": self.model, "role": self.role, **self.facts, **means, **sd}


def usable(cells: pd.DataFrame) -> pd.DataFrame:
    """The probes that were fitted."""
    return cells[cells["status"] == Status.OK.value]


def model_controls(cells: pd.DataFrame, *, seed: int = 0, n_draws: int = 300) -> ModelControls:
    """All controls of one model at one k; concepts without a fitted cell are dropped.

    Args:
        cells: rows of one model and one k, as ``read_table`` makes them.
    """
    used = usable(cells)
    model = str(cells["model"].iloc[0])
    rng = np.random.default_rng([seed, zlib.crc32(model.encode())])  # whatever other tables are read with it
    by = used.groupby("concept")
    best = used.loc[by["f1"].idxmax()]
    exact = {
        "raw": by["f1"].max(), "always_positive": by["f1_always_positive"].max(),
        "f1_balanced": by["f1_balanced"].max(), "typical_cell": by["f1"].mean(),
    }  # fmt: skip
    values = {name: column.to_numpy() for name, column in exact.items()}
    values["one_expert"], variance = one_expert(used, "f1")
    values["one_expert_balanced"], _ = one_expert(used, "f1_balanced")
    noise = homogeneous(used, n_draws, rng)
    values |= {name: drawn.mean(0) for name, drawn in noise.items()}
    values["search_lift"] = values["homogeneous"] - values.pop("one_alike")
    sd = {"one_expert": float(np.sqrt(variance.sum()) / len(variance))}
    sd |= {name: float(noise[name].mean(1).std()) for name in ("homogeneous", "homogeneous_balanced")}
    at = cells[["layer", "expert"]].drop_duplicates()
    facts = {
        "n_concepts": len(best), "n_layers": at["layer"].nunique(), "n_cells": len(at),
        "n_test_min": int(used["n_test"].min()), "n_test_median": float(used["n_test"].median()),
        "n_test_max": int(used["n_test"].max()),
        "share_winners_below": float((best["f1"] < best["f1_always_positive"]).mean()),
        "share_cells_below": float((used["f1"] < used["f1_always_positive"]).mean()),
    }  # fmt: skip
    return ModelControls(model, str(cells["role"].iloc[0]), tuple(map(str, by.groups)), values, sd, facts, used)


def one_expert(cells: pd.DataFrame, metric: str) -> tuple[Float[ndarray, "concept"], Float[ndarray, "concept"]]:
    """Best test score over layers when every layer offers one random expert: exact mean and variance (METRICS 1.5).

    The expert is drawn anew for each concept, evenly among those that were fitted for it, independently in each
    layer; so P(best <= x) is the product over layers of the share of experts that score at most x. An MoE then
    searches no more cells than it has layers; a dense model keeps its score.

    Does not even out the rest: an expert's test set stays smaller than a dense layer's, and its width another.
    """
    moments = []
    for _, group in cells.sort_values(metric).groupby("concept"):
        layer = np.unique(group["layer"], return_inverse=True)[1]
        member = layer[:, None] == np.arange(layer.max() + 1)
        below = (member.cumsum(0) / member.sum(0)).prod(1)
        score, chance = group[metric].to_numpy(), np.diff(below, prepend=0)
        mean = score @ chance
        moments.append((mean, (score - mean) ** 2 @ chance))
    mean, variance = np.array(moments).T
    return mean, variance


def homogeneous(
    cells: pd.DataFrame, n_draws: int, rng: np.random.Generator
) -> dict[str, Float[ndarray, "draw concept"]]:
    """Best F1 over cells that differ in nothing but their counts (METRICS 1.3, arm 2), by simulation.

    Per concept, TPR and FPR are pooled over all cells (total true positives by total positives of the test
    tokens, and so on); every cell then draws its own hits and false alarms, binomial, from its own n+ and n-.

    Args:
        cells: fitted probes of one model and one k.

    Returns:
        ``homogeneous``; ``homogeneous_balanced``, with every cell brought to prevalence one half; ``one_alike``,
        the mean over these cells in place of the maximum.

    Does not show how much of a raw score is noise in general: pooling makes every cell average, so what search
    gains among cells that really differ is not in it.
    """
    drawn: dict[str, list[ndarray]] = {"homogeneous": [], "homogeneous_balanced": [], "one_alike": []}
    for _, group in cells.groupby("concept"):
        n_pos, n_neg = _class_counts(group)
        known = group["fp"].notna().to_numpy()
        tpr = group["tp"].sum() / max(n_pos.sum(), 1)
        fpr = group["fp"].sum() / max(n_neg[known].sum(), 1)
        tp, fp = (_binomial(n, p, n_draws, rng) for n, p in ((n_pos, tpr), (n_neg, fpr)))
        rates = tp / np.maximum(n_pos, 1)[:, None], fp / np.maximum(n_neg, 1)[:, None]
        f1 = 2 * tp / np.maximum(tp + fp + n_pos[:, None], 1)
        drawn["homogeneous"].append(f1.max(0))
        drawn["one_alike"].append(f1.mean(0))
        drawn["homogeneous_balanced"].append(f1_balanced(*rates).max(0))
    return {name: np.stack(columns, axis=1) for name, columns in drawn.items()}


def thinned(
    dense: pd.DataFrame, moe: pd.DataFrame, n_draws: int, rng: np.random.Generator
) -> Float[ndarray, "draw concept"]:
    """Best F1 over dense layers, each tested on a part of its tokens that is as small as the test set of an expert.

    Every layer and draw takes the counts of both classes from a random cell of the MoE that was fitted for the same
    concept, and that many of its own test tokens without replacement; a layer with fewer keeps them all. Evens out
    the noise and the class balance that the maximum feeds on. The layer's neuron was still chosen and fitted on
    more tokens than an expert's: that advantage is not taken away.

    Args:
        dense, moe: fitted probes of one k; every concept of `dense` is one of `moe`.
    """
    best = []
    for concept, layers in dense.groupby("concept"):
        of_moe, of_dense = (_class_counts(cells) for cells in (moe[moe["concept"] == concept], layers))
        at = rng.integers(0, len(of_moe[0]), (len(layers), n_draws))
        n_pos, n_neg = (np.minimum(a[at], b[:, None]) for a, b in zip(of_moe, of_dense, strict=True))
        yes = (np.rint(layers[name].fillna(0).to_numpy()).astype(np.int64) for name in ("tp", "fp"))
        tp, fp = (
            rng.hypergeometric(np.minimum(y, n)[:, None], np.maximum(n - y, 0)[:, None], drawn)
            for y, n, drawn in zip(yes, of_dense, (n_pos, n_neg), strict=True)
        )
        best.append((2 * tp / np.maximum(tp + fp + n_pos, 1)).max(0))
    return np.stack(best, axis=1)


def _class_counts(cells: pd.DataFrame) -> tuple[Int[ndarray, "cell"], Int[ndarray, "cell"]]:
    n_pos = cells["n_pos_test"].to_numpy()
    return n_pos, cells["n_test"].to_numpy() - n_pos


def _binomial(n: Int[ndarray, "cell"], p: float, n_draws: int, rng: np.random.Generator) -> Int[ndarray, "cell draw"]:
    return rng.binomial(n[:, None], min(max(p, 0.0), 1.0), (len(n), n_draws))


def model_gaps(moe: ModelControls, dense: ModelControls, *, seed: int = 0, n_draws: int = 300) -> list[dict[str, Any]]:
    """Mean difference over shared concepts under every control, with its 95 % interval over concept groups.

    ``equal_tests`` sets `one_expert` of the MoE against the `thinned` dense model. An interval does not show how far
    a gap depends on the documents or on the fitted probes: a table holds neither.
    """
    from moe_lens.corpus.source58 import GROUPS

    shared = sorted(set(moe.concepts) & set(dense.concepts))
    if not shared:
        return []
    a, b = ({name: v[[m.concepts.index(c) for c in shared]] for name, v in m.values.items()} for m in (moe, dense))
    layers = dense.cells[dense.cells["concept"].isin(shared)]
    a["equal_tests"] = a["one_expert"]
    b["equal_tests"] = thinned(layers, moe.cells, n_draws, np.random.default_rng([seed, 1])).mean(0)
    group = np.unique([GROUPS.get(name, name) for name in shared], return_inverse=True)[1]
    times = document_multiplicities(group.max() + 1, N_RESAMPLES, seed=seed)[:, group]
    rows = []
    for name in a:
        difference = a[name] - b[name]
        low, high = percentile_interval(times @ difference / times.sum(1))
        gap = {"gap": float(difference.mean()), "ci_low": float(low), "ci_high": float(high)}
        rows.append({"moe": moe.model, "dense": dense.model, "control": name, **gap, "n_concepts": len(shared)})
    return rows

"""From cases to experts: intervals over texts, p-values from sign flips and exchanges, q over experts.

``over_co_selected``    effect of the expert minus that of the experts chosen beside it, at the same token
``over_matched``        minus that of other experts with a like gate, at other tokens of the text
``over_other_targets``  minus its own on targets of other experts' cases
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.stats import benjamini_hochberg, cluster_bootstrap, permutation_p, wilson_interval

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

QUANTITIES: Mapping[str, tuple[str, str | None]] = {
    "logit": ("logit", None),
    "effect": ("effect", None),
    "over_co_selected": ("effect", "effect_co_selected"),
    "over_matched": ("effect", "effect_matched"),
    "over_other_targets": ("effect", "effect_other_targets"),
    "effect_at_place": ("effect_at_place", None),
    "over_co_selected_at_place": ("effect_at_place", "effect_co_selected_at_place"),
}
"""Column of the cases, and what is taken off it."""
ENOUGH_TEXTS = 5
"""With the expert at the trigger: below, no sign-flip p can reach .05."""
Q = 0.05
CAUSAL, NOT_SHOWN, TOO_FEW = "causal", "not shown", "too few"


def expert_table(cases: pd.DataFrame, *, draws: int, seed: int, floor: float) -> pd.DataFrame:
    """One row per expert and mode, see `Triggers`.

    Args:
        cases: see `Triggers`.
        draws: bootstrap samples, sign flips and exchanges.
        floor: nats; no smaller effect is called causal.
    """
    rows = [
        {"layer": layer, "expert": expert, "mode": mode} | _row(group, draws=draws, seed=seed)
        for (layer, expert, mode), group in cases.groupby(["layer", "expert", "mode"], sort=False)
    ]
    table = pd.DataFrame(rows)
    table.insert(0, "address", [f"L{a}.E{b}" for a, b in zip(table["layer"], table["expert"], strict=True)])
    enough = table["n_texts"] >= ENOUGH_TEXTS
    for name in [*QUANTITIES, "rank"]:
        p = table[f"p_{name}"].where(enough)
        table[f"q_{name}"] = p.groupby(table["mode"]).transform(lambda column: benjamini_hochberg(column.to_numpy()))
    table["outcome"] = _outcome(table, floor)
    return table


def _row(group: pd.DataFrame, *, draws: int, seed: int) -> dict[str, Any]:
    used = group[group["used"]]
    routed = used[used["routed"]]
    low, high = wilson_interval(len(routed), len(used))
    row: dict[str, Any] = {
        "n_cases": len(group), "n_used": len(used), "n_routed": len(routed), "n_texts": routed["text"].nunique(),
        "n_matched": int(routed["ranks_matched"].map(len).sum()),
        "routed": len(routed) / len(used) if len(used) else np.nan, "routed_low": float(low),
        "routed_high": float(high), "routed_elsewhere": used["elsewhere"].mean(), "gate": routed["gate"].mean(),
    }  # fmt: skip
    row |= ranks(routed["rank"].to_numpy(np.float64), routed["ranks_matched"].tolist(), draws=draws, seed=seed)
    values = np.stack([_values(routed, *columns) for columns in QUANTITIES.values()])
    _, text = np.unique(routed["text"].to_numpy(str), return_inverse=True)
    estimate, lows, highs, p = over_texts(values, text, draws=draws, seed=seed)
    for name, *numbers in zip(QUANTITIES, estimate, lows, highs, p, strict=True):
        row |= dict(zip((name, f"{name}_low", f"{name}_high", f"p_{name}"), map(float, numbers), strict=True))
    return row


def _values(cases: pd.DataFrame, column: str, minus: str | None) -> Float[ndarray, "case"]:
    values = cases[column].to_numpy(np.float64)
    return values if minus is None else values - cases[minus].to_numpy(np.float64)


def over_texts(
    values: Float[ndarray, "quantity case"], text: Int[ndarray, "case"], *, draws: int, seed: int
) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Mean over cases, its 95 % interval from drawing whole texts, and p for a mean of 0 or less.

    NaN values are left out. The p is that of sign flips of whole texts: exact if, without an effect, a text's sum is
    as likely to be positive as negative, and it cannot be smaller than 2 to the minus number of texts.

    Does not show that the texts are a fair sample: they were written for the label.
    """
    known = np.isfinite(values)
    n_texts = int(text.max(initial=-1)) + 1
    member = (text == np.arange(n_texts)[:, None]).astype(np.float64)
    counts = np.stack([np.where(known, values, 0) @ member.T, known @ member.T], axis=-1)
    nothing = np.full(len(values), np.nan)
    if n_texts == 0:
        return nothing, nothing, nothing, nothing
    total = counts.sum(1)
    with np.errstate(invalid="ignore"):
        estimate = total[:, 0] / total[:, 1]
    low = high = nothing
    if n_texts > 1:
        boot = cluster_bootstrap(counts, lambda c: c[..., 0] / c[..., 1], n_resamples=draws, seed=seed)
        low, high = boot.percentile()
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], (draws, n_texts))
    observed = np.where(total[:, 1] > 0, total[:, 0], np.nan)
    tolerance = 1e-9 * float(np.abs(counts[..., 0]).sum(1).max(initial=0))
    return estimate, low, high, permutation_p(observed, signs @ counts[..., 0].T, tolerance=tolerance)


def ranks(rank: Float[ndarray, "case"], matched: list[Any], *, draws: int, seed: int) -> dict[str, float]:
    """Rank of the expert's write to the target beside the ranks of its matched controls.

    ``rank`` and ``rank_matched`` are means, ``rank1`` and ``rank1_matched`` shares of first ranks, ``p_rank`` is for a
    mean rank no better than that of the controls: within each case, any of them could as well have been the expert.
    Cases without controls count in the first of each pair only.

    A first rank does not show that the prediction depends on the expert.
    """
    n = np.array([len(found) for found in matched], np.int64)
    width = 1 + int(n.max(initial=0))
    table = np.full((len(rank), width), np.nan)
    table[:, 0] = rank
    for row, found in zip(table, matched, strict=True):
        row[1 : 1 + len(found)] = found
    has = (n > 0) & np.isfinite(rank)
    out = {"rank": _mean(rank), "rank1": _mean(np.where(np.isnan(rank), np.nan, rank == 1))}
    out |= {"rank_matched": np.nan, "rank1_matched": np.nan, "p_rank": np.nan}
    if has.any():
        table, n = table[has], n[has]
        others = np.isfinite(table[:, 1:])
        out["rank_matched"] = float((np.nansum(table[:, 1:], axis=1) / n).mean())
        out["rank1_matched"] = float((((table[:, 1:] == 1) & others).sum(1) / n).mean())
        pick = (np.random.default_rng([seed, 2]).random((draws, len(n))) * (n + 1)).astype(np.int64)
        null = table[np.arange(len(n)), pick].sum(1)
        out["p_rank"] = float(permutation_p(-table[:, 0].sum(), -null, tolerance=1e-9))
    return out


def _mean(values: Float[ndarray, "case"]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else np.nan


def _outcome(table: pd.DataFrame, floor: float) -> list[str]:
    """``causal`` in all modes or in none.

    Causal: in every mode the effect and its lower bound lie above 0 and the noise floor, and at q < .05 it is more
    than that of experts with like gates, than that of co-selected experts, and than its own on other targets; the
    last two where there are any.
    """
    beyond = (table["effect"] > floor) & (table["effect_low"] > 0) & (table["q_over_matched"] < Q)
    for name in ("over_co_selected", "over_other_targets"):
        beyond &= (table[f"q_{name}"] < Q) | table[name].isna()
    causal = beyond.groupby(table["address"]).transform("all")
    few = table["n_texts"] < ENOUGH_TEXTS
    return [TOO_FEW if f else CAUSAL if c else NOT_SHOWN for f, c in zip(few, causal, strict=True)]

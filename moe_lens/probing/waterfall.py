"""The waterfall: where the gap between an MoE and a dense model goes (METRICS 1.3, the headline).

1. Keep the concepts that every arm could score, and of each bootstrap sample what every arm could score in it.
2. Average concepts within their group.
3. Forward: from the raw gap take search (the lift of picking the best of equal cells), reuse of test data (so that
   the held-out gap is left), candidates and token counts, routing. The rest is what the neurons may account for.
4. Reverse: take candidates first, then routing, then reuse, with the cell chosen by its own test score until then.
5. Average over groups. Every step is the difference of two levels in the same bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import BadConfig
from moe_lens.plots import METRIC_NAMES, number
from moe_lens.stats import Bootstrap, average_over_groups, percentile_interval

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from numpy import ndarray

MEAN = "__mean__"
STEP_NAMES = {
    "raw": "raw gap",
    "search": "search among more cells",
    "reuse": "reuse of test data",
    "candidates": "candidates and token counts",
    "routing": "routing",
    "left": "left for the neurons",
}
FORWARD = {
    "raw": {"raw": 1},
    "search": {"raw": 1, "search": -1},
    "reuse": {"held_out": 1},
    "candidates": {"equal_random_tokens": 1},
    "routing": {"equal_router_tokens": 1},
}
"""The arms, added with these weights, whose sum is the gap left after each step."""
REVERSE = {
    "raw": {"raw": 1},
    "candidates": {"equal_random_tokens_raw": 1},
    "routing": {"equal_router_tokens_raw": 1},
    "reuse": {"equal_router_tokens": 1},
}
FEW_GROUPS = 5
"""Concept groups below which their mean says nothing about the models."""
COUNTS = ("n_cells_moe", "n_cells_dense", "n_tokens_moe", "n_tokens_dense", "n_documents")
_ALWAYS = ("raw", "search", "held_out")
_Ladder = Mapping[str, Mapping[str, int]]


def waterfall(
    gaps: Mapping[str, Mapping[str, Bootstrap]],
    *,
    group_of: Mapping[str, str],
    metric: str = "f1_balanced",
    k: int = 1,
    null: Float[ndarray, "permutation"] | None = None,
    counts: Mapping[str, Mapping[str, float]] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of the raw gap each step removes, in both orders, with 95 % intervals.

    Args:
        gaps: MoE minus dense by arm and concept, for one metric and k, all from the same bootstrap samples of
            documents. ``search`` is the gap of ``homogeneous`` in what picking the best cell adds to a single one.
            The ladder stops before the first ``equal_*`` arm that is missing; other arms are not looked at. The
            reverse order needs ``equal_random_tokens_raw`` and ``equal_router_tokens_raw``.
        group_of: the group of each concept; one that is missing is a group of its own.
        metric: what `gaps` are in, for the columns ``metric`` and ``k``.
        null: the mean held-out gap over the `common_concepts` under each exchange of labels. It need not centre on
            zero: exchanges leave some labels where they were, and the models differ in cells and class balance.
        counts: for each arm any of `COUNTS`; ``n_tokens_...`` are the rows that the chosen cells are scored on.
        seed: of the resamples of groups.

    Returns:
        one row per order, step and group, and per step one for group ``__mean__``. ``kind`` is ``level`` (``raw``
        and ``left``: the gap itself), ``removed`` (what the step takes from the gap, negative where it adds) or
        ``null`` (``ci_low`` and ``ci_high`` hold 95 % of the exchanges). ``after`` is the gap left after the step.
        Intervals resample documents, those of ``..._groups`` concept groups too: BCa, or percentile intervals
        where there is no jackknife. No rows if no concept could be scored in every arm.

    Raises:
        BadConfig: an arm of the ladder before ``equal_*`` is missing, a count is unknown, or the arms do not have
            equally many bootstrap samples.

    Routing cannot be removed before candidates: which tokens a dense block sees is defined by the expert it is
    paired with. In the reverse order search has no step of its own, because with equally many equally tested cells
    it favours neither model: ``candidates`` contains it.

    How a gap divides depends on the order, so a step is an account and not a cause. The interval of what is left
    does not hold the spread from another split or fit, and a gap left shows better detectors, not that the model
    uses them.
    """
    import pandas as pd

    if unknown := {name for of_arm in (counts or {}).values() for name in of_arm} - set(COUNTS):
        raise BadConfig(f"unknown count {min(unknown)!r} under a bar of the waterfall: use {', '.join(COUNTS)}")
    concepts = common_concepts(gaps)
    members: dict[str, list[int]] = {}
    for i, name in enumerate(concepts):
        members.setdefault(group_of.get(name, name), []).append(i)
    rows: list[dict[str, Any]] = []
    if concepts:
        arms = _arms(gaps)
        every = _by_group(_paired(gaps, arms, concepts), list(members.values()))
        for order, ladder in _ladders(gaps).items():
            rows += _order_rows(order, ladder, every, arms, members, counts or {}, seed)
        rows += _null_rows(null)
    columns = ["order", "step", "kind", "group", "value", "ci_low", "ci_high", "ci_low_groups", "ci_high_groups",
               "after", "after_low", "after_high", "n_groups", "n_concepts", *COUNTS]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    table.insert(0, "metric", metric)
    table.insert(1, "k", k)
    return table


def common_concepts(gaps: Mapping[str, Mapping[str, Bootstrap]]) -> list[str]:
    """The concepts that every arm of the ladder could score, in the order of ``raw``."""
    arms = _arms(gaps)
    return [n for n in gaps["raw"] if all(n in gaps[arm] and np.isfinite(gaps[arm][n].estimate) for arm in arms)]


def _ladders(gaps: Mapping[str, Mapping[str, Bootstrap]]) -> dict[str, _Ladder]:
    """The forward ladder as far as its arms go, and the reverse one if it is complete."""
    if missing := [arm for arm in _ALWAYS if arm not in gaps]:
        raise BadConfig(f"the waterfall needs the arms {', '.join(_ALWAYS)}, and {', '.join(missing)} is missing")
    given = {arm for arm in gaps if gaps[arm] or arm in _ALWAYS}
    forward: dict[str, Mapping[str, int]] = {}
    for step, arms in FORWARD.items():
        if not given.issuperset(arms):
            break
        forward[step] = arms
    ladders: dict[str, _Ladder] = {"forward": forward}
    if len(forward) == len(FORWARD) and all(given.issuperset(arms) for arms in REVERSE.values()):
        ladders["reverse"] = REVERSE
    return ladders


def _arms(gaps: Mapping[str, Mapping[str, Bootstrap]]) -> list[str]:
    """The arms that the ladders are made of."""
    return list(dict.fromkeys(arm for ladder in _ladders(gaps).values() for step in ladder.values() for arm in step))


def _paired(gaps: Mapping[str, Mapping[str, Bootstrap]], arms: Sequence[str], concepts: Sequence[str]) -> Bootstrap:
    """Problem axes ``arm concept``; NaN in one arm is NaN in all, so that steps add up in every bootstrap sample."""
    table = [[gaps[arm][name] for name in concepts] for arm in arms]
    if len({b.draws.shape for row in table for b in row}) > 1:
        raise BadConfig("the arms of a waterfall need the same bootstrap samples: give all of them the same `times`")

    def stacked(values: Sequence[Sequence[Any]]) -> Float[ndarray, "sample arm concept"]:
        array = np.moveaxis(np.array(values, np.float64), -1, 0)
        return np.where(np.isnan(array).any(1, keepdims=True), np.nan, array)

    kinds = min(len(b.jackknives) for row in table for b in row)
    jackknives = tuple(stacked([[b.jackknives[i] for b in row] for row in table]) for i in range(kinds))
    estimate = np.array([[float(b.estimate) for b in row] for row in table])
    return Bootstrap(estimate, stacked([[b.draws for b in row] for row in table]), jackknives)


def _by_group(boot: Bootstrap, members: Sequence[Sequence[int]]) -> Bootstrap:
    """Concepts of one group averaged: the last problem axis becomes the group."""
    parts = [
        average_over_groups(
            Bootstrap(boot.estimate[..., own], boot.draws[..., own], tuple(j[..., own] for j in boot.jackknives))
        )
        for own in map(list, members)
    ]
    jackknives = tuple(np.stack(j, -1) for j in zip(*(p.jackknives for p in parts), strict=True))
    return Bootstrap(np.stack([p.estimate for p in parts], -1), np.stack([p.draws for p in parts], -1), jackknives)


def _weighted(boot: Bootstrap, weights: Float[ndarray, "quantity arm"]) -> Bootstrap:
    """Sums over the arm axis (the last but one)."""
    with np.errstate(invalid="ignore"):
        jackknives = tuple(weights @ j for j in boot.jackknives)
        return Bootstrap(weights @ boot.estimate, weights @ boot.draws, jackknives)


def _order_rows(
    order: str,
    ladder: _Ladder,
    every: Bootstrap,
    arms: Sequence[str],
    members: Mapping[str, Sequence[int]],
    counts: Mapping[str, Mapping[str, float]],
    seed: int,
) -> list[dict[str, Any]]:
    """All rows of one order of removal."""
    steps = dict(ladder) | {"left": list(ladder.values())[-1]}
    after = np.array([[of_step.get(arm, 0) for arm in arms] for of_step in steps.values()], np.float64)
    value = np.concatenate([after[:1], after[:-2] - after[1:-1], after[-1:]])
    by_group = [_weighted(every, weights) for weights in (value, after)]
    mean = _numbers(*map(average_over_groups, by_group))
    wide = average_over_groups(by_group[0], resample_groups=True, seed=seed)
    mean |= dict(zip(("ci_low_groups", "ci_high_groups"), _interval(wide), strict=True))
    dots = _numbers(*by_group)
    rows = []
    for i, (step, of_step) in enumerate(steps.items()):
        arm = next(iter(of_step))  # of `search` it is raw, whose cells are searched
        kind = "level" if step in ("raw", "left") else "removed"
        shared: dict[str, Any] = {"order": order, "step": step, "kind": kind, **counts.get(arm, {})}
        sizes = {"n_groups": len(members), "n_concepts": sum(map(len, members.values()))}
        rows.append({**shared, **sizes, "group": MEAN} | {name: float(column[i]) for name, column in mean.items()})
        for j, (group, own) in enumerate(members.items()):
            sizes = {"n_groups": 1, "n_concepts": len(own)}
            rows.append({**shared, **sizes, "group": group} | {name: float(c[i, j]) for name, c in dots.items()})
    return rows


def _numbers(value: Bootstrap, after: Bootstrap) -> dict[str, Float[ndarray, "*problem"]]:
    return {
        **dict(zip(("ci_low", "ci_high"), _interval(value), strict=True)),
        **dict(zip(("after_low", "after_high"), _interval(after), strict=True)),
        "value": value.estimate, "after": after.estimate,
    }  # fmt: skip


def _interval(boot: Bootstrap) -> tuple[Float[ndarray, "*problem"], Float[ndarray, "*problem"]]:
    return boot.bca() if boot.jackknives else boot.percentile()


def _null_rows(null: Float[ndarray, "permutation"] | None) -> list[dict[str, Any]]:
    known = np.zeros(0) if null is None else null[np.isfinite(null)]
    if not len(known):
        return []
    low, high = percentile_interval(known)
    row = {"order": "forward", "step": "reuse", "kind": "null", "group": MEAN}
    return [row | {"value": float(known.mean()), "ci_low": float(low), "ci_high": float(high)}]


def one_ladder(table: pd.DataFrame, *, metric: str | None = None, k: int | None = None) -> pd.DataFrame:
    """The rows of one metric (balanced F1 if it is there) and k (the smallest).

    Raises:
        BadConfig: a metric or k that the table does not hold.
    """
    if not len(table):
        return table
    metrics, ks = list(dict.fromkeys(table.metric)), sorted(set(table.k))
    if metric is None:
        metric = "f1_balanced" if "f1_balanced" in metrics else metrics[0]
    k = ks[0] if k is None else k
    chosen = table[(table.metric == metric) & (table.k == k)]
    if not len(chosen):
        raise BadConfig(f"no waterfall in {metric!r} at k={k}: metrics {', '.join(metrics)}, k {ks}")
    return chosen


def finding(table: pd.DataFrame, *, metric: str | None = None, k: int | None = None) -> str:
    """The waterfall in one sentence: the raw gap, what each step takes from it, and what is left.

    A step that adds to the gap, or takes more than there was, is said to do so. See `waterfall` for what is not shown.
    """
    table = one_ladder(table, metric=metric, k=k)
    if not len(table):
        return "No concept could be scored in every arm, so the gap cannot be taken apart: use a larger corpus."
    bars: Any = table[(table.order == "forward") & (table.group == MEAN)].itertuples()
    row = {(r.step, r.kind): r for r in bars}
    raw, left, null = row["raw", "level"], row["left", "level"], row.get(("reuse", "null"))
    steps, before = [], raw.value
    for (step, kind), r in row.items():
        if kind == "removed":
            explains = "" if steps else " explains"
            steps.append(f"{STEP_NAMES[step]}{explains} {number(r.value, '+')}{_aside(before, r.after)}")
            before = r.after
    doubt = ", itself not distinguishable from zero" if raw.ci_low <= 0 <= raw.ci_high else ""
    rest = _still_in(table)
    if null is not None:
        held = number(row["reuse", "removed"].after, "+")
        rest += (
            f"; the gap between cells chosen on other documents, {held}, is {beside_null(table)} what exchanged labels "
            f"give there ({number(null.ci_low, '+')} to {number(null.ci_high, '+')})"
        )
    groups = f"{raw.n_groups:.0f} concept group{'s' if raw.n_groups != 1 else ''}"
    few = ", too few to speak of the models" if raw.n_groups < FEW_GROUPS else ""
    return (
        f"Of the raw k={raw.k} {METRIC_NAMES.get(raw.metric, raw.metric)} gap of {_with_interval(raw)} (mean over "
        f"{groups}{few}){doubt}, "
        f"{', '.join(steps)}; {_with_interval(left)} is left{'' if not_removed(table) else ' for the neurons'}, "
        f"{verdict(left.ci_low, left.ci_high)}{rest}."
    )


def not_removed(table: pd.DataFrame) -> list[str]:
    """Steps that a short ladder does not reach."""
    return [step for step in FORWARD if step not in set(table.step)]


def beside_null(table: pd.DataFrame) -> str:
    """Where the held-out gap lies beside 95 % of the exchanges: below, within or above; empty without a null."""
    null = table[table.kind == "null"]
    if not len(null):
        return ""
    rows = table[(table.order == "forward") & (table.step == "reuse") & (table.kind == "removed")]
    value = rows.after[rows.group == MEAN].iloc[0]
    low, high = null.ci_low.iloc[0], null.ci_high.iloc[0]
    return "below" if value < low else "above" if value > high else "within"


def verdict(low: float, high: float) -> str:
    """Where an interval lies."""
    return "above zero" if low > 0 else "below zero" if high < 0 else "not distinguishable from zero"


def _with_interval(row: Any) -> str:
    return " [".join(number(value, "+") for value in (row.value, row.ci_low)) + f", {number(row.ci_high, '+')}]"


def _aside(before: float, after: float) -> str:
    """What is unexpected about a step that leads from one gap to another."""
    if before * after < 0:
        return " (its removal turns the gap around)"
    return " (its removal makes the gap larger)" if abs(after) > abs(before) else ""


def _still_in(table: pd.DataFrame) -> str:
    missing = not_removed(table)
    if not missing:
        return ""
    arm = next(iter(FORWARD[missing[0]]))
    what = "routing is" if missing == ["routing"] else "candidates, token counts and routing are"
    return f"; {what} still in it, because there are no scores of {arm}, so it says nothing about the neurons"

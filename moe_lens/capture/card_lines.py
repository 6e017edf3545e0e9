"""The lines of an expert's card: routing, label, scores and neurons in words that are safe to show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from moe_lens.capture.shading import visible
from moe_lens.types import Status

_NEGATIVES = ("same_token", "random", "near_miss", "other", "moved")
"""The headline first."""


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dicts, with None for every kind of missing value."""
    columns = [
        [value if there else None for value, there in zip(frame[name].tolist(), known, strict=True)]
        for name, known in zip(frame, frame.notna().to_numpy().T.tolist(), strict=True)
    ]
    return [dict(zip(map(str, frame), row, strict=True)) for row in zip(*columns, strict=True)]


def probe_line(probes: pd.DataFrame) -> str:
    """The concepts that an expert's neurons read best."""
    if not len(probes):
        return "no concept had enough tokens of this expert"
    found = [
        f"{visible(row['concept'])} {'+'.join(f'N{neuron}' for neuron in row['neurons'])} {_number(row['auroc'])}"
        for row in records(probes)
    ]
    return f"{', '.join(found)} (AUROC on test, best on validate first)"


def routing_line(row: Mapping[str, Any]) -> str:
    """How much goes to an expert, and from where."""
    if not row["load"]:
        return "no token visited it"
    parts = [
        f"{row['load']:,} tokens ({row['load_share']:.1%}, {row['load_over_even']:.1f}x an even share)",
        f"gate mass {row['gate_mass']:,.0f} (mean weight {_number(row['mean_weight'])})",
        f"{row['write_share']:.1%} of what the layer writes",
    ]
    domain = row.get("top_domain")
    if isinstance(domain, str):
        parts.append(f"prefers {visible(domain)} ({row['top_domain_lift']:.1f}x)")
    return " · ".join([*parts, f"router entropy of the layer {row['router_entropy']:.2f} nats"])


def label_line(row: Mapping[str, Any]) -> str:
    """A label with who gave it, or why there is none."""
    by = visible(row["labeller"])
    if row["status"] != str(Status.OK) or not isinstance(row["label"], str):
        why = f", {visible(row['why'])}" if row["why"] else ""
        return f"none ({row['status']}{why}) by {by}"
    sure = row["confidence"]
    confidence = f", confidence {int(sure)} of 4" if sure is not None else ""
    return f"{visible(row['label'])} (by {by}{confidence})"


def score_chips(scores: pd.DataFrame, *, labeller: str, facet: int) -> list[str]:
    """The scores of one label in a few words each.

    Of each scorer first the headline with interval and margins (same token, not routed; fuzzing has but one kind),
    then the AUROC against the other negatives, then the headline's with labels shuffled.
    """
    mine = scores[(scores["labeller"] == labeller) & (scores["facet"] == facet)]
    order = {name: i for i, name in enumerate(_NEGATIVES)}
    chips = []
    for scorer, rows in mine.groupby("scorer", sort=False):
        rows = rows.sort_values("negatives", key=lambda names: names.map(order), kind="stable")
        judge = f"{scorer}, the labeller itself" if (rows["same_model"] == True).any() else str(scorer)  # noqa: E712
        real, shuffled = (records(rows[rows["control"] == control]) for control in ("none", "shuffled"))
        chips += [chip for row in real[:1] for chip in _headline(row, judge)]
        chips += [f"{_kind(row)} {_auroc(row)}" for row in real[1:]]
        chips += [f"labels shuffled {_auroc(row)}" for row in shuffled[:1]]
    return chips


def _headline(row: Mapping[str, Any], judge: str) -> list[str]:
    found = [f"{judge}: {_kind(row)} AUROC {_auroc(row)}{_interval(row['ci_low'], row['ci_high'])}"]
    for baseline in ("unigram", "bigram"):
        margin, low, high = (row[f"margin_{baseline}{end}"] for end in ("", "_low", "_high"))
        if margin is not None:
            found.append(f"{_number(margin, signed=True)}{_interval(low, high)} over {baseline}")
    return [*found, f"{row['n_abstain']} abstained"] if row["n_abstain"] else found


def _kind(row: Mapping[str, Any]) -> str:
    return row["negatives"].replace("_", " ")


def _auroc(row: Mapping[str, Any]) -> str:
    return _number(row["auroc"]) if row["status"] == str(Status.OK) else row["status"]


def _interval(low: Any, high: Any) -> str:
    return "" if low is None or high is None else f" [{_number(low)}, {_number(high)}]"


def _number(value: Any, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:{'+' if signed else ''}.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"

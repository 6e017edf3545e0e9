"""``Polysemanticity``: the frozen result, one table of neurons and one of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.plots import number
from moe_lens.probing.polysemanticity.compare import MEASURES
from moe_lens.probing.polysemanticity.neurons import FDR

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False)
class Polysemanticity:
    """How many concept groups single neurons serve.

    ``neurons``: one row per neuron; ``pair`` numbers the compared depths, ``weight`` is the neuron's part in the
    matched comparison (sum 1 per pair and role; NaN for neurons that are significant for no group).
    ``layers``: one row per depth, measure and ``matched``; ``pair`` -1 is the mean over depths. ``gap`` is MoE minus
    dense, ``n_moe`` and ``n_dense`` the neurons used.
    """

    neurons: pd.DataFrame
    layers: pd.DataFrame

    @property
    def frame(self) -> pd.DataFrame:
        """The neurons."""
        return self.neurons

    @property
    def has_baseline(self) -> bool:
        return self.neurons["role"].nunique() > 1

    def overall(self, measure: str = "participation_ratio", *, matched: bool = True) -> pd.Series:
        """The row of ``layers`` over all depths."""
        table = self.layers
        rows = table[(table["pair"] == -1) & (table["measure"] == measure) & (table["matched"] == matched)]
        return rows.iloc[0]

    def finding(self) -> str:
        """The comparison in one sentence."""
        neurons = self.neurons
        found = {str(role): int((part["q_value"] <= FDR).sum()) for role, part in neurons.groupby("role")}
        if not sum(found.values()):
            return "No neuron is significant for any concept group, so nothing can be said of how many they serve."
        ratio, two = self.overall(), self.overall("two_or_more")
        if not self.has_baseline:
            (role,) = found
            return (
                f"{found[role]} of {len(neurons)} neurons are significant for a concept group; on average such a "
                f"neuron serves {_value(ratio, role)} groups (noise-corrected participation ratio), and "
                f"{two[role]:.1%} of them detect two or more with AUROC above .65."
            )
        if np.isnan(ratio["gap"]):
            return (
                f"{found['moe']} MoE and {found['dense']} dense neurons are significant for a concept group, but at no "
                f"depth do both models have some of one firing rate: nothing is compared."
            )
        low, high = ratio["ci_low"], ratio["ci_high"]
        verdict = "below" if high < 0 else "above" if low > 0 else "not distinguishable from"
        return (
            f"Matched on firing rate, an MoE neuron serves {_value(ratio, 'moe')} concept groups and a dense neuron "
            f"{_value(ratio, 'dense')} (noise-corrected participation ratio; gap {number(ratio['gap'], '+')} "
            f"[{number(low, '+')}, {number(high, '+')}], {verdict} zero; only groups that are found count, so power "
            f"counts too), {two['moe']:.1%} and {two['dense']:.1%} of them detect two or more with AUROC above .65; "
            f"{ratio['n_moe']} and {ratio['n_dense']} neurons are compared, of {found['moe']} and {found['dense']} "
            f"significant ones and {self._count('moe')} and {self._count('dense')} in all."
        )

    def headline(self) -> str:
        """The comparison in a few words, for a title."""
        ratio = self.overall()
        if not self.has_baseline or np.isnan(ratio["gap"]):
            return "How many concept groups a neuron serves"
        clear = ratio["ci_low"] > 0 or ratio["ci_high"] < 0
        means = f"{ratio['moe']:.2f} groups in the MoE, {ratio['dense']:.2f} in the dense model"
        return f"A neuron serves {means}" + ("" if clear else ", not distinguishable")

    def _count(self, role: str) -> int:
        return int((self.neurons["role"] == role).sum())

    def plot(self) -> go.Figure:
        """`plot_polysemanticity` of this result."""
        from moe_lens.probing.polysemanticity.figure import plot_polysemanticity

        return plot_polysemanticity(self)

    def summary(self) -> dict[str, Any]:
        """The matched means over all depths as plain JSON values; NaN becomes None."""
        out: dict[str, Any] = {}
        for measure in MEASURES:
            row = self.overall(measure)
            names = ("moe", "dense", "gap", "ci_low", "ci_high")
            out[measure] = {name: None if np.isnan(row[name]) else round(float(row[name]), 6) for name in names}
        return out

    def __repr__(self) -> str:
        return f"Polysemanticity({len(self.neurons)} neurons)\n{self.finding()}"

    def _repr_html_(self) -> str:
        from html import escape

        table = self.layers[self.layers["matched"] & self.layers["measure"].isin(MEASURES[:1] + MEASURES[2:4])]
        columns = ["layer", "dense_layer", "measure", "moe", "dense", "gap", "ci_low", "ci_high", "n_moe", "n_dense"]
        shown = table[columns].to_html(index=False, float_format=lambda v: f"{v:.3f}", border=0, na_rep="")
        return f"<p>{escape(self.finding())}</p>{shown}"


def _value(row: pd.Series, role: str) -> str:
    return f"{row[role]:.2f} [{row[f'{role}_low']:.2f}, {row[f'{role}_high']:.2f}]"

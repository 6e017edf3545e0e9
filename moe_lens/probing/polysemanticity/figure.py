"""Distributions of the participation ratio per depth, MoE and dense side by side, matched on firing rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.plots import MODEL_COLOURS, layout

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.probing.polysemanticity.result import Polysemanticity

_NAMES = {"moe": "MoE", "dense": "dense"}
_SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)


def plot_polysemanticity(found: Polysemanticity) -> go.Figure:
    """One box per model and depth, with whiskers over the middle 90 % of neurons; the diamond is the mean.

    Only neurons that are significant and matched, counted as in the table.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    neurons = found.neurons[found.neurons["participation_ratio"].notna() & (found.neurons["weight"] > 0)]
    labels = {pair: _label(part) for pair, part in found.neurons.groupby("pair")}
    top: list[float] = []
    for role, name in _NAMES.items():
        groups = list(neurons[neurons["role"] == role].groupby("pair"))
        if not groups:
            continue
        values = [(part["participation_ratio"].to_numpy(), part["weight"].to_numpy()) for _, part in groups]
        low, first, middle, third, high = np.array([weighted_quantiles(*v, at=_SHARES) for v in values]).T
        top += high.tolist()
        figure.add_box(
            x=[labels[pair] for pair, _ in groups], lowerfence=low, q1=first, median=middle, q3=third, upperfence=high,
            mean=[float(np.average(v, weights=w)) for v, w in values], boxmean=True, name=name, offsetgroup=name,
            line={"color": MODEL_COLOURS[role], "width": 1.5},
            text=[f"{len(part)} {name} neurons" for _, part in groups],
        )  # fmt: skip
    matched = "neurons matched on firing rate" if found.has_baseline else "all significant neurons"
    layout(
        figure, f"{found.headline()}", f"participation ratio over concept groups, noise-corrected; {matched}<br>"
        "box: middle half of the neurons, whiskers: middle 90 %, dashed: mean", width=900, height=460, boxmode="group",
    )  # fmt: skip
    figure.update_layout(showlegend=found.has_baseline, legend={"orientation": "h", "x": 0, "y": 1.04})
    figure.update_yaxes(title="concept groups per neuron", range=[0, 1.08 * max(top, default=1.0)])
    return figure


def _label(part: pd.DataFrame) -> str:
    layers = part.groupby("role")["layer"].first()
    return " / ".join(f"{_NAMES[role]} L{layers[role]}" for role in _NAMES if role in layers)


def weighted_quantiles(
    value: Float[ndarray, "neuron"], weight: Float[ndarray, "neuron"], *, at: Sequence[float]
) -> Float[ndarray, "share"]:
    """Smallest values that reach each share of the total weight."""
    order = np.argsort(value, kind="stable")
    reached = np.cumsum(weight[order])
    found = np.searchsorted(reached, np.asarray(at) * reached[-1])
    return value[order][np.minimum(found, len(value) - 1)]

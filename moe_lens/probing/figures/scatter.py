"""One dot per concept: the dense baseline against the MoE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moe_lens import plots
from moe_lens.errors import BadConfig
from moe_lens.plots import (
    BLUE,
    GREEN,
    GROUND,
    INK,
    MUTED,
    ORANGE,
    PINK,
    RED,
    SKY,
    empty,
    faint,
    layout,
    metric_name,
    rows_of,
)
from moe_lens.probing.waterfall import MEAN

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

HEIGHT = 660
NAMED = 6
_LEFT, _RIGHT, _BELOW, _PLOT = 60, 176, 52, 516  # pixels
_HUES = (BLUE, ORANGE, GREEN, RED, SKY, PINK, "#6E6E6E")
_SYMBOLS = ("circle", "diamond", "square", "cross")
_CHARACTER, _LINE = 6.3, 15  # pixels of a name


def scatter(
    comparison: pd.DataFrame,
    *,
    arm: str = "held_out",
    metric: str = "f1_balanced",
    k: int = 1,
    category_of: Mapping[str, str] | None = None,
) -> go.Figure:
    """Dense on x, MoE on y, 95 % intervals over documents as crosses; the concepts farthest off are named.

    Args:
        comparison: ``comparison.parquet``.
        category_of: category of each concept, for the colours.

    Without a baseline x is what a probe without any neuron scores in the same place. One model may have searched
    more cells than the other: only the ``equal_*`` arms put concepts above the line for another reason.

    Raises:
        BadConfig: an arm, metric or k that was not computed.
    """
    chosen = comparison[(comparison.arm == arm) & (comparison.metric == metric) & (comparison.k == k)]
    if not len(chosen):
        known = {name: list(dict.fromkeys(comparison[name])) for name in ("arm", "metric", "k")}
        asked = f"{arm!r} in {metric!r} at k={k}"
        raise BadConfig(f"no scores of {asked}: " + "; ".join(f"{name} {values}" for name, values in known.items()))
    paired = bool(chosen.dense.notna().any())
    rows = chosen[(chosen.concept != MEAN) & chosen.moe.notna()]
    rows = rows.assign(x=rows.dense if paired else rows.chance_moe)
    rows = rows[rows.x.notna()].reset_index(drop=True)
    if not len(rows):
        return empty(
            "No concept has enough tokens and documents: use a larger corpus.", width=_LEFT + _PLOT, height=HEIGHT
        )
    rows["category"] = [(category_of or {}).get(name, "concept") for name in rows.concept]
    return _draw(rows, arm, metric, k, paired=paired)


def _draw(rows: pd.DataFrame, arm: str, metric: str, k: int, *, paired: bool) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    values = np.concatenate([rows.x, rows.moe])
    room = 0.06 * max(np.ptp(values), 0.05)
    low, high = float(values.min() - room), float(values.max() + room)
    figure.add_shape(
        type="line", x0=low, y0=low, x1=high, y1=high, line={"dash": "dot", "color": MUTED, "width": 1.2}, layer="below"
    )
    categories = list(rows.category.value_counts(sort=True).index)
    for n, category in enumerate(categories):
        colour, symbol = _HUES[n % len(_HUES)], _SYMBOLS[n // len(_HUES) % len(_SYMBOLS)]
        _dots(figure, rows[rows.category == category], category, colour, symbol, paired=paired)
    side = "dense baseline" if paired else "probe without a neuron"
    title, subtitle = _titles(rows, arm, k, metric, paired=paired)
    right = _RIGHT if len(categories) > 1 else 24
    width = _LEFT + _PLOT + right
    layout(figure, title, subtitle, width=width, height=HEIGHT, left=_LEFT, right=right, below=_BELOW)
    name = metric_name(metric)
    figure.update_xaxes(range=[low, high], title=f"{name} of the {side}", tickformat=".2f", showgrid=True,
                        gridcolor="#EEEEEE")  # fmt: skip
    figure.update_yaxes(range=[low, high], title={"text": f"{name} of the MoE", "standoff": 6}, tickformat=".2f")
    figure.update_layout(showlegend=len(categories) > 1, legend={"x": 1.02, "y": 1, "itemsizing": "constant"})
    _name_extremes(figure, rows, low, high)
    return figure


def _dots(figure: go.Figure, rows: pd.DataFrame, category: str, colour: str, symbol: str, *, paired: bool) -> None:
    bar = {"type": "data", "color": faint(colour, 0.3), "thickness": 1, "width": 0}
    x_bar = None
    if paired:
        x_bar = bar | {"array": rows.dense_high - rows.x, "arrayminus": rows.x - rows.dense_low}
    side = "dense" if paired else "no neuron"
    text = [f"<b>{plots.text_of(r.concept)}</b> ({plots.text_of(category)})" for r in rows_of(rows)]
    figure.add_scatter(
        x=rows.x, y=rows.moe, mode="markers", name=plots.text_of(category), hovertext=text, customdata=rows.concept,
        error_x=x_bar,
        error_y=bar | {"array": rows.moe_high - rows.moe, "arrayminus": rows.moe - rows.moe_low},
        marker={"size": 8, "color": colour, "symbol": symbol, "line": {"color": GROUND, "width": 0.8}},
        hovertemplate=f"%{{hovertext}}<br>MoE %{{y:.3f}}<br>{side} %{{x:.3f}}<extra></extra>",
    )  # fmt: skip


def _titles(rows: pd.DataFrame, arm: str, k: int, metric: str, *, paired: bool) -> tuple[str, str]:
    above, n = int((rows.moe > rows.x).sum()), len(rows)
    probe = f"Best k={k} probe of each concept, {arm.replace('_', ' ')}"
    if not paired:
        return f"{above} of {n} concepts score above a probe without a neuron", f"{probe}; {metric_name(metric)}"
    better, worse = int((rows.ci_low > 0).sum()), int((rows.ci_high < 0).sum())
    return (
        f"The MoE scores higher in {above} of {n} concepts",
        f"{probe}; the 95 % interval of the gap lies<br>above zero in {better}, below in {worse} "
        f"(one concept at a time: not corrected for their number)",
    )


def _name_extremes(figure: go.Figure, rows: pd.DataFrame, low: float, high: float) -> None:
    """Names of the concepts farthest from the diagonal, where they cover neither each other nor many dots."""
    scale = _PLOT / (high - low)
    dots = np.stack([(rows.x - low) * scale, (rows.moe - low) * scale], 1)
    taken: list[tuple[float, float, float, float]] = []
    for i in (rows.moe - rows.x).abs().nlargest(NAMED).index:
        name = rows.concept[i]
        box, offset = _place(dots[i], _CHARACTER * len(name), taken, dots)
        taken.append(box)
        figure.add_annotation(
            x=rows.x[i], y=rows.moe[i], text=plots.text_of(name), ax=offset[0], ay=-offset[1], arrowcolor="#999999",
            arrowwidth=1, arrowhead=0, standoff=5, font={"size": 11, "color": INK}, borderpad=1,
        )  # fmt: skip


def _place(
    dot: np.ndarray, width: float, taken: Sequence[tuple[float, float, float, float]], dots: np.ndarray
) -> tuple[tuple[float, float, float, float], tuple[float, float]]:
    """The box (left, bottom, right, top) and offset from the dot, in pixels, that cover least."""
    best, lowest = None, np.inf
    for far in (16, 30, 48):
        for along, up in ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)):
            x, y = dot[0] + along * (far + width / 2), dot[1] + up * far
            box = x - width / 2, y - _LINE / 2, x + width / 2, y + _LINE / 2
            covered = ((dots > (box[0] - 4, box[1] - 4)) & (dots < (box[2] + 4, box[3] + 4))).all(1).sum()
            clashes = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            outside = box[0] < 0 or box[1] < 0 or box[2] > _PLOT or box[3] > _PLOT
            cost = covered + 20 * clashes + 50 * outside + far / 100
            if cost < lowest:
                best, lowest = (box, (x - dot[0], y - dot[1])), cost
    assert best is not None
    return best

"""Heat maps of recovery: layer x expert, and layer x position."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import BadConfig
from moe_lens.plots import BLUE, GROUND, INK, RED, layout, number

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.causal.patching.result import Patching

ABSENT = "#D0D0D0"
_SCALE = [[0, RED], [0.5, GROUND], [1, BLUE]]
_CELL, _WIDTH = 30, 900
"""Pixels."""
MOST_NUMBERS = 20
"""Columns up to which cells carry their number."""


def heatmap(result: Patching, by: str) -> go.Figure:
    """See `Patching.plot`.

    Blue goes toward the prompt that writes are taken from, orange away from it; grey experts are visited by
    neither prompt. On the right what the whole layer comes to, as text: it would drown the experts' colours.
    """
    if by not in ("expert", "position"):
        raise BadConfig(f"unknown by={by!r}: use expert or position")
    return _by_expert(result) if by == "expert" else _by_position(result)


def _by_expert(result: Patching) -> go.Figure:
    rows = result.frame[(result.frame["unit"] == "expert") & result.frame["position"].isna()]
    layers, n = sorted(rows["layer"].unique()), int(rows["expert"].max()) + 1
    z = np.full((len(layers), n), np.nan)
    text = np.full(z.shape, "", object)
    for _, row in rows.iterrows():
        at = layers.index(row["layer"]), int(row["expert"])
        name, visits = f"<b>L{row['layer']}.E{row['expert']}</b>", (row["visits_clean"], row["visits_corrupt"])
        is_visited = sum(visits) > 0
        z[at] = row[result.score] if is_visited else np.nan
        text[at] = f"{name} {number(row[result.score])}<br>visits: clean {visits[0]}, corrupt {visits[1]}"
        if row["n_random"]:
            text[at] += f"<br>p {row['p_random']:.2f} in its layer"
    best = result.experts.iloc[0]
    title = f"L{best['layer']}.E{best['expert']} crosses {_said(result, best[result.score])}, the most of all experts"
    figure = _drawn(result, z, text, layers, list(range(n)), title)
    figure.update_xaxes(title="expert", tickvals=_ticks(n), ticktext=_ticks(n))
    return figure


def _by_position(result: Patching) -> go.Figure:
    rows = result.frame[(result.frame["unit"] == "layer") & result.frame["position"].notna()]
    layers = sorted(rows["layer"].unique())
    base = [pair[1] if result.base == "corrupt" else pair[0] for pair in result.patched]
    names = [_token_pair(result, pair) for pair in result.patched]
    z = np.full((len(layers), len(base)), np.nan)
    text = np.full(z.shape, "", object)
    for _, row in rows.iterrows():
        at = layers.index(row["layer"]), base.index(row["position"])
        z[at] = row[result.score]
        text[at] = f"<b>L{row['layer']}</b> at position {row['position']}: {number(row[result.score])}"
    at = np.unravel_index(np.nanargmax(z), z.shape)
    title = f"L{layers[at[0]]} at {names[at[1]]} crosses {_said(result, float(z[at]))}, the most of all"
    figure = _drawn(result, z, text, layers, list(range(len(base))), title)
    figure.update_xaxes(title="token (clean → corrupt where they differ)", tickvals=list(range(len(base))))
    figure.update_xaxes(ticktext=names, tickangle=-45 if len(names) > 8 else 0)
    return figure


def _drawn(
    result: Patching, z: Float[ndarray, "layer column"], text: Any, layers: list[Any], x: list[int], title: str
) -> go.Figure:
    import plotly.graph_objects as go

    largest = max(float(np.nanmax(np.abs(z))) if np.isfinite(z).any() else 0.0, 1e-3)
    figure = go.Figure(go.Heatmap(
        z=z, x=x, y=[f"L{layer}" for layer in layers], hovertext=text, hovertemplate="%{hovertext}<extra></extra>",
        colorscale=_SCALE, zmid=0, zmin=-largest, zmax=largest, xgap=1, ygap=1, hoverongaps=True,
        colorbar={"title": {"text": result.score, "side": "right"}, "thickness": 12, "x": 1.0, "xpad": 70, "len": 1},
    ))  # fmt: skip
    subtitle = (
        f"{_quoted(result.target)} over {_quoted(result.foil)}: {number(result.difference_clean, '.2f')} "
        f"after clean, {number(result.difference_corrupt, '.2f')} after corrupt (logits)<br>{result.source} "
        f"{result.what}s put into {result.base}; blue toward {result.source}, orange away"
        + ("; grey: not visited" if np.isnan(z).any() else "")
    )
    if z.shape[1] <= MOST_NUMBERS:
        shown = [["" if np.isnan(v) else number(round(v, 2) + 0.0, ".2f") for v in row] for row in z]
        figure.update_traces(text=shown, texttemplate="%{text}", textfont={"size": 11})
    height = 210 + _CELL * len(layers)
    layout(figure, title, subtitle, width=_WIDTH, height=height, left=56, right=160, above=22, below=70)
    figure.update_layout(plot_bgcolor=ABSENT)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(range=[-0.5, len(x) - 0.5])
    _whole_layers(figure, result, layers)
    return figure


def _whole_layers(figure: go.Figure, result: Patching, layers: list[Any]) -> None:
    rows: pd.DataFrame = result.frame[(result.frame["unit"] == "layer") & result.frame["position"].isna()]
    value = dict(zip(rows["layer"], rows[result.score], strict=True))
    for layer in layers:
        figure.add_annotation(
            x=1.01, xref="paper", y=f"L{layer}", text=number(value[layer], ".2f"), showarrow=False, xanchor="left",
            font={"size": 12, "color": INK},
        )  # fmt: skip
    figure.add_annotation(
        x=1.01, xref="paper", y=1, yref="paper", yshift=4, text="whole layer", showarrow=False, xanchor="left",
        yanchor="bottom", font={"size": 12, "color": INK},
    )  # fmt: skip


def _said(result: Patching, value: float) -> str:
    return f"{number(100 * value, '.0f')} % of the gap" if result.score == "recovery" else f"{number(value)} logits"


def _token_pair(result: Patching, pair: tuple[int, int]) -> str:
    a, b = result.tokens_clean[pair[0]], result.tokens_corrupt[pair[1]]
    return _quoted(a) if a == b else f"{_quoted(a)} → {_quoted(b)}"


def _quoted(token: str) -> str:
    return escape(repr(token), quote=False)


def _ticks(n: int) -> list[int]:
    step = 1 if n <= 32 else 8 if n <= 128 else 32
    return list(range(0, n, step))

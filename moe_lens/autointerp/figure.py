"""One dot per label: what it says about routing beyond the token, against what a table of token pairs says."""

from __future__ import annotations

from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING

from moe_lens.plots import BLUE, GREEN, MUTED, ORANGE, PINK, RED, RULE, SKY, empty, layout

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_WIDTH, _HEIGHT = 660, 620
_HUES = (BLUE, ORANGE, GREEN, RED, SKY, PINK)
_SYMBOLS = ("circle", "diamond", "square", "cross")


def against_bigram(frame: pd.DataFrame) -> go.Figure:
    """AUROC of the table of token pairs on x, of the label on y, on tokens of the same id that were not routed.

    Args:
        frame: ``Labels.frame``; labels without a score are left out.

    Both are measured on the same items. A dot above the line says more about routing than the table; intervals of
    single labels are wide (hover), and neither axis says what the expert does.
    """
    import plotly.graph_objects as go

    rows = frame[frame["auroc"].notna() & frame["bigram"].notna()]
    if not len(rows):
        return empty("No label could be scored", width=_WIDTH, height=200)
    figure = go.Figure()
    low = min(0.4, float(rows[["auroc", "bigram"]].min().min()) - 0.02)
    figure.add_scatter(x=[low, 1], y=[low, 1], mode="lines", line={"color": RULE}, hoverinfo="skip")
    for axis in ("x", "y"):
        line = {"color": RULE, "dash": "dot", "width": 1}
        figure.add_shape(type="line", line=line, **{f"{axis}0": 0.5, f"{axis}1": 0.5}, **_across(axis, low))
    for i, (layer, mine) in enumerate(rows.groupby("layer")):
        text = [
            f"<b>{at}</b> {'<br>'.join(map(escape, wrap(str(label), 60)))}<br>AUROC {a:.2f} [{b:.2f}, {c:.2f}]"
            for at, label, a, b, c in mine[["address", "label", "auroc", "ci_low", "ci_high"]].itertuples(index=False)
        ]
        figure.add_scatter(
            x=mine["bigram"], y=mine["auroc"], mode="markers", name=f"layer {layer}", text=text,
            hovertemplate="%{text}<extra></extra>",
            marker={"color": _HUES[i % len(_HUES)], "symbol": _SYMBOLS[i // len(_HUES) % len(_SYMBOLS)], "size": 9,
                    "line": {"color": "#FFFFFF", "width": 1}},
        )  # fmt: skip
    surely, over = int((rows["margin_bigram_low"] > 0).sum()), int((rows["auroc"] > rows["bigram"]).sum())
    layout(
        figure,
        f"{surely} of {len(rows)} labels say more about routing than a table of token pairs",
        "Tokens of the same id, routed to the expert or not; .5 is chance on either axis.<br>"
        f"The title counts labels whose 95 % interval lies above the table; {over} dots are above the line.",
        width=_WIDTH,
        height=_HEIGHT,
    )
    figure.update_layout(showlegend=True, legend={"font": {"color": MUTED}})
    figure.data[0].showlegend = False
    figure.update_xaxes(title="AUROC of the table of token pairs", range=[low, 1.01])
    figure.update_yaxes(title="AUROC of the label", range=[low, 1.01])
    return figure


def _across(axis: str, low: float) -> dict[str, float]:
    other = "y" if axis == "x" else "x"
    return {f"{other}0": low, f"{other}1": 1.0}

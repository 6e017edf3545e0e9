"""Figures of a `Faithfulness`: scores of rankings over bins, and whether importance follows routing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.plots import BLUE, GREEN, MUTED, ORANGE, PINK, RED, SKY, empty, faint, layout, number, rows_of, spread

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd
    import plotly.graph_objects as go

    from moe_lens.causal.faithfulness.result import Faithfulness

_HUES = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
_DASHES = ("solid", "dash", "dot")
_PANEL, _HEIGHT, _LEFT = 330, 640, 66
"""Pixels: width of a panel, height of all, left margin."""
_CHARACTER, _TICKS = 6.8, 34
"""Pixels that a character of a line's name takes, and the tick labels of the next panel."""
_SIDES = (
    ("comprehensiveness_kl", "without the first, KL in nats"),
    ("sufficiency_kl", "with only the first, KL in nats"),
)


def curves(result: Faithfulness) -> go.Figure:
    """KL from the full model when the first experts of a ranking go (top row), or only they stay (bottom row).

    Lines carry 95 % intervals over documents; the grey band holds 95 % of the random sets of all rankings, its line
    their mean. Super experts are in the universe here. Bins are drawn at equal distances.
    """
    from plotly.subplots import make_subplots

    frame = result.frame[(result.frame["super_experts"] == "included") & (result.frame["quantity"] == "bin")]
    own = frame[frame["control"] == "none"]
    modes = list(dict.fromkeys(own["mode"]))
    names = _room(own["ranking"])
    width = _LEFT + len(modes) * (_PANEL + names)
    if not len(own):
        return empty("No ranking was scored", width=width, height=200)
    figure = make_subplots(2, len(modes), horizontal_spacing=names / (width - _LEFT), vertical_spacing=0.1)
    title, subtitle = _titles(result, modes)
    layout(figure, title, subtitle, width=max(width, 560), height=_HEIGHT, left=_LEFT, right=names, above=34)
    for column, mode in enumerate(modes, 1):
        for row, (score, name) in enumerate(_SIDES, 1):
            at: dict[str, Any] = {"row": row, "col": column}
            _band(figure, _drawn(result, mode, "random"), score, at)
            _matched(figure, _drawn(result, mode, "load-matched"), score, at)
            _lines(figure, own[own["mode"] == mode], score, at)
            shares = sorted(set(own["bin"]))
            figure.update_xaxes(
                tickvals=list(range(len(shares))), ticktext=[f"{100 * share:g} %" for share in shares],
                range=[-0.25, len(shares) - 0.75], **at,
            )  # fmt: skip
            if column == 1:
                figure.update_yaxes(title={"text": name, "standoff": 6}, **at)
            figure.update_yaxes(rangemode="tozero", **at)
        left = _subplot(figure, 1, column).xaxis.domain[0]
        figure.add_annotation(
            text=f"<b>{mode}</b>", x=left, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
            yshift=6, showarrow=False, font={"size": 13},
        )  # fmt: skip
        figure.update_xaxes(title=_share_of(own), row=2, col=column)
    return figure


def _room(names: Iterable[str]) -> int:
    """Pixels to the right of a panel for the names of its lines."""
    return round(_CHARACTER * max(map(len, names), default=0)) + _TICKS


def _titles(result: Faithfulness, modes: list[str]) -> tuple[str, str]:
    n = result.frame.loc[result.frame["control"] == "none", "ranking"].nunique()
    better = []
    for mode in modes:
        at = result.gaps
        at = at[(at["mode"] == mode) & (at["quantity"] == "aopc") & (at["super_experts"] == "included")]
        at = at[(at["control"] == "random") & (at["score"] == "comprehensiveness_kl")]
        better.append(f"{int(((at['p'] < 0.05) & (at['low'] > result.noise.kl)).sum())} under {mode}")
    head = f"Of {n} rankings, {' and '.join(better)} beat random sets of experts"
    if not len(result.draws):
        head = f"{n} rankings without a random control"
    return head, (
        f"high is good above, low below; nats per token, {result.n_documents} documents; bars: 95 % over documents"
        "<br>grey: 95 % of random sets with as many experts in each layer, and their mean"
        + ("; dashed outline: range of sets of like load" if (result.draws["control"] == "load-matched").any() else "")
    )


def _share_of(own: pd.DataFrame) -> str:
    what = "gate mass" if own["axis"].iloc[0] == "gate-mass" else "experts"
    return f"share of the {what}" + (" of each layer" if own["universe"].iloc[0] == "per-layer" else "")


def _drawn(result: Faithfulness, mode: str, control: str) -> pd.DataFrame:
    at = result.draws
    at = at[(at["mode"] == mode) & (at["control"] == control) & (at["super_experts"] == "included")]
    return at[at["quantity"] == "bin"]


def _band(figure: go.Figure, drawn: pd.DataFrame, score: str, at: dict[str, Any]) -> None:
    if not len(drawn):
        return
    grouped = drawn.groupby("bin")[score]
    low, high, mean = grouped.quantile(0.025), grouped.quantile(0.975), grouped.mean()
    x = list(range(len(mean)))
    figure.add_scatter(
        x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=faint(MUTED, 0.16), line={"width": 0},
        mode="lines", hoverinfo="skip", **at,
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=mean, mode="lines", line={"color": MUTED, "width": 1.2, "dash": "dot"}, name="random",
        hovertemplate="random %{y:.3f}<extra></extra>", **at,
    )  # fmt: skip


def _matched(figure: go.Figure, drawn: pd.DataFrame, score: str, at: dict[str, Any]) -> None:
    """The range of load-matched sets of all rankings, as an outline: they are too few for quantiles."""
    if not len(drawn):
        return
    grouped = drawn.groupby("bin")[score]
    low, high = grouped.min(), grouped.max()
    x = list(range(len(low)))
    figure.add_scatter(
        x=[*x, *x[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor="rgba(0,0,0,0)", mode="lines",
        line={"color": MUTED, "width": 1, "dash": "dash"}, name="load-matched", hoverinfo="skip", **at,
    )  # fmt: skip


def _lines(figure: go.Figure, own: pd.DataFrame, score: str, at: dict[str, Any]) -> None:
    names = list(dict.fromkeys(own["ranking"]))
    spread_x = 0.06 * (np.arange(len(names)) - (len(names) - 1) / 2)
    ends = []
    for i, name in enumerate(names):
        rows = own[own["ranking"] == name].sort_values("bin")
        y = rows[score].to_numpy(float)
        hue = _HUES[i % len(_HUES)]
        text = [
            f"<b>{name}</b> {100 * share:g} %: {number(value)} [{number(low)}, {number(high)}], {n} experts"
            for share, value, low, high, n in zip(
                rows["bin"], y, rows[f"{score}_low"], rows[f"{score}_high"], rows["n_units"], strict=True
            )
        ]
        figure.add_scatter(
            x=np.arange(len(y)) + spread_x[i], y=y, mode="lines+markers", name=name, text=text,
            line={"color": hue, "width": 2, "dash": _DASHES[i // len(_HUES) % len(_DASHES)]},
            marker={"size": 6, "color": hue}, hovertemplate="%{text}<extra></extra>",
            error_y={"type": "data", "array": rows[f"{score}_high"] - y, "arrayminus": y - rows[f"{score}_low"],
                     "thickness": 1, "width": 0, "color": faint(hue, 0.6)}, **at,
        )  # fmt: skip
        ends.append((name, hue, float(y[-1])))
    highest = max(float(own[f"{score}_high"].max()), float(own[score].max()))
    places = spread([end for *_, end in ends], 0.07 * highest)
    axis = _subplot(figure, at["row"], at["col"])
    for (name, hue, _), y in zip(ends, places, strict=True):
        figure.add_annotation(
            text=name, x=own["bin"].nunique() - 0.78, y=y, xref=axis.xaxis.plotly_name.replace("axis", ""),
            yref=axis.yaxis.plotly_name.replace("axis", ""), xanchor="left", showarrow=False,
            font={"color": hue, "size": 12},
        )  # fmt: skip


_ROUTING = {"load": ("load", BLUE), "gate_mass": ("gate mass", ORANGE), "gate_norm": ("gate × norm", GREEN)}


def alignment(result: Faithfulness) -> go.Figure:
    """Spearman between importance and routing numbers in each layer, a panel for each importance.

    Bars are 95 % intervals over documents of the ranking text. A layer has a line's point only where at least four of
    its experts are visited.
    """
    from plotly.subplots import make_subplots

    frame = result.alignment[result.alignment["layer"].notna() & result.alignment["spearman"].notna()]
    kinds = list(dict.fromkeys(frame["importance"]))
    if not kinds:
        return empty("No layer has enough visited experts to correlate", width=560, height=200)
    layers = sorted(set(frame["layer"].astype(int)))
    panel = max(_PANEL, 26 * len(layers))
    names = _room([name for name, _ in _ROUTING.values()])
    width = _LEFT + len(kinds) * (panel + names)
    figure = make_subplots(1, len(kinds), horizontal_spacing=names / (width - _LEFT), shared_yaxes=True)
    subtitle = (
        "rank correlation of importance with routing, among the visited experts of a layer"
        "<br>bars: 95 % over documents; 0 means that routing says nothing about importance"
    )
    layout(
        figure, _follows(result, kinds[0]), subtitle, width=max(width, 560), height=380, left=_LEFT, right=names,
        above=34,
    )  # fmt: skip
    for column, kind in enumerate(kinds, 1):
        _alignment_lines(figure, frame[frame["importance"] == kind], layers, column)
        left = _subplot(figure, 1, column).xaxis.domain[0]
        figure.add_annotation(
            text=f"<b>importance by {kind.replace('_', ' ')}</b>", x=left, y=1, xref="paper", yref="paper",
            xanchor="left", yanchor="bottom", yshift=6, showarrow=False, font={"size": 13},
        )  # fmt: skip
        every = max(1, len(layers) // 16)
        figure.update_xaxes(
            tickvals=list(range(0, len(layers), every)), ticktext=[f"L{layer}" for layer in layers[::every]],
            range=[-0.4, len(layers) - 0.6], title="layer", row=1, col=column,
        )  # fmt: skip
    lowest = min(0.0, float(np.nanmin(frame[["spearman", "spearman_low"]].to_numpy(float))))
    figure.update_yaxes(range=[max(-1.0, lowest) - 0.05, 1.05], tickvals=[-1, -0.5, 0, 0.5, 1])
    figure.update_yaxes(title={"text": "Spearman", "standoff": 6}, row=1, col=1)
    figure.add_hline(y=0, line={"color": MUTED, "width": 1})
    return figure


def _follows(result: Faithfulness, kind: str) -> str:
    at = result.alignment[result.alignment["layer"].isna() & (result.alignment["importance"] == kind)]
    rows = [row for row in rows_of(at) if np.isfinite(row.spearman)]
    if not rows:
        return "Importance and routing, layer by layer"
    best = max(rows, key=lambda row: abs(row.spearman))
    name = kind.replace("_", " ")
    return f"Importance by {name} correlates {number(best.spearman, '.2f')} with {_ROUTING[best.routing][0]}"


def _alignment_lines(figure: go.Figure, frame: pd.DataFrame, layers: list[int], column: int) -> None:
    ends = []
    for i, (routing, (name, hue)) in enumerate(_ROUTING.items()):
        rows = frame[frame["routing"] == routing].sort_values("layer")
        if not len(rows):
            continue
        y, low, high = (rows[key].to_numpy(float) for key in ("spearman", "spearman_low", "spearman_high"))
        text = [
            f"<b>{name}</b> L{layer}: {number(value, '.2f')} [{number(a, '.2f')}, {number(b, '.2f')}], {n} experts"
            for layer, value, a, b, n in zip(rows["layer"], y, low, high, rows["n_units"], strict=True)
        ]
        figure.add_scatter(
            x=np.array([layers.index(layer) for layer in rows["layer"]]) + 0.08 * (i - 1), y=y, text=text, name=name,
            mode="lines+markers", line={"color": hue, "width": 2}, marker={"size": 6, "color": hue},
            hovertemplate="%{text}<extra></extra>", row=1, col=column,
            error_y={"type": "data", "array": high - y, "arrayminus": y - low, "thickness": 1, "width": 0,
                     "color": faint(hue, 0.6)},
        )  # fmt: skip
        ends.append((name, hue, float(y[-1])))
    axis = _subplot(figure, 1, column)
    for (name, hue, _), y in zip(ends, spread([end for *_, end in ends], 0.08), strict=True):
        figure.add_annotation(
            text=name, x=len(layers) - 0.62, y=y, xref=axis.xaxis.plotly_name.replace("axis", ""),
            yref=axis.yaxis.plotly_name.replace("axis", ""), xanchor="left", showarrow=False,
            font={"color": hue, "size": 12},
        )  # fmt: skip


def _subplot(figure: go.Figure, row: int, column: int) -> Any:
    return figure.get_subplot(row, column)

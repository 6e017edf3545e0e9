"""Mean score of the best probe against the number of neurons it may use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import BadConfig
from moe_lens.plots import (
    MODEL_COLOURS,
    MUTED,
    empty,
    faint,
    layout,
    metric_name,
    number,
    spread,
)
from moe_lens.probing.waterfall import MEAN

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

WIDTH, HEIGHT = 900, 460
NAMES = {"moe": "MoE", "dense": "dense"}
_LEFT, _RIGHT, _BETWEEN, _LABEL = 60, 8, 60, 116  # pixels: margins, between panels, room for the names of lines
_LINES = (("raw", 0.4, 1.4), ("held_out", 1.0, 2.6))  # arm, opacity, width


def against_k(comparison: pd.DataFrame, *, metric: str = "f1_balanced") -> go.Figure:
    """Both models against k on a log axis, with AUROC beside: held out (strong) and raw (faint).

    Args:
        comparison: ``comparison.parquet``; only its rows of concept ``__mean__`` are drawn.

    Bands are 95 % intervals over documents. Dotted is the probe that always says yes (for AUROC, chance). Hatched
    bands hold 95 % of the scores under exchanged labels, with their mean as a thin line; a bar, where there is a null
    at one k only. Does not show whether more neurons carry the concept or only fit it better; from k=2 on only the best
    cells at k=1 were probed, with the true labels and with exchanged ones.

    Raises:
        BadConfig: a metric that was not computed.
    """
    from plotly.subplots import make_subplots

    means = comparison[comparison.concept == MEAN]
    if metric not in set(means.metric):
        raise BadConfig(f"no metric {metric!r} in the comparison: use {', '.join(dict.fromkeys(means.metric))}")
    panels = [name for name in dict.fromkeys((metric, "auroc")) if name in set(means.metric)]
    drawn = means[means.metric.isin(panels) & means.arm.isin(["raw", "held_out"])]
    if not drawn.moe.notna().any():
        return empty("No concept has enough tokens and documents: use a larger corpus.", width=WIDTH, height=HEIGHT)
    plot = WIDTH - _LEFT - _RIGHT
    figure = make_subplots(1, len(panels), horizontal_spacing=_BETWEEN / plot)
    title, subtitle = _titles(means[means.metric == metric])
    if _has_band(means):
        subtitle += "; hatched: labels exchanged"
    layout(figure, title, subtitle, width=WIDTH, height=HEIGHT, left=_LEFT, right=_RIGHT, above=14)
    for column, name in enumerate(panels, 1):
        _panel(figure, means[means.metric == name], name, column, plot / len(panels) - _BETWEEN)
    return figure


def _titles(means: pd.DataFrame) -> tuple[str, str]:
    """What the held-out line says at its two ends, beside what the raw one does."""
    held, raw = (means[means.arm == arm].sort_values("k") for arm in ("held_out", "raw"))
    ends = [0] if len(held) == 1 else [0, -1]
    column = "gap" if held.gap.notna().any() else "moe"
    name = metric_name(means.metric.iloc[0])
    what = f"MoE minus dense in {name} is" if column == "gap" else f"the MoE's best probe has {name}"
    form = "+" if column == "gap" else ".3f"
    at = [f"{number(held[column].iloc[i], form)} at k={held.k.iloc[i]}" for i in ends]
    beside = " and ".join(number(raw[column].iloc[i], form) for i in ends) if len(raw) else "–"
    lines = "strong: cell chosen on other documents (held out); faint: best cell on the test documents (raw)"
    bands = f"{lines}<br>mean over concept groups with 95 % intervals over documents; dotted: no neuron at all"
    return f"Held out, {what} {' and '.join(at)} (raw {beside})", bands


def _panel(figure: go.Figure, means: pd.DataFrame, metric: str, column: int, pixels: float) -> None:
    at: dict[str, Any] = {"row": 1, "col": column}
    ks = sorted(set(means[means.arm == "held_out"].k))
    null = means[means.arm == "null"].sort_values("k")
    ends: list[tuple[str, str, float]] = _null_bands(figure, null, at) if _has_band(means) else []
    for arm, opacity, width in _LINES:
        rows = means[means.arm == arm].sort_values("k")
        for role in NAMES:
            if rows[role].notna().any():
                _line(figure, rows, role, arm, opacity, width, at)
                last = rows[rows[role].notna()].iloc[-1]
                colour = faint(MODEL_COLOURS[role], max(opacity, 0.75))
                ends.append((f"{NAMES[role]} {arm.replace('_', ' ')}", colour, float(last[role])))
    shown = means[means.arm.isin(["raw", "held_out", "null"])][_columns(means)].to_numpy(float)
    ends += _chance(figure, means[means.arm == "held_out"].sort_values("k"), metric, at)
    span = max(math.log10(ks[-1] / ks[0]), 0.6)
    start, end = math.log10(ks[0]) - 0.07 * span, math.log10(ks[-1]) + span * _LABEL / (pixels - _LABEL)
    if not _has_band(means):
        _null_bars(figure, null, 4 * (end - start) / pixels, at)
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    room = 0.06 * (high - low + 1e-3)
    low, high = low - room, high + room
    _name_lines(figure, ends, ks[-1], (high - low) / (HEIGHT - 170), column)
    figure.update_xaxes(
        type="log", tickvals=ks, ticktext=[str(k) for k in ks], title="neurons in the probe, k",
        range=[start, end], **at,
    )  # fmt: skip
    figure.update_yaxes(range=[low, high], tickformat=".2f", title={"text": metric_name(metric), "standoff": 6}, **at)


def _columns(means: pd.DataFrame) -> list[str]:
    every = [f"{role}{end}" for role in NAMES for end in ("", "_low", "_high")]
    return [name for name in (*every, "chance_moe", "chance_dense") if name in means]


def _line(
    figure: go.Figure, rows: pd.DataFrame, role: str, arm: str, opacity: float, width: float, at: dict[str, Any]
) -> None:
    colour, name = MODEL_COLOURS[role], f"{NAMES[role]} {arm.replace('_', ' ')}"
    low, high = rows[f"{role}_low"], rows[f"{role}_high"]
    figure.add_scatter(
        x=[*rows.k, *rows.k[::-1]], y=[*high, *low[::-1]], fill="toself", fillcolor=faint(colour, 0.16 * opacity),
        line={"width": 0}, mode="lines", hoverinfo="skip", name=f"{name} interval", **at,
    )  # fmt: skip
    figure.add_scatter(
        x=rows.k, y=rows[role], mode="lines+markers", name=name, customdata=list(zip(low, high, strict=True)),
        line={"color": faint(colour, opacity), "width": width}, marker={"size": 3 * width**0.5},
        error_y={"type": "data", "array": high - rows[role], "arrayminus": rows[role] - low, "thickness": 1,
                 "visible": len(rows) == 1},
        hovertemplate=f"<b>{name}</b>, k=%{{x}}<br>%{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]"
                      "<extra></extra>", **at,
    )  # fmt: skip


def _chance(figure: go.Figure, rows: pd.DataFrame, metric: str, at: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Dotted; one grey line where it is the same for both models. Returns name, colour and last value of each."""
    ends = []
    sides = {role: rows[f"chance_{role}"] for role in NAMES if rows[f"chance_{role}"].notna().any()}
    text = "chance" if metric == "auroc" else "always positive"
    alike = len(sides) == 2 and (sides["moe"] - sides["dense"]).abs().max() < 5e-4
    for role, values in list(sides.items())[: 1 if alike else 2]:
        shared = alike or len(sides) == 1
        colour, name = (MUTED, text) if shared else (MODEL_COLOURS[role], f"{NAMES[role]} {text}")
        figure.add_scatter(
            x=rows.k, y=values, mode="lines+markers", name=name,
            line={"color": colour, "width": 1.4, "dash": "dot"},
            marker={"symbol": "line-ew-open", "size": 14 if len(rows) == 1 else 0.1},
            hovertemplate=f"<b>{name}</b><br>%{{y:.3f}}<extra></extra>", **at,
        )  # fmt: skip
        ends.append((name, colour, float(values.iloc[-1])))
    return ends


def _has_band(means: pd.DataFrame) -> bool:
    return means.k[means.arm == "null"].nunique() > 1


def _null_bands(figure: go.Figure, rows: pd.DataFrame, at: dict[str, Any]) -> list[tuple[str, str, float]]:
    """What 95 % of exchanges score at each k, hatched, and their mean. Returns name, colour and last mean of each."""
    ends = []
    for role, model in NAMES.items():
        known = rows[rows[f"{role}_low"].notna()]
        if known.empty:
            continue
        colour, name, low, high = MODEL_COLOURS[role], f"{model} null", known[f"{role}_low"], known[f"{role}_high"]
        clear = faint(colour, 0)
        hatch = {"shape": "/", "size": 5, "solidity": 0.25, "fgcolor": colour, "fgopacity": 0.35, "bgcolor": clear}
        figure.add_scatter(
            x=[*known.k, *known.k[::-1]], y=[*high, *low[::-1]], fill="toself", fillpattern=hatch,
            line={"width": 0}, mode="lines", hoverinfo="skip", name=f"{name} band", **at,
        )  # fmt: skip
        figure.add_scatter(
            x=known.k, y=known[role], mode="lines", name=name, customdata=list(zip(low, high, strict=True)),
            line={"color": faint(colour, 0.7), "width": 0.8},
            hovertemplate=f"<b>{name}</b>, labels exchanged, k=%{{x}}<br>mean %{{y:.3f}}, 95 % in "
                          "%{customdata[0]:.3f} to %{customdata[1]:.3f}<extra></extra>", **at,
        )  # fmt: skip
        ends.append((name, faint(colour, 0.75), float(known[role].iloc[-1])))
    return ends


def _null_bars(figure: go.Figure, rows: pd.DataFrame, step: float, at: dict[str, Any]) -> None:
    """A bar for either model, `step` of the log axis to either side of their k."""
    for row in rows.to_dict("records"):
        for side, role in enumerate(NAMES):
            low, high = row.get(f"{role}_low", math.nan), row.get(f"{role}_high", math.nan)
            if math.isfinite(low):
                x, name = row["k"] * 10 ** (step * (2 * side - 1)), f"null {NAMES[role]}"
                figure.add_scatter(
                    x=[x, x], y=[low, high], mode="lines", name=name, line={"color": faint(MODEL_COLOURS[role], 0.45),
                    "width": 6}, hovertemplate=f"<b>{name}</b>, labels exchanged<br>95 % in {number(low)} to "
                    f"{number(high)}<extra></extra>", **at,
                )  # fmt: skip
        tops = [row[f"{role}_high"] for role in NAMES if math.isfinite(row.get(f"{role}_high", math.nan))]
        if tops:
            figure.add_annotation(
                x=math.log10(row["k"]) + 2 * step, y=max(tops), text="null", showarrow=False, xanchor="left",
                yanchor="bottom", font={"size": 11, "color": MUTED}, **at,
            )  # fmt: skip


def _name_lines(figure: go.Figure, ends: list[tuple[str, str, float]], k: int, per_pixel: float, column: int) -> None:
    """The name of each line at its right end, pushed apart where they would overlap."""
    places = spread([y for _, _, y in ends], 14 * per_pixel)
    for (name, colour, _), y in zip(ends, places, strict=True):
        text = f"<b>{name}</b>" if name.endswith("held out") else name
        figure.add_annotation(
            x=math.log10(k), y=y, text=text, showarrow=False, xanchor="left", xshift=8, row=1, col=column,
            font={"size": 11, "color": colour},
        )  # fmt: skip

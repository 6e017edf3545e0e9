"""The figure "where the monosemanticity gap goes" (METRICS 1.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens import plots
from moe_lens.plots import (
    BLUE,
    GROUND,
    INK,
    MUTED,
    ORANGE,
    SKY,
    compact,
    empty,
    faint,
    layout,
    metric_name,
    number,
    rows_of,
)
from moe_lens.probing.waterfall import MEAN, STEP_NAMES, finding, not_removed, one_ladder, verdict

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

WIDTH, HEIGHT = 900, 520
_LEVEL, _UNSORTED = "#6E6E6E", "#9A9A9A"
COLOURS = {"raw": _LEVEL, "search": ORANGE, "reuse": ORANGE, "candidates": ORANGE, "routing": SKY, "left": BLUE}
LABELS = {
    "raw": "raw gap",
    "search": "search among<br>more cells",
    "reuse": "reuse of<br>test data",
    "candidates": "candidates,<br>token counts",
    "routing": "routing",
    "left": "<b>left for<br>the neurons</b>",
}
_BAR, _BAND, _DOTS, _MARK = 0.6, 0.84, 0.24, 0.37  # in distances between bars; dots to either side of the middle
_ROWS = {"cells": ("n_cells_moe", "n_cells_dense"), "tokens": ("n_tokens_moe", "n_tokens_dense"),
         "documents": ("n_documents",)}  # fmt: skip


def waterfall(table: pd.DataFrame, *, metric: str | None = None, k: int | None = None) -> go.Figure:
    """Raw gap on the left, what is left for the neurons on the right, and in between what each step removes.

    Args:
        table: from `probing.waterfall.waterfall`, of one or several metrics and k.
        metric: balanced F1 by default.
        k: the smallest by default.

    A step's dots and hollow marks are drawn where its bar would end for one concept group, or in the reverse order
    of removal; there ``candidates`` hold the search as well, so that its mark stands for both bars together. Dots
    far from all bars are triangles at the edge, with their value on hover. See `probing.waterfall.waterfall` for
    what the numbers do not show.

    Raises:
        BadConfig: a metric or k that the table does not hold.
    """
    import plotly.graph_objects as go

    table = one_ladder(table, metric=metric, k=k)
    if not len(table):
        return empty(finding(table), width=WIDTH, height=HEIGHT)
    bars = _bars(table)
    low, high = _range(table, bars)
    figure = go.Figure()
    _draw_null(figure, table, bars)
    _draw_bars(figure, bars)
    _draw_dots(figure, table, bars, low, high)
    _draw_whiskers(figure, bars)
    _draw_reverse(figure, table, bars)
    _draw_text(figure, table, bars)
    figure.add_hline(y=0, line={"color": INK, "width": 1.2})
    ticks = [_label(step, table) for step in bars.step]
    figure.update_xaxes(
        range=[-0.5, len(bars) - 0.4], tickvals=list(range(len(bars))), ticktext=ticks, tickfont={"size": 12},
        showline=False,
    )  # fmt: skip
    figure.update_yaxes(
        range=[low, high], title={"text": f"gap in {metric_name(bars.metric[0])}", "standoff": 8}, tickformat=".2f"
    )
    return figure


def _bars(table: pd.DataFrame) -> pd.DataFrame:
    """The means of the forward order, with the level before each bar and both ends of its whisker."""
    bars = table[(table.order == "forward") & (table.group == MEAN) & (table.kind != "null")].reset_index(drop=True)
    removed = bars.kind == "removed"
    bars["before"] = bars.after.shift(1).where(removed, 0.0)
    bars["height"] = bars.value.where(~removed, -bars.value)
    bars["whisker_low"] = bars.ci_low.where(~removed, bars.before - bars.ci_high)
    bars["whisker_high"] = bars.ci_high.where(~removed, bars.before - bars.ci_low)
    return bars


def _ends(rows: pd.DataFrame, bars: pd.DataFrame) -> pd.DataFrame:
    """Rows of some steps with the place `x` of their bar and the level `y` at which it would end with their value."""
    place = bars.reset_index(names="x").set_index("step")[["x", "before"]]
    rows = rows.join(place, on="step")
    return rows.assign(y=rows.value.where(rows.kind == "level", rows.before - rows.value))


def _reverse(table: pd.DataFrame, bars: pd.DataFrame) -> pd.DataFrame:
    """Steps of the reverse order at their forward bars; candidates start where the search does."""
    rows = table[(table.order == "reverse") & (table.group == MEAN) & (table.kind == "removed")]
    rows = _ends(rows, bars)
    search = float(bars.loc[bars.step == "search", "value"].sum())
    return rows.assign(y=rows.y + search * (rows.step == "candidates"))


def _range(table: pd.DataFrame, bars: pd.DataFrame) -> tuple[float, float]:
    """All bars, whiskers, marks and the null with room; the dots as far as they do not squash these."""
    null = table[table.kind == "null"]
    core = np.concatenate(
        [
            [0.0], bars.value[bars.kind == "level"], bars.after, bars.whisker_low, bars.whisker_high,
            null.ci_low, null.ci_high, _reverse(table, bars).y,
        ]
    )  # fmt: skip
    low, high = np.nanmin(core), np.nanmax(core)
    room = max(high - low, 1e-3)
    dots = _ends(table[(table.order == "forward") & (table.group != MEAN)], bars).y
    low = min(low - 0.06 * room, max(low - 0.75 * room, dots.min() - 0.06 * room))
    high = max(high + 0.06 * room, min(high + 0.75 * room, dots.max() + 0.06 * room))
    return float(low), float(high)


def _draw_null(figure: go.Figure, table: pd.DataFrame, bars: pd.DataFrame) -> None:
    """On the bar that ends at the held-out gap: the labels were exchanged in that arm."""
    for row in rows_of(table[table.kind == "null"]):
        at = int((bars.step == row.step).to_numpy().argmax())
        low, high = row.ci_low, row.ci_high
        figure.add_bar(
            x=[at], y=[high - low], base=[low], width=_BAND, name="null",
            marker={"color": "rgba(0,0,0,0.07)", "line": {"color": "#AAAAAA", "width": 1}},
            hovertemplate=f"95 % of exchanged labels<br>{number(low, '+')} to {number(high, '+')}<extra></extra>",
        )  # fmt: skip
        figure.add_annotation(
            x=at - _BAND / 2, y=low, text="null", showarrow=False, xanchor="left", yanchor="top",
            font={"size": 10, "color": MUTED},
        )  # fmt: skip


def _draw_bars(figure: go.Figure, bars: pd.DataFrame) -> None:
    """Bars, joined by the level that one leaves to the next."""
    names = _step_names(bars)
    colours = [_UNSORTED if step == "left" and not_removed(bars) else COLOURS[step] for step in bars.step]
    hover = [
        f"<b>{names[r.step]}</b> {number(r.value, '+')} [{number(r.ci_low, '+')}, {number(r.ci_high, '+')}]"
        f"<br>over documents x groups [{number(r.ci_low_groups, '+')}, {number(r.ci_high_groups, '+')}]"
        + (f"<br>{number(r.after, '+')} left" if r.kind == "removed" else "")
        for r in rows_of(bars)
    ]
    figure.add_bar(
        x=list(bars.index), y=bars.height, base=bars.before, width=_BAR, marker={"color": colours}, name="gap",
        hovertext=hover, hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    for i in range(len(bars) - 1):
        x, y = [i + _BAR / 2, i + 1 - _BAR / 2], [bars.after[i]] * 2
        figure.add_shape(type="line", x0=x[0], x1=x[1], y0=y[0], y1=y[1], line={"color": "#999999", "width": 1})


def _draw_whiskers(figure: go.Figure, bars: pd.DataFrame) -> None:
    """In ink, on a wider white one that keeps them apart from the dots."""
    end = bars.before + bars.height
    for colour, thickness, cap in ((GROUND, 5, 7), (INK, 1.8, 6)):
        figure.add_scatter(
            x=list(bars.index), y=end, mode="markers", marker={"size": 0.1}, name="interval", hoverinfo="skip",
            error_y={"type": "data", "array": bars.whisker_high - end, "arrayminus": end - bars.whisker_low,
                     "color": colour, "thickness": thickness, "width": cap},
        )  # fmt: skip


def _draw_dots(figure: go.Figure, table: pd.DataFrame, bars: pd.DataFrame, low: float, high: float) -> None:
    """One dot per concept group and bar."""
    dots = _ends(table[(table.order == "forward") & (table.group != MEAN)], bars)
    turn = dots.groupby("step").cumcount() * 0.618  # golden ratio: neighbours in the table lie far apart
    names = _step_names(bars)
    shown = dots.y.clip(low, high)
    symbols = np.select([dots.y > high, dots.y < low], ["triangle-up", "triangle-down"], "circle")
    text = [
        f"<b>{plots.text_of(r.group)}</b><br>{names[r.step]} {number(r.value, '+')}"
        + (f"<br>{number(r.after, '+')} left" if r.kind == "removed" else "")
        for r in rows_of(dots)
    ]
    figure.add_scatter(
        x=dots.x + _DOTS * (2 * (turn % 1) - 1), y=shown, mode="markers", name="concept groups", hovertext=text,
        hovertemplate="%{hovertext}<extra></extra>", cliponaxis=False,
        marker={"size": 5, "symbol": symbols, "color": faint(INK, 0.4), "line": {"color": GROUND, "width": 0.5}},
    )  # fmt: skip


def _draw_reverse(figure: go.Figure, table: pd.DataFrame, bars: pd.DataFrame) -> None:
    rows = _reverse(table, bars)
    if not len(rows):
        return
    text = [
        f"<b>in the reverse order</b><br>{STEP_NAMES[r.step]}{' and search' if r.step == 'candidates' else ''} "
        f"{number(r.value, '+')} [{number(r.ci_low, '+')}, {number(r.ci_high, '+')}]"
        for r in rows_of(rows)
    ]
    figure.add_scatter(
        x=rows.x + _MARK, y=rows.y, mode="markers", name="reverse order", hovertext=text,
        hovertemplate="%{hovertext}<extra></extra>",
        marker={"symbol": "diamond", "size": 10, "color": GROUND,
                "line": {"color": [COLOURS[step] for step in rows.step], "width": 2}},
    )  # fmt: skip


def _draw_text(figure: go.Figure, table: pd.DataFrame, bars: pd.DataFrame) -> None:
    """Title, the numbers above and the counts below each bar, and the key to the marks."""
    for i, r in enumerate(rows_of(bars)):
        value, ends = (r.height, (r.ci_low, r.ci_high)) if r.kind == "level" else (-r.value, (-r.ci_high, -r.ci_low))
        text = f"<b>{number(value, '+')}</b><br><span style='font-size:10px;color:{MUTED}'>"
        text += f"[{number(ends[0], '+')}, {number(ends[1], '+')}]</span>"
        _note(figure, text, x=i, y=1, yshift=4, yanchor="bottom", font={"size": 14})
    used = {name: columns for name, columns in _ROWS.items() if bars[list(columns)].notna().any(axis=None)}
    for line, (name, columns) in enumerate(used.items()):
        down = {"y": 0, "yshift": -42 - 14 * line, "yanchor": "top", "font": {"size": 11, "color": MUTED}}
        _note(figure, name, x=0, xref="paper", xanchor="right", xshift=-8, **down)
        for i, values in enumerate(bars[list(columns)].to_numpy(float)):
            _note(figure, " | ".join(map(compact, values)), x=i, **down)
    key = _key(table, counted=bool(used))
    bottom = 46 + 14 * len(used)
    _note(figure, key, x=0, xref="paper", xanchor="left", xshift=-67, y=0, yshift=-bottom, yanchor="top", align="left",
          font={"size": 11, "color": MUTED})  # fmt: skip
    layout(figure, _title(bars), _subtitle(bars), width=WIDTH, height=HEIGHT, left=84, right=16, above=40,
           below=bottom + 36, barmode="overlay")  # fmt: skip


def _note(figure: go.Figure, text: str, **place: Any) -> None:
    figure.add_annotation(**{"text": text, "showarrow": False, "yref": "paper"} | place)


def _title(bars: pd.DataFrame) -> str:
    raw, left = (bars[bars.step == step].iloc[0] for step in ("raw", "left"))
    missing = not_removed(bars)
    rest = f"for the neurons, {verdict(left.ci_low, left.ci_high)}"
    if missing:
        rest = "with routing still in it" if missing == ["routing"] else "with token counts and routing still in it"
    values = number(raw.value, "+"), number(left.value, "+")
    return f"Where the monosemanticity gap goes: of {values[0]}, {values[1]} is left {rest}"


def _subtitle(bars: pd.DataFrame) -> str:
    first = bars.iloc[0]
    missing = not_removed(bars)
    parts = [(COLOURS["search"], "due to how it is measured")]
    parts += [] if "routing" in missing else [(COLOURS["routing"], "due to routing")]
    parts += [(_UNSORTED, "not taken apart")] if missing else [(COLOURS["left"], "left for the neurons")]
    squares = " &nbsp; ".join(f"<span style='color:{colour}'>■</span> {text}" for colour, text in parts)
    groups = f"{first.n_groups:.0f} concept groups" if first.n_groups > 1 else "1 concept group"
    name = metric_name(first.metric)
    return (
        f"{name[0].upper()}{name[1:]} of the best k={first.k} probe, MoE minus dense, mean over {groups}<br>{squares}"
    )


def _key(table: pd.DataFrame, *, counted: bool) -> str:
    lines = [["whiskers: 95 % interval over documents", "● concept group"], []]
    if (table.order == "reverse").any():
        lines[0].append("◇ removed in the reverse order (candidates: search included)")
    if (table.kind == "null").any():
        lines[1].append("grey band: 95 % of gaps with labels exchanged, cells chosen on other documents")
    if counted:
        lines[1].append("counts: MoE | dense")
    return "<br>".join(" &nbsp; ".join(line) for line in lines if line)


def _step_names(table: pd.DataFrame) -> dict[str, str]:
    return STEP_NAMES | ({"left": "left"} if not_removed(table) else {})


def _label(step: str, table: pd.DataFrame) -> str:
    if step == "left" and not_removed(table):
        return "<b>left</b>"
    return LABELS[step] if step in ("raw", "left") else f"− {LABELS[step]}"

"""Colours, type and small layout helpers that all figures share.

Hues are those of Okabe & Ito (2008), which stay apart under every common colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

INK, MUTED, RULE, GROUND = "#222222", "#666666", "#DDDDDD", "#FFFFFF"
ORANGE, SKY, GREEN, BLUE, RED, PINK = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
MODEL_COLOURS = {"moe": BLUE, "dense": RED}
NARROW = 700
"""Pixels to which a figure can shrink without losing the end of its title."""
FONT = "Helvetica, Arial, Liberation Sans, sans-serif"
CHARACTER = 0.58
"""Mean width of a bold character, in font sizes."""
_TITLE, _SMALL = 17, 12


METRIC_NAMES = {"f1": "F1", "f1_balanced": "balanced F1", "auroc": "AUROC"}


def layout(
    figure: go.Figure, title: str, subtitle: str = "", *, width: int, height: int,
    left: int = 72, right: int = 24, above: int = 16, below: int = 56, **more: Any,
) -> None:  # fmt: skip
    """Light ground, title and grey lines under it on the left, and the plot below them.

    Args:
        above: pixels between the titles and the plot; `left`, `right` and `below` are the other margins.
    """
    lines = wrap(title, int((min(width, NARROW) - 60) / (_TITLE * CHARACTER)))
    top = 26 + 1.3 * _TITLE * len(lines) + 1.3 * _SMALL * (1 + subtitle.count("<br>"))
    figure.update_layout(
        width=width, height=height, paper_bgcolor=GROUND, plot_bgcolor=GROUND, showlegend=False,
        margin={"l": left, "r": right, "t": top + above, "b": below},
        font={"family": FONT, "size": _SMALL, "color": INK},
        title={"text": f"<b>{'<br>'.join(lines)}</b>", "font": {"size": _TITLE}, "x": 0,
               "subtitle": {"text": subtitle, "font": {"size": _SMALL, "color": MUTED}},
               "xref": "container", "xanchor": "left", "y": 1,
               "yref": "container", "yanchor": "top", "pad": {"l": 20, "t": 26}},
        hoverlabel={"bgcolor": GROUND, "font": {"family": FONT, "size": _SMALL}}, **more,
    )  # fmt: skip
    figure.update_xaxes(showgrid=False, zeroline=False, linecolor=RULE)
    figure.update_yaxes(gridcolor="#EEEEEE", zeroline=False)


def text_of(value: object) -> str:
    """Any text inside plotly's little HTML, which knows ``&lt;`` but not ``&quot;``."""
    return escape(str(value), quote=False)


def empty(message: str, *, width: int, height: int) -> go.Figure:
    """A figure that says why there is nothing to draw."""
    import plotly.graph_objects as go

    figure = go.Figure()
    layout(figure, message, width=width, height=height)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric)


def number(value: float, form: str = ".3f") -> str:
    """The value as text, with a true minus sign; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    return (signed(value) if form == "+" else format(value, form)).replace("-", "−")


def signed(value: float) -> str:
    """Three digits with the sign, none on a zero."""
    text = f"{value:+.3f}"
    return "0.000" if text in ("+0.000", "-0.000") else text


def compact(value: float) -> str:
    """A count in four characters or so."""
    if not math.isfinite(value):
        return "–"
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * scale or (scale > 1e3 and value >= scale):
            return f"{value / scale:.3g}{unit}"
    return f"{value:,.0f}"


def faint(colour: str, opacity: float) -> str:
    """A hex colour as rgba."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def rows_of(frame: pd.DataFrame) -> Iterable[Any]:
    """Rows with their columns as attributes, whose types a checker cannot know."""
    return frame.itertuples()


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the order of `wanted` and as close to it as pushing neighbours apart gets."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[list[int], float]] = []
    for i in order:
        members, centre = [i], wanted[i]
        while blocks and centre - gap * (len(members) - 1) / 2 < _top(blocks[-1], gap) + gap:
            before, _ = blocks.pop()
            members = before + members
            centre = sum(wanted[j] for j in members) / len(members)
        blocks.append((members, centre))
    out = [0.0] * len(wanted)
    for members, centre in blocks:
        for n, i in enumerate(members):
            out[i] = centre + gap * (n - (len(members) - 1) / 2)
    return out


def _top(block: tuple[list[int], float], gap: float) -> float:
    members, centre = block
    return centre + gap * (len(members) - 1) / 2

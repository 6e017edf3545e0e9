"""Two figures of a trial: all labels by routing and need, and one expert's labels, true and false, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens import plots
from moe_lens.causal.trial.claims import REAL
from moe_lens.causal.trial.verdict import DELTA, ROUTING, VERDICT_MODES, Verdict
from moe_lens.plots import BLUE, GREEN, INK, MUTED, ORANGE, RED, SKY, empty, faint, layout, number, rows_of

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.causal.trial.result import Trial

HUES = {
    Verdict.SUPPORTED: GREEN,
    Verdict.ROUTING_ONLY: BLUE,
    Verdict.REFUTED: RED,
    Verdict.UNDECIDED: ORANGE,
    Verdict.UNDERPOWERED: SKY,
}
_SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up")
"""Of the verdicts, for those who see no hues."""
_WIDTH, _HEIGHT = 760, 560
_ROW, _NAMES = 56, 210
"""Pixels: height of a label's row, room for its name."""
_MODE_SHIFT = 0.18
"""Rows from the middle of a label to each of its two modes."""


def verdict_plane(trial: Trial, weakest: pd.DataFrame) -> go.Figure:
    """Routing AUROC on x, the smaller need of the two modes on y; false labels in grey under the true ones.

    Args:
        weakest: one row per label, as `Trial` picks them.

    Bars are 95 % intervals over documents. Needs are drawn by asinh(need / delta): evenly up to what counts as a need,
    by their logarithm beyond. The verdict also asks for both modes, q and enough documents, so a dot in the upper right
    corner need not be supported.
    """
    import plotly.graph_objects as go

    drawn = weakest[weakest["need"].notna() & weakest["auroc_routing"].notna()]
    if not len(drawn):
        return empty("No label has enough tokens for a number", width=_WIDTH, height=200)
    delta = float(trial.settings.get("delta", DELTA))
    squashed = drawn.assign(**{name: np.arcsinh(drawn[name] / delta) for name in ("need", "need_low", "need_high")})
    text = pd.Series([_hover(row) for row in rows_of(drawn)], index=drawn.index)
    is_real = squashed["label_kind"] == REAL
    figure = go.Figure()
    if len(false := squashed[~is_real]):
        figure.add_scatter(
            x=false["auroc_routing"], y=false["need"], mode="markers", name=f"false labels ({len(false)})",
            text=text[~is_real], hovertemplate="%{text}<extra></extra>",
            marker={"color": faint(MUTED, 0.35), "size": 6},
        )  # fmt: skip
    for (verdict, hue), symbol in zip(HUES.items(), _SYMBOLS, strict=True):
        rows = squashed[is_real & (squashed["verdict"] == str(verdict))]
        if len(rows):
            figure.add_scatter(
                x=rows["auroc_routing"], y=rows["need"], mode="markers", name=f"{verdict} ({len(rows)})",
                text=text[rows.index], hovertemplate="%{text}<extra></extra>",
                marker={"color": hue, "size": 10, "symbol": symbol, "line": {"color": "#FFFFFF", "width": 1}},
                error_x=_bar(rows, "auroc_routing", 1, hue), error_y=_bar(rows, "need", 1, hue),
            )  # fmt: skip
    layout(figure, _headline(trial), _subtitle(trial, len(weakest) - len(drawn)), width=_WIDTH, height=_HEIGHT)
    figure.update_layout(showlegend=True, legend={"font": {"color": MUTED}})
    lines: dict[str, Any] = {"line": {"color": MUTED, "dash": "dot", "width": 1}}
    figure.add_hline(y=float(np.arcsinh(1)), **lines)
    figure.add_vline(x=ROUTING, **lines)
    figure.update_xaxes(title="AUROC of the label for its expert's visits")
    figure.update_yaxes(title="need, mnat per token", **_ticks(squashed["need"], delta))
    return figure


def _ticks(squashed: pd.Series, delta: float) -> dict[str, Any]:
    """Ticks in mnat of an asinh axis: 0, what counts as a need, and 1, 2, 5 times powers of ten beyond it."""
    largest = float(np.sinh(squashed.abs().max())) * delta
    steps = [step * 10.0**power for power in range(-6, 4) for step in (1, 2, 5)]
    ups = [delta, *(step for step in steps if 1.9 * delta < step <= 1.5 * largest)]
    values = [*(-up for up in reversed(ups)), 0.0, *ups]
    return {
        "tickvals": [float(np.arcsinh(value / delta)) for value in values],
        "ticktext": [number(round(1000 * value, 6), ",.10g") for value in values],
    }


def _headline(trial: Trial) -> str:
    verdicts = trial.verdicts["verdict"]
    n = int((verdicts == str(Verdict.SUPPORTED)).sum())
    return f"{n} of {len(verdicts)} labels say where their expert is visited and needed"


def _subtitle(trial: Trial, n_missing: int) -> str:
    summary = trial.summary()
    false = summary[(summary["label_kind"] != REAL) & (summary["verdict"] == str(Verdict.SUPPORTED))]
    total = int(summary.loc[summary["label_kind"] != REAL, "n"].sum())
    said = f"Of {total} false labels (grey) {int(false['n'].sum())} are supported. " if total else ""
    said += "Dotted: what support asks for. Bars: 95 % over documents."
    return said + (
        f"<br>{n_missing} without a number {'is' if n_missing == 1 else 'are'} left out." if n_missing else ""
    )


def _bar(rows: pd.DataFrame, name: str, scale: float, hue: str) -> dict[str, Any]:
    value, low, high = (scale * rows[f"{name}{end}"] for end in ("", "_low", "_high"))
    return {
        "type": "data", "array": high - value, "arrayminus": value - low,
        "thickness": 1, "width": 0, "color": faint(hue, 0.45),
    }  # fmt: skip


def _hover(row: Any) -> str:
    kind = "" if row.label_kind == REAL else f" {row.label_kind}"
    label = "<br>".join(map(plots.text_of, wrap(str(row.label), 60)))
    need = f"need {number(1000 * row.need, '.0f')} mnat [{number(1000 * row.need_low, '.0f')}, "
    need += f"{number(1000 * row.need_high, '.0f')}] under {row.mode}"
    routing = f"routing {number(row.auroc_routing, '.2f')} [{number(row.auroc_routing_low, '.2f')}, "
    routing += f"{number(row.auroc_routing_high, '.2f')}]"
    return f"<b>L{row.layer}.E{row.expert}</b>{kind}: {label}<br>{row.verdict}<br>{need}<br>{routing}"


def one_expert(trial: Trial, rows: pd.DataFrame) -> go.Figure:
    """An expert's labels, a row each: need inside and outside the label, against matched experts, and its routing.

    Args:
        rows: of `Trial.frame`, all of one expert.

    Left: need at visits that the label marks (filled) and at the others (open); the open dot's bar is the interval of
    the difference, so it misses the filled dot where the need is surely larger inside. Middle, if experts of like load
    were measured: contrast of the effect between marked and other tokens, of this expert (filled) and their mean
    (open). Right: AUROC of the label for the visits. Upper and lower marks of a row are the modes that have a vote.
    """
    from plotly.subplots import make_subplots

    rows = rows[rows["mode"].isin(VERDICT_MODES)]
    keys = rows[["label_kind", "facet", "label", "verdict"]].drop_duplicates(["label_kind", "facet"])
    keys = keys.sort_values("label_kind", key=lambda kind: kind != REAL, kind="stable", ignore_index=True)
    places = {(row.label_kind, row.facet): len(keys) - 1.0 - i for i, row in enumerate(rows_of(keys))}
    height = np.array([places[row.label_kind, row.facet] for row in rows_of(rows)])
    modes = list(dict.fromkeys(rows["mode"]))
    panels = [_NEED, *([_MATCHED] if rows["specificity"].notna().any() else []), _VISITS]
    figure = make_subplots(
        1, len(panels), shared_yaxes=True, horizontal_spacing=0.05, column_widths=_WIDTHS[len(panels)]
    )
    layout(
        figure, _verdict_of(rows), _key(modes, panels), width=980, height=210 + _ROW * len(keys), left=_NAMES, above=12
    )
    figure.update_yaxes(
        tickvals=list(places.values()), ticktext=[_name(row) for row in rows_of(keys)], col=1,
        range=[-0.6, len(keys) - 0.4],
    )  # fmt: skip
    inside = rows.assign(
        outside=rows["need"] - rows["exclusivity"], outside_low=rows["need"] - rows["exclusivity_high"],
        outside_high=rows["need"] - rows["exclusivity_low"], matched=rows["contrast"] - rows["specificity"],
    )  # fmt: skip
    for column, panel in enumerate(panels, 1):
        for i, mode in enumerate(modes if panel is not _VISITS else modes[:1]):
            at = (rows["mode"] == mode).to_numpy()
            shift = _MODE_SHIFT * (len(modes) - 1 - 2 * i) if panel is not _VISITS else 0.0
            for is_real, hue in ((True, BLUE), (False, MUTED)):
                chosen = at & ((rows["label_kind"] == REAL) == is_real).to_numpy()
                for name, lower in panel.dots:
                    y = height[chosen] + shift - lower
                    _dots(figure, inside[chosen], y, name, panel.scale, hue, column=column, mode=mode)
        edge = 1000 * float(trial.settings.get("delta", DELTA)) if panel is _NEED else panel.edge
        line: dict[str, Any] = {"line": {"color": MUTED, "dash": "dot", "width": 1}, "row": 1, "col": column}
        figure.add_vline(x=edge, **line)
        figure.update_xaxes(title=panel.title, row=1, col=column)
    return figure


@dataclass(frozen=True)
class _Panel:
    title: str
    scale: float
    edge: float
    """Where the dotted line stands."""
    dots: tuple[tuple[str, float], ...]
    """Columns, and how many rows lower each is drawn; those after the first are open dots."""


_NEED = _Panel("need, mnat per token", 1000, np.nan, (("need", -0.06), ("outside", 0.06)))
_MATCHED = _Panel("contrast, mnat per token", 1000, 0, (("contrast", -0.06), ("matched", 0.06)))
_VISITS = _Panel("routing AUROC", 1, ROUTING, (("auroc_routing", 0),))
_WIDTHS = {2: [0.62, 0.38], 3: [0.42, 0.31, 0.27]}
_OPEN = ("outside", "matched")


def _key(modes: list[str], panels: list[_Panel]) -> str:
    said = f"Filled: at the label's tokens; open: at the expert's other visits. Upper marks {modes[0]}"
    said += f", lower marks {modes[-1]}. Bars: 95 % over documents.<br>"
    if _MATCHED in panels:
        return said + "Contrast: effect at the label's tokens minus at others; open: mean of experts of like load."
    return said + "No expert of like load was measured beside it; --matched layer measures all of the layer."


def _dots(
    figure: go.Figure, rows: pd.DataFrame, y: Float[ndarray, "label"], name: str, scale: float, hue: str, *,
    column: int, mode: str,
) -> None:  # fmt: skip
    bar = _bar(rows, name, scale, hue) if f"{name}_low" in rows else None
    figure.add_scatter(
        x=scale * rows[name], y=y, mode="markers", error_x=bar, row=1, col=column,
        marker={"size": 9, "color": "#FFFFFF" if name in _OPEN else hue, "line": {"color": hue, "width": 1.5}},
        hovertemplate=f"{name}, {mode}: %{{x:.3g}}<extra></extra>",
    )  # fmt: skip


def _verdict_of(rows: pd.DataFrame) -> str:
    real = rows[rows["label_kind"] == REAL].drop_duplicates("facet")
    where = f"L{rows['layer'].iloc[0]}.E{rows['expert'].iloc[0]}"
    said = "; ".join(f"“{plots.text_of(_short(row.label))}” is {row.verdict}" for row in rows_of(real))
    return f"{where}: {said or 'no label of its own'}"


def _short(label: str, width: int = 60) -> str:
    return label if len(label) <= width else label[: width - 1].rstrip() + "…"


def _name(row: Any) -> str:
    head = "its label" if row.label_kind == REAL else row.label_kind
    facet = f" {row.facet}" if row.facet else ""
    hue = INK if row.label_kind == REAL else MUTED
    first = plots.text_of(_short(str(row.label), 28))
    return f"<span style='color:{hue}'><b>{head}{facet}</b>: {row.verdict}<br>{first}</span>"

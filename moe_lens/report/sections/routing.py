"""Where tokens go: load and entropy per layer, experts by domain, experts chosen together."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from moe_lens import plots
from moe_lens.report.missing import command
from moe_lens.report.parts import Figure, Missing, Part, Section

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_AROUND_ONE = [[0, plots.RED], [0.5, "#f4f4f2"], [1, plots.BLUE]]
_COLUMNS = [
    "layer", "expert", "n_tokens", "load", "load_share", "gate_mass", "mean_weight", "output_norm", "weighted_norm",
    "n_documents", "router_entropy", "router_margin", "load_entropy", "load_cv",
]  # fmt: skip
_TICKS = {"tickvals": [-3, -1, 0, 1, 3], "ticktext": ["⅛", "½", "1", "2", "8"]}
_FEW, _FEW_TICKS = 8, {"tickvals": [-3, 0, 3], "ticktext": ["⅛", "1", "8"]}
"""Rows up to which a colour bar is too low for five ticks."""
_VALUES = 30
"""Values of a field on one heat map, those with most documents."""


def section(run: Run, say: Claims) -> Section:
    """Load, entropy, domains and co-activation, of which the run has all or none."""
    if not run.has("routing"):
        missing = Missing("Routing", command(run, "probe"))
        return Section("routing", "Routing", "", (missing,))
    routing = say.table("routing")
    routed = routing[routing["role"] == "moe"]
    parts: list[Part] = [_load(routed)]
    if run.has("routing_fields") and len(say.table("routing_fields")):
        parts += [_by_field(say.table("routing_fields"), name) for name in ("domain", "kind")]
        parts = [part for part in parts if not isinstance(part, Figure) or len(part.rows)]
    elif not run.has("routing_fields"):
        parts.append(Missing("Experts by domain", command(run, "probe")))
    if run.has("coactivation") and len(say.table("coactivation")):
        parts.append(_together(say.table("coactivation")))
    elif not run.has("coactivation"):
        parts.append(Missing("Experts chosen together", command(run, "probe")))
    where = {"role": "moe"}
    lead = Markup(
        "{} experts in {} layers. The busiest gets {} visits a token, the least busy {}; within a layer loads vary by "
        "{} to {} of their mean (coefficient of variation). Where tokens go does not say what an expert does with them."
    ).format(
        say.count("routing", where=where, distinct=("layer", "expert")),
        say.count("routing", where=where, distinct=("layer",)),
        say.of("max", "routing", "load_share", where=where),
        say.of("min", "routing", "load_share", where=where),
        say.of("min", "routing", "load_cv", where=where, form=".2f"),
        say.of("max", "routing", "load_cv", where=where, form=".2f"),
    )
    return Section("routing", "Routing", lead, tuple(parts))


def _load(routed: pd.DataFrame) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    even = routed.groupby("layer")["load_share"].transform("mean")
    figure.add_scatter(
        x=routed["layer"], y=routed["load_share"] / even, mode="markers", customdata=_addresses(routed),
        hovertemplate="%{customdata}: %{y:.2f} × even load<extra></extra>",
        marker={"color": plots.BLUE, "size": 7, "opacity": 0.65},
    )  # fmt: skip
    by_layer = routed.drop_duplicates("layer")
    figure.add_scatter(
        x=by_layer["layer"], y=by_layer["load_entropy"] / np.log(routed.groupby("layer").size().to_numpy()),
        mode="lines+markers", name="entropy", line={"color": plots.RED}, yaxis="y2",
        hovertemplate="layer %{x}: load entropy %{y:.3f} of the largest<extra></extra>",
    )  # fmt: skip
    title = "Load of every expert, and how even each layer is"
    subtitle = "Dots, left axis: visits over those of an even router. Line, right axis: entropy of the load, 1 if even."
    plots.layout(figure, title, subtitle, width=860, height=380, right=72)
    right = {"overlaying": "y", "side": "right", "title": "load entropy / largest", "range": [0, 1.05]}
    figure.update_layout(yaxis2={**right, "showgrid": False, "tickvals": [0, 0.25, 0.5, 0.75, 1]})
    figure.update_xaxes(title="layer", dtick=1 if routed["layer"].nunique() < 25 else None)
    figure.update_yaxes(title="visits / even load", rangemode="tozero", selector=0)
    return Figure.of("routing-load", figure, rows=routed[_COLUMNS], source="routing.parquet")


def _by_field(fields: pd.DataFrame, name: str) -> Figure:
    rows = fields[fields["field"] == name]
    if not len(rows):
        return Figure(f"routing-{name}", "", "", {}, rows, "")
    most = rows.drop_duplicates("value").nlargest(_VALUES, "n_documents")["value"]
    shown = rows[rows["value"].isin(most)]
    n = rows["value"].nunique()
    figures = {f"layer {layer}": _heat(part, name, n) for layer, part in shown.groupby("layer")}
    made = {at: Figure.of(f"routing-{name}", figure, rows=rows, source="routing_fields.parquet")
            for at, figure in figures.items()}  # fmt: skip
    first = next(iter(made.values()))
    choices = {at: one.plot for at, one in made.items()} if len(made) > 1 else None
    return Figure(first.id, first.title, first.subtitle, first.plot, rows, first.source, choices, "layer")


def _heat(rows: pd.DataFrame, name: str, n: int) -> go.Figure:
    import plotly.graph_objects as go

    lift = rows.pivot(index="value", columns="expert", values="lift")
    share = rows.pivot(index="value", columns="expert", values="share").loc[lift.index, lift.columns]
    order = lift.to_numpy().argmax(axis=1).argsort(kind="stable")[::-1]
    figure = go.Figure(
        go.Heatmap(
            z=np.log2(np.clip(lift.to_numpy()[order], 1 / 8, 8)), x=[f"E{e}" for e in lift.columns],
            y=[escape(value, quote=False) for value in lift.index[order]],
            customdata=np.dstack([lift.to_numpy()[order], share.to_numpy()[order]]),
            colorscale=_AROUND_ONE, zmid=0, zmin=-3, zmax=3,
            hovertemplate=f"{name} %{{y}}, %{{x}}: %{{customdata[1]:.1%}} of its tokens, "
                          "%{customdata[0]:.2f} × the share of all tokens<extra></extra>",
            colorbar={"title": "× share", "thickness": 12, **(_TICKS if len(lift) > _FEW else _FEW_TICKS)},
        )
    )  # fmt: skip
    title = f"Experts by {name}"
    subtitle = (
        f"How much more often tokens of a {name} visit an expert than tokens of the whole text do. Rows are in order "
        "of the expert that stands out most; few documents make large ratios."
    )
    if len(lift) < n:
        subtitle += f"<br>The {len(lift)} with most documents of {n}; the download has them all."
    height = 150 + 19 * len(lift)
    plots.layout(figure, title, subtitle, width=860, height=height, left=150)
    figure.update_xaxes(title="expert")
    figure.update_yaxes(title={"text": name, "standoff": 6}, showgrid=False)
    return figure


def _together(pairs: pd.DataFrame) -> Figure:
    figures = {}
    for layer, rows in pairs.groupby("layer"):
        figures[f"layer {layer}"] = Figure.of(
            "routing-together", _pair_heat(rows), rows=pairs, source="coactivation.parquet"
        )
    first = next(iter(figures.values()))
    choices = {at: one.plot for at, one in figures.items()} if len(figures) > 1 else None
    return Figure(first.id, first.title, first.subtitle, first.plot, pairs, first.source, choices, "layer")


def _pair_heat(rows: pd.DataFrame) -> go.Figure:
    import plotly.graph_objects as go

    n = int(rows[["expert", "other"]].max().max()) + 1
    grid: Any = np.full((n, n), np.nan)
    grid[rows["expert"], rows["other"]] = grid[rows["other"], rows["expert"]] = rows["lift"] / rows["lift_null"]
    names = [f"E{e}" for e in range(n)]
    with np.errstate(divide="ignore"):
        shade = np.clip(np.log2(grid), -3, 3)
    figure = go.Figure(
        go.Heatmap(
            z=shade, x=names, y=names, customdata=grid, colorscale=_AROUND_ONE, zmid=0, zmin=-3, zmax=3,
            hovertemplate="%{y} with %{x}: %{customdata:.2f} × chance<extra></extra>",
            colorbar={"title": "× chance", "thickness": 12, **_TICKS},
        )
    )  # fmt: skip
    subtitle = (
        "Tokens that visit both experts, over what routing without any preference gives (drawn without replacement). "
        "Experts that go together need not do the same thing."
    )
    plots.layout(figure, "Experts chosen together", subtitle, width=620, height=560, left=64)
    figure.update_xaxes(title="expert", constrain="domain")
    figure.update_yaxes(title="expert", autorange="reversed", scaleanchor="x", constrain="domain", showgrid=False)
    return figure


def _addresses(rows: pd.DataFrame) -> list[str]:
    return [f"L{layer}.E{expert}" for layer, expert in zip(rows["layer"], rows["expert"], strict=True)]

"""Two panels: what each arm scores, and how far each push moves the next token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_lens import plots
from moe_lens.causal.steering.result import STEERED
from moe_lens.models.edits.steered import FULL

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.causal.steering.result import Steering


def arms_and_strengths(found: Steering) -> go.Figure:
    """Change of the score by arm, a dot per prompt and a bar at the mean; KL against strength, a line per arm.

    Without a target there is the second panel only. The utmost push stands at the right edge, at `FULL` logits.
    """
    from plotly.subplots import make_subplots

    n = 2 if found.is_scored else 1
    figure = make_subplots(rows=1, cols=n, horizontal_spacing=0.14)
    addresses = found.summary().set_index("arm")["address"]
    if found.is_scored:
        _scores(figure, found)
    for arm in reversed(found.changes.index):  # the steered line on top
        line = found.curve[found.curve["arm"] == arm].sort_values("strength")
        figure.add_scatter(
            x=np.minimum(line["strength"], FULL), y=line["kl"], mode="lines+markers", row=1, col=n,
            marker={"size": 5}, line={"color": _colour(arm)}, name=arm,
            text=[f"{arm}: {addresses[arm]}<br>{kl:.3f} nats" for kl in line["kl"]], hoverinfo="text",
        )  # fmt: skip
    if found.settings["kl"] is not None:
        figure.add_hline(y=found.settings["kl"], line={"color": plots.MUTED, "dash": "dot"}, row=1, col=n)  # pyright: ignore[reportArgumentType]
    plots.layout(figure, f"Steering: {found.direction}", _grey(found), width=480 * n, height=420, below=90)
    figure.update_xaxes(title="largest bias on router logits", type="log", row=1, col=n)
    figure.update_yaxes(title="KL(clean || arm) of the next token, nats", row=1, col=n)
    return figure


def _scores(figure: go.Figure, found: Steering) -> None:
    for arm, changes in found.changes.iterrows():
        values = changes.to_numpy(float)
        text = [f"prompt {number}: {value:+.3f}" for number, value in enumerate(values)]
        figure.add_scatter(
            x=[arm] * len(values), y=values, mode="markers", row=1, col=1, text=text, hoverinfo="text",
            marker={"color": plots.faint(_colour(str(arm)), 0.4), "size": 7},
        )  # fmt: skip
        figure.add_scatter(
            x=[arm], y=[values.mean()], mode="markers", row=1, col=1, hoverinfo="y",
            marker={"symbol": "line-ew", "size": 26, "line": {"width": 3, "color": _colour(str(arm))}},
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": plots.RULE}, row=1, col=1)  # pyright: ignore[reportArgumentType]
    unit = "log p of the target" if found.settings["target_text"] is not None else "share of text in matches"
    figure.update_yaxes(title=f"{unit}, arm − clean", row=1, col=1)


def _colour(arm: str) -> str:
    return plots.RED if arm == STEERED else plots.BLUE


def _grey(found: Steering) -> str:
    """The finding, a clause a line."""
    return found.finding().replace("; ", "<br>")

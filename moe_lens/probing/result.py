"""``Probes``: the frozen result of one probing run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.errors import BadConfig
from moe_lens.probing.arms import LADDER, METRICS, usable, winners
from moe_lens.probing.compare import MEAN

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.capture.run import Run


@dataclass(frozen=True, repr=False)
class Probes:
    """Probes of every cell, and the arms of the comparison.

    ``cells`` is probe.parquet, ``comparison`` is comparison.parquet, ``run`` the directory they were written
    to, if any.
    """

    cells: pd.DataFrame
    comparison: pd.DataFrame
    run: Run | None = None

    @property
    def frame(self) -> pd.DataFrame:
        """The cells."""
        return self.cells

    @property
    def has_baseline(self) -> bool:
        return self.cells[["model", "role"]].drop_duplicates().shape[0] > 1

    def arms(self, *, metric: str = "f1", k: int | None = None) -> pd.DataFrame:
        """Mean over concepts of every arm that was run, in the order of METRICS 1.3.

        Args:
            k: the smallest by default.

        Raises:
            BadConfig: a metric or k that was not computed.
        """
        table = self.comparison
        k = int(table.k.min()) if k is None else k
        if metric not in METRICS or k not in set(table.k):
            raise BadConfig(f"no arm with metric {metric!r} and k {k}: metrics {METRICS}, k {sorted(set(table.k))}")
        chosen = table[(table.concept == MEAN) & (table.metric == metric) & (table.k == k)]
        return chosen.sort_values("arm", key=lambda arm: arm.map(LADDER.index), ignore_index=True)

    def best(self, *, arm: str = "held_out", k: int = 1, metric: str = "f1") -> pd.DataFrame:
        """Best cell and neurons per (role, concept): which expert's neuron carries which concept.

        Sorted by AUROC. ``f1_always_positive`` is what class balance alone gives in that cell.
        """
        first = self.cells[(self.cells.seed == self.cells.seed.min()) & (self.cells.k == k)]
        parts = [winners(group, arm, metric) for _, group in first.groupby(["model", "role"], sort=False)]
        table = pd.concat(parts).sort_values(["role", "auroc"], ascending=[False, False], ignore_index=True)
        address = [f"L{a}.E{b}" for a, b in zip(table.layer, table.expert, strict=True)]
        table.insert(2, "address", address)
        return table

    def summary(self) -> dict[str, Any]:
        """Headline numbers as plain JSON values; NaN becomes None."""
        k = int(self.comparison.k.min())
        arms = {}
        for row in self.comparison[(self.comparison.concept == MEAN) & (self.comparison.k == k)].itertuples():
            fields = ["moe", "dense", "gap", "ci_low", "ci_high", "chance_moe", "chance_dense"]
            if row.arm == "homogeneous":
                fields += ["one_cell_moe", "one_cell_dense"]
            arms.setdefault(row.arm, {})[row.metric] = {name: _plain(getattr(row, name)) for name in fields}
        counts = self.cells.status.value_counts().to_dict()
        models = self.cells[["role", "model"]].drop_duplicates()
        return {
            "models": dict(zip(models.role, models.model, strict=True)),
            "k": k,
            "arms": arms,
            "n_concepts_scored": int(usable(self.cells).concept.nunique()),
            "n_concepts": int(self.cells.concept.nunique()),
            "probes_by_status": {str(name): int(n) for name, n in counts.items()},
            "run": str(self.run.path) if self.run else None,
        }

    def finding(self) -> str:
        """The comparison in plain English: the raw gap, and what each arm leaves of it. Never raw alone."""
        k = int(self.comparison.k.min())
        f1: dict[Any, Any] = {row.arm: row for row in self.arms(metric="f1", k=k).itertuples()}
        raw, held = f1["raw"], f1["held_out"]
        if math.isnan(held.moe):
            return f"No concept has enough tokens and documents to score a k={k} probe: use a larger corpus."
        if self.has_baseline and math.isnan(held.gap):
            return "The two models share no concept with enough tokens to compare: use a larger corpus."
        alike, routed = f1.get("homogeneous"), f1.get("routing_only")
        parts = [_raw_gap(k, raw)] if self.has_baseline else [_own_score(k, held)]
        if not self.has_baseline:
            parts.append(f"chosen on the test data it would read {raw.moe:.3f}")
            if alike is not None:
                parts[-1] += f", and {alike.moe:.3f} if all cells were alike"
        elif alike is not None:
            parts.append(_search(alike))
        if self.has_baseline:
            parts.append(_held_out(held))
        if routed is not None:
            auroc = {row.arm: row for row in self.arms(metric="auroc", k=k).itertuples()}["routing_only"]
            parts.append(
                f"routing alone, without any neuron, reaches AUROC {auroc.moe:.3f} and, over all tokens, "
                f"F1 {routed.moe:.3f} ({routed.chance_moe:.3f} by always saying yes)"
            )
        if self.has_baseline:
            parts.append(
                f"the MoE still searches {held.n_cells_moe} cells against {held.n_cells_dense}, so this does "
                f"not show that its neurons are cleaner"
            )
        return "; ".join(parts) + "."

    def plot(self, *, arm: str = "held_out", metric: str = "f1", k: int = 1) -> go.Figure:
        """Per-concept scatter, dense against MoE (or F1 against the always-positive F1 without a baseline)."""
        import plotly.graph_objects as go

        table = self.comparison
        chosen = table[(table.arm == arm) & (table.metric == metric) & (table.k == k) & (table.concept != MEAN)]
        chosen = chosen[chosen.status == "ok"]
        x = chosen.dense if self.has_baseline else chosen.chance_moe
        label = "dense baseline" if self.has_baseline else "probe without a neuron"
        hover = "%{text}<br>x %{x:.3f}<br>MoE %{y:.3f}<extra></extra>"
        figure = go.Figure(go.Scatter(x=x, y=chosen.moe, mode="markers", text=chosen.concept, hovertemplate=hover))
        figure.add_shape(type="line", x0=0, y0=0, x1=1, y1=1, line={"dash": "dot", "color": "grey"})
        figure.update_layout(
            title=f"Best k={k} probe per concept, {arm.replace('_', ' ')} {metric}",
            xaxis_title=f"{metric} of the {label}", yaxis_title=f"{metric} of the MoE", width=620, height=560,
        )  # fmt: skip
        return figure

    def __repr__(self) -> str:
        return f"Probes({len(self.cells)} probes, {self.cells.concept.nunique()} concepts)\n{self.finding()}"

    def _repr_html_(self) -> str:
        from html import escape

        columns = ["arm", "metric", "k", "moe", "dense", "gap", "ci_low", "ci_high", "chance_moe", "chance_dense"]
        table = self.arms(metric="f1")[columns].to_html(index=False, float_format=lambda v: f"{v:.3f}", border=0)
        return f"<p>{escape(self.finding())}</p>{table}"


def _raw_gap(k: int, raw: Any) -> str:
    return f"Raw k={k} F1 gap, MoE minus dense: {raw.gap:+.3f} [{raw.ci_low:+.3f}, {raw.ci_high:+.3f}]"


def _own_score(k: int, held: Any) -> str:
    return (
        f"Best k={k} neuron per concept, held out: mean F1 {held.moe:.3f} [{held.moe_low:.3f}, {held.moe_high:.3f}] "
        f"(always-positive {held.chance_moe:.3f})"
    )


def _search(alike: Any) -> str:
    """The gap between cells that are all alike, and the part of it that exists only because the best is taken."""
    lift = (alike.moe - alike.one_cell_moe) - (alike.dense - alike.one_cell_dense)
    return (
        f"if all cells of a model were alike the same search would still show {alike.gap:+.3f} "
        f"({lift:+.3f} of it by picking the best cell)"
    )


def _held_out(held: Any) -> str:
    verdict = "above" if held.ci_low > 0 else "below" if held.ci_high < 0 else "not distinguishable from"
    return (
        f"with the cell chosen on other documents {held.gap:+.3f} [{held.ci_low:+.3f}, {held.ci_high:+.3f}] is left, "
        f"{verdict} zero"
    )


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)

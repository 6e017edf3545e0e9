"""``Probes``: the frozen result of one probing run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.capture.store import replacing
from moe_lens.errors import BadConfig
from moe_lens.probing.arms import LADDER, METRICS, usable, winners
from moe_lens.probing.compare import MEAN
from moe_lens.probing.polysemanticity import Polysemanticity
from moe_lens.probing.waterfall import finding
from moe_lens.types import Granularity

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.capture.run import Run


@dataclass(frozen=True, repr=False)
class Probes:
    """Probes of every cell, the arms of the comparison, and where the gap between the models goes.

    ``cells`` is probe.parquet, ``comparison`` comparison.parquet, ``steps`` waterfall.parquet (empty without a
    baseline), ``neurons`` the concept groups that single neurons serve (None if not asked for), ``run`` the directory
    they were written to, if any.
    """

    cells: pd.DataFrame
    comparison: pd.DataFrame
    steps: pd.DataFrame = field(default_factory=pd.DataFrame)
    neurons: Polysemanticity | None = None
    run: Run | None = None

    @classmethod
    def of(cls, run: Run) -> Probes:
        """Read the result of a finished run back.

        Raises:
            BadOutput: the run holds no probes.
        """
        steps = run.frame("waterfall") if run.has("waterfall") else pd.DataFrame()
        neurons = None
        if run.has("neuron_layers"):
            neurons = Polysemanticity(run.frame("neurons"), run.frame("neuron_layers"))
        return cls(run.frame("probe"), run.frame("comparison"), steps, neurons, run)

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
        """The comparison in one sentence: the raw gap, and what each step leaves of it. Never raw alone."""
        k = int(self.comparison.k.min())
        if (nothing := self._nothing()) is not None:
            return nothing
        return finding(self.steps, k=k) if len(self.steps) else _own_score(k, self._arms_of("f1_balanced"))

    def findings(self) -> list[str]:
        """`finding`, then what routing gives without a neuron, then what the same search finds in exchanged labels."""
        said = [self.finding()]
        if self._nothing() is not None:
            return said
        auroc = self._arms_of("auroc")
        if (routed := auroc.get("routing_only")) is not None:
            said.append(
                f"Routing alone, without any neuron, reaches AUROC {routed.moe:.3f} over all tokens"
                + self._beside(auroc)
            )
        if (null := auroc.get("null")) is not None:
            said.append(self._against_null(null))
        return said

    def _nothing(self) -> str | None:
        """Why there is nothing to say, None if there is."""
        held = self._arms_of("f1_balanced")["held_out"]
        if math.isnan(held.moe):
            return f"No concept has enough tokens and documents to score a k={held.k} probe: use a larger corpus."
        if self.has_baseline and math.isnan(held.gap):
            return "The two models share no concept with enough tokens to compare: use a larger corpus."
        return None

    def _arms_of(self, metric: str) -> dict[Any, Any]:
        """Rows of the smallest k by arm."""
        return {row.arm: row for row in self.arms(metric=metric).itertuples()}

    def _beside(self, auroc: dict[Any, Any]) -> str:
        """What neurons add to routing, over all tokens."""
        whole = auroc.get("whole_population")
        if whole is None or math.isnan(whole.moe):
            return "."
        dense = f" (dense: {whole.dense:.3f}, from .5)" if self.has_baseline else ""
        return f"; with the best neuron on top {whole.moe:.3f}{dense}."

    def _against_null(self, mean: Any) -> str:
        """How many concepts beat their null; those that are functions of the token type are left out (see `nulls`)."""
        types = set(self.cells.concept[self.cells.granularity == Granularity.TYPE.value])
        rows = self.comparison[(self.comparison.arm == "null") & (self.comparison.metric == "auroc")]
        rows = rows[(rows.concept != MEAN) & (rows.k == mean.k) & rows.q_value.notna() & ~rows.concept.isin(types)]
        n = int((rows.q_value <= 0.05).sum())
        tested = f"; {n} of {len(rows)} concepts of spans and documents beat their null in the MoE (q <= .05)"
        return (
            f"With labels exchanged the same search reaches AUROC {mean.moe:.3f} [{mean.moe_low:.3f}, "
            f"{mean.moe_high:.3f}]{tested if len(rows) else ''}."
        )

    def waterfall(self, *, metric: str = "f1_balanced", k: int | None = None) -> go.Figure:
        """Where the gap goes, step by step (METRICS 1.3); see `probing.waterfall.waterfall` for what is not shown.

        Raises:
            BadConfig: the run has no baseline.
        """
        from moe_lens.probing import figures

        if not len(self.steps):
            raise BadConfig("there is no gap to take apart: probe with a dense baseline (--baseline)")
        return figures.waterfall(self.steps, metric=metric, k=k)

    def against_k(self, *, metric: str = "f1_balanced") -> go.Figure:
        """Scores against the number of neurons, with the null band."""
        from moe_lens.probing import figures

        return figures.against_k(self.comparison, metric=metric)

    def scatter(self, *, arm: str = "held_out", metric: str = "f1_balanced", k: int | None = None) -> go.Figure:
        """One dot per concept, dense against MoE (or chance against MoE without a baseline)."""
        from moe_lens.probing import figures

        k = int(self.comparison.k.min()) if k is None else k
        category_of = dict(zip(self.cells.concept, self.cells.category, strict=True))
        return figures.scatter(self.comparison, arm=arm, metric=metric, k=k, category_of=category_of)

    def write_figures(self, path: str | Path) -> Path:
        """All figures in one HTML file that needs no network."""
        figures = [self.waterfall()] if len(self.steps) else []
        figures += [self.against_k(), self.scatter()]
        if self.neurons is not None:
            figures.append(self.neurons.plot())
        parts = [
            f.to_html(full_html=False, include_plotlyjs=i == 0, div_id=f"figure-{i}") for i, f in enumerate(figures)
        ]
        page = "<!doctype html><meta charset=utf-8><title>moe-lens probe</title>" + "".join(parts)
        with replacing(Path(path)) as temporary:
            temporary.write_text(page, encoding="utf-8")
        return Path(path)

    def plot(self) -> go.Figure:
        """The waterfall; without a baseline the scatter."""
        return self.waterfall() if len(self.steps) else self.scatter()

    def __repr__(self) -> str:
        head = f"Probes({len(self.cells)} probes, {self.cells.concept.nunique()} concepts)"
        return "\n".join([head, *self.findings()])

    def _repr_html_(self) -> str:
        from moe_lens.notebook import result_html, table_html

        columns = ["arm", "metric", "k", "moe", "chance_moe", "dense", "chance_dense", "gap", "ci_low", "ci_high"]
        columns += ["n_cells_moe", "n_cells_dense"]
        arms = pd.concat([self.arms(metric=metric) for metric in ("f1_balanced", "f1", "auroc")])
        arms = arms[columns].dropna(axis="columns", how="all")
        headings = {"moe": "MoE", "chance_moe": "chance", "chance_dense": "chance", "ci_low": "from", "ci_high": "to",
                    "n_cells_moe": "cells, MoE", "n_cells_dense": "cells, dense"}  # fmt: skip
        return result_html(self.findings(), table_html(arms, headings=headings, forms={"gap": "+"}))


def _own_score(k: int, f1: dict[Any, Any]) -> str:
    held, raw, alike = f1["held_out"], f1["raw"], f1.get("homogeneous")
    search = f", and {alike.moe:.3f} if all cells were alike" if alike is not None else ""
    return (
        f"Best k={k} neuron per concept, held out: mean balanced F1 {held.moe:.3f} [{held.moe_low:.3f}, "
        f"{held.moe_high:.3f}] (.667 by always saying yes); chosen on the test data it would read {raw.moe:.3f}"
        f"{search}."
    )


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)

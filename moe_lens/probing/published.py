"""What the probing tables released with arXiv 2604.02178 say about MoE against dense, and what is left of it.

The source reports, per concept, the best test F1 over all cells. Beside it stand scores that need no better neuron:

    raw              best test F1 over cells, as published (METRICS 1.5)
    always_positive  best F1 over cells of a probe with no neuron: the class balance that routing produced
    f1_balanced      raw with every cell brought to prevalence one half (METRICS 1.2)
    one_expert       best test F1 when every layer offers one random expert: no more cells than a dense model has
    homogeneous      expected best F1 if all cells had the same pooled rates: noise and search alone (METRICS 1.3)
    typical_cell     mean over cells in place of the maximum
    equal_tests      (gaps only) one_expert against dense layers tested on as few tokens as an expert

Usage: ``read_published(files).controls(k=1)``, ``.gaps(k=1)``, ``.plot()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.errors import BadConfig
from moe_lens.plots import number
from moe_lens.probing.published_controls import ModelControls, model_controls, model_gaps, usable
from moe_lens.probing.released import BadPublishedTable, read_table
from moe_lens.types import Role

if TYPE_CHECKING:
    import plotly.graph_objects as go

CONTROLS = ("raw", "always_positive", "f1_balanced", "one_expert", "homogeneous", "typical_cell")
LABELS = {
    "raw": "raw: best cell by test F1",
    "always_positive": "no neuron: always yes",
    "f1_balanced": "raw at prevalence 1/2",
    "one_expert": "one random expert a layer",
    "homogeneous": "all cells alike: search alone",
    "typical_cell": "mean over cells",
}


def read_published(files: Iterable[str | Path] | str | Path, *, seed: int = 0, n_draws: int = 300) -> Published:
    """Read released probing tables, one model a file.

    Args:
        files: ``.csv`` or ``.csv.gz``; the file's name is the model's.
        seed: of the binomial noise and of the bootstrap.
        n_draws: draws of the noise.

    Raises:
        BadPublishedTable: no file, one that is not of the released format, or two of one name.
    """
    paths = [Path(files)] if isinstance(files, str | Path) else [Path(file) for file in files]
    if not paths:
        raise BadPublishedTable("no table was given: name one or more released .csv.gz files")
    frames, sources = [], {}
    for path in paths:
        frame, sha256 = read_table(path)
        model = str(frame["model"].iloc[0])
        if model in sources:
            raise BadPublishedTable(f"two tables are called {model!r}: give each model once, or rename one file")
        frames.append(frame)
        sources[model] = sha256
    return Published(pd.concat(frames, ignore_index=True), sources, seed, n_draws)


@dataclass(frozen=True, eq=False, repr=False)
class Published:
    """Released probes of one or more models. ``frame`` has one row per (model, concept, layer, expert, k)."""

    frame: pd.DataFrame
    sources: Mapping[str, str]
    """sha256 of every file by model."""
    seed: int = 0
    n_draws: int = 300
    _computed: dict[int, list[ModelControls]] = field(default_factory=dict)
    _gaps: dict[int, pd.DataFrame] = field(default_factory=dict)

    @property
    def ks(self) -> list[int]:
        """Every k that some table holds."""
        return sorted({int(k) for k in self.frame["k"]})

    def curve(self) -> pd.DataFrame:
        """Mean over concepts of the best F1 over cells, model by k: the source's figures 1, 3 and 8."""
        best = usable(self.frame).groupby(["model", "k", "concept"], sort=False)["f1"].max()
        return best.groupby(["model", "k"], sort=False).mean().unstack("k")

    def best(self, *, k: int = 1) -> pd.DataFrame:
        """The winning cell per (model, concept); ties go to the larger test set, then the lower layer and expert."""
        rows = usable(self._at(k))
        order = ["f1", "n_test", "layer", "expert"]
        rows = rows.sort_values(order, ascending=[False, False, True, True], kind="stable")
        return (
            rows.groupby(["model", "concept"], sort=False).head(1).sort_values(["model", "concept"], ignore_index=True)
        )

    def controls(self, *, k: int = 1) -> pd.DataFrame:
        """Every control, one row a model, means over concepts (METRICS 1.5).

        Columns: model, role, n_concepts, n_layers, n_cells, test tokens per cell, the controls,
        ``share_winners_below`` and ``share_cells_below``: concepts whose best cell, and cells, that score under the
        always-positive probe of that very cell. ``homogeneous`` is simulated (seeded), the others are exact; an
        ``_sd`` is that of one draw. ``search_lift`` is how far ``homogeneous`` lies above one of its cells.

        Does not show what the neurons are worth: width and test sets still differ between models, and no table
        tells a neuron from the router in front of it.

        Raises:
            BadConfig: a k that the tables do not hold.
        """
        return pd.DataFrame([model.row() for model in self._controls(k)])

    def gaps(self, *, k: int = 1) -> pd.DataFrame:
        """MoE minus dense under every control, for every pair, over the concepts that both have.

        ``equal_tests`` evens out what the tables allow: one random expert a layer, and every dense layer tested on
        as many tokens of each class as a random cell of the MoE (`thinned`).
        The 95 % interval resamples groups of concepts: duplicates stay together.
        Does not show how far a gap depends on the documents: the released tables do not keep them.
        """
        if k not in self._gaps:
            models = self._controls(k)
            pairs = [(m, d) for m in models for d in models if (m.role, d.role) == (Role.MOE.value, Role.DENSE.value)]
            rows = [r for pair in pairs for r in model_gaps(*pair, seed=self.seed, n_draws=self.n_draws)]
            columns = ["moe", "dense", "control", "gap", "ci_low", "ci_high", "n_concepts"]
            self._gaps[k] = pd.DataFrame(rows, columns=columns)
        return self._gaps[k].copy()

    def summary(self, *, k: int = 1) -> dict[str, Any]:
        """Everything above as plain JSON values."""
        curve = self.curve()
        models = [
            {**model.row(), "f1_by_k": curve.loc[model.model].dropna().to_dict(), "sha256": self.sources[model.model]}
            for model in self._controls(k)
        ]
        gaps = self.gaps(k=k).to_dict("records")
        return {"k": k, "models": models, "gaps": gaps, "seed": self.seed, "n_draws": self.n_draws}

    def finding(self, *, k: int = 1) -> str:
        """What is left of the gap, in one sentence; of several MoEs the range."""
        each = self._sentences(k)
        return each[0] if len(each) == 1 else _together(*self._sides(k), self.gaps(k=k), k)

    def findings(self, *, k: int = 1) -> list[str]:
        """`finding`, and with several MoEs a sentence for each."""
        each = self._sentences(k)
        return each if len(each) == 1 else [self.finding(k=k), *each]

    def _sides(self, k: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Controls of the MoEs and of the dense models."""
        table = self.controls(k=k)
        return table[table["role"] == Role.MOE.value], table[table["role"] == Role.DENSE.value]

    def _sentences(self, k: int) -> list[str]:
        """One for each MoE, or that there is nothing to compare."""
        moes, dense = self._sides(k)
        if not len(moes) or not len(dense):
            kind = "dense model" if len(moes) else "MoE"
            return [f"Nothing is compared: these tables hold no {kind}; add the file of one."]
        gaps = self.gaps(k=k)
        return [_sentence(row, dense, gaps[gaps["moe"] == row["model"]], k) for _, row in moes.iterrows()]

    def plot(self, *, k: int = 1) -> go.Figure:
        """`plot_published` of this object."""
        return plot_published(self, k=k)

    def __repr__(self) -> str:
        return f"Published({len(self.sources)} models, {len(self.frame)} probes, k {self.ks})"

    def _repr_html_(self) -> str:
        from html import escape

        k = self.ks[0]
        columns = ["model", "n_cells", "n_test_median", *CONTROLS]
        table = self.controls(k=k)[columns].to_html(index=False, float_format=lambda v: f"{v:.3f}", border=0)
        return f"<p>{escape(' '.join(self.findings(k=k)))}</p>{table}"

    def _at(self, k: int) -> pd.DataFrame:
        if k not in self.ks:
            raise BadConfig(f"no table holds k={k}: give one of {', '.join(map(str, self.ks))}")
        return self.frame[self.frame["k"] == k]

    def _controls(self, k: int) -> list[ModelControls]:
        if k not in self._computed:
            groups = [cells for _, cells in self._at(k).groupby("model", sort=False) if len(usable(cells))]
            if not groups:
                raise BadConfig(f"no probe with k={k} was fitted: give another of {', '.join(map(str, self.ks))}")
            self._computed[k] = [model_controls(cells, seed=self.seed, n_draws=self.n_draws) for cells in groups]
        return self._computed[k]


def _sentence(moe: pd.Series, dense: pd.DataFrame, gaps: pd.DataFrame, k: int) -> str:
    """The gap, what two trivial explanations score, and what is left against the closest dense model."""
    if not len(gaps):
        return f"{moe['model']} shares no concept with a dense model: nothing is compared."
    raw = gaps[gaps["control"] == "raw"]
    rival = _closest(raw)["dense"].iloc[0]
    one, equal = (_gap_of(gaps, control, rival) for control in ("one_expert", "equal_tests"))
    return (
        f"{moe['model']} minus {_count(dense)} is {_range(raw['gap'], '+')} in raw k={k} F1, but in its cells a "
        f"probe with no neuron scores {moe['always_positive']:.3f} (dense {_range(dense['always_positive'])}) and "
        f"searching {moe['n_cells']} of them adds {moe['search_lift']:.3f} even if all are alike (dense "
        f"{_range(dense['search_lift'])}): with one random expert a layer {one} is left against {rival}, {equal} once "
        f"its layers are tested on as few tokens, and whether neurons or routing earn it these tables cannot say."
    )


def _together(moes: pd.DataFrame, dense: pd.DataFrame, gaps: pd.DataFrame, k: int) -> str:
    """The same over several MoEs, each against the dense model that is closest to it."""
    closest = _closest(gaps[gaps["control"] == "raw"])[["moe", "dense"]]
    if not len(closest):
        return "None of the MoEs shares a concept with a dense model: nothing is compared."
    raw, one = (gaps[gaps["control"] == control].merge(closest) for control in ("raw", "one_expert"))
    above = int((one["ci_low"] > 0).sum())
    return (
        f"{len(closest)} of {len(moes)} MoEs minus the dense model closest to each are {_range(raw['gap'], '+')} in "
        f"raw k={k} F1, but in their cells a probe with no neuron scores {_range(moes['always_positive'])} (dense "
        f"{_range(dense['always_positive'])}): with one random expert a layer {_range(one['gap'], '+')} is left, "
        f"surely above zero for {above}, and whether neurons or routing earn it these tables cannot say."
    )


def _closest(raw: pd.DataFrame) -> pd.DataFrame:
    """Of every MoE the row of the dense model with the smallest raw gap."""
    return raw.sort_values("gap", kind="stable").drop_duplicates("moe")


def _gap_of(gaps: pd.DataFrame, control: str, dense: str) -> str:
    row = gaps[(gaps["control"] == control) & (gaps["dense"] == dense)].iloc[0]
    return f"{number(row['gap'], '+')} [{number(row['ci_low'], '+')}, {number(row['ci_high'], '+')}]"


def _count(dense: pd.DataFrame) -> str:
    return str(dense["model"].iloc[0]) if len(dense) == 1 else f"{len(dense)} dense models"


def _range(values: pd.Series, form: str = ".3f") -> str:
    low, high = number(values.min(), form), number(values.max(), form)
    return low if low == high else f"{low} to {high}"


def plot_published(published: Published, *, k: int = 1) -> go.Figure:
    """Every model a line of dots: the raw score and the controls that need no better neuron.

    Bars on drawn controls are one sd over draws.
    """
    import plotly.graph_objects as go

    table = published.controls(k=k).sort_values(["role", "raw"], ascending=[False, False])
    symbols = {"raw": "circle", "always_positive": "x", "f1_balanced": "circle-open", "one_expert": "diamond",
               "homogeneous": "triangle-up", "typical_cell": "line-ns-open"}  # fmt: skip
    figure = go.Figure()
    for name in CONTROLS:
        sd = table.get(f"{name}_sd")
        figure.add_scatter(
            x=table[name], y=table["model"], name=LABELS[name], mode="markers",
            marker={"symbol": symbols[name], "size": 13 if name == "raw" else 10},
            error_x=None if sd is None else {"type": "data", "array": sd},
            customdata=table[["n_cells", "n_test_median"]],
            hovertemplate="%{y}<br>%{x:.3f}<br>%{customdata[0]} cells of %{customdata[1]} test tokens",
        )  # fmt: skip
    figure.update_layout(
        title=f"Best k={k} probe over cells, mean over concepts: raw against the controls",
        xaxis_title="F1", yaxis={"autorange": "reversed"}, width=900, height=240 + 40 * len(table),
    )  # fmt: skip
    return figure

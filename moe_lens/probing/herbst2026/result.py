"""``Herbst2026``: the source's tables for one model and its baseline, beside the controls they were printed without.

Every control is that of `probing.published`, computed from the same file that ``to_csv`` writes: what
``moe-lens probe --from-published`` says about a released table it says about ours.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.errors import BadCorpus
from moe_lens.plots import number
from moe_lens.probing.compare import MEAN
from moe_lens.probing.published import Published, read_published
from moe_lens.probing.released import COLUMNS, DENSE, NOT_FITTED, SCORES
from moe_lens.types import Role, Status

if TYPE_CHECKING:
    import plotly.graph_objects as go

PROTOCOL = "herbst2026"
SIDES = ("model", "baseline")
BESIDE = ("f1_always_positive", "f1_balanced", "n_test", "n_cells")
"""What stands beside each best F1: the score of no neuron in the winning cell, the winner's F1 at prevalence one
half, its test tokens, and how many cells it was the best of."""


@dataclass(frozen=True, eq=False, repr=False)
class Herbst2026:
    """Probes of every cell under the source's protocol, of one model or of two.

    ``cells`` has a row per (model, concept, layer, expert, k): the columns of the released tables, and model, role,
    protocol, neurons (largest mean difference first) and status. ``num_positive`` and ``num_negative`` count the
    routed tokens before the split.
    """

    cells: pd.DataFrame
    sampled: pd.DataFrame
    """Per model and concept: texts and tokens sampled, texts cut to what the model reads, whether the corpus ended
    before there were enough tokens."""
    seed: int

    @property
    def frame(self) -> pd.DataFrame:
        """The cells."""
        return self.cells

    @property
    def models(self) -> list[str]:
        """The model, and its baseline if there is one."""
        return list(self.cells["model"].unique())

    @property
    def ks(self) -> list[int]:
        return sorted({int(k) for k in self.cells["k"]})

    @cached_property
    def published(self) -> Published:
        """These tables as ``--from-published`` reads them: ``.controls(k=1)``, ``.gaps(k=1)``, ``.best(k=1)``.

        Raises:
            BadCorpus: no cell of any model has enough tokens.
        """
        fitted = self.cells.groupby("model")["status"].agg(lambda status: (status == Status.OK.value).any())
        models = [model for model in self.models if fitted[model]]
        if not models:
            raise BadCorpus("no cell has 50 positive and 50 negative tokens of a concept: give more documents")
        with tempfile.TemporaryDirectory() as folder:
            return read_published(self._write(Path(folder), models), seed=self.seed)

    @cached_property
    def comparison(self) -> pd.DataFrame:
        """The best test cell of each concept and k, and what could have produced its score.

        Columns: concept (``__mean__`` over those that all models have), k, ``gap``, and once for ``model`` and once
        for ``baseline``: ``f1`` (the source's number, the highest test F1 of any cell), ``cell``, `BESIDE`.

        Does not show which part of a gap a control explains: each is a score of its own, see ``published.gaps``.
        """
        rows = [self._compared(k) for k in self.ks]
        return pd.concat(rows, ignore_index=True)

    def finding(self, *, k: int | None = None) -> str:
        """The source's number and what stands beside it, in one sentence."""
        k = self.ks[0] if k is None else k
        table = self.comparison
        rows = table[(table["concept"] == MEAN) & (table["k"] == k)]
        if not len(rows):
            return f"Under {PROTOCOL} nothing is compared at k={k}: no concept has enough tokens in both models."
        row = rows.iloc[0]
        sides = [side for side in SIDES if pd.notna(row.get(f"f1_{side}"))]

        def of(column: str, form: str = ".3f") -> str:
            return " and ".join(format(row[f"{column}_{side}"], form) for side in sides)

        who = " and ".join(self.models[SIDES.index(side)] for side in sides)
        gap = f" ({number(row['gap'], '+')})" if len(sides) == 2 else ""
        return (
            f"By the protocol of arXiv 2604.02178 the best cell of {who} reads a concept with a mean k={k} F1 of "
            f"{of('f1')}{gap}, but that cell is the best of {of('n_cells', '.0f')} by the very score reported, a probe "
            f"with no neuron scores {of('f1_always_positive')} in it, and at prevalence one half it has "
            f"{of('f1_balanced')}{self._left(k)}."
        )

    def to_csv(self, folder: str | Path) -> list[Path]:
        """Write one ``.csv`` a model in the released format, readable by ``moe-lens probe --from-published``.

        As in a released file, cells that no sampled token was routed to are left out.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return self._write(folder, self.models)

    def plot(self, *, k: int | None = None) -> go.Figure:
        """Both models and their controls (`published.plot_published`)."""
        return self.published.plot(k=self.ks[0] if k is None else k)

    def summary(self, *, k: int | None = None) -> dict[str, Any]:
        """Models, controls and gaps as plain JSON values."""
        return {"protocol": PROTOCOL, **self.published.summary(k=self.ks[0] if k is None else k)}

    def __repr__(self) -> str:
        return f"Herbst2026({', '.join(self.models)}: {len(self.cells)} probes, k {self.ks})"

    def _repr_html_(self) -> str:
        from html import escape

        means = self.comparison[self.comparison["concept"] == MEAN].dropna(axis="columns", how="all")
        table = means.to_html(index=False, float_format=lambda value: f"{value:.3f}", border=0)
        return f"<p>{escape(self.finding())}</p>{table}"

    def _write(self, folder: Path, models: Sequence[str]) -> list[Path]:
        stems = self._stems
        paths = []
        for model in models:
            mine = self.cells[self.cells["model"] == model]
            paths.append(folder / f"{stems[model]}.csv")
            paths[-1].write_text(released(mine).to_csv(index=False, na_rep="NaN", lineterminator="\n"), "utf-8")
        return paths

    @property
    def _stems(self) -> dict[str, str]:
        """File names of the models, which are their names in `published`."""
        stems = [re.sub(r"[^\w.-]+", "-", model.rstrip("/").split("/")[-1]).strip("-") for model in self.models]
        if len(set(stems)) < len(stems):
            stems[1] += "-baseline"
        return dict(zip(self.models, stems, strict=True))

    def _compared(self, k: int) -> pd.DataFrame:
        sides = {side: self._best(model, k) for side, model in zip(SIDES, self.models, strict=False)}
        table = pd.concat([best.add_suffix(f"_{side}") for side, best in sides.items()], axis=1)
        table["gap"] = table["f1_model"] - table["f1_baseline"] if "baseline" in sides else np.nan
        shared = table[table[[f"f1_{side}" for side in sides]].notna().all(axis=1)]
        if len(shared):
            mean = shared.mean(numeric_only=True)
            table = table.reindex([*table.index, MEAN])
            table.loc[MEAN, mean.index] = mean
        return table.rename_axis("concept").reset_index().assign(k=k)

    def _best(self, model: str, k: int) -> pd.DataFrame:
        """The winning cell of every concept of one model, by concept; NaN where no cell was fitted."""
        mine = self.cells[(self.cells["model"] == model) & (self.cells["k"] == k)]
        n_cells = (mine["status"] == Status.OK.value).groupby(mine["concept"]).sum().rename("n_cells")
        if not n_cells.any():
            return n_cells.to_frame().assign(f1=np.nan)
        best = self.published.best(k=k)
        best = best[best["model"] == self._stems[model]].set_index("concept")
        best["cell"] = [f"L{layer}.E{expert}" for layer, expert in zip(best["layer"], best["expert"], strict=True)]
        return best.join(n_cells, how="right")[["f1", "cell", *BESIDE]]

    def _left(self, k: int) -> str:
        """The gap with as many candidates in the MoE as in the dense model, where it can be had."""
        gaps = self.published.gaps(k=k)
        one = gaps[gaps["control"] == "one_expert"]
        if not len(one):
            return ""
        row = one.iloc[0]
        gap, low, high = row[["gap", "ci_low", "ci_high"]]
        if row["moe"] != self._stems[self.models[0]]:  # the published gap is MoE minus dense, ours model minus baseline
            gap, low, high = -gap, -high, -low
        return f"; with one random expert a layer {number(gap, '+')} [{number(low, '+')}, {number(high, '+')}] is left"


def released(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of one model in the columns and spellings of a released table."""
    seen = cells[cells["num_positive"] + cells["num_negative"] > 0]
    table = seen[list(COLUMNS)].astype(dict.fromkeys((*SCORES, "expert"), object))
    table.loc[seen["status"] == Status.TOO_FEW.value, list(SCORES)] = NOT_FITTED[0]
    if (seen["role"] == Role.DENSE.value).all():
        table["expert"] = DENSE
    return table

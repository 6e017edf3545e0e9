"""``Faithfulness``: the frozen result of scoring rankings of experts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.causal.effects import NoiseFloor
from moe_lens.causal.faithfulness.sets import Bins
from moe_lens.causal.faithfulness.tables import AOPC, SCORES
from moe_lens.causal.screen import ScreenRecall
from moe_lens.errors import BadOutput
from moe_lens.plots import number, rows_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.capture.run import Run

_MORE = {
    "gaps": "faithfulness_gaps", "draws": "faithfulness_draws", "circuit": "faithfulness_circuit",
    "naopc": "faithfulness_naopc", "agreement": "faithfulness_agreement", "stability": "faithfulness_stability",
    "alignment": "faithfulness_alignment", "churn": "faithfulness_churn", "units": "faithfulness_units",
    "routing_spread": "faithfulness_routing",
}  # fmt: skip
"""Field to the name of its table in a run directory."""
TABLES = ("faithfulness", *_MORE.values())
ALPHA = 0.05
_KL = ("comprehensiveness_kl", "sufficiency_kl")
_SHOWN = ["mode", "score", "ranking", "value", "control", "control_value", "gap", "low", "high", "p"]
ENOUGH_MATCHED = 0.5
"""Share of experts with a match of like load from which the load-matched control is quoted."""


@dataclass(frozen=True, repr=False)
class Faithfulness:
    """How much the model loses without the experts that a ranking puts first, and how much with only those.

    Nats per prediction. High comprehensiveness and low sufficiency are good, against random sets with as many experts
    in each layer. A ranking that beats them names experts that matter together under one mode of ablation; it does
    not say what they do, and AOPC does not compare models.
    """

    frame: pd.DataFrame
    """faithfulness.parquet: one row per ranking, mode, super_experts, bin or area, and control. Each of four scores
    with _low and _high (95 %, documents; of controls also draws) and _p (rank among the random sets)."""
    gaps: pd.DataFrame = field(repr=False)
    """Ranking against control, positive is better; see `tables.Tabulator.gaps`."""
    draws: pd.DataFrame = field(repr=False)
    """Scores of each control set."""
    circuit: pd.DataFrame = field(repr=False)
    """Circuit faithfulness, completeness, CPR and CMD on log-probabilities."""
    naopc: pd.DataFrame = field(repr=False)
    agreement: pd.DataFrame = field(repr=False)
    """With leave-one-out; empty where that was not ranked."""
    stability: pd.DataFrame = field(repr=False)
    """Between two halves of the ranking text."""
    alignment: pd.DataFrame = field(repr=False)
    """Importance against routing, by layer."""
    routing_spread: pd.DataFrame = field(repr=False)
    churn: pd.DataFrame = field(repr=False)
    """Share of the top-k that changes when the largest bin goes, by layer."""
    units: pd.DataFrame = field(repr=False)
    """Every expert with load, gate mass, largest output, and its scores."""
    bins: Bins
    noise: NoiseFloor
    n_documents: int
    n_tokens: int
    """Predictions scored."""
    n_passes: int
    reference: str = ""
    """Digest of the text that mean, mean_off and resample take their values from."""
    notes: tuple[str, ...] = ()
    recall: ScreenRecall | None = None
    """Of the gradient screen, where that was ranked."""
    run: Run | None = None
    """The directory it was written to, if any."""

    @classmethod
    def of(cls, run: Run) -> Faithfulness:
        """Read a result back from a run directory.

        Raises:
            BadOutput: the run holds none.
        """
        entry = run.manifest["commands"].get("faithfulness", {})
        if entry.get("state") != "done" or not all(run.has(name) for name in TABLES):
            raise BadOutput(f"{run.path} holds no scored rankings: run moe-lens faithfulness -o {run.path} first")
        bins, notes = Bins(**entry["bins"] | {"shares": tuple(entry["bins"]["shares"])}), tuple(entry["notes"])
        same = {name: entry[name] for name in ("n_documents", "n_tokens", "n_passes", "reference")}
        tables = {name: run.frame(table) for name, table in _MORE.items()}
        return cls(
            frame=run.frame("faithfulness"), **tables, **same, bins=bins, noise=NoiseFloor(**entry["noise"]),
            notes=notes, run=run, recall=ScreenRecall(**entry["recall"]) if entry.get("recall") else None,
        )  # fmt: skip

    @property
    def super_experts(self) -> list[str]:
        """Experts with extreme outputs, as addresses; where there are some, all is scored without them as well."""
        rows = self.units[self.units["is_super"]]
        return [f"L{layer}.E{expert}" for layer, expert in zip(rows["layer"], rows["expert"], strict=True)]

    @property
    def areas(self) -> pd.DataFrame:
        """AOPC of every ranking, mode and control."""
        columns = ["ranking", "mode", "super_experts", "control", *SCORES]
        return self.frame.loc[self.frame["quantity"] == AOPC, columns].reset_index(drop=True)

    def finding(self) -> str:
        """In one sentence the ranking that beats random sets most clearly, and its lead over load-matched ones."""
        at = self._leads("random")
        if not len(at):
            return (
                f"{self.frame['ranking'].nunique()} rankings were scored, but no random control was drawn (n_random is "
                "0), so the scores have nothing to be compared with."
            )
        best: Any = next(clearest_first(at).itertuples())
        n_better = int(((at["p"] < ALPHA) & (at["low"] > self.noise.kl)).sum())
        pick = f", the clearest of {len(at)}" if len(at) > 1 else ""
        tested = f"{n_better} of {len(at)} beat random, p < .05 uncorrected"
        least = 1 / (1 + self._n_random())
        if least >= ALPHA:
            tested = f"no p can fall below {least:.2f} with {self._n_random()} random sets: draw 20"
        return (
            f"Without the experts that {best.ranking} puts first the output moves by {number(best.value)} nats (AOPC "
            f"in KL, {best.mode}), without random ones by {number(best.control_value)}: a lead of "
            f"{_with_interval(best)}, p {best.p:.2f}{pick} ({tested}), "
            f"{self._beside_matched(best.ranking, best.mode)}."
        )

    def _n_random(self) -> int:
        """Random sets that were drawn for each ranking."""
        rows = self.draws[self.draws["control"] == "random"]
        return int(rows["draw"].nunique())

    def _beside_matched(self, ranking: str, mode: str) -> str:
        """The lead over sets of like load, and the share of experts that had a match."""
        row: Any = next(self._leads("load-matched").query("ranking == @ranking and mode == @mode").itertuples(), None)
        share = self.matched_share.get((ranking, mode), float("nan"))
        if row is None or not math.isfinite(share):
            return "and load-matched sets were not drawn"
        said = f"{share:.0%} of its experts have a match of like load in their layer"
        if share < ENOUGH_MATCHED:
            return f"and no lead over load-matched sets can be quoted, since only {said}"
        return f"and {_with_interval(row)} over load-matched sets ({said})"

    def _leads(self, control: str) -> pd.DataFrame:
        """Leads in comprehensiveness (AOPC, KL) over a control, a row for each ranking and mode."""
        at = self.gaps[(self.gaps["quantity"] == AOPC) & (self.gaps["super_experts"] == "included")]
        return at[(at["control"] == control) & (at["score"] == "comprehensiveness_kl")]

    @property
    def matched_share(self) -> pd.Series:
        """By ranking and mode the share of its first experts that have a match of like load and gate mass."""
        at = self.frame[(self.frame["super_experts"] == "included") & self.frame["matched_share"].notna()]
        return at.groupby(["ranking", "mode"])["matched_share"].mean()

    def findings(self) -> list[str]:
        """`finding`, then the text and the clean passes, then mode by mode, then what limits them."""
        floor = "two clean passes agree exactly"
        if self.noise.kl or self.noise.mean_nll:
            floor = f"two clean passes differ by {self.noise.kl:.1e} nats of KL, {self.noise.mean_nll:.1e} of the mean"
        said = [self.finding(), f"{self.n_documents} documents, {self.n_tokens:,} predictions; {floor}."]
        said += [self._about(mode) for mode in self.frame["mode"].unique()]
        if (order := self._order_changes()) is not None:
            said.append(order)
        said += self._aligned()
        if found := self.super_experts:
            writes = "write" if len(found) > 1 else "writes"
            said.append(
                f"{', '.join(found)} {writes} extreme outputs: rows with super_experts=excluded never ablate them."
            )
        if (screen := self.recall) is not None:
            said.append(
                f"The gradient screen's first tenth holds {screen.recall:.0%} [{screen.low:.0%}, {screen.high:.0%}] "
                f"of the largest tenth of exact effects, on {screen.n_sample} experts that were measured one by one."
            )
        kept = self.frame[(self.frame["control"] == "none") & (self.frame["quantity"] == "bin")]
        if most := int(kept["layers_emptied"].max()):
            layers = "layers" if most > 1 else "layer"
            said.append(f"Sufficiency leaves up to {most} {layers} without a routed expert (layers_emptied).")
        full = kept[kept["n_layers_removed"] > 0] if "n_layers_removed" in kept else kept.head(0)
        if len(full):
            share, layers = full["bin"].min(), int(full["n_layers_removed"].max())
            said.append(
                f"From the bin of {share:.0%} on, comprehensiveness takes every routed expert of up to {layers} "
                f"layer{'s' if layers > 1 else ''} away (n_layers_removed): random sets of as many are the same sets."
            )
        return said + [f"{note[0].upper()}{note[1:]}." for note in self.notes]

    def _about(self, mode: str) -> str:
        at = self.gaps
        at = at[(at["mode"] == mode) & (at["quantity"] == AOPC) & (at["super_experts"] == "included")]
        at = at[at["control"] == "random"]
        if not len(at):
            return (
                f"{mode}: no random control was drawn (n_random is 0), so the scores have nothing to be compared with."
            )
        parts = []
        for score, name in (("comprehensiveness_kl", "comprehensiveness"), ("sufficiency_kl", "sufficiency")):
            rows = clearest_first(at[at["score"] == score])
            best: Any = next(rows.itertuples())
            better = rows[(rows["p"] < ALPHA) & (rows["low"] > self.noise.kl)]
            parts.append(
                f"{name} of {best.ranking} {best.value:.3f}, random {best.control_value:.3f}, gap "
                f"{_with_interval(best)}, p {best.p:.2f}, and {len(better)} of {len(rows)} rankings beat "
                "random"
            )
        said = f"{mode}: {'; '.join(parts)} (AOPC in KL, nats; p uncorrected for {at['ranking'].nunique()} rankings)."
        return " ".join([said, *self._matched(mode)])

    def _matched(self, mode: str) -> list[str]:
        """How the rankings do against sets of equal load, if those were drawn."""
        at = self._leads("load-matched")
        at = at[at["mode"] == mode]
        if not len(at):
            return []
        matched = self.matched_share.xs(mode, level="mode")
        usable = at[at["ranking"].map(matched) >= ENOUGH_MATCHED]
        low, high = 100 * matched.min(), 100 * matched.max()
        said = f"{low:.0f} to {high:.0f} % of experts have a match of like load and gate mass in their layer"
        if not len(usable):
            return [f"Only {said}, too few for a load-matched control."]
        better = list(usable.loc[usable["low"] > self.noise.kl, "ranking"])
        return [f"Ahead of load-matched sets: {', '.join(better) or 'none'} of {len(usable)} with a match ({said})."]

    def _aligned(self) -> list[str]:
        rows = self.alignment[self.alignment["layer"].isna() & (self.alignment["importance"] == "gradient")]
        parts = []
        for row in rows_of(rows):
            value, low, high = (number(x, ".2f") for x in (row.spearman, row.spearman_low, row.spearman_high))
            parts.append(f"{value} [{low}, {high}] with {row.routing}")
        return [f"Within layers, importance by gradient correlates {', '.join(parts)} (Spearman)."] if parts else []

    def _order_changes(self) -> str | None:
        rows = self.areas
        rows = rows[(rows["control"] == "none") & (rows["super_experts"] == "included")]
        if rows["mode"].nunique() < 2 or rows["ranking"].nunique() < 2:
            return None
        best = rows.loc[rows.groupby("mode", sort=False)["comprehensiveness_kl"].idxmax(), ["mode", "ranking"]]
        if best["ranking"].nunique() == 1:
            return None
        listed = ", ".join(f"{ranking} under {mode}" for mode, ranking in best.itertuples(index=False))
        return f"The most comprehensive ranking depends on the mode: {listed}."

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table by the name under which a run directory keeps it."""
        return {"faithfulness": self.frame} | {table: getattr(self, name) for name, table in _MORE.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        at = self.gaps[(self.gaps["quantity"] == AOPC)].drop(columns="bin")
        areas = self.circuit[self.circuit["quantity"].isin(["cpr", "cmd"])].drop(columns="bin")
        return {
            "run": str(self.run.path) if self.run else None,
            "finding": self.finding(), "findings": self.findings(),
            "bins": {"shares": list(self.bins.shares), "rounding": self.bins.rounding,
                     "include_zero": self.bins.include_zero, "aggregate": self.bins.aggregate},
            "noise": {"nll": self.noise.nll, "kl": self.noise.kl, "mean_nll": self.noise.mean_nll},
            "n_documents": self.n_documents, "n_tokens": self.n_tokens, "n_passes": self.n_passes,
            "reference": self.reference, "recall": asdict(self.recall) if self.recall else None,
            "super_experts": self.super_experts, "notes": list(self.notes),
            "aopc": _plain(self.areas), "gaps": _plain(at), "agreement": _plain(self.agreement),
            "stability": _plain(self.stability), "alignment": _plain(self.alignment),
            "circuit": _plain(areas), "naopc": _plain(self.naopc), "routing": _plain(self.routing_spread),
            "churn": _plain(self.churn),
        }  # fmt: skip

    def plot(self) -> go.Figure:
        """Comprehensiveness and sufficiency over bins, one line a ranking, with the band of random sets."""
        from moe_lens.causal.faithfulness.figure import curves

        return curves(self)

    def plot_alignment(self) -> go.Figure:
        """Rank correlation of importance with routing numbers, layer by layer."""
        from moe_lens.causal.faithfulness.figure import alignment

        return alignment(self)

    def __repr__(self) -> str:
        return "\n".join([f"Faithfulness({self.frame['ranking'].nunique()} rankings)", *self.findings()])

    def _repr_html_(self) -> str:
        from moe_lens.notebook import result_html, table_html

        rows = self.gaps[(self.gaps["quantity"] == AOPC) & self.gaps["score"].isin(_KL)]
        rows = rows[rows["super_experts"] == "included"].sort_values(["mode", "score", "ranking"], kind="stable")
        table = table_html(rows[_SHOWN], forms={"gap": "+", "p": ".2f"})
        return result_html(self.findings(), table)


def clearest_first(leads: pd.DataFrame) -> pd.DataFrame:
    """Rows of `Faithfulness.gaps` by p, and by the lead where p is the same (few random sets give few values of p)."""
    return leads.sort_values(["p", "gap"], ascending=[True, False], kind="stable")


def _with_interval(row: Any) -> str:
    return f"{number(row.gap, '+')} [{number(row.low, '+')}, {number(row.high, '+')}]"


def _plain(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows with None where there is no value."""
    return table.astype(object).where(table.notna(), None).to_dict("records")

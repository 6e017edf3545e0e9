"""``Trial``: the frozen result of putting labels on trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.causal.trial.nulls import REAL
from moe_lens.causal.trial.verdict import ROUTING, VERDICT_MODES, Exclusive, Verdict, shares
from moe_lens.errors import OutOfRange
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LABEL = ["label_kind", "layer", "expert", "facet"]
_NUMBERS = {
    Verdict.SUPPORTED: 0,
    Verdict.ROUTING_ONLY: 1,
    Verdict.REFUTED: 2,
    Verdict.UNDECIDED: 3,
    Verdict.UNDERPOWERED: 4,
}


@dataclass(frozen=True, repr=False)
class Trial:
    """Verdicts on labels. ``frame`` is validation.parquet: one row per label, true or false, and mode.

    ``settings`` says what was tried on what: labels given and tried, documents, predictions, the smallest effect that
    counts.
    """

    frame: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, address: str | ExpertAddress) -> pd.DataFrame:
        """All rows of one expert, its false labels too.

        Raises:
            OutOfRange: an expert that was not on trial.
        """
        at = ExpertAddress.parse(address)
        rows = self.frame[(self.frame["layer"] == at.layer) & (self.frame["expert"] == at.expert)]
        if not len(rows):
            raise OutOfRange(f"{at} was not on trial: choose from trial.verdicts.address")
        return rows.reset_index(drop=True)

    @property
    def verdicts(self) -> pd.DataFrame:
        """One row per real label: address, label, verdict, and the smaller of its needs, with that mode's numbers."""
        weakest = self._weakest
        weakest = weakest[weakest["label_kind"] == REAL]
        order = weakest["verdict"].map({str(v): n for v, n in _NUMBERS.items()})
        table = weakest.assign(order=order).sort_values(["order", "layer", "expert", "facet"], ignore_index=True)
        address = [f"L{a}.E{b}" for a, b in zip(table["layer"], table["expert"], strict=True)]
        columns = ["facet", "label", "verdict", "exclusive", "mode", "need", "need_low", "need_high", "q"]
        columns += ["exclusivity", "auroc_routing", "auroc_routing_low", "lift", "n_docs_z1r1", "load", "basis"]
        table = table[columns]
        table.insert(0, "address", address)
        return table

    @property
    def _weakest(self) -> pd.DataFrame:
        """Of every label the row with the smaller need, among modes that have a vote."""
        voting = self.frame[self.frame["mode"].isin(VERDICT_MODES)]
        return voting.sort_values("need", kind="stable").drop_duplicates(_LABEL)

    def summary(self) -> pd.DataFrame:
        """Labels by kind and verdict: ``label_kind, verdict, n, share, low, high``; intervals are Wilson's.

        All labels on trial count, underpowered ones too. They are a sample of the labels where `settings` says so.
        """
        once = self.frame.drop_duplicates(_LABEL)
        parts = [
            shares(rows["verdict"]).assign(label_kind=kind) for kind, rows in once.groupby("label_kind", sort=False)
        ]
        table = pd.concat(parts, ignore_index=True)
        return table[["label_kind", "verdict", "n", "share", "low", "high"]]

    def finding(self) -> str:
        """The result in a few sentences."""
        counts: dict[str, dict[str, int]] = {}
        for kind, name, number in self.summary()[["label_kind", "verdict", "n"]].to_numpy().tolist():
            counts.setdefault(kind, {})[name] = number
        real = counts.pop(REAL)
        supported, total = real.pop(str(Verdict.SUPPORTED)), self._totals[REAL]
        row = self.summary().iloc[0]  # kinds and verdicts come in order: real, supported
        said = (
            f"{supported} of {total} labels on trial are supported ({row['share']:.0%}, 95 % interval {row['low']:.0%} "
            f"to {row['high']:.0%}): their experts are visited there and needed there; "
            + ", ".join(f"{number} {name}" for name, number in real.items())
            + "."
        )
        if self.settings.get("is_sample"):
            said += f" They are a sample of {self.settings['n_labels']} labels."
        if counts:
            false = [f"{kind} {found[Verdict.SUPPORTED]} of {self._totals[kind]}" for kind, found in counts.items()]
            said += f" False labels supported: {', '.join(false)}."
        return said

    @property
    def _totals(self) -> dict[str, int]:
        kinds = self.frame.drop_duplicates(_LABEL)["label_kind"]
        return {kind: int((kinds == kind).sum()) for kind in kinds.unique()}

    def to_markdown(self) -> str:
        """One page: what was tried, the finding, verdicts by kind, one line per real label (validation.md)."""
        s = self.settings
        exclusive = self.verdicts
        exclusive = exclusive[exclusive["verdict"] == str(Verdict.SUPPORTED)]["exclusive"].value_counts()
        words = ", ".join(f"{exclusive.get(str(word), 0)} {word}" for word in Exclusive)
        lines = [
            "# Labels on trial", "", self.finding(), "",
            f"Model {s.get('model')}, text {s.get('corpus')}: {s.get('n_predictions'):,} predictions in "
            f"{s.get('n_documents'):,} held-out documents, live routing, horizon {s.get('horizon')}. An expert "
            f"counts as needed from {s.get('delta', float('nan')):.3g} nats per token in both modes. Supported: "
            f"{words}.", "",
            *_markdown(self._by_kind()), "",
            "need: nats per token that its documents lose without the expert, beyond a co-selected one at equal "
            "gates; the mode with the smaller need is shown. routing: AUROC of the label for the expert's visits, "
            f"from {ROUTING}.",
            "", *_markdown(self._lines()), "",
        ]  # fmt: skip
        return "\n".join(lines)

    def _by_kind(self) -> pd.DataFrame:
        table = self.summary()
        wide = table.pivot(index="label_kind", columns="verdict", values="n")
        wide = wide.reindex(index=list(dict.fromkeys(table["label_kind"])), columns=[str(v) for v in _NUMBERS])
        found = table[table["verdict"] == str(Verdict.SUPPORTED)].set_index("label_kind")
        wide["share supported"] = [
            f"{r.share:.0%} [{r.low:.0%}, {r.high:.0%}]" for r in found.loc[wide.index].itertuples()
        ]
        return wide.rename_axis(columns=None).reset_index(names="labels")

    def _lines(self) -> pd.DataFrame:
        v = self.verdicts
        interval = [f"{a:.3f} [{b:.3f}, {c:.3f}]" for a, b, c in zip(v.need, v.need_low, v.need_high, strict=True)]
        routing = [f"{a:.2f} [{b:.2f}" for a, b in zip(v.auroc_routing, v.auroc_routing_low, strict=True)]
        columns = {
            "expert": v.address, "verdict": v.verdict, "exclusive": v.exclusive.where(v.verdict == "supported", ""),
            "need": interval, "q": v.q.map("{:.3f}".format), "routing": [f"{text}, ...]" for text in routing],
            "lift": v.lift.map("{:.1f}".format), "documents": v.n_docs_z1r1, "label": v.label,
        }  # fmt: skip
        return pd.DataFrame(columns)

    def plot(self) -> go.Figure:
        """Need against routing AUROC, one dot per label, true and false."""
        import plotly.graph_objects as go

        from moe_lens import plots

        figure = go.Figure()
        weakest = self._weakest
        for real in (False, True):
            rows = weakest[(weakest["label_kind"] == REAL) == real]
            text = [f"L{r.layer}.E{r.expert} {r.label_kind}: {r.label}<br>{r.verdict}" for r in rows.itertuples()]
            figure.add_scatter(
                x=rows["auroc_routing"], y=rows["need"], mode="markers", name="labels" if real else "false labels",
                text=text, hoverinfo="text", marker={"color": plots.BLUE if real else plots.RULE, "size": 8},
            )  # fmt: skip
        figure.add_hline(y=self.settings.get("delta", 0), line={"color": plots.MUTED, "dash": "dot"})
        figure.add_vline(x=ROUTING, line={"color": plots.MUTED, "dash": "dot"})
        figure.update_xaxes(title="AUROC of the label for its expert's visits")
        figure.update_yaxes(title="need, nats per token")
        plots.layout(figure, "Labels on trial", self.finding(), width=760, height=480)
        return figure

    def __repr__(self) -> str:
        return f"Trial({len(self.verdicts)} labels)\n{self.finding()}"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(self.finding())}</p>{self.verdicts.to_html(index=False)}"


def _markdown(table: pd.DataFrame) -> list[str]:
    rows = [[str(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in table.to_numpy().tolist()]
    return ["| " + " | ".join(row) + " |" for row in [list(map(str, table.columns)), ["---"] * table.shape[1], *rows]]

"""``Trial``: the frozen result of putting labels on trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.causal.trial.claims import REAL
from moe_lens.causal.trial.verdict import VERDICT_MODES, Verdict, shares
from moe_lens.errors import BadOutput, OutOfRange
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.capture.run import Run

TABLE, PAGE = "validation", "validation.md"
"""Name of the table in a run directory, and file of the page."""
VERDICT_ORDER = (Verdict.SUPPORTED, Verdict.ROUTING_ONLY, Verdict.REFUTED, Verdict.UNDECIDED, Verdict.UNDERPOWERED)
"""In tables."""
_VERDICT_COLUMNS = (
    "address", "facet", "label", "verdict", "exclusive", "mode", "effect_z1r1", "effect_z1r1_low", "effect_z0r1",
    "need", "need_low", "need_high", "q", "exclusivity", "auroc_routing", "auroc_routing_low", "lift", "n_docs_z1r1",
    "load", "basis",
)  # fmt: skip
_LABEL = ["label_kind", "layer", "expert", "facet"]


@dataclass(frozen=True, repr=False)
class Trial:
    """Verdicts on labels. ``frame`` is validation.parquet: one row per label, true or false, and mode.

    ``settings`` says what was tried on what: labels given and tried, documents, predictions, the smallest effect that
    counts. ``run`` is the directory it was written to, if any.
    """

    frame: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)
    run: Run | None = None

    @classmethod
    def of(cls, run: Run) -> Trial:
        """Read the trial of a run directory back.

        Raises:
            BadOutput: no labels were tried in it.
        """
        settings = run.manifest["commands"].get("validate", {}).get("settings")
        if settings is None or not run.has(TABLE):
            raise BadOutput(f"{run.path} holds no trial of labels: run moe-lens validate -o {run.path} first")
        frame = run.frame(TABLE)
        if not {*_VERDICT_COLUMNS} <= {*frame.columns, "address"}:
            raise BadOutput(f"the trial in {run.path} is of an older moe-lens: run the same command with --no-resume")
        return cls(frame, settings, run)

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
        return self._real[list(_VERDICT_COLUMNS)]

    @property
    def _real(self) -> pd.DataFrame:
        """Of every real label the row with the smaller need, all columns; by verdict, then expert."""
        weakest = self._weakest
        weakest = weakest[weakest["label_kind"] == REAL]
        order = weakest["verdict"].map({str(v): n for n, v in enumerate(VERDICT_ORDER)})
        table = weakest.assign(order=order).sort_values(["order", "layer", "expert", "facet"], ignore_index=True)
        return table.assign(address=[f"L{a}.E{b}" for a, b in zip(table["layer"], table["expert"], strict=True)])

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
        """The result in one sentence: what share is supported, what became of the others, and of false labels."""
        counts: dict[str, dict[str, int]] = {}
        for kind, name, number in self.summary()[["label_kind", "verdict", "n"]].to_numpy().tolist():
            counts.setdefault(kind, {})[name] = number
        real = counts.pop(REAL)
        total = sum(real.values())
        supported = real.pop(str(Verdict.SUPPORTED))
        row = self.summary().iloc[0]  # kinds and verdicts come in order: real, supported
        sample = ""
        if self.settings.get("is_sample"):
            sample = f" (a sample of {self.settings['n_labels']} labels that holds experts of all loads)"
        false = [f"{kind} {found[Verdict.SUPPORTED]} of {sum(found.values())}" for kind, found in counts.items()]
        return (
            f"{supported} of {total} labels on trial{sample} are supported, their experts visited there and needed "
            f"there more than others ({row['share']:.0%}, 95 % interval {row['low']:.0%} to {row['high']:.0%}); "
            + ", ".join(f"{number} {name}" for name, number in real.items())
            + (f"; of false labels supported: {', '.join(false)}" if false else "")
            + "."
        )

    def findings(self) -> list[str]:
        """`finding`, then where supported labels are needed, and whether labels fit their own experts best."""
        from moe_lens.causal.trial.page import about_supported, assignment

        return [self.finding(), *about_supported(self._real), *assignment(self.frame)]

    def to_markdown(self) -> str:
        """One page: what was tried, the finding, verdicts by kind, every label's numbers (validation.md)."""
        from moe_lens.causal.trial.page import page

        return page(self, self._real, VERDICT_ORDER)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        false = self._weakest
        false = false[false["label_kind"] != REAL]
        columns = ["label_kind", "layer", "expert", "facet", "label", "verdict", "need", "auroc_routing"]
        return {
            "run": str(self.run.path) if self.run else None,
            "finding": self.finding(),
            "findings": self.findings(),
            "settings": dict(self.settings),
            "summary": _plain(self.summary()),
            "labels": _plain(self.verdicts),
            "false_labels": _plain(false[columns]),
        }

    def plot(self, address: str | ExpertAddress | None = None) -> go.Figure:
        """All labels by routing AUROC and need; or of one expert, its need inside and outside the label.

        Args:
            address: such as ``L9.E5``, for the figure of one expert beside matched experts and false labels.

        Raises:
            OutOfRange: an expert that was not on trial.
        """
        from moe_lens.causal.trial.figure import one_expert, verdict_plane

        return verdict_plane(self, self._weakest) if address is None else one_expert(self, self[address])

    def __repr__(self) -> str:
        return "\n".join([f"Trial({len(self.verdicts)} labels)", *self.findings()])

    def _repr_html_(self) -> str:
        from moe_lens.causal.trial.page import tables
        from moe_lens.notebook import result_html, table_html

        return result_html(self.findings(), *map(table_html, tables(self, self._real, VERDICT_ORDER)))


def _plain(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows with None where there is no value."""
    return table.astype(object).where(table.notna(), None).to_dict("records")

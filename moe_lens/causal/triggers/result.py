"""``Triggers``: the frozen result of a trigger-target experiment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.causal.triggers.cases import Defect
from moe_lens.causal.triggers.statistics import CAUSAL, NOT_SHOWN, TOO_FEW
from moe_lens.errors import BadOutput, OutOfRange
from moe_lens.plots import rows_of
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.capture.run import Run

COMMAND = "triggers"
_EFFECTS = {
    "effect": "effect", "over_co_selected": "over beside", "over_matched": "over like gates",
    "over_other_targets": "over other targets",
}  # fmt: skip
TABLE, CASES, PAGE = "triggers", "trigger_cases", "triggers.md"


@dataclass(frozen=True, repr=False)
class Triggers:
    """Do experts raise the targets of their cases at the triggers?

    ``frame`` has one row per expert and mode (triggers.parquet). n_cases, n_used, n_routed (used, with the expert
    chosen at the trigger), n_texts of these, n_matched controls. ``routed`` is the share of used cases with its Wilson
    interval, ``routed_elsewhere`` the share of other tokens of the texts. ``logit`` is what the expert writes to the
    target's logit directly, ``rank`` that write's mean rank among the experts chosen at the token and ``rank1`` the
    share of first ranks, ``rank_matched`` and ``rank1_matched`` those of controls with like gates. ``effect`` is in
    nats of log p(target) that go with the expert at the trigger alone; ``over_co_selected`` and ``over_matched`` are
    what is left beyond experts chosen beside it and experts with like gates at other tokens, ``over_other_targets``
    beyond its effect on targets of other experts' cases; ``..._at_place`` is read where the text has the target (or at
    its end) in place of at the trigger. Each has a 95 % interval over texts
    (``_low``, ``_high``), a one-sided sign-flip p, and q by Benjamini-Hochberg over experts within the mode. All are
    over used cases with the expert at the trigger. ``outcome`` is causal, not shown or too few (texts).

    ``cases`` has one row per case and mode (trigger_cases.parquet), unused ones with their ``defects`` too.

    Cases are written to fit a label, so a causal outcome shows that the expert works for these targets after these
    triggers. It does not show that it works for nothing else, that it does so in text nobody wrote for it, or that
    the label is right; a case without an effect may have a second expert that stands in.
    """

    frame: pd.DataFrame
    cases: pd.DataFrame
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Model, modes, seed, draws, noise_floor, notes, and the run directory, if any."""

    @classmethod
    def of(cls, run: Run) -> Triggers:
        """Read a result back from a run directory.

        Raises:
            BadOutput: the run holds none.
        """
        entry = run.manifest["commands"].get(COMMAND, {})
        if "settings" not in entry or not run.has(TABLE) or not run.has(CASES):
            raise BadOutput(
                f"{run.path} holds no trigger-target cases: run moe-lens validate --triggers DIR -o {run.path} first"
            )
        return cls(run.frame(TABLE), run.frame(CASES), entry["settings"] | {"run": str(run.path)})

    def __getitem__(self, address: str | ExpertAddress) -> pd.DataFrame:
        """Cases of one expert.

        Raises:
            OutOfRange: an expert without cases.
        """
        at = ExpertAddress.parse(address)
        rows = self.cases[(self.cases["layer"] == at.layer) & (self.cases["expert"] == at.expert)]
        if not len(rows):
            raise OutOfRange(f"{at} has no cases: choose from triggers.frame.address")
        return rows.reset_index(drop=True)

    @property
    def modes(self) -> list[str]:
        return list(dict.fromkeys(self.frame["mode"]))

    @property
    def defects(self) -> dict[str, int]:
        """Cases by defect; a case with two counts twice."""
        counts = Counter(name for found in self._once["defects"] for name in found)
        return {str(defect): counts[str(defect)] for defect in Defect if counts[str(defect)]}

    @property
    def outcomes(self) -> dict[str, int]:
        """Experts by outcome."""
        found = self._experts["outcome"].value_counts()
        return {name: int(found.get(name, 0)) for name in (CAUSAL, NOT_SHOWN, TOO_FEW)}

    @property
    def _once(self) -> pd.DataFrame:
        return self.cases[self.cases["mode"] == self.modes[0]]

    @property
    def _experts(self) -> pd.DataFrame:
        return self.frame[self.frame["mode"] == self.modes[0]]

    @property
    def weakest(self) -> pd.DataFrame:
        """Of every expert the mode with the smallest effect."""
        rows = self.frame.sort_values("effect", kind="stable", na_position="last").drop_duplicates("address")
        return rows.sort_values(["layer", "expert"], ignore_index=True)

    def finding(self) -> str:
        """The result in one sentence, with its nulls."""
        counts = self.outcomes
        return (
            f"{counts[CAUSAL]} of {len(self._experts)} experts raise their targets at their triggers: taking the "
            f"expert away there lowers the target in {' and '.join(self.modes)}, more than taking away experts chosen "
            "beside it or experts with like gates elsewhere, and more than it lowers other experts' targets (q < .05); "
            f"{counts[NOT_SHOWN]} not shown, {counts[TOO_FEW]} with too few texts."
        )

    def findings(self) -> list[str]:
        """`finding`, then what became of the cases, then the experts' rank by direct attribution."""
        once = self._once
        n_used, n_routed = int(once["used"].sum()), int((once["used"] & once["routed"]).sum())
        said = [
            self.finding(),
            f"{n_used} of {len(once)} cases can be measured, and in {n_routed} of them the expert is chosen at the "
            f"trigger ({_percent(self._experts['routed_elsewhere'].mean())} of the other tokens of the texts).",
        ]
        ranked = once[once["used"] & once["rank"].notna()]
        with_controls = ranked[ranked["ranks_matched"].map(len) > 0]
        if len(with_controls):
            matched = with_controls["ranks_matched"].map(lambda found: np.mean(np.asarray(found) == 1)).mean()
            said.append(
                f"By direct attribution it writes most to the target in {_percent((with_controls['rank'] == 1).mean())}"
                f" of these, and an expert with a like gate elsewhere in {_percent(matched)} (chance alone would be "
                f"{_percent((1 / with_controls['n_chosen']).mean())})."
            )
        return said

    def to_markdown(self) -> str:
        """One page: the findings, cases by defect, one line per expert (triggers.md)."""
        s = self.settings
        lines = [
            "# Trigger-target cases", "", " ".join(self.findings()), "",
            f"Model {s.get('model')}, {len(self._once)} cases, live routing, seed {s.get('seed')}; differences between "
            f"two clean passes reach {s.get('noise_floor', np.nan):.2g} nats (99th percentile).", "",
            *(f"{note}\n" for note in s.get("notes", ())),
            *_markdown(pd.DataFrame([[name, n] for name, n in self.defects.items()], columns=["defect", "cases"])), "",
            *_markdown(self.lines()), "",
            "Of every expert the mode with the smaller effect. routed: share of usable cases with the expert chosen at "
            "the trigger; elsewhere: of other tokens. first: share of cases in which it writes most to the target's "
            "logit among the experts chosen there; like gates: the same of other experts with a like gate at other "
            "tokens. effect: nats of log p(target) that go with the expert at the trigger; over ...: what is left "
            "beyond experts chosen beside it, experts with like gates elsewhere, and its own effect on other experts' "
            "targets. Intervals are over texts.", "",
            *self._faulty(),
        ]  # fmt: skip
        return "\n".join(lines)

    def _faulty(self) -> list[str]:
        """Every case with a defect, for triggers.md."""
        wrong = self._once[[len(found) > 0 for found in self._once["defects"]]]
        if not len(wrong):
            return []
        rows = [
            [
                f"L{row.layer}.E{row.expert}",
                row.trigger,
                row.target,
                ", ".join(row.defects),
                "yes" if row.used else "no",
            ]
            for row in rows_of(wrong)
        ]
        return [
            "Cases with a defect:", "",
            *_markdown(pd.DataFrame(rows, columns=["expert", "trigger", "target", "defects", "used"])), "",
        ]  # fmt: skip

    def lines(self) -> pd.DataFrame:
        """One line per expert, as text, for tables that are read."""
        w = self.weakest
        text: dict[str, Any] = {
            "expert": w["address"], "outcome": w["outcome"], "mode": w["mode"], "used": w["n_used"],
            "routed": [_percent(value) for value in w["routed"]],
            "elsewhere": [_percent(value) for value in w["routed_elsewhere"]],
            "first": [_percent(value) for value in w["rank1"]],
            "like gates": [_percent(value) for value in w["rank1_matched"]],
            "q rank": [_number(value) for value in w["q_rank"]],
        }  # fmt: skip
        for name, title in _EFFECTS.items():
            rows = zip(w[name], w[f"{name}_low"], w[f"{name}_high"], strict=True)
            text[title] = [f"{_number(a)} [{_number(b)}, {_number(c)}]" for a, b, c in rows]
        return pd.DataFrame(text)

    def plot(self) -> go.Figure:
        """Effect at the trigger against that of experts with like gates, one dot per expert; causal ones in blue."""
        import plotly.graph_objects as go

        from moe_lens import plots

        w = self.weakest
        w = w.assign(other=w["effect"] - w["over_matched"]).dropna(subset=["effect", "other"])
        if not len(w):
            return plots.empty("No expert is chosen at the triggers of its cases", width=680, height=320)
        figure = go.Figure()
        for causal, colour in ((False, plots.MUTED), (True, plots.BLUE)):
            rows = w[(w["outcome"] == CAUSAL) == causal]
            names = zip(rows["address"], rows["mode"], rows["outcome"], strict=True)
            figure.add_scatter(
                x=rows["other"], y=rows["effect"], mode="markers", marker={"color": colour, "size": 9},
                text=[f"{a} ({m}): {o}" for a, m, o in names],
                error_y={
                    "type": "data", "symmetric": False, "array": rows["effect_high"] - rows["effect"],
                    "arrayminus": rows["effect"] - rows["effect_low"], "color": plots.RULE, "thickness": 1,
                },
                hovertemplate="%{text}<br>%{y:.3f} nats, like gates %{x:.3f}<extra></extra>",
            )  # fmt: skip
        low, high = float(w[["other", "effect"]].min().min()), float(w[["other", "effect"]].max().max())
        figure.add_scatter(
            x=[low, high], y=[low, high], mode="lines", hoverinfo="skip", line={"color": plots.MUTED, "dash": "dot"}
        )
        title = f"{self.outcomes[CAUSAL]} of {len(self._experts)} experts raise their targets at their triggers"
        plots.layout(figure, title, "Nats of log p(target); the line is that of equal effects", width=680, height=460)
        figure.update_xaxes(title="experts with like gates at other tokens")
        figure.update_yaxes(title="the expert at the trigger")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "run": self.settings.get("run"), "finding": self.finding(), "findings": self.findings(),
            "outcomes": self.outcomes, "defects": self.defects, "settings": dict(self.settings),
            "experts": self.frame.to_dict("records"),
        }  # fmt: skip

    def __repr__(self) -> str:
        return "\n".join([f"Triggers({len(self._experts)} experts, {len(self._once)} cases)", *self.findings()])

    def _repr_html_(self) -> str:
        from moe_lens.notebook import result_html, table_html

        return result_html(self.findings(), table_html(self.lines()))


def _percent(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "-"


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "-"


def _markdown(table: pd.DataFrame) -> list[str]:
    rows = [[str(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in table.to_numpy().tolist()]
    return ["| " + " | ".join(row) + " |" for row in [list(map(str, table.columns)), ["---"] * table.shape[1], *rows]]

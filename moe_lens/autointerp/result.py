"""``Labels``: the frozen result of labelling and scoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.autointerp.labels import KEY, usable, with_none
from moe_lens.errors import BadOutput, OutOfRange
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from moe_lens.capture.card import ExpertCard
    from moe_lens.capture.run import Run

HEADLINE = "same_token"
"""Negatives of the headline: the token id of a positive, not routed."""
_SCORERS = ("detection", "rule", "embedding", "fuzz")
"""In the order in which the headline looks for one."""
_ANSWERED = ("ok", "cached", "budget")
"""Outcomes of requests that are no trouble, or have a sentence of their own."""
N_SHOWN = 20
"""Labels that a notebook shows."""
_HEADINGS = {"address": "expert", "auroc": "AUROC", "ci_low": "from", "ci_high": "to", "bigram": "token pairs"}


@dataclass(frozen=True, repr=False)
class Labels:
    """Labels of experts and their scores.

    ``labels`` is labels.parquet, ``scores`` label_scores.parquet, ``summary`` the means over experts, ``answers``
    what was answered about each item, ``exemplars`` the tokens, ``outcomes`` requests to language models by how they
    ended, ``failures`` those without a reply by cause, ``run`` the directory they were written to, if any.
    """

    labels: pd.DataFrame
    scores: pd.DataFrame
    summary: pd.DataFrame
    answers: pd.DataFrame
    exemplars: pd.DataFrame
    outcomes: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    run: Run | None = None

    @classmethod
    def of(cls, run: Run, *, labeller: str | None = None) -> Labels:
        """Read labels back from a run directory.

        Args:
            labeller: whose, where there are those of several; the last that was written by default.

        Raises:
            BadOutput: the run holds no labels, or none of `labeller`.
        """
        if not run.has("label_scores"):
            raise BadOutput(f"{run.path} holds no scored labels: run moe-lens autointerp -o {run.path} first")
        tables = {name: run.frame(name) for name in ("labels", "label_scores", "label_summary", "label_answers")}
        known = list(dict.fromkeys(tables["labels"]["labeller"]))
        labeller = labeller or known[-1]
        if labeller not in known:
            raise BadOutput(f"{run.path} holds no labels of {labeller!r}: it has those of {', '.join(known)}")
        labels, scores, summary, answers = (
            table[table["labeller"] == labeller].reset_index(drop=True) for table in tables.values()
        )
        entry = run.manifest["commands"].get("autointerp", {}).get("labellers", {}).get(labeller, {})
        return cls(
            with_none(labels),
            scores,
            summary,
            answers,
            run.frame("exemplars"),
            entry.get("outcomes", {}),
            entry.get("failures", {}),
            run,
        )

    @property
    def labeller(self) -> str:
        return str(self.labels["labeller"].iloc[0])

    @property
    def scorer(self) -> str | None:
        """The scorer that the headline is of, None if nothing was judged."""
        return next((name for name in _SCORERS if (self.scores["scorer"] == name).any()), None)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per label, with its headline score: AUROC against the same token id, not routed."""
        columns = ["auroc", "ci_low", "ci_high", "unigram", "bigram", "margin_bigram", "margin_bigram_low", "n_abstain"]
        chosen = self._headline(self.scores)[[*KEY, *columns]]
        table = self.labels.merge(chosen, how="left", on=list(KEY))
        table.insert(0, "address", [f"L{a}.E{b}" for a, b in zip(table["layer"], table["expert"], strict=True)])
        return table

    def _headline(self, table: pd.DataFrame, *, control: str = "none") -> pd.DataFrame:
        at = (table["scorer"] == self.scorer) & (table["negatives"] == HEADLINE) & (table["control"] == control)
        return table[at]

    def __getitem__(self, address: str | ExpertAddress) -> ExpertCard:
        """Everything the run says about one expert.

        Raises:
            OutOfRange: an expert without exemplars.
            BadOutput: the labels were not written to a run directory.
        """
        if self.run is None:
            raise BadOutput("cards are read from a run directory: pass out= to ml.autointerp")
        return self.run.card(ExpertAddress.parse(address))

    def label(self, address: str | ExpertAddress) -> str | None:
        """The label of one expert (facets joined by ``;``), None without one.

        Raises:
            OutOfRange: the expert was not labelled.
        """
        at = ExpertAddress.parse(address)
        rows = self.labels[(self.labels["layer"] == at.layer) & (self.labels["expert"] == at.expert)]
        if not len(rows):
            raise OutOfRange(f"{at} was not labelled: choose from labels.frame.address")
        return "; ".join(usable(rows)["label"]) or None

    @property
    def counts(self) -> dict[str, int]:
        """Labels by status."""
        return {str(name): int(n) for name, n in self.labels["status"].value_counts().items()}

    @property
    def same_model(self) -> bool:
        """Whether one language model wrote labels and judged them."""
        return bool(self.scores["same_model"].any())

    def finding(self) -> str:
        """What the labels are worth in one sentence, beside what would have produced the same number."""
        n, ok = len(self.labels), len(usable(self.labels))
        noun = "facets" if (self.labels["facet"] > 0).any() else "experts"
        said = f"{ok} of {n} {noun} have a label ({self.labeller})"
        mean = self._mean()
        if mean is None:
            return f"{said}, but none could be scored on tokens of the same id: too few tokens, documents or answers."
        other = self._mean(control="shuffled")
        null = "" if other is None else f", another expert's label {other.auroc:.3f}"
        judge = f"{mean.scorer}, the model that wrote them, which favours them," if self.same_model else mean.scorer
        return (
            f"{said}, and on tokens of the same id that were not routed {judge} gives them a mean AUROC of "
            f"{mean.auroc:.3f} [{mean.ci_low:.3f}, {mean.ci_high:.3f}] (a table of token pairs {mean.bigram:.3f}, of "
            f"tokens {mean.unigram:.3f}{null}): {int(mean.n_above_bigram)} of {int(mean.n_experts)} surely "
            "predict routing better than the pair table."
        )

    def findings(self) -> list[str]:
        """`finding`, then what kept language models from answering."""
        said = [self.finding()]
        if left := self.outcomes.get("budget"):
            said.append(f"The budget left {left} requests unasked.")
        if trouble := {name: n for name, n in self.outcomes.items() if n and name not in _ANSWERED}:
            causes = ", ".join(f"{n} {cause}" for cause, n in self.failures.items())
            asides = {"failed": f" ({causes})"} if causes else {}
            words = ", ".join(f"{n} {name}{asides.get(name, '')}" for name, n in trouble.items())
            said.append(f"Requests without a usable reply: {words}.")
        return said

    def _mean(self, *, control: str = "none") -> Any | None:
        """The row of `summary` that the headline quotes, None if nothing could be scored."""
        row: Any = next(self._headline(self.summary, control=control).itertuples(), None)
        return None if row is None or pd.isna(row.auroc) else row

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        means = self.summary.to_dict("records")
        return {
            "run": str(self.run.path) if self.run else None,
            "labeller": self.labeller,
            "finding": self.finding(),
            "findings": self.findings(),
            "labels_by_status": self.counts,
            "requests_by_outcome": {name: n for name, n in self.outcomes.items() if n},
            "failures_by_cause": dict(self.failures),
            "same_model": self.same_model,
            "summary": means,
            "labels": self.frame[["address", "facet", "label", "rule", "status", "auroc", "ci_low", "ci_high"]].to_dict(
                "records"
            ),
        }

    def plot(self) -> go.Figure:
        """One dot per label: its headline AUROC against that of the table of token pairs, by layer."""
        from moe_lens.autointerp.figure import against_bigram

        return against_bigram(self.frame)

    def __repr__(self) -> str:
        return "\n".join([f"Labels({len(self.labels)} of {self.labeller})", *self.findings()])

    def _repr_html_(self) -> str:
        from moe_lens.notebook import result_html, table_html

        columns = ["address", "label", "status", "auroc", "ci_low", "ci_high", "bigram"]
        best = self.frame.sort_values("auroc", ascending=False, na_position="last")[columns].head(N_SHOWN)
        said = self.findings()
        if len(self.frame) > len(best):
            said.append(f"Below: the {len(best)} of {len(self.frame)} with the highest AUROC, which flatters them.")
        return result_html(said, table_html(best, headings=_HEADINGS))

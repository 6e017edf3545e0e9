"""``page(trial)``: validation.md, one page with every statistic of METRICS 3 for every label on trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from moe_lens.causal.trial.claims import REAL
from moe_lens.causal.trial.verdict import ROUTING, Exclusive, Verdict

if TYPE_CHECKING:
    from moe_lens.causal.trial.result import Trial

_SOME = {"PR-AUC": "pr_auc", "dose": "dose_response", "replaceability": "replaceability", "kappa": "kappa_judge"}
"""Statistics that some trials have, by their names on the page."""


def page(trial: Trial, real: pd.DataFrame, order: Sequence[Verdict]) -> str:
    """What was tried, the finding, verdicts by kind, and two tables with a line for each label.

    Args:
        real: of every real label the row of the mode with the smaller need, and its ``address``.
        order: of verdicts.
    """
    s = trial.settings
    by_kind, verdicts = tables(trial, real, order)
    lines = [
        "# Labels on trial", "", trial.finding(), "",
        f"Model {s.get('model')}, text {s.get('corpus')}: {s.get('n_predictions', 0):,} predictions in "
        f"{s.get('n_documents', 0):,} held-out documents, live routing, horizon {s.get('horizon')}. Judge: "
        f"{s.get('judge') or 'the rules and concepts of the labels'}. An expert counts as needed from "
        f"{s.get('delta', float('nan')):.3g} nats per token in both modes. {' '.join(trial.findings()[1:])}", "",
        *_markdown(by_kind), "",
        "effect: nats per token that visited tokens of the label lose without the expert. need: the same beyond a "
        "co-selected one at equal gates; the mode with the smaller need is shown. routing: AUROC of the label for the "
        f"expert's visits, from {ROUTING}. Supported also asks for an effect above 0 in both modes, and routing-only "
        "for none surely above that threshold: where effect and need disagree, a label is undecided.", "",
        *_markdown(verdicts), "",
        "Behind them, in the same mode. tokens, documents: marked and visited / marked only / visited only / neither, "
        "and documents with marked / visited / both / visited only. C: mean effect at marked tokens minus at others; "
        "C visited: the same among visited tokens; specificity: C minus that of load-matched experts; elsewhere: "
        "effect at visits that are not marked; X: need at marked minus at other visits; AUROC and PR-AUC of the effect "
        "for the label; kappa: agreement of two judges. "
        f"{int(real['specificity'].notna().sum())} of {len(real)} labels have a load-matched expert on trial; "
        "--matched layer measures all experts of the layer for it.",
        "", *_markdown(_behind(real)), "",
    ]  # fmt: skip
    return "\n".join(lines)


def tables(trial: Trial, real: pd.DataFrame, order: Sequence[Verdict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Labels by kind and verdict, and the verdicts with their numbers, as text."""
    return _by_kind(trial.summary(), order), _verdicts(real)


def about_supported(real: pd.DataFrame) -> list[str]:
    """How many of the supported labels name a place where the expert is needed more than at its other visits."""
    supported = real[real["verdict"] == str(Verdict.SUPPORTED)]["exclusive"].value_counts()
    words = ", ".join(f"{supported.get(str(word), 0)} {word}" for word in Exclusive)
    return [f"Need of supported labels beside that at their experts' other visits: {words}."] if len(supported) else []


def assignment(frame: pd.DataFrame) -> list[str]:
    """Whether labels fit their own experts better than each other's, over layers and modes."""
    rows = frame[frame["label_kind"] == REAL].drop_duplicates(["layer", "mode"])
    rows = rows[rows["p_assignment"].notna() & (rows["p_assignment_floor"] <= 0.05)]  # few labels show nothing
    if not len(rows):
        return []
    return [
        "Labels fit their own experts better than one another's (p up to .05, uncorrected) in "
        f"{int((rows['p_assignment'] <= 0.05).sum())} of {len(rows)} pairs of layer and mode."
    ]


def _by_kind(summary: pd.DataFrame, order: Sequence[Verdict]) -> pd.DataFrame:
    wide = summary.pivot(index="label_kind", columns="verdict", values="n")
    wide = wide.reindex(index=list(dict.fromkeys(summary["label_kind"])), columns=[str(v) for v in order])
    found = summary[summary["verdict"] == str(Verdict.SUPPORTED)].set_index("label_kind")
    wide["share supported"] = [f"{r.share:.0%} [{r.low:.0%}, {r.high:.0%}]" for r in found.loc[wide.index].itertuples()]
    return wide.rename_axis(columns=None).reset_index(names="labels")


def _verdicts(real: pd.DataFrame) -> pd.DataFrame:
    columns = {
        "expert": real["address"], "verdict": real["verdict"],
        "exclusive": real["exclusive"].where(real["verdict"] == str(Verdict.SUPPORTED), ""),
        "effect": _intervals(real, "effect_z1r1"), "need": _intervals(real, "need"),
        "q": real["q"].map("{:.3f}".format),
        "routing": _intervals(real, "auroc_routing", 2), "lift": real["lift"].map("{:.1f}".format),
        "documents": real["n_docs_z1r1"], "label": real["label"],
    }  # fmt: skip
    return pd.DataFrame(columns)


def _behind(real: pd.DataFrame) -> pd.DataFrame:
    tokens = [f"n_tokens_{cell}" for cell in ("z1r1", "z1r0", "z0r1", "z0r0")]
    documents = [f"n_docs_{cell}" for cell in ("z1", "r1", "z1r1", "z0r1")]
    numbers = {"C": ("contrast", 4), "C visited": ("contrast_routed", 4), "specificity": ("specificity", 4)}
    columns = {
        "expert": real["address"], "mode": real["mode"], "basis": real["basis"],
        "tokens": real[tokens].astype(str).agg(" / ".join, axis=1),
        "documents": real[documents].astype(str).agg(" / ".join, axis=1),
        "load": real["load"], "gate mass": real["gate_mass"].map("{:.1f}".format),
        **{name: real[column].map(f"{{:.{digits}f}}".format) for name, (column, digits) in numbers.items()},
        "elsewhere": _intervals(real, "effect_z0r1"), "X": _intervals(real, "exclusivity"),
        "p": real["p"].map("{:.4f}".format),
        "AUROC effect": real["auroc_effect"].map("{:.2f}".format), "abstained": real["abstained"].map("{:.0%}".format),
    }  # fmt: skip
    some = {name: real[column] for name, column in _SOME.items() if real[column].notna().any()}
    return pd.DataFrame(columns | {name: values.map("{:.2f}".format) for name, values in some.items()})


def _intervals(table: pd.DataFrame, name: str, digits: int = 3) -> list[str]:
    """``value [low, high]`` of every row."""
    bounds = table[[name, f"{name}_low", f"{name}_high"]].to_numpy().tolist()
    return ["{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*row, d=digits) if row[0] == row[0] else "nan" for row in bounds]


def _markdown(table: pd.DataFrame) -> list[str]:
    cells = [[_cell(value) for value in row] for row in table.to_numpy().tolist()]
    return ["| " + " | ".join(row) + " |" for row in [list(map(str, table.columns)), ["---"] * table.shape[1], *cells]]


def _cell(value: object) -> str:
    text = str(value).replace("|", "\\|").replace("\n", " ")
    return "-" if text == "nan" else text

"""Labels on trial: verdicts, true labels beside false ones, and one figure for every expert on trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from moe_lens.causal.trial.claims import REAL
from moe_lens.causal.trial.result import VERDICT_ORDER, Trial
from moe_lens.causal.trial.verdict import Verdict
from moe_lens.report.claims import Claim
from moe_lens.report.parts import Figure, Part, Section, Table

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_LABEL = ("label_kind", "layer", "expert", "facet")
_SHOWN = ("address", "facet", "label", "verdict", "exclusive", "need", "need_low", "need_high", "q", "auroc_routing",
          "lift", "n_docs_z1r1", "mode")  # fmt: skip
_HEADINGS = {
    "address": "expert", "n_docs_z1r1": "documents", "auroc_routing": "routing AUROC", "need": "need, nats",
    "exclusive": "exclusive need?", "label_kind": "labels", "n": "labels with it", "mode": "ablation",
}  # fmt: skip
_FORMS = {
    **dict.fromkeys(("need", "need_low", "need_high", "exclusivity"), ".4f"),
    **dict.fromkeys(("q", "auroc_routing", "auroc_routing_low"), ".3f"),
    "lift": ".2f", **dict.fromkeys(("share", "low", "high"), ".1%"),
}  # fmt: skip


def section(run: Run, say: Claims) -> Section | None:
    """None without a trial: the front page and the table of experts name the command that adds it."""
    if not run.has("validation"):
        return None
    trial = Trial.of(run)
    weakest = trial.verdicts
    weakest = weakest[[name for name in _SHOWN if name != "facet" or weakest["facet"].any()]]
    by_expert = {address: _of_expert(trial, address) for address in dict.fromkeys(weakest["address"])}
    parts: list[Part] = [
        Figure.of("trial-plane", trial.plot(), rows=_rows(trial.frame), source="validation.parquet"),
        Table("trial-verdicts", "Verdicts on labels", weakest, "validation.parquet", headings=_HEADINGS, forms=_FORMS,
              intervals={"need": ("need_low", "need_high")}, search=True, filters=("verdict",),
              links="address" if run.has("exemplars") else None),
        Table("trial-kinds", "True and false labels by verdict", trial.summary(), "validation.parquet",
              headings=_HEADINGS, forms=_FORMS, intervals={"share": ("low", "high")},
              filters=("label_kind", "verdict")),
    ]  # fmt: skip
    if by_expert:
        first = next(iter(by_expert.values()))
        choices = {address: figure.plot for address, figure in by_expert.items()}
        parts.append(
            Figure("trial-expert", "One expert on trial", first.subtitle, first.plot, _rows(trial.frame),
                   "validation.parquet", choices, "expert", rows_of="trial-plane")
        )  # fmt: skip
    return Section("trial", "Labels on trial", _lead(run, say), tuple(parts))


def _lead(run: Run, say: Claims) -> Markup:
    real = {"label_kind": REAL}
    counts = [
        Markup("{} {}").format(say.count("validation", where={**real, "verdict": verdict}, distinct=_LABEL), verdict)
        for verdict in map(str, VERDICT_ORDER)
    ]
    said = Markup("Of {} labels on trial{}: {}.").format(
        say.count("validation", where=real, distinct=_LABEL), _sample(run, say), Markup(", ").join(counts)
    )
    false = {"label_kind": {"!=": REAL}}
    if say.number(Claim("validation", false, "count")):
        said += Markup(" Of {} false labels, {} supported.").format(
            say.count("validation", where=false, distinct=_LABEL),
            say.count("validation", where={**false, "verdict": str(Verdict.SUPPORTED)}, distinct=_LABEL),
        )
    return said + Markup(
        " A label is supported if its expert is visited where it holds, and the model predicts worse there without "
        "that expert than without another one chosen beside it. Both ablation modes must agree."
    )


def _sample(run: Run, say: Claims) -> Markup:
    if not run.manifest["commands"].get("validate", {}).get("settings", {}).get("is_sample"):
        return Markup("")
    return Markup(", a sample of {} that holds experts of all loads").format(
        say.fact("commands.validate.settings.n_labels")
    )


def _of_expert(trial: Trial, address: str) -> Figure:
    return Figure.of("trial-expert", trial.plot(address), rows=trial.frame.head(0), source="", least=820)


def _rows(frame: pd.DataFrame) -> pd.DataFrame:
    """What is worth reading outside: every row, without the columns that are the same in all of them."""
    same = [name for name in frame if name not in ("label_kind", "mode") and frame[name].nunique(dropna=False) == 1]
    return frame.drop(columns=same)

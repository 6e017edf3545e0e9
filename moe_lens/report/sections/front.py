"""The front page: four questions, answered in a sentence or two each, with numbers taken from the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from moe_lens import plots
from moe_lens.report.claims import Claim
from moe_lens.report.parts import Answers, Missing, Section

if TYPE_CHECKING:
    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_LABEL = ("layer", "expert", "facet")
_STEPS = {
    "search": "search among more cells", "reuse": "reuse of test data", "candidates": "candidates and token counts",
    "routing": "routing",
}  # fmt: skip
N_EXPERTS = 5
"""Experts that the third answer names."""


def section(run: Run, say: Claims) -> Section:
    """The four answers; one that the run cannot give yet says which command would."""
    model = run.manifest["model"]["name"]
    answers: tuple[tuple[str, Markup | Missing], ...] = (
        ("Where does the monosemanticity gap go, and what is left for the neurons?", _gap(run, say, model)),
        ("How many labels survived trial?", _labels(run, say, model)),
        ("Which experts matter most?", _experts(run, say, model)),
        ("What could not be decided, and why?", _undecided(run, say)),
    )
    lead = "Underlined numbers say, when you point at them, which rows of which table they come from."
    return Section("findings", "Findings", lead, (Answers(answers),))


def _gap(run: Run, say: Claims, model: str) -> Markup | Missing:
    steps = say.table("waterfall") if run.has("waterfall") else pd.DataFrame()
    if not len(steps):
        return Missing("", f"moe-lens probe --model {model} --baseline DENSE_MODEL -o DIR")
    k = int(steps["k"].min())
    at: dict[str, Any] = {"metric": "f1_balanced", "k": k, "group": "__mean__", "order": "forward"}

    def number(step: str, form: str = "+.3f") -> Markup:
        where = {**at, "step": step, "kind": "level" if step in ("raw", "left") else "removed"}
        return say.interval("waterfall", ("value", "ci_low", "ci_high"), where=where, form=form)

    there = set(steps[(steps["metric"] == at["metric"]) & (steps["group"] == "__mean__")]["step"])
    removed = [Markup("{} {}").format(name, number(step)) for step, name in _STEPS.items() if step in there]
    said = Markup(
        "As published, best neuron against best neuron, the MoE minus the dense model is {} balanced F1 (k = {}). {}"
    )
    said = said.format(number("raw"), k, Markup("Of that, {}. ").format(Markup(", ").join(removed)) if removed else "")
    if "left" not in there:
        return said
    left = steps[(steps[list(at)] == pd.Series(at)).all(axis=1) & (steps["step"] == "left")].iloc[0]
    verdict = (
        "not distinguishable from zero" if left.ci_low <= 0 <= left.ci_high
        else "in favour of the MoE" if left.value > 0 else "in favour of the dense model"
    )  # fmt: skip
    return said + Markup(
        "{} is left for the neurons: {}. It is a mean over {} concept groups; one pair of models."
    ).format(
        number("left"),
        verdict,
        say.value("waterfall", "n_groups", where={**at, "step": "left", "kind": "level"}, form=".0f"),
    )


def _labels(run: Run, say: Claims, model: str) -> Markup | Missing:
    if not run.has("validation"):
        before = "" if run.has("labels") else f"moe-lens autointerp --model {model} -o DIR && "
        return Missing("", f"{before}moe-lens validate --model {model} -o DIR")
    real = {"label_kind": "real"}

    def count(verdict: str, kind: str = "real") -> Markup:
        return say.count("validation", where={"label_kind": kind, "verdict": verdict}, distinct=_LABEL)

    said = Markup(
        "{} of {} labels on trial are supported, {}: their experts are visited where the label holds, and needed "
        "there. {} are about routing only, {} refuted."
    ).format(
        count("supported"), say.count("validation", where=real, distinct=_LABEL),
        say.share("validation", where={"verdict": "supported"}, among=real, distinct=_LABEL),
        count("routing-only"), count("refuted"),
    )  # fmt: skip
    kinds = [kind for kind in say.table("validation")["label_kind"].unique() if kind != "real"]
    if kinds:
        false = [
            Markup("{} {} of {}, {}").format(
                kind, count("supported", kind), say.count("validation", where={"label_kind": kind}, distinct=_LABEL),
                say.share("validation", where={"verdict": "supported"}, among={"label_kind": kind}, distinct=_LABEL),
            )
            for kind in kinds
        ]  # fmt: skip
        said += Markup(" False labels that passed the same trial: {}. Where these intervals overlap the labels' own, "
                       "support says little for the words.").format(Markup("; ").join(false))  # fmt: skip
    settings = run.manifest["commands"].get("validate", {}).get("settings", {})
    if settings.get("is_sample"):
        said += Markup(" The labels on trial are a sample of {}.").format(settings["n_labels"])
    return said


def _experts(run: Run, say: Claims, model: str) -> Markup | Missing:
    if not run.has("faithfulness_units"):
        return Missing("", f"moe-lens faithfulness --model {model} -o DIR")
    units, gaps = say.table("faithfulness_units"), say.table("faithfulness_gaps")
    rankings = [str(c).removeprefix("score_") for c in units if str(c).startswith("score_") and c != "score_random"]
    ranking = next((name for name in ("leave_one_out", "gradient") if name in rankings), rankings[0])
    score = f"score_{ranking}"
    top = units.nlargest(N_EXPERTS, score)
    names = [
        Markup("{} ({})").format(
            f"L{row.layer}.E{row.expert}",
            say.value("faithfulness_units", score, where={"layer": row.layer, "expert": row.expert}, form=".3g"),
        )
        for row in plots.rows_of(top)
    ]
    said = Markup("By {} (scores in brackets): {}.").format(ranking.replace("_", " "), Markup(", ").join(names))
    for mode in gaps["mode"].unique():
        where = {"ranking": ranking, "mode": mode, "quantity": "aopc", "super_experts": "included", "control": "random",
                 "score": "comprehensiveness_kl"}  # fmt: skip
        if (gaps[list(where)] == pd.Series(where)).all(axis=1).sum() == 1:
            said += Markup(" Under {}, ablating the first of that ranking costs {} nats more than ablating as many "
                           "random experts of the same layers (p = {}).").format(
                mode, say.interval("faithfulness_gaps", ("gap", "low", "high"), where=where, form="+.3f"),
                say.value("faithfulness_gaps", "p", where=where, form=".2f"),
            )  # fmt: skip
    notes = run.manifest["commands"].get("faithfulness", {}).get("notes", [])
    return said + Markup("").join(Markup(" {}.").format(f"{note[0].upper()}{note[1:]}") for note in notes)


def _undecided(run: Run, say: Claims) -> Markup:
    said = []
    if run.has("probe"):
        too_few = {"status": "too_few"}
        said.append(
            Markup("{} of {} probes had too few tokens or documents of their concept.").format(
                say.count("probe", where=too_few), say.count("probe")
            )
        )
    if run.has("labels"):
        without = [s for s in say.table("labels")["status"].unique() if s != "ok"]
        said.append(
            Markup("{} of {} experts have no label.").format(
                say.count("labels", where={"status": without}, distinct=_LABEL), say.count("labels", distinct=_LABEL)
            )
        )
    if run.has("validation"):
        said.append(_open_labels(say))
    if not said:
        return Markup("Nothing was tried yet that could fail.")
    return Markup(" ").join(said)


def _open_labels(say: Claims) -> Markup:
    def count(**where: Any) -> Markup:
        return say.count("validation", where={"label_kind": "real", **where}, distinct=_LABEL)

    underpowered = {"label_kind": "real", "verdict": "underpowered"}
    why = Markup("")
    if say.number(Claim("validation", underpowered, "count")):
        why = Markup(
            " (a median of {} documents where the label holds and {} where the expert is visited; each takes 30)"
        )
        why = why.format(*(say.of("median", "validation", name, where=underpowered, form=".0f")
                           for name in ("n_docs_z1", "n_docs_r1")))  # fmt: skip
    return Markup(
        "{} labels are underpowered{}, and {} undecided: their intervals allow a need and none, or taking the expert "
        "away costs something, but no more than another expert at its weights would."
    ).format(count(verdict="underpowered"), why, count(verdict="undecided"))

"""The front page: four questions, each answered in one line, with bars to look at and the sentences that go with it.

Numbers are taken from the tables (`claims`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from moe_lens import plots
from moe_lens.report.claims import Claim
from moe_lens.report.missing import command
from moe_lens.report.parts import Answer, Answers, Piece, Section, Strip, Unanswered
from moe_lens.types import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_LABEL = ("layer", "expert", "facet")
_STEPS = {
    "raw": ("raw gap", "raw"),
    "search": ("search among cells", "measured"),
    "reuse": ("reuse of test data", "measured"),
    "candidates": ("candidates, tokens", "measured"),
    "routing": ("routing", "through"),
    "left": ("left for neurons", "neurons"),
}
"""Steps of the waterfall, with their names and the class of their bars."""
_VERDICTS = ("supported", "routing-only", "refuted", "underpowered", "undecided")
N_EXPERTS = 5
"""Experts that the third answer names."""


def section(run: Run, say: Claims) -> Section:
    """The four answers; one that the run cannot give yet says which command would."""
    answers = tuple(answer(run, say) for answer in (_gap, _labels, _experts, _undecided))
    lead = "Underlined numbers say, when you point at them, which rows of which table they come from."
    return Section("findings", "Findings", lead, (Answers(answers),))


def _gap(run: Run, say: Claims) -> Answer | Unanswered:
    question = "Where does the monosemanticity gap go, and what is left for the neurons?"
    table = say.table("waterfall") if run.has("waterfall") else pd.DataFrame()
    if not len(table):
        return Unanswered(question, command(run, "probe", baseline=True))
    at: dict[str, Any] = {"metric": "f1_balanced", "k": int(table["k"].min()), "group": "__mean__", "order": "forward"}
    rows = table[(table[list(at)] == pd.Series(at)).all(axis=1) & (table["kind"] != "null")].set_index("step")

    def number(step: str, *, whole: bool = True) -> Markup:
        where = {**at, "step": step, "kind": rows.loc[step, "kind"]}
        if whole and where["kind"] == "removed":  # as in the figure: what the step does to the gap
            return say.interval("waterfall", ("value", "ci_high", "ci_low"), where=where, form="+.3f", times=-1.0)
        if whole:
            return say.interval("waterfall", ("value", "ci_low", "ci_high"), where=where, form="+.3f")
        return say.value("waterfall", "value", where=where, form="+.3f")

    said = [
        Markup("As published, best neuron against best neuron, the MoE minus the dense model is {} balanced F1 "
               "(k = {}). Bars: what each control does to that gap.").format(number("raw"), at["k"])
    ]  # fmt: skip
    head = Markup("The raw gap is {}").format(number("raw"))
    if "left" in rows.index:
        left: Any = rows.loc["left"]
        verdict = (
            "not distinguishable from zero" if left.ci_low <= 0 <= left.ci_high
            else "in favour of the MoE" if left.value > 0 else "in favour of the dense model"
        )  # fmt: skip
        head = Markup("{} of {} is left for the neurons: {}").format(
            number("left"), number("raw", whole=False), verdict
        )
        n = say.value("waterfall", "n_groups", where={**at, "step": "left", "kind": "level"}, form=".0f")
        said.append(Markup("It is a mean over {} concept groups; one pair of models.").format(n))
    legend = (("measured", "due to how it is measured"), ("through", "due to routing"), ("neurons", "left"))
    return Answer(question, head, tuple(said), (("probing", "Waterfall and probes"),), _ladder(rows, number), legend)


def _ladder(rows: pd.DataFrame, number: Any) -> tuple[Strip, ...]:
    """One bar a step, from what was left before it to what is left after."""
    steps = [step for step in _STEPS if step in rows.index]
    spans = []
    for step in steps:
        row: Any = rows.loc[step]
        spans.append((0.0, row["value"]) if row["kind"] == "level" else (row["after"], row["after"] + row["value"]))
    low, high = min(0.0, *map(min, spans)), max(0.0, *map(max, spans))
    scale = 100 / (high - low or 1.0)
    return tuple(
        Strip(
            _STEPS[step][0],
            (Piece((min(span) - low) * scale, abs(span[1] - span[0]) * scale, _STEPS[step][1], _STEPS[step][0]),),
            number(step), zero=-low * scale,
        )
        for step, span in zip(steps, spans, strict=True)
    )  # fmt: skip


def _labels(run: Run, say: Claims) -> Answer | Unanswered:
    question = "How many labels survived trial?"
    if not run.has("validation"):
        return Unanswered(question, command(run, "validate"))

    def count(kind: str, **where: Any) -> Markup:
        return say.count("validation", where={"label_kind": kind, **where}, distinct=_LABEL)

    def share(kind: str) -> Markup:
        return say.share("validation", where={"verdict": "supported"}, among={"label_kind": kind}, distinct=_LABEL)

    false = [kind for kind in say.table("validation")["label_kind"].unique() if kind != "real"]
    head = Markup("{} of {} labels supported").format(count("real", verdict="supported"), count("real"))
    said = [
        Markup("Supported: the expert is visited where the label holds, and needed there. {} of the labels are about "
               "routing only, {} refuted.").format(
            count("real", verdict="routing-only"), count("real", verdict="refuted")
        )
    ]  # fmt: skip
    if false:
        counts = [Markup("{} {} of {}").format(kind, count(kind, verdict="supported"), count(kind)) for kind in false]
        head += Markup("; false ones: {}").format(Markup(", ").join(counts))
        said.append(
            Markup("False labels ({}) went through the same trial. {}").format(", ".join(false), _beside(say, false))
        )
    settings = run.manifest["commands"].get("validate", {}).get("settings", {})
    if settings.get("is_sample"):
        n = say.fact("commands.validate.settings.n_labels")
        said.append(
            Markup("{} of {} labels were tried, a sample that holds experts of all loads.").format(count("real"), n)
        )
    strips = [_verdicts(say, kind, share(kind)) for kind in ("real", *false)]
    seen = [v for v in _VERDICTS if any(piece.kind == v for strip in strips for piece in strip.pieces)]
    return Answer(
        question, head, tuple(said), (("trial", "Labels on trial"),), tuple(strips), tuple((v, v) for v in seen)
    )


def _beside(say: Claims, false: Sequence[str]) -> str:
    """Which kinds of false labels are supported about as often as the labels themselves."""

    def end(take: str, kind: str) -> float:
        claim = Claim("validation", {"verdict": "supported"}, take, distinct=_LABEL, among={"label_kind": kind})
        return say.number(claim)

    alike = [kind for kind in false if end("share_low", "real") <= end("share_high", kind)]
    if not alike:
        return "None of their intervals reaches the labels' own."
    which = "All of their intervals" if len(alike) == len(false) else f"The intervals of {' and '.join(alike)}"
    return f"{which} reach the labels' own: beside these, support says little for the words."


def _verdicts(say: Claims, kind: str, said: Markup) -> Strip:
    """Verdicts of one kind of labels as a bar, each with its number."""
    claims = {v: Claim("validation", {"label_kind": kind, "verdict": v}, "count", distinct=_LABEL) for v in _VERDICTS}
    counts = np.array([say.number(claim) for claim in claims.values()])
    ends = 100 * np.cumsum(counts) / max(counts.sum(), 1)
    pieces = [
        Piece(end - width, width, verdict, verdict, say.show(claim))
        for (verdict, claim), end, width in zip(claims.items(), ends, np.diff(ends, prepend=0), strict=True)
        if width
    ]
    return Strip("labels" if kind == "real" else kind, tuple(pieces), said)


def _experts(run: Run, say: Claims) -> Answer | Unanswered:
    question = "Which experts matter most?"
    if not run.has("faithfulness_units"):
        return Unanswered(question, command(run, "faithfulness"))
    units = say.table("faithfulness_units")
    rankings = [str(c).removeprefix("score_") for c in units if str(c).startswith("score_") and c != "score_random"]
    ranking = next((name for name in ("leave_one_out", "gradient") if name in rankings), rankings[0])
    score = f"score_{ranking}"
    top = units.nlargest(N_EXPERTS, score)
    largest = top[score].abs().max() or 1.0
    names, strips = [], []
    for row in plots.rows_of(top):
        name = _linked(run, f"L{row.layer}.E{row.expert}")
        where = {"layer": row.layer, "expert": row.expert}
        piece = Piece(0.0, 100 * max(float(getattr(row, score)), 0.0) / largest, "value", "score")
        strips.append(Strip(name, (piece,), say.value("faithfulness_units", score, where=where, form=".3g")))
        names.append(name)
    said = [Markup("Ranked by {}; bars: its score.").format(ranking.replace("_", " "))]
    gaps = say.table("faithfulness_gaps") if run.has("faithfulness_gaps") else pd.DataFrame({"mode": []})
    for mode in gaps["mode"].unique():
        where = {"ranking": ranking, "mode": mode, "quantity": "aopc", "super_experts": "included", "control": "random",
                 "score": "comprehensiveness_kl"}  # fmt: skip
        if (gaps[list(where)] == pd.Series(where)).all(axis=1).sum() == 1:
            said.append(Markup("Under {}, ablating the first of that ranking costs {} nats more than ablating as many "
                               "random experts of the same layers (p = {}).").format(
                mode, say.interval("faithfulness_gaps", ("gap", "low", "high"), where=where, form="+.3f"),
                say.value("faithfulness_gaps", "p", where=where, form=".2f"),
            ))  # fmt: skip
    notes = run.manifest["commands"].get("faithfulness", {}).get("notes", [])
    said += [Markup("{}.").format(f"{note[0].upper()}{note[1:]}") for note in notes]
    head = Markup(", ").join(names)
    return Answer(question, head, tuple(said), (("faithfulness", "Faithfulness of rankings"),), tuple(strips))


def _linked(run: Run, address: str) -> Markup:
    if run.has("exemplars") and run.has("routing"):  # then there are cards
        return Markup('<a href="#{}">{}</a>').format(address, address)
    return Markup("{}").format(address)


def _undecided(run: Run, say: Claims) -> Answer:
    head, said, strips, links = [], [], [], []

    def part(name: str, some: Claim, every: Claim) -> Markup:
        n, of = say.number(some), say.number(every)
        text = Markup("{} of {}").format(say.show(some), say.show(every))
        strips.append(Strip(name, (Piece(0.0, 100 * n / of if of else 0.0, "false", name),), text))
        return text

    if run.has("probe"):
        found = part("probes too small", Claim("probe", {"status": "too_few"}, "count"), Claim("probe", {}, "count"))
        head.append(Markup("{} probes").format(found))
        said.append(Markup("Probes had too few tokens or documents of their concept."))
        rest = Claim("probe", {"status": str(Status.NOT_FITTED)}, "count")
        if say.number(rest):
            said.append(Markup("{} more were not fitted: beyond the smallest k only the best cells are probed.").format(
                say.show(rest)))  # fmt: skip
        links.append(("probing", "Probes"))
    if run.has("labels"):
        without = [s for s in say.table("labels")["status"].unique() if s != "ok"]
        found = part("no label", Claim("labels", {"status": without}, "count", distinct=_LABEL),
                     Claim("labels", {}, "count", distinct=_LABEL))  # fmt: skip
        said.append(Markup("{} experts have no label.").format(found))
        links.append(("experts", "Experts"))
    if run.has("validation"):
        real = {"label_kind": "real"}
        undecided, every = (Claim("validation", where, "count", distinct=_LABEL)
                            for where in ({**real, "verdict": "undecided"}, real))  # fmt: skip
        head.append(Markup("{} labels undecided").format(part("labels undecided", undecided, every)))
        said += _open_labels(say)
        links.append(("trial", "Labels on trial"))
    if not said:
        return Answer(_OPEN, Markup("Nothing yet"), (Markup("Nothing was tried yet that could fail."),))
    return Answer(_OPEN, _joined(head) or said[0], tuple(said), tuple(links), tuple(strips))


_OPEN = "What could not be decided, and why?"


def _joined(pieces: Sequence[Markup]) -> Markup:
    return Markup(", ").join(pieces)


def _open_labels(say: Claims) -> list[Markup]:
    underpowered = {"label_kind": "real", "verdict": "underpowered"}
    n = Claim("validation", underpowered, "count", distinct=_LABEL)
    why = Markup("")
    if say.number(n):
        why = Markup(
            " (a median of {} documents where the label holds and {} where the expert is visited; each takes 30)"
        )
        why = why.format(*(say.of("median", "validation", name, where=underpowered, form=".0f")
                           for name in ("n_docs_z1", "n_docs_r1")))  # fmt: skip
    return [
        Markup("{} labels are underpowered{}. Of the undecided, intervals allow a need and none, or taking the expert "
               "away costs something, but no more than another expert at its weights would.").format(say.show(n), why)
    ]  # fmt: skip

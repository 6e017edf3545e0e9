"""What ``moe-lens validate`` shows on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_lens.cli.terminal import aside, more_tables, number, say, table

if TYPE_CHECKING:
    from moe_lens.causal.trial.plan import TrialPlan
    from moe_lens.causal.trial.result import Trial

N_SHOWN = 20
_EXCLUSIVE = {"exclusive": "yes", "not exclusive": "no", "by routing": "by routing", "unknown": "unknown"}


def trial(found: Trial, *, details: bool = False) -> None:
    """Verdicts and the finding; with details every label, and counts by verdict beside those of false labels."""
    verdicts(found, details=details)
    if details:
        counts(found)
    say(*found.findings()) if details else say(found.finding())
    aside(*found.settings.get("notes", ()))
    aside("" if details else more_tables(1))


def verdicts(found: Trial, *, details: bool = False) -> None:
    """One line per real label, supported ones first."""
    frame = found.verdicts
    rows = [
        [
            row["address"] + (f".{row['facet']}" if row["facet"] else ""),
            row["verdict"],
            number(1000 * row["effect_z1r1"], 0),
            _span(row, "need", scale=1000, digits=0),
            _EXCLUSIVE[row["exclusive"]] if row["verdict"] == "supported" else "",
            number(row["auroc_routing"], 2),
            str(int(row["n_docs_z1r1"])),
            row["label"],
        ]
        for row in frame.head(len(frame) if details else N_SHOWN).to_dict("records")
    ]
    delta = number(1000 * found.settings["delta"], 0)
    note = (
        "effect: mnat (thousandths of a nat) per token lost there without the expert; need: what of it is lost beyond "
        f"taking away another expert chosen beside it; support asks for {delta} or more; routing: AUROC of the label "
        "for the visits; docs: with a visited token of the label"
    )
    if details:
        note = (
            "effect: mnat per token that visited tokens of the label lose without the expert. need: the same beyond "
            "one chosen beside it at equal weight, with 95 % interval, in the mode where it is smaller; it counts from "
            f"{delta} mnat, and only with an effect above 0. exclusive: needed more there than at its other tokens? "
            "routing: AUROC of the label for the visits. docs: with a visited token of the label"
        )
    left = len(frame) - len(rows)
    columns = ["=expert", "=verdict", "~>effect", ">need, mnat", "~exclusive", ">routing", "~>docs", "label"]
    if not any(row[4] for row in rows):
        columns, rows = columns[:4] + columns[5:], [row[:4] + row[5:] for row in rows]
    table(
        "Labels on trial",
        columns,
        rows,
        note=note + (f"; {left} more labels with --details" if left else ""),
    )


def counts(found: Trial) -> None:
    """Labels by verdict with Wilson's interval over all of them, and false labels by verdict."""
    summary = found.summary()
    kinds = list(dict.fromkeys(summary["label_kind"]))
    by_kind = {kind: rows.set_index("verdict") for kind, rows in summary.groupby("label_kind")}
    rows = []
    for kind in kinds:
        own = by_kind[kind].loc["supported"]
        interval = f"{own['share']:.0%} [{own['low']:.0%}, {own['high']:.0%}]"
        numbers = [str(int(n)) for n in by_kind[kind]["n"]]
        rows.append([kind, *numbers, str(int(by_kind[kind]["n"].sum())), interval])
    names = [f">{verdict}" for verdict in by_kind[kinds[0]].index]
    note = "below real: false labels of the same experts, which should not be supported" if len(kinds) > 1 else ""
    table("By verdict", ["=labels", *names, ">all", "~>supported, 95 %"], rows, note=note)


def _span(row: dict[Any, Any], name: str, *, scale: float, digits: int) -> str:
    """``45 [31, 60]``, or a dash."""
    value, low, high = (number(scale * row[f"{name}{end}"], digits) for end in ("", "_low", "_high"))
    return "-" if value == "-" else f"{value} [{low}, {high}]"


def plan(found: TrialPlan, calls: Mapping[str, Mapping[str, int]]) -> None:
    """What a trial would take, and what it could not show.

    Args:
        calls: by judge, ``tokens`` it would be asked about and ``calls``.
    """
    poor = [label for label in found.labels if label.lacks]
    if poor:
        note = "underpowered whatever the passes would show: give more documents, or a larger --max-tokens"
        rows = [[label.address, label.lacks, label.label] for label in poor[:N_SHOWN]]
        table(f"{len(poor)} labels with too little text", ["=expert", "has", "label"], rows, note=note)
    of_all = f" (a sample of {found.n_given})" if found.n_given > found.n_labels else ""
    said = [
        f"{found.model}: {found.n_labels} labels on trial{of_all}, {found.n_predictions:,} predictions in "
        f"{found.n_documents:,} documents; {found.n_passes:,} passes, about {found.minutes:.1f} minutes (one took "
        f"{found.seconds_per_pass:.2f} s here).",
        *(
            f"{judge} would be asked about {asked['tokens']:,} tokens, in at most {asked['calls']:,} calls."
            for judge, asked in calls.items()
        ),
    ]
    reach = sorted(label.detectable for label in found.labels if not label.lacks and label.detectable is not None)
    if reach:
        low, middle, high = (f"{1000 * reach[i]:.0f}" for i in (0, len(reach) // 2, -1))
        said.append(
            f"The smallest need that is found with 80 % power is {low} to {high} mnat, typically {middle}, from each "
            f"label's number of documents and how much {found.timed} differs between them; a need counts from "
            f"{1000 * found.delta:.0f} mnat."
        )
    say(*said)

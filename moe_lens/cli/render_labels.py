"""What ``moe-lens autointerp`` shows on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_lens.cli.terminal import aside, count, interval, more_tables, number, say, span, table

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.autointerp.result import Labels
    from moe_lens.cli.label_plan import LabelPlan

NEGATIVES = {
    "same_token": "same token id, not routed",
    "random": "any token",
    "near_miss": "ranked next by the router",
    "other": "another expert's high scores",
    "moved": "mark moved in its own text",
}
N_SHOWN = 12


def labels(found: Labels, *, details: bool = False) -> None:
    """Labels that predict routing best and what was found, with what went wrong; with details also the means."""
    best(found)
    if details:
        means(found.summary)
    finding, *trouble = found.findings()
    say(finding)
    aside(*trouble)
    aside("" if details else more_tables(1), "moe-lens show prints one expert")


def best(found: Labels, n_shown: int = N_SHOWN) -> None:
    """The labels with the best headline scores."""
    frame = found.frame.sort_values("auroc", ascending=False, na_position="last")
    rows = [
        [
            row["address"] + (f".{row['facet']}" if row["facet"] else ""),
            number(row["auroc"], 2),
            interval(row["ci_low"], row["ci_high"], digits=2),
            number(row["bigram"], 2),
            row["label"] or f"({row['status']}: {row['why']})",
        ]
        for row in frame.head(n_shown).to_dict("records")
    ]
    n = int((frame["status"] == "ok").sum())
    which = f"The {len(rows)} of {n} labels" if len(rows) < n else "Labels"
    picked = "; the best of many flatter" if len(rows) < n else ""
    table(
        f"{which} of {found.labeller} with the highest AUROC against the same token id, not routed",
        ["=expert", ">AUROC", "~>95 % interval", ">pairs", "label"],
        rows,
        note=f"pairs: AUROC of a table of token pairs, fitted on other documents{picked}",
    )


def means(summary: pd.DataFrame) -> None:
    """Mean over experts of every scorer and kind of negatives, with what chance and tables alone give."""
    rows = []
    for row in summary.to_dict("records"):
        rows.append(
            [
                row["scorer"] + (" *" if row["control"] == "shuffled" else ""),
                NEGATIVES.get(row["negatives"], row["negatives"]),
                str(int(row["n_experts"])),
                number(row["auroc"]),
                interval(row["ci_low"], row["ci_high"]),
                number(row["unigram"]),
                number(row["bigram"]),
                str(int(row["n_above_bigram"])) if row["control"] == "none" else "-",
            ]
        )
    columns = ["scorer", "negatives", "~>experts", ">AUROC", "~>95 % interval", ">token", ">pairs", ">above pairs"]
    note = "* the label of another expert of the layer; token, pairs: tables of token ids and of token pairs"
    table("Mean over experts", columns, rows, note=note)


def plan(found: LabelPlan, *, details: bool = False) -> None:
    """What labelling and scoring would need: requests if a language model is asked, else tokens per expert."""
    if not found.costs or details:
        tokens_per_expert(found)
    if found.costs:
        requests(found)
    tokens = ", ".join(f"{n:,} {split}" for split, n in found.tokens.items())
    asked = f"{found.calls:,} calls" if found.costs else "no language model is asked"
    if found.max_calls is not None and found.max_calls < found.calls:
        asked += f", of which --max-calls {found.max_calls:,} leaves {found.calls - found.max_calls:,} unasked"
    say(
        f"{found.model}: {found.n_experts} experts, {found.n_documents:,} documents, tokens {tokens}; labels by "
        f"{found.labeller}, scored by {', '.join(found.scorers)}; {asked}."
    )
    aside(more_tables(1) if found.costs and not details else "")


def tokens_per_expert(found: LabelPlan) -> None:
    """Visits of an evenly used expert, beside those that a full set of exemplars takes."""
    rows = []
    for share in found.shares:
        row: list[Any] = [span(share.layers), f"{share.top_k} of {share.n_experts}"]
        row += [f"{share.tokens_per_expert[split]:,} (of {need})" for split, need in found.needed.items()]
        rows.append(row)
    note = "of an evenly used expert; one with fewer than in brackets gets fewer exemplars and the status too_few"
    table("Tokens per expert", ["layers", "top-k", *(f">{split}" for split in found.needed)], rows, note=note)


def requests(found: LabelPlan) -> None:
    """Calls and tokens by task."""
    costs = [(c.task, c.model, c.calls, c.tokens_in, c.tokens_out) for c in found.costs]
    costs.append(("all", "", found.calls, found.tokens_in, found.tokens_out))
    rows = [[task, model, f"{calls:,}", count(read), count(wrote)] for task, model, calls, read, wrote in costs]
    note = (
        "calls if every expert gets a label; replies in the cache cost nothing, unusable ones are asked for once more; "
        "tokens are rough, texts other than English prose can have twice as many"
    )
    table("Requests", ["task", "model", ">calls", ">tokens in", ">tokens out"], rows, note=note)

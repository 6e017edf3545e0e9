"""What ``moe-lens autointerp`` shows on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from moe_lens.cli.render import count, interval, number, span, table

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


def labels(found: Labels, *, n_shown: int = N_SHOWN) -> None:
    """Labels that predict routing best, mean scores beside their baselines, and what was found."""
    best(found, n_shown)
    means(found.summary)
    if trouble := {name: n for name, n in found.outcomes.items() if n and name not in ("ok", "cached")}:
        causes = ", ".join(f"{n} {cause}" for cause, n in found.failures.items())
        words = [f"{n} {name}" + (f" ({causes})" if name == "failed" and causes else "") for name, n in trouble.items()]
        typer.echo("requests without a usable reply: " + ", ".join(words))
    typer.echo("")
    typer.echo(found.finding())


def best(found: Labels, n_shown: int) -> None:
    """The labels with the best headline scores, and the number of the others."""
    frame = found.frame.sort_values("auroc", ascending=False, na_position="last")
    rows = [
        [
            row["address"] + (f" facet {row['facet']}" if row["facet"] else ""),
            number(row["auroc"], 2),
            interval(row["ci_low"], row["ci_high"], digits=2),
            number(row["bigram"], 2),
            row["label"] or f"({row['status']}: {row['why']})",
        ]
        for row in frame.head(n_shown).to_dict("records")
    ]
    left = int((frame["status"] == "ok").sum()) - sum(
        row["status"] == "ok" for row in frame.head(n_shown).to_dict("records")
    )
    table(
        f"Labels of {found.labeller}, by AUROC against the same token id, not routed",
        ["expert", ">AUROC", ">95 % interval", ">pairs", "label"],
        rows,
        note="pairs: AUROC of a table of token pairs, fitted on other documents"
        + (f"; {left} more labels in labels.parquet, moe-lens show prints one expert" if left else ""),
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
    columns = ["scorer", "negatives", ">experts", ">AUROC", ">95 % interval", ">token", ">pairs", ">above pairs"]
    note = "* the label of another expert of the layer; token, pairs: tables of token ids and of token pairs"
    table("Mean over experts", columns, rows, note=note)


def plan(found: LabelPlan) -> None:
    """What labelling and scoring would need."""
    tokens = ", ".join(f"{n:,} {split}" for split, n in found.tokens.items())
    typer.echo(f"{found.model}: {found.n_experts} experts, {found.n_documents:,} documents, tokens {tokens}")
    typer.echo(f"labels by {found.labeller}, scored by {', '.join(found.scorers)}")
    rows = []
    for share in found.shares:
        row: list[Any] = [span(share.layers), f"{share.top_k} of {share.n_experts}"]
        row += [f"{share.tokens_per_expert[split]:,} (of {need})" for split, need in found.needed.items()]
        rows.append(row)
    note = "of an evenly used expert; one with fewer than in brackets gets fewer exemplars and the status too_few"
    table("Tokens per expert", ["layers", "top-k", *(f">{split}" for split in found.needed)], rows, note=note)
    if not found.costs:
        typer.echo("no language model is asked")
        return
    costs = [(c.task, c.model, c.calls, c.tokens_in, c.tokens_out) for c in found.costs]
    costs.append(("all", "", found.calls, found.tokens_in, found.tokens_out))
    rows = [[task, model, f"{calls:,}", count(read), count(wrote)] for task, model, calls, read, wrote in costs]
    note = (
        "calls if every expert gets a label; replies in the cache cost nothing, unusable ones are asked for once more; "
        "tokens are rough, texts other than English prose can have twice as many"
    )
    table("Requests", ["task", "model", ">calls", ">tokens in", ">tokens out"], rows, note=note)
    if found.max_calls is not None and found.max_calls < found.calls:
        typer.echo(f"--max-calls {found.max_calls:,} leaves {found.calls - found.max_calls:,} of them unasked")

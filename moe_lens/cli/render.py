"""Everything the command line shows on stdout: compact tables, and JSON for machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from moe_lens.cli.terminal import aside, count, interval, measured, more_tables, number, say, size, span, table

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.cli.plan import ModelPlan, Plan, Shortage
    from moe_lens.models.doctor import Diagnosis
    from moe_lens.models.spec import Spec
    from moe_lens.probing.published import Published
    from moe_lens.probing.result import Probes

ARMS_NOTE = (
    "F1 is balanced; raw: best cell on test; held_out: chosen on other documents; equal_*: as many cells, neurons and "
    "tokens in both; null: labels exchanged"
)
ALL_ARMS_NOTE = (
    "F1 at prevalence one half; raw: the cell that scores best on test; homogeneous: expected best if all cells had "
    "the pooled rates; held_out: chosen on other documents; equal_*: as many cells, neurons and tokens in both models, "
    "the dense cells on random documents or on what the router sends to their partner; routing_only, whole_population "
    "(a neuron on top of the routing): over all tokens; null: labels exchanged"
)
MIN_VISITS, MIN_SHARE = 50, 0.2
"""Below either, a high lift of an expert for a domain is a few documents."""


def spec(found: Spec) -> None:
    """The anatomy of one model."""
    typer.echo(f"{found.name}: {found.architecture} ({found.model_type})")
    for name, value in _facts(found).items():
        if value:
            typer.echo(f"{name + ':':<18} {value}")
    layers = [[layers, *map(str, kind)] for layers, kind in _runs_of_layers(found)]
    table("", [">layers", "kind", ">experts", ">top-k", ">neurons each", ">shared", "gated"], layers)
    if found.suggested_baseline:
        typer.echo(f"A dense model to compare with (--baseline): {found.suggested_baseline}{_caveat(found)}")


def _caveat(found: Spec) -> str:
    """What the suggested baseline is and is not; only the bundled twin needs no size."""
    from moe_lens.models.families import DENSE_PARAMETERS

    size = DENSE_PARAMETERS.get(found.suggested_baseline or "")
    if size is None:
        return ", trained on the same data with the same active width"
    sizes = f"{count(size)} parameters against {count(found.active_parameters)} active"
    return f"\n  similar in data or family, not matched in size: {sizes}"


def _facts(found: Spec) -> dict[str, str]:
    """What holds for the model as a whole, in words."""
    shared = {entry.shared_d_ff for entry in found.layers if entry.shared_d_ff is not None}
    entry = next((entry for entry in found.layers if entry.layer in found.moe_layers), None)
    routed = "none: a dense model"
    if entry is not None:
        routed = f"{entry.top_k} of {entry.n_experts} for each token (N_A/N = {found.sparsity:.4g})"
    norm = {None: "unknown", True: "weights of the chosen experts sum to 1", False: "weights are not renormalised"}
    return {
        "parameters": count(found.total_parameters),
        "active per token": f"{count(found.active_parameters)}, {count(found.embedding_parameters)} of it embedding",
        "routed experts": routed,
        "shared experts": f"{'/'.join(map(str, sorted(shared)))} neurons that every token visits" if shared else "",
        "gate": (str(found.gate) if found.gate else norm[found.norm_topk_prob]) if found.is_moe else "",
        "context": "" if found.max_positions is None else f"{found.max_positions:,} tokens",
        "quantisation": ""
        if found.quantisation is None
        else f"{found.quantisation} (needs plain weights to be loaded)",
    }


def diagnosis(found: Diagnosis) -> None:
    """Every check with its number, what the checkpoint offers, and the verdict as the last line."""
    typer.echo(f"{found.name}\n")
    for name, value in found.capabilities.items():
        typer.echo(f"{name + ':':<15} {value}")
    rows = [
        [str(i), line.check, line.status.value, measured(line.value), measured(line.threshold), line.detail]
        for i, line in enumerate(found.checks, start=1)
    ]
    table("", [">", "check", "status", ">value", ">limit", "what was compared"], rows)
    typer.echo(found.verdict)


def _runs_of_layers(found: Spec) -> list[tuple[str, tuple[Any, ...]]]:
    """Layers of one shape in a row share a line."""
    grouped: list[tuple[list[int], tuple[Any, ...]]] = []
    for entry in found.layers:
        shared = "-" if entry.shared_d_ff is None else entry.shared_d_ff
        kind = (entry.role.value, entry.n_experts, entry.top_k, entry.d_ff, shared, "yes" if entry.gated else "no")
        if grouped and grouped[-1][1] == kind and grouped[-1][0][-1] == entry.layer - 1:
            grouped[-1][0].append(entry.layer)
        else:
            grouped.append(([entry.layer], kind))
    return [(span(at), kind) for at, kind in grouped]


def model_pair(moe: Spec, dense: Spec) -> str:
    """The two models in a line."""
    layer = next(entry for entry in moe.layers if entry.layer in moe.moe_layers)
    return (
        f"{moe.name} ({count(moe.total_parameters)} parameters, {count(moe.active_parameters)} active, {layer.top_k} "
        f"of {layer.n_experts} experts in {len(moe.moe_layers)} layers) beside {dense.name} "
        f"({count(dense.total_parameters)})"
    )


def top_experts(by_field: pd.DataFrame, *, field: str = "domain", n_experts: int = 3, n_values: int = 12) -> None:
    """The domains that experts prefer most, and which experts those are.

    Only experts that take a fifth of a domain's tokens: a high lift on few tokens is a few documents.
    """
    mine = by_field[
        (by_field["field"] == field) & (by_field["visits"] >= MIN_VISITS) & (by_field["share"] >= MIN_SHARE)
    ]
    groups = {
        str(value): group for value, group in mine.sort_values("lift", ascending=False).groupby("value", sort=False)
    }
    rows = []
    for value, group in list(groups.items())[:n_values]:
        best = group.head(n_experts)
        shown = [f"L{r.layer}.E{r.expert} {r.share:.0%} ({r.lift:.1f}x)" for r in best.itertuples()]
        rows.append([value, count(float(group["n_tokens"].iloc[0])), *shown, *[""] * (n_experts - len(shown))])
    if not rows:
        return
    names = ["first expert", "second", "third", *[""] * n_experts][:n_experts]
    left_out = len(set(by_field.loc[by_field["field"] == field, "value"])) - len(rows)
    table(
        f"Experts by {field}: share of the {field}'s tokens that visit the expert (lift over the whole text)",
        [field, ">tokens", *names],
        rows,
        note=f"{left_out} more in routing_fields.parquet" if left_out else "",
    )


def probes(found: Probes, *, details: bool = False) -> None:
    """All arms, or without a baseline the best neurons, and what was found; with details every table."""
    others: list[Callable[[], None]] = [lambda: best_neurons(found, n_concepts=24)]
    if found.has_baseline:
        arms(found, note=ALL_ARMS_NOTE if details else ARMS_NOTE)
        others += [lambda: waterfall(found)] if len(found.steps) else []
    else:
        best_neurons(found)
        others = [lambda: arms(found, note=ALL_ARMS_NOTE)]
    if details:
        for show in others:
            show()
    say(*found.findings(), *([found.neurons.finding()] if found.neurons else [])) if details else say(found.finding())
    figures = ""
    if found.run is not None:
        page, table = found.run.path / "probe.html", found.run.path / "comparison.parquet"
        if not page.exists() or page.stat().st_mtime_ns < table.stat().st_mtime_ns:
            found.write_figures(page)
        figures = f"figures: {page.name}"
    aside(figures, "" if details else more_tables(len(others)))


def waterfall(found: Probes) -> None:
    """What each step takes from the raw gap, in balanced F1 and AUROC."""
    from moe_lens.plots import signed
    from moe_lens.probing.waterfall import MEAN, STEP_NAMES, one_ladder

    columns = []
    for metric in ("f1_balanced", "auroc"):
        rows = one_ladder(found.steps, metric=metric)
        columns.append(rows[(rows["order"] == "forward") & (rows["group"] == MEAN) & (rows["kind"] != "null")])
    rows = []
    for f1, auroc in zip(*(c.itertuples() for c in columns), strict=True):
        sign = -1 if f1.kind == "removed" else 1
        name = STEP_NAMES[f1.step] if sign == 1 else f"minus {STEP_NAMES[f1.step]}"
        cells = [[signed(sign * r.value), interval(*sorted((sign * r.ci_low, sign * r.ci_high)))] for r in (f1, auroc)]
        rows.append([name, *cells[0], *cells[1]])
    title = f"Where the k={columns[0]['k'].iloc[0]} gap goes, MoE minus baseline"
    table(title, ["step", ">balanced F1", "~>95 % interval", ">AUROC", "~>95 % interval"], rows)


def best_neurons(probes: Probes, *, n_concepts: int = 20) -> None:
    """The best neuron of either model for the concepts that are read off best, chosen on validate, scored on test."""
    k = int(probes.cells["k"].min())
    best = probes.best(arm="held_out", k=k).set_index(["concept", "role"])
    roles = [role for role in ("moe", "dense") if role in best.index.get_level_values("role")]
    rows = []
    concepts = list(dict.fromkeys(best.index.get_level_values("concept")))
    if not concepts:
        return
    for concept in concepts[:n_concepts]:
        row = [concept]
        for role in roles:
            if (concept, role) not in best.index:
                row += ["-"] * 4
                continue
            cell = best.loc[(concept, role)]
            neuron = f"{cell.address}.N{cell.neurons[0]}" if k == 1 else cell.address
            row += [neuron, number(cell.f1, 2), number(cell.f1_always_positive, 2), number(cell.auroc, 2)]
        rows.append(row)
    columns = [name for role in roles for name in (f"{role} neuron", ">F1", "~>always", ">AUROC")]
    left_out = len(concepts) - len(rows)
    more = f"; {left_out} more concepts in probe.parquet" if left_out else ""
    table(
        "Best neuron per concept, chosen on validation documents, scored on test documents",
        ["concept", *columns],
        rows,
        note=f"always: F1 of always saying yes in that cell{more}",
    )


def arms(probes: Probes, *, note: str = ARMS_NOTE) -> None:
    """Mean over concepts under every arm that was run, in the metrics that do not move with the class balance."""
    from moe_lens.probing.arms import LADDER

    k = int(probes.comparison["k"].min())
    found = {metric: probes.arms(metric=metric, k=k).set_index("arm") for metric in ("auroc", "f1_balanced")}
    both = probes.has_baseline
    names = [">base", ">gap", ">95 %"] if both else [">95 %"]
    rows = []
    for arm in LADDER:
        if not any(arm in frame.index for frame in found.values()):
            continue
        cells: list[str] = []
        for frame in found.values():
            if arm not in frame.index:
                cells += ["-"] * (1 + len(names))
                continue
            row: Any = frame.loc[arm]
            bounds = (row.ci_low, row.ci_high) if both else (row.moe_low, row.moe_high)
            gap = [number(row.dense), number(row.gap)] if both else []
            cells += [number(row.moe), *gap, interval(*bounds, digits=2)]
        rows.append([arm, *cells])
    mean: Any = next(iter(found["auroc"].itertuples()))
    title = f"Best k={k} probe, mean over {int(mean.n_concepts)} concept groups"
    who = ", MoE beside baseline" if both else ""
    table(title + who, ["arm", ">AUROC", *names, ">F1", *names], rows, note=note)


def run_tables(run: Mapping[str, Any]) -> None:
    """One run: a line about it, and its tables."""
    typer.echo(_headline(run))
    rows = [[t["table"], "damaged" if t["rows"] is None else f"{t['rows']:,}", size(t["bytes"])] for t in run["tables"]]
    table("", ["table", ">rows", ">size"], rows)


def runs(found: Sequence[Mapping[str, Any]]) -> None:
    """A folder of runs, one line each."""
    table(
        "",
        ["run", "model", "~baseline", "~corpus", "~>tables", ">size", "status", "~when"],
        [
            [
                r["path"],
                r["model"] or "-",
                r["baseline"] or "-",
                r["corpus"] or "-",
                str(len(r["tables"])),
                size(sum(t["bytes"] for t in r["tables"])),
                r["status"],
                (r["created"] or "-")[:16].replace("T", " "),
            ]
            for r in found
        ],
    )


def _headline(run: Mapping[str, Any]) -> str:
    against = f" against {run['baseline']}" if run["baseline"] else ""
    when = (run["created"] or "?")[:16].replace("T", " ")
    return f"{run['model']}{against} on {run['corpus']}, seed {run['seed']}, {run['status']}, {when}"


def plan(found: Plan, *, details: bool = False) -> None:
    """What a run would need, before it is started; with details every concept that falls short."""
    rows = [
        [model.name, span(s.layers), f"{s.top_k} of {s.n_experts}", *[f"{n:,}" for n in s.tokens_per_expert.values()]]
        for model in found.models
        for s in model.shares
    ]
    columns = ["model", ">layers", ">experts", *_splits(found.models[0])]
    table("Tokens that each expert sees if the router is even", columns, rows)
    lines = []
    for model in found.models:
        tokens = ", ".join(f"{n:,} {split}" for split, n in model.tokens.items())
        lines.append(
            f"{model.name}: tokens {tokens}; memory {size(model.weight_bytes)} for weights, and "
            f"{size(model.least_bytes)} (a layer at a time) to {size(model.most_bytes)} (all layers in one pass)"
        )
    say(*lines)
    shortages = found.models[0].shortages
    if shortages and details:
        table(
            f"Concepts that fall short of the minimum in experts of {found.models[0].name}",
            ["concept", "split", ">tokens", ">per expert", ">needed", ">documents", ">needed", "in"],
            [
                [
                    *(s.concept, s.split, f"{s.tokens:,}", f"{s.per_expert:.0f}", str(s.needed)),
                    *(str(s.documents), str(s.documents_needed), _where(s)),
                ]
                for s in shortages
            ],
            note="tokens: of the rarer class, positive or negative; documents: with a positive token",
        )
    needs = f"{found.n_documents:,} documents, {found.n_concepts} concepts, about {size(found.disk_bytes)} on disk"
    where = f"the average expert of {found.models[0].name}"
    few = f"; {len(shortages)} concepts fall short in {where}" if shortages else ""
    say(f"{needs}{few}.")
    aside(more_tables(1) if shortages and not details else "")


def _splits(model: ModelPlan) -> list[str]:
    return [f">{split}" for split in model.tokens]


def _where(shortage: Shortage) -> str:
    return "every expert" if shortage.impossible else "the average expert"


def published(tables: Published, *, k: int) -> None:
    """Released tables: one row a model, the raw score beside the controls that need no better neuron."""
    found = tables.controls(k=k)
    scores = ["raw", "always_positive", "f1_balanced", "one_expert", "homogeneous", "typical_cell"]
    rows = [
        [r["model"], f"{r['n_cells']:,}", f"{r['n_test_median']:.0f}", *(number(r[name], 4) for name in scores)]
        for r in found.to_dict("records")
    ]
    low, high = found["n_concepts"].min(), found["n_concepts"].max()
    concepts = f"{low}" if low == high else f"{low} to {high}"
    table(
        f"Best k={k} probe over cells, mean F1 over {concepts} concepts",
        ["model", ">cells", "~>tokens", ">raw", ">always", ">balanced", ">1/layer", ">search", "~>typical"],
        rows,
        note="tokens: of the median cell's test; always: a probe with no neuron; balanced: at prevalence 1/2; 1/layer: "
        "one random expert a layer; search: expected best if all cells were alike; typical: mean cell",
    )

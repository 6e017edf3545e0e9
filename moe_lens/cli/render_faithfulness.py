"""What ``moe-lens faithfulness`` shows on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_lens.cli.terminal import aside, interval, more_tables, number, say, table

if TYPE_CHECKING:
    from moe_lens.causal.faithfulness.result import Faithfulness
    from moe_lens.cli.faithfulness_plan import FaithfulnessPlan

N_SHOWN = 20
"""Pairs of ranking and mode that are shown without --details."""
_CASE = ("ranking", "mode", "super_experts")


def faithfulness(found: Faithfulness, *, details: bool = False) -> None:
    """Both scores beside their controls and the finding; with details every table and sentence."""
    if not details:
        summary(found)
        say(found.finding())
        aside(more_tables(3 + bool(len(found.naopc))))
        return
    note = f"KL in nats per token, {_bins(found)}; random, matched: lead over such sets"
    if found.frame["super_experts"].nunique() > 1:
        note += "; * super experts are never ablated"
    areas(found, "comprehensiveness_kl", "Without the experts ranked first (comprehensiveness, high is good)", note)
    circuit = "CPR, CMD: circuit faithfulness of the log-probability, high and low are good"
    areas(found, "sufficiency_kl", "With only the experts ranked first (sufficiency, low is good)", circuit)
    if len(found.naopc):
        normalised(found)
    orders(found)
    alignment(found)
    say(*found.findings())


def _bins(found: Faithfulness) -> str:
    """What the scores are averaged over."""
    shares = ", ".join(f"{100 * share:g}" for share in found.bins.shares)
    how = "mean" if found.bins.aggregate == "mean" else "area"
    unit = "gate mass" if found.frame["axis"].iloc[0] == "gate-mass" else "experts"
    layer = " of each layer" if found.frame["universe"].iloc[0] == "per-layer" else ""
    return f"{how} over {shares} % of the {unit}{layer}"


def summary(found: Faithfulness) -> None:
    """AOPC of every ranking and mode without and with only its first experts, with the leads over controls."""
    own = found.frame[(found.frame["quantity"] == "aopc") & (found.frame["control"] == "none")]
    own = own[own["super_experts"] == "included"]
    gaps = found.gaps[(found.gaps["quantity"] == "aopc") & (found.gaps["super_experts"] == "included")]
    gaps = gaps.set_index(["score", "control", "ranking", "mode"])
    shares = found.matched_share
    rows = []
    for row in own.head(N_SHOWN).to_dict("records"):
        at = (row["ranking"], row["mode"])
        line = list(at)
        for score in ("comprehensiveness_kl", "sufficiency_kl"):
            random, matched = (score, "random", *at), (score, "load-matched", *at)
            line += [number(row[score], 2), interval(row[f"{score}_low"], row[f"{score}_high"], digits=2)]
            line += [number(gaps["gap"].get(random), 2), number(gaps["p"].get(random), 2)]
            line += [number(gaps["gap"].get(matched), 2)]
        share = shares.get(at)
        rows.append([*line, "-" if share is None else f"{share:.0%}"])
    score = ["~>95 %", ">random", ">p", ">matched"]
    left = len(own) - len(rows)
    table(
        "Without the experts ranked first (WITHOUT, high is good), with only these (ONLY, low is good)",
        ["ranking", "mode", ">WITHOUT", *score, ">ONLY", *score, ">match"],
        rows,
        note=f"KL, {_bins(found)}; random, matched: lead over such sets; match: share of experts with a match of like "
        "load" + (f"; {left} more rows with --details" if left else ""),
    )


def areas(found: Faithfulness, score: str, title: str, note: str) -> None:
    """AOPC of one side for every ranking and mode, with the gap to each control; CPR and CMD beside sufficiency."""
    own = found.frame[(found.frame["quantity"] == "aopc") & (found.frame["control"] == "none")]
    gaps = found.gaps[(found.gaps["quantity"] == "aopc") & (found.gaps["score"] == score)]
    gaps = gaps.set_index([*_CASE, "control"])
    circuit = found.circuit.set_index([*_CASE, "quantity"])["value"] if score.startswith("sufficiency") else None
    rows = []
    for row in own.to_dict("records"):
        at = tuple(row[name] for name in _CASE)
        line = [
            row["ranking"] + (" *" if row["super_experts"] == "excluded" else ""),
            row["mode"],
            number(row[score]),
            interval(row[f"{score}_low"], row[f"{score}_high"]),
            number(gaps["gap"].get((*at, "random"))),
            number(gaps["p"].get((*at, "random")), 2),
            number(gaps["gap"].get((*at, "load-matched"))),
        ]
        rows.append(
            line + ([] if circuit is None else [number(circuit.get((*at, name)), 2) for name in ("cpr", "cmd")])
        )
    columns = ["ranking", "mode", ">KL", "~>95 % interval", ">random", ">p", ">matched"]
    table(title, columns + ([] if circuit is None else [">CPR", ">CMD"]), rows, note=note)


def normalised(found: Faithfulness) -> None:
    """NAOPC of both sides, which compares models; where a beam was used, that of the wider one."""
    at = found.frame[found.frame["quantity"] == "naopc"]
    rows = [
        [row["ranking"], row["mode"], number(row["comprehensiveness_kl"], 2), number(row["sufficiency_kl"], 2)]
        for row in at.to_dict("records")
    ]
    n = int(found.naopc["n_candidates"].iloc[0])
    widths = found.naopc["width"].dropna()
    how = f"beam of {widths.max()}" if len(widths) else "exact"
    note = f"0 and 1 are the lowest and highest AOPC of any order of {n} experts drawn by lot ({how})"
    table("NAOPC", ["ranking", "mode", ">comprehensiveness", ">sufficiency"], rows, note=note)


def orders(found: Faithfulness) -> None:
    """How stable each ranking is, and how it agrees with leave-one-out."""
    tau = found.agreement.set_index("ranking")["kendall"]
    rows = [
        [row["ranking"], number(row["spearman"], 2), number(row["top_jaccard"], 2), number(tau.get(row["ranking"]), 2)]
        for row in found.stability.to_dict("records")
    ]
    note = (
        "halves, top tenth: Spearman and overlap between two halves of the ranking text; LOO tau: Kendall with "
        "leave-one-out, if that was ranked"
    )
    table("Rankings", ["ranking", ">halves", ">top tenth", ">LOO tau"], rows, note=note)


def alignment(found: Faithfulness) -> None:
    """One line a layer: how importance follows routing, and how uneven the routing is."""
    by = found.alignment[found.alignment["importance"] == "gradient"]
    spread = found.routing_spread.set_index("layer")
    churn = found.churn[found.churn["ranking"] == found.churn["ranking"].iloc[0]] if len(found.churn) else found.churn
    changes = churn.groupby("layer")["churn"].mean() if len(churn) else {}
    rows = []
    for layer in spread.index:
        at = by[by["layer"] == layer].set_index("routing")
        line = [f"L{layer}"]
        for name in ("load", "gate_mass", "gate_norm"):
            line += [number(at["spearman"].get(name), 2)]
        line += [number(at["partial_spearman"].get("gate_norm"), 2)]
        numbers = spread.loc[layer]
        line += [number(numbers[name], 2) for name in ("router_entropy", "load_cv", "load_gini")]
        rows.append([*line, number(changes.get(layer), 2)])
    columns = ["", ">load", ">gate mass", ">gate norm", ">given load", ">entropy", "~>load CV", "~>Gini", ">churn"]
    which = f" of {churn['ranking'].iloc[0]}" if len(churn) else ""
    note = (
        "Spearman within the layer of importance by gradient with routing numbers; given load: gate norm with load "
        f"taken out; churn: share of the top-k that changes when the largest bin{which} goes, mean over modes"
    )
    table("Does importance follow routing?", columns, rows, note=note)


def plan(found: FaithfulnessPlan) -> None:
    """Passes by purpose and the minutes they would take."""
    rows = [[purpose, f"{n:,}"] for purpose, n in found.passes.items() if n]
    rows.append(["all", f"{found.n_passes:,}"])
    note = "at most: equal sets run once; twice the sets if the model has super experts, which only a run finds out"
    table("Passes", ["for", ">passes"], rows, note=note)
    minutes = f"{found.minutes:.1f}" if found.minutes < 100 else f"{found.minutes:,.0f}"
    say(
        f"{found.model}: {found.n_experts} experts, passes over {found.max_tokens:,} tokens, about {minutes} minutes "
        f"at {found.seconds_per_pass:.2g} s a pass, timed on this machine just now."
    )

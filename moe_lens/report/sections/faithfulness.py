"""Are these the experts that matter? Comprehensiveness and sufficiency, with the sets that could have done as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from moe_lens.causal.faithfulness.result import ALPHA, ENOUGH_MATCHED, Faithfulness, clearest_first
from moe_lens.causal.faithfulness.tables import AOPC
from moe_lens.report.missing import command
from moe_lens.report.parts import Figure, Missing, Part, Prose, Section, Table

if TYPE_CHECKING:
    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_COMPREHENSIVE, _SUFFICIENT = "comprehensiveness_kl", "sufficiency_kl"
_FORMS = {
    **dict.fromkeys(("value", "control_value", "spearman", "kendall", "score_gradient"), ".3f"),
    **dict.fromkeys(("gap", "low", "high"), "+.3f"),
    "matched": ".0%", "p": ".2f", "gate_mass": ",.0f", "load": ",", "max_output": ".2f",
}  # fmt: skip
_HEADINGS = {
    "value": "score, nats", "control_value": "control's score", "gap": "ahead of control",
    "matched": "experts with a match",
}  # fmt: skip


def section(run: Run, say: Claims) -> Section:
    """Curves with random and load-matched sets, gaps with intervals, importance against routing, every expert."""
    if not run.has("faithfulness"):
        missing = Missing("Rankings of experts", command(run, "faithfulness"))
        return Section("faithfulness", "Faithfulness", "", (missing,))
    found = Faithfulness.of(run)
    units = found.units.assign(
        address=[f"L{a}.E{b}" for a, b in zip(found.units.layer, found.units.expert, strict=True)]
    )
    same = [c for c in units if c in ("is_super", "in_universe") and units[c].nunique() == 1]
    units = units[["address", *(c for c in units if c not in ("address", "expert", *same))]]
    forms = {**_FORMS, **{str(c): ".4g" for c in units if str(c).startswith("score_")}}
    curves: Any = found.plot()
    alignment: Any = found.plot_alignment()
    parts: list[Part] = [
        *map(Prose, _limits(found, say)),
        Figure.of("faithfulness-curves", curves, rows=found.frame, source="faithfulness.parquet",
                  least=curves.layout.width),
        Table("faithfulness-gaps", "Rankings against control sets (area over bins)", (gaps := _gaps(found)),
              "faithfulness_gaps.parquet, faithfulness.parquet", headings=_HEADINGS, forms=forms,
              intervals={"gap": ("low", "high")},
              filters=[c for c in ("ranking", "mode", "control", "score", "super_experts") if c in gaps]),
        Figure.of("faithfulness-alignment", alignment, rows=found.alignment,
                  source="faithfulness_alignment.parquet", least=alignment.layout.width),
        Table("faithfulness-units", "Every expert, by its scores", units, "faithfulness_units.parquet", forms=forms,
              headings={"address": "expert"}, search=True, filters=("layer",),
              links="address" if run.has("exemplars") else None),
    ]  # fmt: skip
    lead = Markup("{} documents, {} predictions; two clean passes {}.{}").format(
        say.fact("commands.faithfulness.n_documents"), say.fact("commands.faithfulness.n_tokens"), _noise(found, say),
        Markup("").join(Markup(" {}").format(_mode(found, say, mode)) for mode in found.frame["mode"].unique()),
    )  # fmt: skip
    return Section("faithfulness", "Faithfulness", lead, tuple(parts))


def _noise(found: Faithfulness, say: Claims) -> Markup:
    if not (found.noise.kl or found.noise.mean_nll):
        return Markup("agree exactly")
    kl, mean = (say.fact(f"commands.faithfulness.noise.{name}", form=".1e") for name in ("kl", "mean_nll"))
    return Markup("differ by {} nats of KL, {} of the mean").format(kl, mean)


def _gaps(found: Faithfulness) -> pd.DataFrame:
    """Areas, with the share of experts that had a match beside what is said of load-matched sets."""
    gaps = found.gaps[found.gaps["quantity"] == AOPC].drop(columns=["quantity", "bin"], errors="ignore")
    same = [c for c in ("mode", "super_experts") if gaps[c].nunique() == 1]
    if not (gaps["control"] == "load-matched").any():
        return gaps.drop(columns=same)
    own = found.frame[found.frame["control"] == "load-matched"]
    matched: Any = own.groupby(["ranking", "mode", "super_experts"], as_index=False)["matched_share"].mean()
    matched = matched.rename(columns={"matched_share": "matched"}).assign(control="load-matched")
    order = [*gaps.columns[: list(gaps.columns).index("control") + 1], "matched"]
    table = gaps.merge(matched, how="left", on=["ranking", "mode", "super_experts", "control"])
    return table[[*order, *(c for c in table if c not in order)]].drop(columns=same)


def _mode(found: Faithfulness, say: Claims, mode: str) -> Markup:
    """The ranking with the clearest lead over random sets, how many lead, and what is known of load-matched sets."""
    at = {"mode": mode, "quantity": AOPC, "super_experts": "included", "score": _COMPREHENSIVE, "control": "random"}
    rows = _rows(found.gaps, at)
    if not len(rows):
        return Markup("Under {}, no random sets were drawn to compare with.").format(mode)
    best = clearest_first(rows)["ranking"].iloc[0]
    where = {**at, "ranking": best}

    def number(column: str, form: str = ".3f") -> Markup:
        return say.value("faithfulness_gaps", column, where=where, form=form)

    def ahead(score: str) -> Markup:
        beats = {"p": {"<": ALPHA}, "low": {">": found.noise.kl}}
        return Markup("{} of {}").format(
            say.count("faithfulness_gaps", where={**at, "score": score, **beats}),
            say.count("faithfulness_gaps", where={**at, "score": score}),
        )

    said = Markup(
        "Under {}, ablating the experts that {} puts first costs {} nats of KL, as many random ones of the same "
        "layers {}: {} more (p = {}). Ahead of random sets are {} rankings in comprehensiveness, {} in sufficiency."
    ).format(
        mode, _name(best), number("value"), number("control_value"),
        say.interval("faithfulness_gaps", ("gap", "low", "high"), where=where, form="+.3f"), number("p", ".2f"),
        ahead(_COMPREHENSIVE), ahead(_SUFFICIENT),
    )  # fmt: skip
    return said + _matched(found, say, mode)


def _matched(found: Faithfulness, say: Claims, mode: str) -> Markup:
    """Sets of equal load stand for the ranking only if most of its experts have another one of like load."""
    own = {"mode": mode, "super_experts": "included", "control": "load-matched"}
    rows = _rows(found.frame, own).dropna(subset=["matched_share"])
    if not len(rows):
        return Markup("")
    shares = rows.groupby("ranking", sort=False)["matched_share"].mean()
    usable = [str(name) for name in shares.index[shares >= ENOUGH_MATCHED]]
    low, high = (
        say.of("mean", "faithfulness", "matched_share", where={**own, "ranking": name}, form=".0%")
        for name in (shares.idxmin(), shares.idxmax())
    )
    said = Markup("{} to {}").format(low, high) if len(shares) > 1 else low
    if not usable:
        return Markup(" Only {} of their experts have a match of like load, too few to say more.").format(said)
    at = {**own, "quantity": AOPC, "score": _COMPREHENSIVE, "ranking": usable}
    return Markup(" Ahead of sets of like load are {} of {}; {} of their experts have such a match.").format(
        say.count("faithfulness_gaps", where={**at, "low": {">": found.noise.kl}}),
        say.count("faithfulness_gaps", where=at), said,
    )  # fmt: skip


def _limits(found: Faithfulness, say: Claims) -> list[Markup]:
    """What else the tables say, and what limits it."""
    own: dict[str, Any] = {"control": "none", "quantity": "bin"}
    kept, said = _rows(found.frame, own), []
    aligned = found.alignment
    aligned = aligned[aligned["layer"].isna() & (aligned["importance"] == "gradient")]
    if len(aligned):
        at = {"importance": "gradient", "layer": None}
        columns = ("spearman", "spearman_low", "spearman_high")
        each = [
            Markup("{} with {}").format(
                say.interval("faithfulness_alignment", columns, where={**at, "routing": name}, form=".2f"), _name(name)
            )
            for name in aligned["routing"]
        ]
        said.append(Markup("Within layers, importance by gradient correlates {} (Spearman).").format(
            Markup(", ").join(each)))  # fmt: skip
    if found.recall is not None:
        recall, low, high, n = (
            say.fact(f"commands.faithfulness.recall.{name}", form=form)
            for name, form in (("recall", ".0%"), ("low", ".0%"), ("high", ".0%"), ("n_sample", ""))
        )
        said.append(
            Markup("The gradient screen's first tenth holds {} [{}, {}] of the largest tenth of exact effects, on {} "
                   "experts that were measured one by one.").format(recall, low, high, n)
        )  # fmt: skip
    if found.super_experts:
        said.append(
            Markup("{} stand out by extreme outputs: rows with super experts excluded never ablate them.").format(
                ", ".join(found.super_experts)
            )
        )
    limits = []
    if np.nan_to_num(float(kept["layers_emptied"].max())) > 0:
        most = say.of("max", "faithfulness", "layers_emptied", where=own, form=".0f")
        limits.append(Markup("In sufficiency, up to {} layers are left without a routed expert.").format(most))
    if "n_layers_removed" in kept and (kept["n_layers_removed"] > 0).any():
        gone = {**own, "n_layers_removed": {">": 0}}
        limits.append(
            Markup("From the bin of {} on, comprehensiveness takes all experts of up to {} layers away, where random "
                   "sets are the same sets.").format(
                say.of("min", "faithfulness", "bin", where=gone, form=".0%"),
                say.of("max", "faithfulness", "n_layers_removed", where=gone, form=".0f"))
        )  # fmt: skip
    limits += [Markup("{}.").format(f"{note[0].upper()}{note[1:]}") for note in found.notes]
    return [*said, *([Markup(" ").join(limits)] if limits else [])]


def _rows(table: pd.DataFrame, where: dict[str, Any]) -> pd.DataFrame:
    return table[(table[list(where)] == pd.Series(where)).all(axis=1)]


def _name(ranking: str) -> str:
    return ranking.replace("_", " ")

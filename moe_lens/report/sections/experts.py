"""Every expert in one table, and one card each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from markupsafe import Markup

from moe_lens.errors import OutOfRange
from moe_lens.report.missing import command
from moe_lens.report.parts import Cards, Missing, Part, Section, Table

if TYPE_CHECKING:
    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_MANY = 256
"""Experts from which on cards show fewer exemplars: the page has to open."""
_KEY = ["layer", "expert"]
_HEADINGS = {
    "address": "expert", "load_over_even": "load / even", "output_norm": "output norm", "top_domain": "domain",
    "top_domain_lift": "× share", "score": "AUROC", "bigram": "token pairs", "need": "need, mnat",
    "auroc_routing": "routing", "label": "label",
}  # fmt: skip
_FORMS = {
    "load_over_even": ".2f", "output_norm": ".2f", "top_domain_lift": ".1f", "score": ".2f", "bigram": ".2f",
    "need": ".0f", "auroc_routing": ".2f",
}  # fmt: skip


def section(run: Run, say: Claims) -> Section:
    """The table, with whatever the run knows of each expert, and the cards of those with exemplars."""
    parts: list[Part] = []
    if not run.has("routing"):
        return Section("experts", "Experts", "", (Missing("Experts", command(run, "probe")),))
    table = _table(run, say)
    parts.append(
        Table("expert-table", "All experts", table, _sources(run), headings=_HEADINGS, forms=_FORMS, search=True,
              filters=[c for c in ("layer", "verdict", "labelled") if c in table],
              links="address" if run.has("exemplars") else None)
    )  # fmt: skip
    parts += _cards(run, table["address"].tolist())
    for needed, what, name in (
        ("labels", "Labels", "autointerp"),
        ("label_scores", "Scores of labels", "autointerp"),
        ("validation", "Verdicts on labels", "validate"),
    ):
        if not run.has(needed):
            parts.append(Missing(what, command(run, name)))
    lead = Markup("{} experts.").format(say.count("routing", where={"role": "moe"}, distinct=_KEY))
    if run.has("exemplars"):
        lead += " Click an address for its card; the address of the page then leads there again."
    if "score" in table:
        lead += " AUROC is that of the label for the same token ids routed or not, beside what token pairs alone reach."
    return Section("experts", "Experts", lead, tuple(parts))


def _table(run: Run, say: Claims) -> pd.DataFrame:
    table = run.experts()
    even = table.groupby("layer")["load_share"].transform("mean")
    table["load_over_even"] = table["load_share"] / even
    columns = ["address", "layer", "load_over_even", "output_norm"]
    columns += [c for c in ("top_domain", "top_domain_lift") if c in table]
    if run.has("labels") and run.has("label_scores") and run.has("exemplars"):
        from moe_lens.autointerp.result import Labels

        frame = Labels.of(run).frame
        said = frame.groupby(_KEY, as_index=False).agg(
            label=("label", lambda found: "; ".join(x for x in found if isinstance(x, str)) or None),
            score=("auroc", "first"), bigram=("bigram", "first"),
        )  # fmt: skip
        table = table.merge(said, how="left", on=_KEY)
        columns += ["score", "bigram"]
    if run.has("validation"):
        table = table.merge(_verdicts(say.table("validation")), how="left", on=_KEY)
        columns += ["verdict", "need", "auroc_routing"]
    return table[[columns[0], *(["label"] if "label" in table else []), *columns[1:]]]


def _verdicts(validation: pd.DataFrame) -> pd.DataFrame:
    """The verdict of every real label, with the smaller of its needs; of facets the first."""
    rows = validation[(validation["label_kind"] == "real") & validation["mode"].isin(["zero", "mean_off"])]
    rows = rows.sort_values(["facet", "need"], kind="stable").drop_duplicates(_KEY)
    return rows[[*_KEY, "verdict", "need", "auroc_routing"]].assign(need=rows["need"] * 1000)


def _sources(run: Run) -> str:
    used = ("routing", "routing_fields", "labels", "label_scores", "validation")
    return ", ".join(f"{name}.parquet" for name in used if run.has(name))


def _cards(run: Run, addresses: list[str]) -> list[Part]:
    if not run.has("exemplars"):
        return [Missing("Exemplars and cards", command(run, "autointerp"))]
    cards, n = {}, 8 if len(addresses) <= _MANY else 4
    for address in addresses:
        try:
            cards[address] = Markup(run.card(address, n=n)._repr_html_())
        except OutOfRange:  # its message names the folder, which must not get into a page that is passed on
            cards[address] = Markup("<p>{} has no exemplars in this run.</p>").format(address)
    return [Cards.of("cards", "", cards, source="exemplars.parquet")]

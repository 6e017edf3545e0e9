"""Are these the experts that matter? Comprehensiveness and sufficiency, with the sets that could have done as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_lens.causal.faithfulness.result import Faithfulness
from moe_lens.report.parts import Figure, Missing, Part, Section, Table

if TYPE_CHECKING:
    from moe_lens.capture.run import Run
    from moe_lens.report.claims import Claims

_FORMS = {
    **dict.fromkeys(("value", "control_value", "gap", "low", "high", "spearman", "kendall", "score_gradient"), ".3f"),
    "p": ".2f", "gate_mass": ",.0f", "load": ",", "max_output": ".2f",
}  # fmt: skip


def section(run: Run, say: Claims) -> Section:
    """Curves with random and load-matched sets, gaps with intervals, importance against routing, every expert."""
    if not run.has("faithfulness"):
        command = f"moe-lens faithfulness --model {run.manifest['model']['name']} -o DIR"
        return Section("faithfulness", "Faithfulness", "", (Missing("Rankings of experts", command),))
    found = Faithfulness.of(run)
    gaps = found.gaps[found.gaps["quantity"] == "aopc"].drop(columns=["quantity", "bin"], errors="ignore")
    units = found.units.assign(
        address=[f"L{a}.E{b}" for a, b in zip(found.units.layer, found.units.expert, strict=True)]
    )
    units = units[["address", *(c for c in units if c != "address")]]
    forms = {**_FORMS, **{str(c): ".4g" for c in units if str(c).startswith("score_")}}
    parts: list[Part] = [
        Figure.of("faithfulness-curves", found.plot(), rows=found.frame, source="faithfulness.parquet"),
        Table("faithfulness-gaps", "Rankings against control sets (area over bins)", gaps, "faithfulness_gaps.parquet",
              forms=forms, filters=[c for c in ("ranking", "mode", "control", "score", "super_experts") if c in gaps]),
        Figure.of("faithfulness-alignment", found.plot_alignment(), rows=found.alignment,
                  source="faithfulness_alignment.parquet"),
        Table("faithfulness-units", "Every expert, by its scores", units, "faithfulness_units.parquet", forms=forms,
              headings={"address": "expert"}, search=True, filters=("layer",),
              links="address" if run.has("exemplars") else None),
    ]  # fmt: skip
    return Section("faithfulness", "Faithfulness", found.finding(), tuple(parts))

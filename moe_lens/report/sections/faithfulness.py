"""Are these the experts that matter? Comprehensiveness and sufficiency, with the sets that could have done as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_lens.causal.faithfulness.result import Faithfulness
from moe_lens.report.parts import Figure, Missing, Part, Prose, Section, Table

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
    same = [c for c in units if c in ("is_super", "in_universe") and units[c].nunique() == 1]
    units = units[["address", *(c for c in units if c not in ("address", "expert", *same))]]
    forms = {**_FORMS, **{str(c): ".4g" for c in units if str(c).startswith("score_")}}
    first, *more = found.findings()
    curves, alignment = found.plot(), found.plot_alignment()
    parts: list[Part] = [
        *map(Prose, more),
        Figure.of("faithfulness-curves", curves, rows=found.frame, source="faithfulness.parquet",
                  least=curves.layout.width),
        Table("faithfulness-gaps", "Rankings against control sets (area over bins)", gaps, "faithfulness_gaps.parquet",
              forms=forms, filters=[c for c in ("ranking", "mode", "control", "score", "super_experts") if c in gaps]),
        Figure.of("faithfulness-alignment", alignment, rows=found.alignment,
                  source="faithfulness_alignment.parquet", least=alignment.layout.width),
        Table("faithfulness-units", "Every expert, by its scores", units, "faithfulness_units.parquet", forms=forms,
              headings={"address": "expert"}, search=True, filters=("layer",),
              links="address" if run.has("exemplars") else None),
    ]  # fmt: skip
    return Section("faithfulness", "Faithfulness", first, tuple(parts))

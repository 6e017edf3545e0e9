"""``Patching``: the frozen result of patching experts between two prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.plots import number

if TYPE_CHECKING:
    import plotly.graph_objects as go

FRAME = (
    "unit", "layer", "expert", "position", "effect", "recovery", "visits_clean", "visits_corrupt", "p_random",
    "n_random", "p_co_selected", "n_co_selected",
)  # fmt: skip
COALITIONS = ("kind", "experts", "n_experts", "effect", "recovery", "sum_alone", "p_random", "n_random")
CONTROLS = ("control", "of", "draw", "experts", "effect", "recovery")


@dataclass(frozen=True, repr=False)
class Patching:
    """How far the prediction moves from one prompt's to the other's when experts are patched.

    Recovery is 0 for the prompt that runs as it is and 1 for the other one; above 1 and below 0 are possible. It is
    about one pair of prompts, without an interval: repeat it on pairs of a kind before you speak of the kind. p-values
    are ranks among controls on this pair, not corrected for the number of experts.
    """

    frame: pd.DataFrame
    """One row per unit (expert, layer, all layers together) and position (missing: all chosen ones): effect in logits,
    positive toward the other prompt, recovery, visits by either prompt, p by rank among the visited experts of the
    layer (p_random) and among random experts chosen beside it (p_co_selected), with the number of controls."""
    coalitions: pd.DataFrame = field(repr=False)
    """One row per coalition; sum_alone is the sum of its members' recoveries. Greedy ones were chosen to be large, so
    their p says less than that of a coalition named beforehand."""
    controls: pd.DataFrame = field(repr=False)
    """Every control draw behind p_co_selected of `frame` and p_random of `coalitions`."""
    tokens_clean: tuple[str, ...]
    tokens_corrupt: tuple[str, ...]
    patched: tuple[tuple[int, int], ...]
    """Positions at which experts were patched, (in clean, in corrupt); a shared beginning is left out."""
    target: str
    foil: str
    difference_clean: float
    """Logit of target minus that of foil after the clean prompt."""
    difference_corrupt: float
    direction: str
    what: str
    routing: str
    n_patches: int
    """Patched prompts, each a whole pass if they ran one by one."""
    n_passes: int
    """Batched passes from the patched layer on that were run instead."""
    notes: tuple[str, ...] = ()

    @property
    def experts(self) -> pd.DataFrame:
        """Rows of experts that were patched at all positions, largest recovery first."""
        rows = self._whole("expert")
        return rows.sort_values("effect", ascending=False, kind="stable", ignore_index=True)

    @property
    def base(self) -> str:
        """The prompt that runs: clean or corrupt."""
        return "corrupt" if self.direction == "denoise" else "clean"

    @property
    def source(self) -> str:
        """The prompt that writes are taken from."""
        return "clean" if self.direction == "denoise" else "corrupt"

    @property
    def score(self) -> str:
        """Column that figures and sentences use: recovery, or effect where there is none."""
        return "effect" if self.frame["recovery"].isna().all() else "recovery"

    def _whole(self, unit: str) -> pd.DataFrame:
        return self.frame[(self.frame["unit"] == unit) & self.frame["position"].isna()]

    def finding(self) -> str:
        """What carries the difference, in one sentence, with the controls of the largest expert."""
        return (
            f"With {self.source} writes of all experts put into {self.base}, the {self.score} of {self.target!r} over "
            f"{self.foil!r} is {number(self._whole('all')[self.score].iloc[0], '.2f')} (logit difference "
            f"{number(self.difference_clean, '.2f')} after clean, {number(self.difference_corrupt, '.2f')} after "
            f"corrupt); {self._about_experts()}."
        )

    def findings(self) -> list[str]:
        """`finding`, then layers, coalitions and what limits the answer."""
        return [
            self.finding(),
            f"{len(self.patched)} of {len(self._tokens)} positions are patched, {self.routing} routing.",
            self._about_layers(),
            *self._about_coalitions(),
            f"{self.n_patches} patches took {self.n_passes} batched passes.",
            *(f"{note[0].upper()}{note[1:]}." for note in self.notes),
        ]

    @property
    def _tokens(self) -> tuple[str, ...]:
        return self.tokens_corrupt if self.base == "corrupt" else self.tokens_clean

    def _about_layers(self) -> str:
        layers = self._whole("layer").sort_values("effect", ascending=False, kind="stable")
        each = ", ".join(f"L{row['layer']} {number(row[self.score], '.2f')}" for _, row in layers.head(3).iterrows())
        return f"All experts of one layer: {self.score} {each}."

    def _about_experts(self) -> str:
        rows = self.experts
        touched = int(((rows["visits_clean"] > 0) | (rows["visits_corrupt"] > 0)).sum())
        if not touched:
            return "no expert was visited at these positions"
        best = rows.iloc[0]
        p = [f"p {best['p_random']:.2f} among {best['n_random'] + 1} of its layer"] if best["n_random"] else []
        if best["n_co_selected"]:
            p.append(f"p {best['p_co_selected']:.2f} against {best['n_co_selected']} choices of co-selected ones")
        controls = f" ({', '.join(p)}; uncorrected for {touched} experts)" if p else ""
        name = f"L{best['layer']}.E{best['expert']}"
        return f"the largest single expert is {name} with {number(best[self.score], '.2f')}{controls}"

    def _about_coalitions(self) -> list[str]:
        if not len(self.coalitions):
            return []
        best = self.coalitions.sort_values("effect", ascending=False, kind="stable").iloc[0]
        p = f", p {best['p_random']:.2f} among {best['n_random']} random ones" if best["n_random"] else ""
        chosen = " (chosen greedily on this pair)" if best["kind"] == "greedy" else ""
        return [f"Coalition of {best['n_experts']}{chosen} {best['experts']}: {number(best[self.score], '.2f')}{p}."]

    def plot(self, by: str = "expert") -> go.Figure:
        """Heat map of recovery: layer x expert, or with by="position" whole layers at each position.

        Raises:
            BadConfig: another `by`.
        """
        from moe_lens.causal.patching.figure import heatmap

        return heatmap(self, by)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {name: getattr(self, name) for name in (
            "tokens_clean", "tokens_corrupt", "target", "foil", "difference_clean", "difference_corrupt", "direction",
            "what", "routing", "n_patches", "n_passes", "notes",
        )}  # fmt: skip
        tables = {name: _plain(getattr(self, name)) for name in ("frame", "coalitions", "controls")}
        lists = {name: list(value) for name, value in plain.items() if isinstance(value, tuple)}
        return {
            "finding": self.finding(),
            "findings": self.findings(),
            **plain,
            **lists,
            "patched": [list(p) for p in self.patched],
            **tables,
        }

    def __repr__(self) -> str:
        return "\n".join([f"Patching({self.direction}, {len(self.experts)} experts)", *self.findings()])

    def _repr_html_(self) -> str:
        from moe_lens.notebook import result_html, table_html

        rows = self.experts.head(12).drop(columns=["unit", "position"])
        rows.insert(0, "address", [f"L{a}.E{b}" for a, b in zip(rows["layer"], rows["expert"], strict=True)])
        tables = [rows.drop(columns=["layer", "expert"]), *([self.coalitions] if len(self.coalitions) else [])]
        return result_html(self.findings(), *(table_html(table, headings={"address": "expert"}) for table in tables))


def _plain(table: pd.DataFrame) -> list[dict[Any, Any]]:
    """Rows with None where there is no value."""
    return table.astype(object).where(table.notna(), None).to_dict("records")

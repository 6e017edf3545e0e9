"""Run patches and put them into tables: single experts, layers, coalitions, and what controls come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.causal.patching.result import COALITIONS, CONTROLS, FRAME
from moe_lens.stats import permutation_p
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.causal.patching.copies import Cells, Copies
    from moe_lens.causal.patching.plan import Grid

TOP = 10
"""Experts, by recovery, whose co-selected control is run."""
TIES = 1e-5
"""Logits: control effects this little below the observed one count as ties; rounding makes such differences."""


@dataclass
class Measure:
    """The patches of one call, and what they come to."""

    copies: Copies
    grid: Grid
    gap: float
    """Logit difference of the prompt that writes are taken from, minus that of the prompt that runs."""
    scale: float
    """The gap as denominator, NaN where it is too small for one."""
    n_random: int
    rng: np.random.Generator
    progress: bool
    controls: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `Patching.controls` so far."""

    def effects(self, patches: Sequence[Cells], title: str) -> Float[ndarray, "patch"]:
        """Change of the logit difference under each patch, positive where it goes toward the other prompt."""
        found = self.copies.differences(patches, title=title, progress=self.progress) - self.copies.unpatched
        return found if self.gap >= 0 else -found

    def _numbers(self, frame: pd.DataFrame, effects: Float[ndarray, "row"]) -> None:
        frame["effect"] = effects
        frame["recovery"] = effects / abs(self.scale)

    def singles(self, each_position: bool) -> pd.DataFrame:
        """`Patching.frame`: experts, layers, layers at each position, and all layers together."""
        rows: list[tuple[str, int | None, int | None, int | None]] = []
        patches: list[Cells] = []
        for layer, visited in self.grid.visited.items():
            for e in range(visited.shape[1]):
                address = ExpertAddress(layer, e)
                at: list[int | None] = [None, *(np.flatnonzero(visited[:, e]).tolist() if each_position else ())]
                rows += [("expert", layer, e, position) for position in at]
                patches += [self.grid.single(address, position) for position in at]
            at = [None, *self.grid.positions]
            rows += [("layer", layer, None, position) for position in at]
            patches += [self.grid.layer(layer, position) for position in at]
        rows.append(("all", None, None, None))
        patches.append(self.grid.everything())
        frame = pd.DataFrame(rows, columns=["unit", "layer", "expert", "position"])
        frame = frame.astype(dict.fromkeys(("layer", "expert", "position"), "Int64"))
        self._numbers(frame, self.effects(patches, "patch"))
        for name in ("clean", "corrupt"):
            frame[f"visits_{name}"] = [self._visits(name, *row[1:]) for row in rows]
        frame["p_random"] = frame["p_co_selected"] = np.nan
        frame["n_random"] = frame["n_co_selected"] = 0
        has_cell = np.array([any(at.any() for at in cells.values()) for cells in patches])
        experts = frame[(frame["unit"] == "expert") & frame["position"].isna() & has_cell]
        self._against_layer(frame, experts)
        self._against_co_selected(frame, experts)
        return frame[list(FRAME)]

    def _visits(self, name: str, layer: int | None, expert: int | None, position: int | None) -> int:
        """Visits of the unit by one prompt at the positions concerned."""
        layers = list(self.grid.visits[name].values()) if layer is None else [self.grid.visits[name][layer]]
        rows = slice(None) if position is None else [position]
        return sum(int(at[rows][:, slice(None) if expert is None else [expert]].sum()) for at in layers)

    def _against_layer(self, frame: pd.DataFrame, experts: pd.DataFrame) -> None:
        """p of each expert by its rank among the others of its layer that either prompt visits."""
        for _, rows in experts.groupby("layer"):
            effect = rows["effect"].to_numpy()
            if len(effect) > 1:
                at_least = (effect >= effect[:, None] - TIES).sum(axis=1)  # itself included
                frame.loc[rows.index, "p_random"] = at_least / len(effect)
                frame.loc[rows.index, "n_random"] = len(effect) - 1

    def _against_co_selected(self, frame: pd.DataFrame, experts: pd.DataFrame) -> None:
        """p of the experts on top against random ones that are visited beside them, at the same positions.

        Choices that come twice count once: with two experts a token there is one way to choose the other at each, and
        many draws of few choices would make p smaller than these choices can.
        """
        first = experts.index[np.argsort(-experts["effect"].to_numpy(), kind="stable")][:TOP]
        rows: list[int] = []
        patches: list[Cells] = []
        for row in first:
            address = self._address(frame, row)
            drawn = [self.grid.beside(address, self.rng) for _ in range(self.n_random)]
            distinct = {_key(cells): cells for cells in drawn if cells is not None}
            patches += distinct.values()
            rows += [row] * len(distinct)
        effects, of = self.effects(patches, "co-selected"), np.array(rows, np.int64)
        for row in dict.fromkeys(rows):
            null = effects[of == row]
            frame.loc[row, "p_co_selected"] = float(permutation_p(frame["effect"][row], null, tolerance=TIES))
            frame.loc[row, "n_co_selected"] = len(null)
            for draw, (at, effect) in enumerate(zip(np.flatnonzero(of == row), null, strict=True)):
                ((layer, chosen),) = patches[at].items()
                names = [ExpertAddress(layer, int(e)) for e in np.flatnonzero(chosen.any(axis=0))]
                self._control("co-selected", self._address(frame, row), draw, names, effect)

    @staticmethod
    def _address(frame: pd.DataFrame, row: int) -> ExpertAddress:
        return ExpertAddress(int(frame["layer"][row]), int(frame["expert"][row]))

    def _control(self, kind: str, of: object, draw: int, experts: Sequence[ExpertAddress], effect: float) -> None:
        self.controls.append({
            "control": kind, "of": str(of), "draw": draw, "experts": _listed(experts), "effect": effect,
            "recovery": effect / abs(self.scale),
        })  # fmt: skip

    def control_table(self) -> pd.DataFrame:
        return pd.DataFrame(self.controls, columns=list(CONTROLS))

    def coalitions(
        self, named: Sequence[tuple[ExpertAddress, ...]], n_greedy: int, frame: pd.DataFrame
    ) -> pd.DataFrame:
        """`Patching.coalitions`: those that were named, or the greedy ones of 1 to `n_greedy` experts."""
        sets = self._greedy(n_greedy) if n_greedy else list(named)
        alone = frame[(frame["unit"] == "expert") & frame["position"].isna()]
        effect_of = {self._address(frame, row): float(frame["effect"][row]) for row in alone.index}
        effects = self.effects([self.grid.together(members) for members in sets], "coalitions")
        table = pd.DataFrame({
            "kind": "greedy" if n_greedy else "given", "experts": [_listed(members) for members in sets],
            "n_experts": [len(members) for members in sets],
        })  # fmt: skip
        self._numbers(table, effects)
        table["sum_alone"] = [sum(effect_of[member] for member in members) / abs(self.scale) for members in sets]
        nulls = [self.grid.random_coalitions(members, self.n_random, self.rng) for members in sets]
        patches = [self.grid.together(drawn) for null in nulls for drawn in null]
        drawn_effects = iter(self.effects(patches, "random coalitions"))
        p = []
        for members, null, effect in zip(sets, nulls, effects, strict=True):
            values = np.array([next(drawn_effects) for _ in null])
            p.append(float(permutation_p(effect, values, tolerance=TIES)) if len(null) else np.nan)
            for draw, (drawn, value) in enumerate(zip(null, values, strict=True)):
                self._control("random", _listed(members), draw, drawn, value)
        table["p_random"], table["n_random"] = p, [len(null) for null in nulls]
        return table[list(COALITIONS)]

    def _greedy(self, n: int) -> list[tuple[ExpertAddress, ...]]:
        """Coalitions of 1, 2, ... n experts, each with the one that adds most to the one before."""
        candidates = self.grid.experts
        path: list[tuple[ExpertAddress, ...]] = [()]
        for size in range(1, min(n, len(candidates)) + 1):
            options = [tuple(sorted((*path[-1], expert))) for expert in candidates if expert not in path[-1]]
            found = self.effects([self.grid.together(option) for option in options], f"coalition of {size}")
            path.append(options[int(found.argmax())])
        return path[1:]

    def notes(self, base: str, source: str) -> tuple[str, ...]:
        """What a reader of the numbers should know."""
        said = []
        if np.isnan(self.scale):
            said.append(
                f"clean and corrupt differ by {abs(self.gap):.3g} logits only, too little to be a denominator: "
                "recovery is not given, effects are in logits"
            )
        here, there = (self.grid.visits[name] for name in (base, source))
        if only := _only(here, there):
            said.append(
                f"{only} experts are visited by the {base} prompt only: what is put in there is zero, that is their "
                "removal"
            )
        if self.copies.what == "output" and (only := _only(there, here)):
            said.append(f"{only} experts are visited by the {source} prompt only: their outputs cannot be put in")
        return tuple(said)


def _only(here: Cells, there: Cells) -> int:
    """Experts that one prompt visits and the other does not."""
    return sum(int((here[layer].any(axis=0) & ~there[layer].any(axis=0)).sum()) for layer in here)


def _listed(experts: Sequence[ExpertAddress]) -> str:
    return ", ".join(map(str, experts))


def _key(cells: Cells) -> tuple[tuple[int, bytes], ...]:
    """What tells two patches apart."""
    return tuple((layer, at.tobytes()) for layer, at in sorted(cells.items()))

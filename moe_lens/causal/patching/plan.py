"""What to patch: single experts, whole layers, layers at one position, coalitions, and controls for them.

Every function makes `Cells`: by layer, the (position, expert) entries that a patch replaces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, prod
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.errors import BadConfig
from moe_lens.models.edits.base import read_addresses
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

    from moe_lens.causal.patching.copies import Cells, Writes
    from moe_lens.causal.patching.prompts import Pair
    from moe_lens.models.lens import Lens


@dataclass(frozen=True)
class Grid:
    """Where experts can be patched."""

    visits: Mapping[str, Cells]
    """Which experts the clean and the corrupt prompt visit; empty outside the chosen positions."""
    visited: Cells
    """Cells that change anything where only their layer is patched."""
    positions: tuple[int, ...]
    """Chosen positions at which the prompts can differ, in the prompt that runs, as all positions here."""

    @classmethod
    def of(cls, pair: Pair, writes: Mapping[str, Writes], base: str, what: str) -> Grid:
        """Patches of the prompt `base`; of what="output" only its own visits can change."""
        at = {"clean": [a for a, _ in pair.patched], "corrupt": [b for _, b in pair.patched]}
        visits: dict[str, dict[int, Bool[ndarray, "position expert"]]] = {}
        for name, found in writes.items():
            visits[name] = {}
            for layer, row in found.row.items():
                visits[name][layer] = np.zeros((len(pair.ids(base)), row.shape[1]), bool)
                visits[name][layer][at[base]] = (row[at[name]] >= 0).cpu().numpy()
        either = {layer: visits["clean"][layer] | visits["corrupt"][layer] for layer in visits["clean"]}
        return cls(visits, either if what == "write" else visits[base], tuple(at[base]))

    @property
    def experts(self) -> list[ExpertAddress]:
        """Experts with a cell."""
        return [
            ExpertAddress(layer, int(e))
            for layer, visits in self.visited.items()
            for e in np.flatnonzero(visits.any(axis=0))
        ]

    def single(self, expert: ExpertAddress, position: int | None = None) -> Cells:
        """One expert at all chosen positions, or at one."""
        only = np.zeros_like(self.visited[expert.layer])
        only[slice(None) if position is None else position, expert.expert] = True
        return {expert.layer: only & self.visited[expert.layer]}

    def layer(self, layer: int, position: int | None = None) -> Cells:
        """All experts of a layer."""
        visits = self.visited[layer]
        if position is None:
            return {layer: visits}
        only = np.zeros_like(visits)
        only[position] = visits[position]
        return {layer: only}

    def together(self, experts: Sequence[ExpertAddress]) -> Cells:
        """Several experts at once.

        In later layers at every chosen position: after a patch below, an expert may be visited where it was not.
        """
        layers = sorted({expert.layer for expert in experts})
        cells: dict[int, Bool[ndarray, "position expert"]] = {}
        for layer in layers:
            only = np.zeros_like(self.visited[layer])
            numbers = [expert.expert for expert in experts if expert.layer == layer]
            only[np.ix_(self.positions, numbers)] = True
            cells[layer] = only & self.visited[layer] if layer == layers[0] else only
        return cells

    def everything(self) -> Cells:
        """All experts of all layers."""
        return self.together([
            ExpertAddress(layer, e) for layer, visits in self.visited.items() for e in range(visits.shape[1])
        ])  # fmt: skip

    def beside(self, expert: ExpertAddress, rng: np.random.Generator) -> Cells | None:
        """At each cell of `expert`, a random other expert that is visited there; None if there is none anywhere."""
        visits = self.visited[expert.layer]
        others = visits & visits[:, expert.expert, None]
        others[:, expert.expert] = False
        keys = np.where(others, rng.random(others.shape), -1.0)
        chosen = np.zeros_like(visits)
        rows = np.flatnonzero(others.any(axis=1))
        chosen[rows, keys[rows].argmax(axis=1)] = True
        return {expert.layer: chosen} if len(rows) else None

    def random_coalitions(
        self, experts: Sequence[ExpertAddress], n: int, rng: np.random.Generator
    ) -> list[list[ExpertAddress]]:
        """`n` other coalitions of visited experts, as many in each layer; none if there are too few experts."""
        layers = sorted({expert.layer for expert in experts})
        numbers = {layer: np.flatnonzero(self.visited[layer].any(axis=0)) for layer in layers}
        sizes = {layer: sum(expert.layer == layer for expert in experts) for layer in layers}
        if prod(comb(len(numbers[layer]), sizes[layer]) for layer in layers) < 2:
            return []
        own, found = set(experts), []
        while len(found) < n:
            drawn = [
                ExpertAddress(layer, int(e))
                for layer in layers
                for e in rng.choice(numbers[layer], sizes[layer], replace=False)
            ]
            if set(drawn) != own:
                found.append(drawn)
        return found


def read_coalitions(lens: Lens, coalitions: object) -> list[tuple[ExpertAddress, ...]]:
    """Coalitions as the user names them: sequences of addresses, or one sequence.

    Raises:
        BadConfig: no sequence of addresses, an empty one, or a neuron.
        OutOfRange: an expert that the model does not have.
    """
    if not isinstance(coalitions, Sequence) or isinstance(coalitions, str) or not coalitions:
        raise BadConfig(f"coalitions= is a number or lists of experts such as [['L0.E1', 'L1.E2']], not {coalitions!r}")
    given = [coalitions] if isinstance(coalitions[0], str | ExpertAddress) else coalitions
    found = [tuple(sorted(lens.address(expert) for expert in read_addresses([members]))) for members in given]
    for members in found:
        for expert in members:
            if expert.neuron is not None:
                raise BadConfig(f"coalitions are made of whole experts, not of {expert}: name {_whole(expert)}")
    return found


def _whole(expert: ExpertAddress) -> ExpertAddress:
    return ExpertAddress(expert.layer, expert.expert)

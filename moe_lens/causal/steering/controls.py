"""Experts to steer instead: of the same layers, with like load and gate mass on the same texts (METRICS 2.5).

One expert of like load often cannot move the next token as much as the one in question. Then others of its layer join
it, at random, until together they can: what is held equal is the KL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.causal.steering.direction import Direction
from moe_lens.causal.trial.matching import load_matched
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.models.spec import Spec

Visits = Mapping[int, tuple["Float[ndarray, 'expert']", "Float[ndarray, 'expert']"]]
"""Load and gate mass of every expert by layer."""


@dataclass(frozen=True)
class Control:
    """A stand-in for every steered expert."""

    experts: tuple[ExpertAddress, ...]
    matched: bool
    """Whether all of them lie within the caliper of the expert they stand for."""


def matched_controls(direction: Direction, visits: Visits, n: int) -> list[Control]:
    """Up to `n` sets of experts to push instead, those of like load first.

    Each steered expert has a stand-in of its layer, which is not steered itself and stands in once only. Where too few
    experts lie within the caliper the nearest others follow; where the layer has no more there are fewer controls.
    """
    queues = [_candidates(expert, direction, visits) for expert in direction.experts]
    found: list[Control] = []
    taken: set[ExpertAddress] = set()
    while len(found) < n:
        chosen: list[tuple[ExpertAddress, bool]] = []
        for queue in queues:
            best = next((candidate for candidate in queue if candidate[0] not in taken), None)
            if best is None:
                return found
            taken.add(best[0])
            chosen.append(best)
        found.append(Control(tuple(expert for expert, _ in chosen), all(matched for _, matched in chosen)))
    return found


def _candidates(expert: ExpertAddress, direction: Direction, visits: Visits) -> list[tuple[ExpertAddress, bool]]:
    """Every expert of the layer that is not steered, with whether it matches; nearest first."""
    load, mass = visits[expert.layer]
    steered = {other.expert for other in direction.experts if other.layer == expert.layer}
    free = [other for other in range(len(load)) if other not in steered]
    near = load_matched(expert.expert, load, mass, among=free, most=len(free))
    distance = np.abs(np.log1p(load) - np.log1p(load[expert.expert]))
    rest = sorted((other for other in free if other not in near), key=distance.__getitem__)
    ranked = [(other, True) for other in near] + [(other, False) for other in rest]
    return [(ExpertAddress(expert.layer, other), matched) for other, matched in ranked]


def joined(
    control: Direction, direction: Direction, visits: Visits, spec: Spec, rng: np.random.Generator
) -> Direction | None:
    """`control` with up to twice as many experts, the new ones pushed as those they join; None if no more may.

    Only experts that the texts visit join, none that is steered, and no more than routing leaves room for.
    """
    pushes = list(control.pushes)
    for push in control.pushes:
        layer = push.expert.layer
        entry = spec.at(layer)
        assert entry is not None
        room = {"suppress": entry.n_experts - entry.top_k, "force": entry.top_k, "bias": entry.n_experts}[push.way]
        ways = Counter(other.way for other in pushes if other.expert.layer == layer)
        taken = {other.expert for other in pushes} | set(direction.experts)
        free = [e for e in np.flatnonzero(visits[layer][0]).tolist() if ExpertAddress(layer, e) not in taken]
        if ways[push.way] < room and free:
            pushes.append(replace(push, expert=ExpertAddress(layer, int(rng.choice(free)))))
    return Direction(tuple(pushes)) if len(pushes) > len(control.pushes) else None

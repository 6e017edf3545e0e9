"""Sets that a ranking has to beat: drawn by lot in each layer, and of equal load (METRICS 2.5).

Every control set has as many units in each layer as the set it stands against, so that depth explains nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

CALIPER = 0.25
"""Largest |difference| of ln load and of ln gate mass between a unit and its match."""


def random_orders(layer: Int[ndarray, "unit"], n: int, *, seed: int = 0) -> Int[ndarray, "draw unit"]:
    """A random place of every unit among those of its layer, for `n` draws.

    One draw serves all bins of a ranking: its sets are nested, as those of the ranking are.
    """
    keys = np.random.default_rng([seed, 17]).random((n, len(layer)))
    place = np.zeros((n, len(layer)), np.int64)
    for at in np.unique(layer):
        mine = np.flatnonzero(layer == at)
        place[:, mine] = keys[:, mine].argsort(axis=1).argsort(axis=1)
    return place


def random_like(
    chosen: Bool[ndarray, "unit"],
    place: Int[ndarray, "draw unit"],
    *,
    layer: Int[ndarray, "unit"],
    member: Bool[ndarray, "unit"],
) -> Bool[ndarray, "draw unit"]:
    """Random sets of `member` units with as many in each layer as `chosen`. They may overlap with it."""
    found = np.zeros(place.shape, bool)
    for at in np.unique(layer[chosen]):
        mine = np.flatnonzero(member & (layer == at))
        order = place[:, mine].argsort(axis=1)[:, : chosen[mine].sum()]
        np.put_along_axis(found, mine[order], True, axis=1)
    return found


def matched_like(
    chosen: Bool[ndarray, "unit"],
    n: int,
    *,
    layer: Int[ndarray, "unit"],
    member: Bool[ndarray, "unit"],
    load: Float[ndarray, "unit"],
    mass: Float[ndarray, "unit"],
    seed: int = 0,
) -> tuple[Bool[ndarray, "draw unit"], float]:
    """Sets in which every unit is replaced by another of its layer with the same load and gate mass.

    Without replacement; a random one within `CALIPER`, else the nearest that is left. Where a layer has none left
    outside `chosen`, the unit stands for itself.

    Returns:
        The sets, and the share of replacements within the caliper. Where it is low, as for a ranking by load, the
        control is no match and its difference is partly that of load.
    """
    rng = np.random.default_rng([seed, 29])
    found = np.zeros((n, len(chosen)), bool)
    size = np.log(np.stack([load, mass]).clip(1e-12))
    away = np.abs(size[:, :, None] - size[:, None, :]).max(axis=0)
    within = 0
    for draw in found:
        for unit in rng.permutation(np.flatnonzero(chosen)).tolist():
            free = np.flatnonzero(member & (layer == layer[unit]) & ~chosen & ~draw)
            near = free[away[unit, free] <= CALIPER]
            within += len(near) > 0
            if len(near):
                draw[rng.choice(near)] = True
            else:
                draw[free[away[unit, free].argmin()] if len(free) else unit] = True
    return found, within / max(1, n * int(chosen.sum()))

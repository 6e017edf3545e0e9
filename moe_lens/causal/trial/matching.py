"""Experts of like load: controls, strata, samples (METRICS 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

CALIPER = 0.25
"""Largest difference of ln load and of ln gate mass."""
CONTROLS = 10
STRATUM = 4
"""Smallest number of experts in a load stratum."""


def load_matched(
    own: int,
    load: Float[ndarray, "expert"],
    mass: Float[ndarray, "expert"],
    *,
    among: Sequence[int],
    most: int = CONTROLS,
) -> list[int]:
    """Experts of `among`, other than `own`, whose load and gate mass lie within the caliper; nearest first."""
    others = np.array([e for e in among if e != own and load[e] > 0 and mass[e] > 0], np.int64)
    if not load[own] > 0 or not mass[own] > 0 or not len(others):
        return []
    by_load = np.abs(np.log(load[others] / load[own]))
    by_mass = np.abs(np.log(mass[others] / mass[own]))
    near = np.flatnonzero((by_load <= CALIPER) & (by_mass <= CALIPER))
    return others[near[np.argsort((by_load + by_mass)[near], kind="stable")]][:most].tolist()


def load_strata(load: Float[ndarray, "expert"], size: int = STRATUM) -> Int[ndarray, "expert"]:
    """Stratum of every expert, by rank of load; each holds `size` experts or more, if there are so many."""
    n = max(1, len(load) // size)
    rank = np.argsort(np.argsort(load, kind="stable"), kind="stable")
    return rank * n // max(len(load), 1)


def stratified_sample(load: Float[ndarray, "label"], n: int, *, seed: int) -> Int[ndarray, "chosen"]:
    """`n` labels drawn so that all loads are present: the ranks are cut into n runs and one is drawn from each."""
    if n >= len(load):
        return np.arange(len(load))
    order = np.argsort(load, kind="stable")
    runs = np.array_split(order, n)
    rng = np.random.default_rng(seed)
    return np.sort([rng.choice(run) for run in runs])


def deranged(n: int, *, seed: int) -> Int[ndarray, "label"]:
    """A random permutation that leaves no label in its place: a random cycle through all. n must be 2 or more."""
    cycle = np.random.default_rng(seed).permutation(n)
    out = np.empty(n, np.int64)
    out[cycle] = np.roll(cycle, 1)
    return out

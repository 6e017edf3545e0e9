"""Which units a bin holds: bins with their rounding, the universe they are shares of, and what they count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from moe_lens.errors import BadConfig, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

Rounding = Literal["ceil", "truncate"]
Universe = Literal["global", "per-layer"]
Axis = Literal["count", "gate-mass"]
_SLACK = 1e-9
"""7 % of 100 is 7 in spite of binary fractions."""


@dataclass(frozen=True)
class Bins:
    """Shares of the universe at which sets are cut, and how their scores are averaged (METRICS 2.2).

    Two results compare only where all four fields agree: a zero bin alone changes an AOPC by |B|/(|B|+1).
    """

    shares: tuple[float, ...]
    """Ascending, in (0, 1]."""
    rounding: Rounding = "ceil"
    """``ceil``: max(1, ceil(q n)); ``truncate``: int(q n), which may be none (ferret, MIB)."""
    include_zero: bool = False
    """Whether the empty set counts as a bin."""
    aggregate: Literal["mean", "trapezoid"] = "mean"

    def __post_init__(self) -> None:
        shares = tuple(self.shares)
        if not shares or list(shares) != sorted(set(shares)) or not 0 < shares[0] <= shares[-1] <= 1:
            raise BadConfig(f"bins={shares}: give different shares in (0, 1], the smallest first")
        if self.rounding not in ("ceil", "truncate") or self.aggregate not in ("mean", "trapezoid"):
            raise BadConfig(
                f"rounding={self.rounding!r}, aggregate={self.aggregate!r}: rounding is ceil or truncate, aggregate "
                "is mean or trapezoid"
            )

    def count(self, n: int, share: float) -> int:
        """Units that `share` of `n` comes to."""
        if self.rounding == "truncate":
            return math.floor(share * n + _SLACK)
        return min(n, max(1, math.ceil(share * n - _SLACK)))


PRESETS = {
    "default": Bins((0.01, 0.05, 0.10, 0.20)),
    "eraser": Bins((0.01, 0.05, 0.10, 0.20, 0.50)),
    "seed": Bins((0.05, 0.10, 0.15, 0.20, 0.25)),
    "mib": Bins((0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), "truncate", aggregate="trapezoid"),
}
"""Bins of ERASER's code (its formula adds a zero bin), of arXiv 2606.29613, and of MIB's circuit track."""


def bins_of(given: str | Bins | Sequence[float]) -> Bins:
    """Bins from a preset's name, shares, or themselves.

    Raises:
        BadConfig: an unknown preset, or shares that are no bins.
    """
    if isinstance(given, Bins):
        return given
    if isinstance(given, str):
        if given not in PRESETS:
            raise BadConfig(f"unknown bins {given!r}{nearest(given, PRESETS)}: use {', '.join(PRESETS)} or shares")
        return PRESETS[given]
    return Bins(tuple(float(share) for share in given))


def ranked(score: Float[ndarray, "unit"]) -> Int[ndarray, "unit"]:
    """Units from the highest score down; ties to the lower address, NaN last."""
    return np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")


def top(
    score: Float[ndarray, "unit"],
    share: float,
    bins: Bins,
    *,
    layer: Int[ndarray, "unit"],
    member: Bool[ndarray, "unit"],
    mass: Float[ndarray, "unit"] | None = None,
    universe: Universe = "global",
) -> Bool[ndarray, "unit"]:
    """The highest scored units that make up `share` of the universe.

    Args:
        layer: of each unit; matters for ``per-layer``, where `share` of every layer is taken.
        member: units of the universe; others are never chosen.
        mass: count gate mass instead of units: units are taken until `share` of the mass is reached.
    """
    chosen = np.zeros(len(score), bool)
    groups = [member] if universe == "global" else [member & (layer == at) for at in np.unique(layer[member])]
    for group in groups:
        order = ranked(np.where(group, score, np.nan))
        order = order[group[order]]
        chosen[order[: _size(order, share, bins, mass)]] = True
    return chosen


def _size(order: Int[ndarray, "unit"], share: float, bins: Bins, mass: Float[ndarray, "unit"] | None) -> int:
    if mass is None:
        return bins.count(len(order), share)
    reached = np.cumsum(mass[order])
    wanted = share * reached[-1] if len(order) else 0.0
    slack = _SLACK * max(wanted, 1.0)
    if bins.rounding == "truncate":
        return int(np.searchsorted(reached, wanted + slack, side="right"))
    return min(len(order), int(np.searchsorted(reached, wanted - slack)) + 1)


def emptied(removed: Bool[ndarray, "unit"], layer: Int[ndarray, "unit"]) -> tuple[int, ...]:
    """Layers that are left without a unit."""
    return tuple(int(at) for at in np.unique(layer) if removed[layer == at].all())

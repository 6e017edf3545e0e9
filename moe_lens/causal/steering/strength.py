"""Bisection: how strong a push must be for the next token to move by a given KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_lens.models.edits.steered import FULL

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

STEPS = 15
TOLERANCE = 0.1
"""Nats; a tenth of the KL that is sought where this is below 1 nat."""
WEAKEST = 2.0**-7
"""Logits; the middle between it and `FULL`, on a log scale, is 1."""


@dataclass(frozen=True)
class Strength:
    """What the search came to."""

    value: float
    """Largest bias, logits; infinity is the utmost (`Direction.mode`)."""
    kl: Float[ndarray, "prompt"]
    reached: bool
    """Whether the mean KL is within the tolerance."""
    tried: tuple[tuple[float, float], ...]
    """Every (strength, mean KL) of the search, in its order."""
    utmost: float
    """Mean KL of the utmost push; NaN if it was not tried."""


def tolerance(kl: float) -> float:
    return TOLERANCE * min(1.0, kl)


def find_strength(measure: Callable[[float], Float[ndarray, "prompt"]], kl: float) -> Strength:
    """Bisect the strength, on a log scale, until the mean KL is `kl` within `tolerance`.

    The utmost push comes first: where it moves the next token by less, nothing can. After `STEPS` measurements the
    nearest one is taken; KL jumps where experts change places in the top-k, so there may be none within the tolerance.
    The search takes KL to grow with strength, which it does by and large only.

    Args:
        measure: mean KL of each prompt at a strength in logits.
    """
    tried: list[tuple[float, Float[ndarray, "prompt"]]] = [(math.inf, measure(math.inf))]
    off = [abs(float(tried[0][1].mean()) - kl)]
    utmost = float(tried[0][1].mean())
    low, high = WEAKEST, FULL
    while utmost > kl and min(off) > tolerance(kl) and len(tried) < STEPS:
        middle = math.sqrt(low * high)
        tried.append((middle, measure(middle)))
        found = float(tried[-1][1].mean())
        off.append(abs(found - kl))
        low, high = (middle, high) if found < kl else (low, middle)
    best = min(range(len(tried)), key=off.__getitem__)
    value, values = tried[best]
    curve = tuple((strength, float(each.mean())) for strength, each in tried)
    return Strength(value, values, off[best] <= tolerance(kl), curve, utmost)


def as_given(measure: Callable[[float], Float[ndarray, "prompt"]], strength: float) -> Strength:
    """The strength that was asked for, whatever KL it has."""
    values = measure(strength)
    mean = float(values.mean())
    return Strength(strength, values, True, ((strength, mean),), mean if math.isinf(strength) else math.nan)

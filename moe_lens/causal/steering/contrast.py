"""Is it these experts, or would a disturbance of this size do the same? Steered against control experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.stats import document_multiplicities, percentile_interval, permutation_p

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

DRAWS = 10_000
ROUNDING = 1e-9


@dataclass(frozen=True)
class Contrast:
    """Change of the score by steering, beyond that of control experts at the same KL."""

    change: float
    """Steered minus clean, mean over prompts."""
    controls: float
    """The same of the controls, mean over them; NaN without any."""
    difference: float
    low: float
    """95 % bootstrap interval of the difference over prompts; NaN with one prompt."""
    high: float
    p: float
    """Rank of the steered change among the controls', both without sign: (1 + those as large) / (controls + 1)."""
    n_controls: int
    """Controls at the same KL; others are not compared."""


def contrast(
    steered: Float[ndarray, "prompt"], controls: Float[ndarray, "control prompt"], *, seed: int = 0
) -> Contrast:
    """Compare changes of a score (METRICS 2.5, METRICS 3 item 8).

    Args:
        steered: score with the experts steered minus score of the clean text.
        controls: the same for each control that reached the KL.

    The interval is over prompts, with the controls as they are: it does not show the spread over other controls, and
    with fewer than ten prompts it is too narrow. p says nothing about prompts; it is 1 / (controls + 1) at the least.
    """
    change = float(steered.mean())
    if not len(controls):
        return Contrast(change, *(float("nan"),) * 5, n_controls=0)
    beyond = steered - controls.mean(axis=0)
    low, high = np.nan, np.nan
    if len(beyond) > 1:
        times = document_multiplicities(len(beyond), DRAWS, seed=seed)
        low, high = percentile_interval(times @ beyond / len(beyond))
    p = permutation_p(abs(change), np.abs(controls.mean(axis=1)), tolerance=ROUNDING)
    return Contrast(
        change, float(controls.mean()), float(beyond.mean()), float(low), float(high), float(p), len(controls)
    )

"""Which neurons a k-sparse probe may use: ranked on the select split, from streamed moments only.

``score = |m1 - m0| / sqrt((s1^2 + s0^2) / 2 + eps^2)`` with ``eps`` one hundredth of the median standard
deviation of the cell's neurons (METRICS 1.1). Dividing by the spread keeps loud neurons from winning by
amplitude; eps keeps near-silent ones from winning by division.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from moe_lens.capture.moments import Moments

RANKINGS = ("standardised", "mean_diff")
EPSILON = 1e-2


def neuron_scores(moments: Moments, *, rank: str = "standardised") -> Float[Tensor, "expert concept d_ff"]:
    """Separation of the two classes by each neuron, larger is better; -1 where a class has no row.

    Args:
        rank: ``standardised`` (METRICS 1.1) or ``mean_diff``, the plain mean difference of arXiv 2604.02178.

    Raises:
        BadConfig: an unknown ranking.
    """
    gap = (moments.mean_pos - moments.mean_neg).abs()
    if rank == "standardised":
        eps = EPSILON * moments.var.sqrt().median(dim=-1).values[:, None, None]
        gap = gap / ((moments.var_pos + moments.var_neg) / 2 + eps * eps).sqrt()
    elif rank != "mean_diff":
        raise BadConfig(f"unknown neuron ranking {rank!r}: choose one of {', '.join(RANKINGS)}")
    return gap.nan_to_num(nan=-1.0, posinf=-1.0)


def top_neurons(scores: Float[Tensor, "expert concept d_ff"], k: int) -> Int[Tensor, "expert concept {k}"]:
    """The `k` best neurons, best first, ties to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k]

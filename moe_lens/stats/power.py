"""What a sample can show at all: null spread of AUROC, smallest detectable effects, documents needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_lens.errors import BadConfig
from moe_lens.stats.normal import normal_quantile

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray


def auroc_null_se(
    n_pos: Float[ndarray, "*shape"] | float, n_neg: Float[ndarray, "*shape"] | float
) -> Float[ndarray, "*shape"]:
    """Standard deviation of AUROC where score and class are unrelated, ``sqrt((n+ + n- + 1) / (12 n+ n-))``.

    Exact for independent, untied rows (Mann & Whitney 1947); infinite where a class is empty. Ties make the
    true value smaller, by the factor ``sqrt(1 - sum(t^3 - t) / (n^3 - n))`` over runs of t equal scores; leaving
    that out makes a studentised AUROC cautious. Rows of one document make it larger (see `design_effect`).

    On tokens it is a yardstick for comparing cells of different size, not a standard error to test with: only
    exchanging labels between documents gives a valid test.
    """
    n_pos, n_neg = np.asarray(n_pos, np.float64), np.asarray(n_neg, np.float64)
    pairs = 12 * n_pos * n_neg
    out = np.full(np.broadcast(n_pos, n_neg).shape, np.inf)
    return np.sqrt(np.divide(n_pos + n_neg + 1, pairs, out=out, where=pairs > 0))


def design_effect(tokens_per_document: Int[ndarray, "document"], intraclass_correlation: float) -> float:
    """Factor by which clustering inflates a variance, ``1 + (sum n^2 / sum n - 1) rho`` (Kish 1965).

    At ``rho = 1`` only documents count. The correlation must be known from elsewhere: for a label that is
    constant within documents it is 1.
    """
    n = np.asarray(tokens_per_document, np.float64)
    return float(1 + ((n**2).sum() / n.sum() - 1) * intraclass_correlation)


def detectable_auroc(
    n_pos: Float[ndarray, "*shape"] | float,
    n_neg: Float[ndarray, "*shape"] | float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    sides: int = 1,
    design_effect: float = 1.0,
) -> Float[ndarray, "*shape"]:
    """Smallest true AUROC that a rank test finds with probability `power` (Noether 1987, JASA 82:645).

    Args:
        n_pos: positives; documents, where the label is a property of whole documents.
        n_neg: negatives, in the same unit.
        alpha: level of the test; divide it by the number of tests for a Bonferroni family.
        sides: 1, because the neuron's sign is fixed on select before AUROC is looked at.
        design_effect: variance inflation by clustering, see the function of that name.

    Returns:
        NaN where even a perfect score would not be found.

    Uses the null variance also under the alternative, which is a little cautious for a large AUROC. Does not
    show what the search over cells costs: that needs the permutation null.
    """
    reach = _reach(alpha, power, sides) * auroc_null_se(n_pos, n_neg) * np.sqrt(design_effect)
    return np.where(reach <= 0.5, 0.5 + reach, np.nan)


def detectable_effect(
    n_documents: Int[ndarray, "*shape"] | int, *, alpha: float = 0.05, power: float = 0.8, sides: int = 2
) -> Float[ndarray, "*shape"]:
    """Smallest paired effect d (mean / sd of per-document differences) that a t-test finds; inverts `documents_needed`.

    NaN where there are too few documents for any effect.
    """
    room = np.asarray(n_documents, np.float64) - _critical(alpha, sides) ** 2 / 2
    out = np.full(room.shape, np.nan)
    return np.divide(_reach(alpha, power, sides), np.sqrt(np.maximum(room, 0)), out=out, where=room > 0)


def documents_needed(
    effect: Float[ndarray, "*shape"] | float, *, alpha: float = 0.05, power: float = 0.8, sides: int = 2
) -> Int[ndarray, "*shape"]:
    """Documents with which a paired t-test finds the standardised effect d with probability `power`.

    ``((z_alpha + z_power) / d)^2 + z_alpha^2 / 2``, rounded up: the normal formula with Guenther's (1981)
    correction, within one document of the noncentral t. d = .2 needs 199, d = .1 needs 787; at alpha = .05/1024
    it is 610 and 2,412.

    Says what is needed on average, if d is right: effects that were found first and then used as d are inflated.
    """
    n = (_reach(alpha, power, sides) / np.asarray(effect, np.float64)) ** 2 + _critical(alpha, sides) ** 2 / 2
    return np.ceil(n).astype(np.int64)


def _critical(alpha: float, sides: int) -> float:
    if not 0 < alpha < 1 or sides not in (1, 2):
        raise BadConfig(f"alpha={alpha} with {sides} sides: give 0 < alpha < 1 and 1 or 2 sides")
    return float(normal_quantile(1 - alpha / sides))


def _reach(alpha: float, power: float, sides: int) -> float:
    """Standard errors between the null and an effect that is found with probability `power`."""
    if not 0 < power < 1:
        raise BadConfig(f"power={power}: give a probability between 0 and 1, such as 0.8")
    return _critical(alpha, sides) + float(normal_quantile(power))

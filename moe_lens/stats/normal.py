"""Distribution function and quantiles of the standard normal, elementwise, without scipy."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

_NORMAL = NormalDist()
_cdf = np.frompyfunc(_NORMAL.cdf, 1, 1)
_inv_cdf = np.frompyfunc(_NORMAL.inv_cdf, 1, 1)


def normal_cdf(z: Float[ndarray, "*shape"] | float) -> Float[ndarray, "*shape"]:
    return np.asarray(_cdf(np.asarray(z, np.float64)), np.float64)


def normal_quantile(p: Float[ndarray, "*shape"] | float) -> Float[ndarray, "*shape"]:
    """Inverse of `normal_cdf`, for 0 < p < 1."""
    return np.asarray(_inv_cdf(np.asarray(p, np.float64)), np.float64)

"""Mutual information between domains and experts, in bits, beside the same number on shuffled documents.

Plug-in estimates are biased upward, and the conditional one badly so (a token seen once "determines" both its
domain and its expert). Therefore every figure is printed beside its null: the same tokens and experts with the
domains permuted over whole documents. Only the difference is evidence.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Information:
    """One layer's figures in bits; ``null`` is the mean over permutations, ``null_max`` their largest."""

    layer: int
    expert_entropy: float
    domain_expert: float
    domain_expert_null: float
    domain_expert_null_max: float
    given_token: float
    given_token_null: float
    given_token_null_max: float
    token_expert: float
    """Also biased upward; a ceiling for how much routing a look-up by token could explain."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def entropy(counts: np.ndarray) -> float:
    """Plug-in entropy in bits of a table of counts."""
    positive = counts[counts > 0].astype(np.float64)
    total = positive.sum()
    return float(np.log2(total) - (positive * np.log2(positive)).sum() / total)


def _joint(size: int, *columns: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    return np.bincount(np.ravel_multi_index(columns, sizes), minlength=size)


def mutual_information(x: np.ndarray, y: np.ndarray, n_x: int, n_y: int) -> float:
    """I(x; y) in bits from paired labels."""
    joint = _joint(n_x * n_y, x, y, sizes=(n_x, n_y)).reshape(n_x, n_y)
    return entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint)


def conditional_information(x: np.ndarray, y: np.ndarray, z: np.ndarray, n_x: int, n_y: int, n_z: int) -> float:
    """I(x; y | z) = H(x, z) + H(y, z) - H(z) - H(x, y, z) in bits."""
    xz = _joint(n_x * n_z, x, z, sizes=(n_x, n_z))
    yz = _joint(n_y * n_z, y, z, sizes=(n_y, n_z))
    xyz = _joint(n_x * n_y * n_z, x, y, z, sizes=(n_x, n_y, n_z))
    return entropy(xz) + entropy(yz) - entropy(np.bincount(z, minlength=n_z)) - entropy(xyz)


def information(
    layer: int,
    experts: np.ndarray,
    tokens: np.ndarray,
    document: np.ndarray,
    domain: np.ndarray,
    *,
    n_experts: int,
    n_tokens: int,
    permutations: int = 8,
    seed: int = 0,
) -> Information:
    """Information of one layer.

    ``experts`` is [row, top_k]; ``tokens`` and ``document`` are [row]; ``domain`` is [document]. A row counts once
    for each of its experts.
    """
    top_k = experts.shape[1]
    expert, token, doc = experts.reshape(-1), np.repeat(tokens, top_k), np.repeat(document, top_k)
    n_domains = int(domain.max()) + 1

    def both(labels: np.ndarray) -> tuple[float, float]:
        return (
            mutual_information(labels, expert, n_domains, n_experts),
            conditional_information(labels, expert, token, n_domains, n_experts, n_tokens),
        )

    plain, given = both(domain[doc])
    rng = np.random.default_rng(seed)
    nulls = np.array([both(rng.permutation(domain)[doc]) for _ in range(permutations)])
    return Information(
        layer,
        entropy(np.bincount(expert, minlength=n_experts)),
        plain,
        *_mean_max(nulls[:, 0]),
        given,
        *_mean_max(nulls[:, 1]),
        mutual_information(token, expert, n_tokens, n_experts),
    )


def _mean_max(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.max())

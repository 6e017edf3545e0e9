"""Concepts that agree form one group, and a group is represented once (METRICS 1.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized

AGREE = 0.5
"""Phi above which two concepts are one."""


@dataclass(frozen=True)
class ConceptGroup:
    """Concepts that mark nearly the same tokens."""

    name: str
    """Of the concept that stands for the group: the member with most positive tokens, the first of equals."""
    concept: int
    members: tuple[str, ...]


def concept_groups(tokenized: Tokenized, threshold: float = AGREE) -> list[ConceptGroup]:
    """Groups of concepts, in the order of the concepts that stand for them.

    Two concepts are in one group if they share ``Concept.group``, or if phi of their labels exceeds `threshold` over
    the eligible tokens on which both are defined; groups that share a concept are one. Tokens of all splits
    count: labels are a property of the text, and no activation is looked at.

    Groups are chains: two members may agree with a third and hardly with each other. Concepts in different groups
    may still be correlated, or one contain the other.
    """
    concepts = tokenized.concepts
    alike = _phi(tokenized) > threshold
    names = [c.group or c.name for c in concepts]
    alike |= np.array([[a == b for b in names] for a in names], bool).reshape(alike.shape)
    label = np.arange(len(concepts))
    while True:
        least = np.where(alike, label[None], len(concepts)).min(1) if len(label) else label
        if (least == label).all():
            break
        label = least
    positives = [int((tokenized.eligible & tokenized.label(c)).sum()) for c in range(len(concepts))]
    groups = []
    for number in np.unique(label):
        members = np.flatnonzero(label == number)
        first = int(members[np.argmax([positives[c] for c in members])])
        groups.append(ConceptGroup(concepts[first].name, first, tuple(concepts[c].name for c in members)))
    return sorted(groups, key=lambda group: group.concept)


def _phi(tokenized: Tokenized) -> Float[ndarray, "concept concept"]:
    """Correlation of the labels of every two concepts, 0 where one of them is constant or they never meet."""
    n_concepts = len(tokenized.concepts)
    both, hits, on = (np.zeros((n_concepts, n_concepts)) for _ in range(3))
    step = 1 << 14
    for start in range(0, tokenized.n_tokens, step):
        keep = tokenized.eligible[start : start + step]
        scope = tokenized.in_scope[tokenized.window_of[start : start + step]][keep].astype(np.float32)
        label = tokenized.labels(start, start + step)[keep] * scope
        both += label.T @ label
        hits += label.T @ scope  # row concept's positives where the column concept is defined
        on += scope.T @ scope
    spread = hits * (on - hits)
    variance = spread * spread.T
    out = np.zeros_like(both)
    return np.divide(on * both - hits * hits.T, np.sqrt(variance), out=out, where=variance > 0)

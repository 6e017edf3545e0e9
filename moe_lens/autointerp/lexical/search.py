"""The rule of one expert: terms proposed on one half of the select documents and kept if they help on the other.

A token weighs ``1 / routed`` if the expert got it and ``-1 / others`` if not, so that the weights of the tokens that
a rule marks add up to Youden's J, recall minus false positive rate: balanced accuracy is ``(1 + J) / 2``.

1. Predicates that mark much weight by themselves are the expert's candidates.
2. Terms are made of them: a list of strings, with classes or without, a class, a list of markers before the token,
   or one of the former with (or without) such markers. Lists grow by the string that adds most.
3. The term that adds most weight, less a price for its length, is tried on the other half. It stays if it adds
   weight there, by more than documents vary. Then again, with what is not marked yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.autointerp.lexical.candidates import Bits, Candidates
from moe_lens.autointerp.lexical.predicates import Predicate, String, Term
from moe_lens.autointerp.lexical.sampled_text import SampledText

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

MOST_TERMS = 4
"""Of a rule; a class in a list counts as one."""
MOST_STRINGS = 24
MOST_CLASSES = 2
"""In a list, beside strings."""
MOST_MARKERS = 6
_CANDIDATES = 48
"""Of each kind."""
_PAIRED = 4
"""Terms that are tried with surroundings."""
_PURE = 3
"""A second list is made as if false positives cost this much: classes that are too wide do not come first then."""
_TRIES = 3
_POSITIVES, _OTHERS = 8192, 16384
"""Tokens of the first half from which terms are made, at most."""
LEAST_GAIN = 0.01
"""Of a term, in J on the second half."""
_LEAST_STRING = 0.003
_PRICE = 0.002
"""In J, for every string or marker."""
LEAST_Z = 2.6
"""Standard errors over documents by which a term must help on the second half."""


@dataclass(frozen=True)
class Found:
    """A rule's terms and what it is worth."""

    terms: tuple[Term, ...]
    bits: tuple[Bool[ndarray, "token"], ...]
    """What each term marks, in both halves."""
    j: float
    """Recall minus false positive rate on the half that did not propose."""


class Search:
    """Rules for the experts of any layer, from the same text and candidates."""

    def __init__(self, text: SampledText, candidates: Candidates, proposing: Bool[ndarray, "token"]) -> None:
        self.text, self.candidates, self.proposing = text, candidates, proposing
        self._strings = np.array([isinstance(p, String) for p in candidates.tokens.predicates], bool)
        _, self._document = np.unique(text.document, return_inverse=True)

    def gains(self, routed: Bool[ndarray, "token expert"]) -> Float[ndarray, "predicate expert"]:
        """J of every candidate over tokens, for every expert, on the first half."""
        mine = routed[self.proposing]
        return self.candidates.tokens.gains(weights(mine, np.ones(len(mine), bool)).astype(np.float32))

    def rule(
        self, routed: Bool[ndarray, "token"], gains: Float[ndarray, "predicate"], rng: np.random.Generator
    ) -> Found | None:
        """The rule of an expert, None if none is better than nothing.

        Args:
            gains: its column of `gains`.
            rng: draws the tokens from which terms are made, where there are too many.
        """
        draft = _Draft(self, routed, gains, rng)
        value = weights(routed, ~self.proposing)
        covered = np.zeros(len(self.text), bool)
        terms: list[Term] = []
        while (room := MOST_TERMS - sum(len(term.parts) for term in terms)) > 0:
            near_alone = all(term.tokens for term in terms)
            for term in draft.proposals(covered[self.proposing], near_alone=near_alone, most_parts=room):
                marked = self.text.tokens_of(term, self.candidates.marks)
                if self._helps(value * (marked & ~covered)):
                    break
            else:
                break
            terms.append(term)
            covered |= marked
        if not terms:
            return None
        parts = tuple(part for term in terms for part in term.parts)
        bits = tuple(self.text.tokens_of(part, self.candidates.marks) for part in parts)
        return Found(parts, bits, float(value[covered].sum()))

    def _helps(self, value: Float[ndarray, "token"]) -> bool:
        by_document = np.bincount(self._document, value)
        error = np.sqrt((by_document**2).sum())
        return bool(by_document.sum() >= max(LEAST_GAIN, LEAST_Z * error))


def weights(routed: Bool[ndarray, "*token"], used: Bool[ndarray, "token"]) -> Float[ndarray, "*token"]:
    """Weights that add up to J over marked tokens, 0 where not `used`; the first axis is the tokens'."""
    used = used.reshape(-1, *[1] * (routed.ndim - 1))
    yes, no = (routed & used), (~routed & used)
    return yes / np.maximum(yes.sum(0), 1) - no / np.maximum(no.sum(0), 1)


class _Draft:
    """Terms for one expert, from a sample of the first half."""

    def __init__(
        self,
        search: Search,
        routed: Bool[ndarray, "token"],
        gains: Float[ndarray, "predicate"],
        rng: np.random.Generator,
    ) -> None:
        mine = routed[search.proposing]
        drawn = [rng.permutation(np.flatnonzero(mine == on))[:n] for on, n in ((True, _POSITIVES), (False, _OTHERS))]
        self.rows = np.sort(np.concatenate(drawn))
        self.weight = weights(mine[self.rows], np.ones(len(self.rows), bool)).astype(np.float32)
        tokens, near = search.candidates.tokens, search.candidates.near
        self.strings, self.string_bits = self._best(tokens, np.where(search._strings, gains, 0))
        self.classes, self.class_bits = self._best(tokens, np.where(search._strings, 0, gains))
        self.markers = [p for p in near.predicates if isinstance(p, String)]
        self.marker_bits = near.rows(slice(None))[:, self.rows].astype(np.float32)

    def _best(
        self, bits: Bits, gains: Float[ndarray, "predicate"]
    ) -> tuple[list[Predicate], Float[ndarray, "candidate row"]]:
        at = np.argsort(-gains, kind="stable")[:_CANDIDATES]
        at = at[gains[at] > 0]
        return [bits.predicates[i] for i in at], bits.rows(at)[:, self.rows].astype(np.float32)

    def proposals(self, covered: Bool[ndarray, "token"], *, near_alone: bool, most_parts: int) -> Iterator[Term]:
        """The best few terms of at most so many parts, the best first."""
        weight = np.where(covered[self.rows], 0, self.weight)
        scored = [
            (gain, term) for gain, term in self._all(weight, near_alone) if gain > 0 and len(term.parts) <= most_parts
        ]
        scored.sort(key=lambda item: -item[0])
        yield from (term for _, term in scored[:_TRIES])

    def _all(self, weight: Float[ndarray, "row"], near_alone: bool) -> Iterator[tuple[float, Term]]:
        bases = [self._list(weight, *plan) for plan in ((0, 1), (MOST_CLASSES, 1), (MOST_CLASSES, _PURE))]
        own = self.class_bits @ weight
        for i in np.argsort(-own, kind="stable")[:_PAIRED].tolist():
            bases.append((float(own[i]) - _PRICE, Term((self.classes[i],)), self.class_bits[i] > 0))
        for gain, term, marked in bases:
            if not term.tokens:
                continue
            yield gain, term
            yield from self._with_surroundings(gain, term, marked, weight)
        if near_alone:
            yield from self._with_surroundings(0.0, Term(()), np.ones(len(weight), bool), weight)

    def _list(
        self, weight: Float[ndarray, "row"], most_classes: int, strictness: float
    ) -> tuple[float, Term, Bool[ndarray, "row"]]:
        """A list of strings and a few classes, chosen as if false positives cost `strictness` times what they do."""
        strict = np.where(weight < 0, strictness * weight, weight)
        bits = np.concatenate([self.class_bits, self.string_bits]) if most_classes else self.class_bits[:0]
        mixed, _ = _grow(bits, strict, MOST_STRINGS)
        classes = [i for i in mixed if i < len(self.classes) and bits[i] @ strict >= LEAST_GAIN][:most_classes]
        marked = (self.class_bits[classes] > 0).any(0)
        strings, _ = _grow(self.string_bits, np.where(marked, 0, strict), MOST_STRINGS)
        marked = marked | (self.string_bits[strings] > 0).any(0)
        tokens = (*(self.classes[i] for i in classes), *(self.strings[i] for i in strings))
        return float(weight @ marked) - _PRICE * len(tokens), Term(tokens), np.asarray(marked)

    def _with_surroundings(
        self, gain: float, term: Term, marked: Bool[ndarray, "row"], weight: Float[ndarray, "row"]
    ) -> Iterator[tuple[float, Term]]:
        rows = np.flatnonzero(marked & (weight != 0))
        here, bits = weight[rows], self.marker_bits[:, rows]
        price = _PRICE * len(term.tokens)
        listed, near = _grow(bits, here, MOST_MARKERS)
        if listed:
            markers = tuple(self.markers[i] for i in listed)
            yield near - price - _PRICE * len(listed), Term(term.tokens, markers)
        if term.tokens:
            listed, less = _grow(bits, -here, MOST_MARKERS)
            if listed:
                markers = tuple(self.markers[i] for i in listed)
                yield gain + less - _PRICE * len(listed), Term(term.tokens, markers, negated=True)


def _grow(bits: Float[ndarray, "candidate row"], weight: Float[ndarray, "row"], most: int) -> tuple[list[int], float]:
    """A list of candidates that together mark much weight, the one that adds most first; and that weight."""
    own = bits @ weight
    pool = np.argsort(-own, kind="stable")[:_CANDIDATES]
    pool = pool[own[pool] > _LEAST_STRING]
    bits, left = bits[pool], weight.copy()
    listed: list[int] = []
    total = 0.0
    while len(listed) < min(most, len(pool)):
        added = bits @ left
        best = int(added.argmax())
        if added[best] <= _LEAST_STRING:
            break
        listed.append(int(pool[best]))
        total += float(added[best])
        left[bits[best] > 0] = 0
    return listed, total

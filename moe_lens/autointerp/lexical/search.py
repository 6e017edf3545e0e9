"""The rule of one expert: terms proposed on one half of the select documents and kept if they help on the other.

A token weighs ``1 / routed`` if the expert got it and ``-1 / others`` if not, so that the weights of the tokens that
a rule marks add up to Youden's J, recall minus false positive rate: balanced accuracy is ``(1 + J) / 2``. Every
class, string and marker has a price in J (`price`), so that a rule stays short enough to be read.

1. Predicates that mark much weight by themselves are the expert's candidates.
2. Terms are made of them: a list of strings and classes, a class, or markers before the token, or one of the former
   with (or without) such markers. Lists grow by what adds most.
3. The term that adds most weight, less its price, is tried on the other half. It stays if it adds weight there, by
   more than documents vary. Then again, with what is not marked yet.
4. What the finished rule can do without, at less than its price, is taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.autointerp.lexical.candidates import Candidates
from moe_lens.autointerp.lexical.predicates import CharacterClass, Predicate, String, Term
from moe_lens.autointerp.lexical.sampled_text import SampledText

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

MOST_TERMS = 4
"""Of a rule; a class in a list counts as one."""
MOST_STRINGS = 5
MOST_CLASSES = 2
"""In a list, beside strings."""
MOST_MARKERS = 3
_CANDIDATES = 32
"""Of each kind."""
_PAIRED = 3
"""Classes that are tried with surroundings."""
_PURE = 3
"""A list is also made as if false positives cost this much: classes that are too wide do not come first then."""
_TRIES = 3
_POSITIVES, _OTHERS = 4096, 8192
"""Tokens of the first half from which terms are made, at most."""
LEAST_GAIN = 0.01
"""Of a term, in J on the second half."""
LEAST_Z = 2.6
"""Standard errors over documents by which a term must help on the second half."""
PRICE = 0.005
"""In J, of a class, a string or a marker;"""
_PRICE_OF_LENGTH = 1 / 20_000
"""of a character of the rule;"""
_PRICE_OF_BOUNDARY = 0.001
"""of a boundary that is not one of a whole word."""


@dataclass(frozen=True)
class Found:
    """A rule's terms and what it is worth."""

    terms: tuple[Term, ...]
    bits: tuple[Bool[ndarray, "token"], ...]
    """What each term marks, in both halves."""
    j: float
    """Recall minus false positive rate on the half that did not propose."""
    held: bool = True
    """Whether the other half bore the terms out."""


class Search:
    """Rules for the experts of any layer, from the same text and candidates."""

    def __init__(self, text: SampledText, candidates: Candidates, proposing: Bool[ndarray, "token"]) -> None:
        self.text, self.candidates, self.proposing = text, candidates, proposing
        tokens, near = candidates.tokens, candidates.near
        self.is_string = np.array([isinstance(p, String) for p in tokens.predicates], bool)
        self.price = np.array([price(p) for p in tokens.predicates], np.float32)
        self.marker_price = np.array([price(p) for p in near.predicates], np.float32)
        self.near = np.ascontiguousarray(near.rows(slice(None)).T)
        _, self._document = np.unique(text.document, return_inverse=True)

    def gains(self, routed: Bool[ndarray, "token expert"]) -> Float[ndarray, "predicate expert"]:
        """J of every candidate over tokens, for every expert, on the first half."""
        mine = routed[self.proposing]
        return self.candidates.tokens.gains(weights(mine, np.ones(len(mine), bool)).astype(np.float32))

    def rule(
        self,
        routed: Bool[ndarray, "token"],
        gains: Float[ndarray, "predicate"],
        rng: np.random.Generator,
        *,
        insist: bool = False,
    ) -> Found | None:
        """The rule of an expert, None if none is better than nothing.

        Args:
            gains: its column of `gains`.
            rng: draws the tokens from which terms are made, where there are too many.
            insist: where the second half bears no term out, take the first one that was proposed.
        """
        draft = _Draft(self, routed, gains, rng)
        value = weights(routed, ~self.proposing)
        covered = np.zeros(len(self.text), bool)
        terms: list[Term] = []
        while (room := MOST_TERMS - sum(len(term.parts) for term in terms)) > 0:
            near_alone = all(term.tokens for term in terms)
            for term in draft.proposals(covered[self.proposing], near_alone=near_alone, most_parts=room):
                marked = self._bits(term)
                if self._helps(value * (marked & ~covered)):
                    break
            else:
                break
            terms.append(term)
            covered |= marked
        held = bool(terms)
        if insist and not held:
            terms = list(islice(draft.proposals(covered[self.proposing], near_alone=True, most_parts=MOST_TERMS), 1))
        if not terms:
            return None
        parts = tuple(part for term in self.pruned(terms, routed) for part in term.parts)
        bits = tuple(self._bits(part) for part in parts)
        return Found(parts, bits, float(value[np.any(bits, axis=0)].sum()), held)

    def pruned(self, terms: list[Term], routed: Bool[ndarray, "token"]) -> list[Term]:
        """What of the terms is worth its price, over both halves; those with the same surroundings become one."""
        single = list(dict.fromkeys(replace(t, tokens=(p,)) for t in terms for p in t.tokens))
        single += [term for term in terms if not term.tokens]
        bits = np.array([self._bits(term) for term in single])
        worth = [price(p) for term in single for p in (term.tokens or term.near)[:1]]
        weight = weights(routed, np.ones(len(routed), bool))
        kept = list(range(len(single)))
        while len(kept) > 1:
            alone = bits[kept] & (bits[kept].sum(0) == 1)
            spare = alone @ weight - np.array(worth)[kept]
            if spare.min() >= 0:
                break
            kept.pop(int(spare.argmin()))
        alike: dict[tuple[tuple[String, ...], bool], list[Predicate]] = {}
        for term in (single[i] for i in kept):
            alike.setdefault((term.near, term.negated), []).extend(term.tokens)
        return [Term(tuple(tokens), *surroundings) for surroundings, tokens in alike.items()]

    def _bits(self, term: Term) -> Bool[ndarray, "token"]:
        return self.text.tokens_of(term, self.candidates.marks)

    def _helps(self, value: Float[ndarray, "token"]) -> bool:
        by_document = np.bincount(self._document, value)
        error = np.sqrt((by_document**2).sum())
        return bool(by_document.sum() >= max(LEAST_GAIN, LEAST_Z * error))


def weights(routed: Bool[ndarray, "*token"], used: Bool[ndarray, "token"]) -> Float[ndarray, "*token"]:
    """Weights that add up to J over marked tokens, 0 where not `used`; the first axis is the tokens'."""
    used = used.reshape(-1, *[1] * (routed.ndim - 1))
    yes, no = (routed & used), (~routed & used)
    return yes / np.maximum(yes.sum(0), 1) - no / np.maximum(no.sum(0), 1)


def price(predicate: Predicate) -> float:
    """What a predicate must add in J to be worth a reader's time."""
    length = _PRICE_OF_LENGTH * len(Term((predicate,)).regex)
    if isinstance(predicate, CharacterClass) or predicate.whole_word:
        return PRICE + length
    return PRICE + length + _PRICE_OF_BOUNDARY * ((predicate.left != "any") + (predicate.right != "any"))


@dataclass(frozen=True)
class _Base:
    """A term before its surroundings are looked at."""

    gain: float
    """Less its price."""
    term: Term
    price: float
    marked: Bool[ndarray, "row"]


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
        tokens = search.candidates.tokens
        net = gains - search.price
        chosen = [self._best(np.where(search.is_string == on, net, -1)) for on in (False, True)]
        at = np.concatenate(chosen)
        self.n_classes = len(chosen[0])
        self.predicates = [tokens.predicates[i] for i in at]
        self.price = search.price[at]
        self.bits = np.ascontiguousarray(tokens.rows(at)[:, self.rows].T).astype(np.float32)
        self.markers = [p for p in search.candidates.near.predicates if isinstance(p, String)]
        self.marker_price = search.marker_price
        self.marker_bits = search.near[self.rows].astype(np.float32)

    @staticmethod
    def _best(net: Float[ndarray, "predicate"]) -> Int[ndarray, "candidate"]:
        at = np.argsort(-net, kind="stable")[:_CANDIDATES]
        return at[net[at] > 0]

    def proposals(self, covered: Bool[ndarray, "token"], *, near_alone: bool, most_parts: int) -> Iterator[Term]:
        """The best few terms of at most so many parts, the best first."""
        weight = np.where(covered[self.rows], 0, self.weight).astype(np.float32)
        bases = list(self._bases(weight))
        scored = [(base.gain, base.term) for base in bases]
        if near_alone:
            bases.append(_Base(0.0, Term(()), 0.0, np.ones(len(weight), bool)))
        scored += self._with_surroundings(bases, weight, most_parts)
        scored = [(gain, term) for gain, term in scored if gain > 0 and len(term.parts) <= most_parts]
        scored.sort(key=lambda item: -item[0])
        yield from (term for _, term in scored[:_TRIES])

    def _bases(self, weight: Float[ndarray, "row"]) -> Iterator[_Base]:
        own = weight @ self.bits[:, : self.n_classes] - self.price[: self.n_classes]
        single = [[i] for i in np.argsort(-own, kind="stable")[:_PAIRED].tolist()]
        lists = [self._list(weight, *plan) for plan in ((0, 1), (MOST_CLASSES, 1), (MOST_CLASSES, _PURE))]
        for listed in {tuple(listed): listed for listed in [*single, *lists] if listed}.values():
            marked = np.asarray(self.bits[:, listed].any(1))
            cost = float(self.price[listed].sum())
            yield _Base(float(weight @ marked) - cost, Term(tuple(self.predicates[i] for i in listed)), cost, marked)

    def _list(self, weight: Float[ndarray, "row"], most_classes: int, strictness: float) -> list[int]:
        """Strings and a few classes, chosen as if false positives cost `strictness` times what they do."""
        strict = np.where(weight < 0, strictness * weight, weight).astype(np.float32)
        kind = (np.arange(len(self.predicates)) >= self.n_classes).astype(int)
        return grow(self.bits, strict, self.price, kind, (most_classes, MOST_STRINGS))[0]

    def _with_surroundings(
        self, bases: Sequence[_Base], weight: Float[ndarray, "row"], most_parts: int
    ) -> Iterator[tuple[float, Term]]:
        """Each base with, or without, markers before it; only where that could still be one of the best."""
        if not bases or not self.markers:
            return
        marked = np.array([base.marked for base in bases]) * weight
        own = marked @ self.marker_bits
        plans = []
        for i, base in enumerate(bases):
            for sign, start in ((1, -base.price), (-1, base.gain)):
                if sign < 0 and not base.term.tokens:
                    continue
                left = sign * own[i] - self.marker_price
                pool = np.argsort(-left, kind="stable")[:_CANDIDATES]
                pool = pool[left[pool] > 0]
                bound = start + float(left[pool[:MOST_MARKERS]].sum())
                plans.append((bound, i, sign, start, pool))
        plans.sort(key=lambda plan: -plan[0])
        best = [base.gain for base in bases if len(base.term.parts) <= most_parts]
        for bound, i, sign, start, pool in plans:
            if len(best) >= _TRIES and bound <= sorted(best)[-_TRIES]:
                break
            rows = np.flatnonzero(marked[i])
            bits, kind = self.marker_bits[rows[:, None], pool], np.zeros(len(pool), int)
            listed, added = grow(bits, sign * weight[rows], self.marker_price[pool], kind, (MOST_MARKERS,))
            if listed:
                markers = tuple(self.markers[pool[j]] for j in listed)
                best.append(start + added)
                yield start + added, replace(bases[i].term, near=markers, negated=sign < 0)


def grow(
    bits: Float[ndarray, "row candidate"],
    weight: Float[ndarray, "row"],
    price: Float[ndarray, "candidate"],
    kind: Int[ndarray, "candidate"],
    limits: Sequence[int],
) -> tuple[list[int], float]:
    """A list of candidates that together mark much weight, the one that adds most first; and that weight, less price.

    Args:
        kind: of each candidate, 0 and up.
        limits: by kind, how many may be listed.
    """
    added = weight @ bits - price
    fresh = np.ones(len(weight), bool)
    room = np.array(limits)
    listed: list[int] = []
    total = 0.0
    while len(added):
        best = int(np.where(room[kind] > 0, added, -1).argmax())
        if room[kind[best]] <= 0 or added[best] <= 0:
            break
        listed.append(best)
        total += float(added[best])
        room[kind[best]] -= 1
        new = np.flatnonzero(fresh & (bits[:, best] > 0))
        fresh[new] = False
        added = added - weight[new] @ bits[new]
    return listed, total

"""Which predicates are tried, and their bits on the tokens of the half that proposes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.autointerp.lexical.predicates import CLASSES, LONGEST, Predicate, String
from moe_lens.autointerp.lexical.sampled_text import SampledText

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, UInt8
    from numpy import ndarray

_SURFACES = 700
_WORDS = 80
"""Words whose next word is a candidate."""
_MARKERS = 500
"""Markers looked at; of these are kept"""
_KEPT_MARKERS = 128
_LEAST = 15
"""Tokens that a predicate must mark in the half that proposes."""
_MARKER = r"\\\p{L}{2,}|\p{L}{2,}|</|/>|://|\n\n|\n\t|\n  +|[^\w\s]{1,2}"
_ROWS = 256


@dataclass(frozen=True)
class Bits:
    """Predicates and, packed along the tokens, what they mark in the half that proposes."""

    predicates: list[Predicate]
    packed: UInt8[ndarray, "predicate byte"]
    n_tokens: int

    def rows(self, which: slice | Int[ndarray, "row"]) -> Bool[ndarray, "row token"]:
        return np.unpackbits(self.packed[which], axis=1, count=self.n_tokens).view(bool)

    def gains(self, weight: Float[ndarray, "token expert"]) -> Float[ndarray, "predicate expert"]:
        """Sum of the weights of the tokens that each predicate marks."""
        blocks = [slice(at, at + _ROWS) for at in range(0, len(self.predicates), _ROWS)]
        parts = [self.rows(block).astype(np.float32) @ weight for block in blocks]
        return np.concatenate(parts) if parts else np.zeros((0, weight.shape[1]), np.float32)


class Candidates:
    """Predicates over tokens and markers of surroundings, drawn from the tokens `proposing` alone.

    ``marks`` has the characters that each of them marks in the whole sample.
    """

    def __init__(self, text: SampledText, proposing: Bool[ndarray, "token"]) -> None:
        surfaces = [s for s, on in zip(text.surfaces(), proposing.tolist(), strict=True) if on]
        frequent = [s for s, _ in Counter(s for s in surfaces if 0 < len(s) <= LONGEST).most_common(_SURFACES)]
        tokens = [*text.as_tokens(frequent, proposing), *_parts(frequent), *_following(surfaces), *CLASSES]
        markers = _markers(text)
        self.marks: dict[Predicate, Int[ndarray, "mark"]] = {}
        self.tokens = self._bits(text, tokens, proposing, near=False)
        near = self._bits(text, markers, proposing, near=True)
        diverse = _diverse(near, text.document[proposing])
        self.near = Bits([near.predicates[i] for i in diverse], near.packed[diverse], near.n_tokens)
        wanted = {*self.tokens.predicates, *self.near.predicates}
        self.marks = {p: at for p, at in self.marks.items() if p in wanted}

    def _bits(
        self, text: SampledText, predicates: list[Predicate], proposing: Bool[ndarray, "token"], *, near: bool
    ) -> Bits:
        """Those that mark enough tokens and no other one's tokens."""
        at = np.flatnonzero(proposing)
        found: dict[bytes, tuple[Predicate, UInt8[ndarray, "byte"]]] = {}
        for predicate, marks in zip(predicates, text.marks(predicates), strict=True):
            bits = (text.tokens_near if near else text.tokens_with)(marks)[at]
            if _LEAST <= np.count_nonzero(bits) <= len(at) - _LEAST:
                packed = np.packbits(bits)
                if (key := packed.tobytes()) not in found:
                    found[key] = predicate, packed
                    self.marks[predicate] = marks
        packed = np.array([bits for _, bits in found.values()], np.uint8).reshape(len(found), (len(at) + 7) // 8)
        return Bits([predicate for predicate, _ in found.values()], packed, len(at))


def _parts(surfaces: list[str]) -> list[Predicate]:
    """Strings at the boundaries of words that they may have, the plainest reading first."""
    out: list[Predicate] = []
    for text in surfaces:
        lefts = ("start", "inside", "any") if text[0].isalnum() else ("any",)
        rights = ("end", "any") if text[-1].isalnum() else ("any",)
        boundaries = [(left, right) for left in lefts for right in rights]
        out += [String(text, *at) for at in boundaries if at != ("any", "end") or len(lefts) == 1]
    return out


def _following(surfaces: list[str]) -> list[Predicate]:
    """The word after a frequent word."""
    words = Counter(s.strip() for s in surfaces if s.strip().isalpha() and len(s) < LONGEST)
    return [String(f"{word} ", "start", after=True) for word, _ in words.most_common(_WORDS)]


def _markers(text: SampledText) -> list[Predicate]:
    """Words and signs by the number of windows that they occur in."""
    import regex

    counts = Counter(m for t in text.texts for m in set(regex.findall(_MARKER, t)) if len(m) <= LONGEST)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MARKERS]
    return [String(m, "start" if m[0].isalnum() else "any", "end" if m[-1].isalnum() else "any") for m, _ in ranked]


def _diverse(near: Bits, document: Int[ndarray, "token"]) -> Int[ndarray, "kept"]:
    """Markers that tell documents apart, each by what the ones before it do not tell (pivoted Gram-Schmidt)."""
    _, inverse, counts = np.unique(document, return_inverse=True, return_counts=True)
    if not near.predicates:
        return np.zeros(0, np.int64)
    order = np.argsort(inverse, kind="stable")
    first = np.cumsum(counts) - counts
    blocks = [slice(at, at + _ROWS) for at in range(0, len(near.predicates), _ROWS)]
    sums = [np.add.reduceat(near.rows(b)[:, order].astype(np.float32), first, axis=1) for b in blocks]
    size = np.sqrt(counts)
    rest = np.concatenate(sums) / size
    rest = rest - np.outer(rest @ size, size) / counts.sum()  # less the mean over tokens
    kept: list[int] = []
    for _ in range(min(_KEPT_MARKERS, len(rest))):
        size = (rest**2).sum(1)
        size[kept] = -1
        best = int(size.argmax())
        kept.append(best)
        if size[best] > 1e-9:
            unit = rest[best] / np.sqrt(size[best])
            rest = rest - np.outer(rest @ unit, unit)
    return np.array(kept)

"""Concepts to token bits: character spans of every concept in a document, then overlap with token spans.

Each regular expression runs once per document, a lexer once per document for all token classes. With spans
sorted and disjoint, token [a, b) is positive iff the first span that ends after a starts before b; one
`searchsorted` per concept, no loop over tokens or characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.corpus.columns import Tagged, tagged_spans
from moe_lens.corpus.concepts import Column, Concept, FieldEquals, Regex, TokenClass
from moe_lens.corpus.lexing import class_spans, merged
from moe_lens.errors import BadConcept

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.corpus.text import Document

TIMEOUT_SECONDS = 5.0
"""Time one regular expression may take on a document of up to 100,000 characters; longer ones get more."""


@dataclass(frozen=True)
class DocumentTags:
    """What all concepts say about one document."""

    in_scope: Bool[ndarray, "concept"]
    spans: tuple[Int[ndarray, "span 2"], ...]
    """Per concept, half-open character spans, sorted and disjoint; empty where out of scope."""

    def token_bits(
        self, char_start: Int[ndarray, "token"], char_end: Int[ndarray, "token"]
    ) -> Bool[ndarray, "token concept"]:
        """Whether each token's characters overlap each concept's. A token without characters is negative."""
        out = np.zeros((len(char_start), len(self.spans)), dtype=bool)
        has_characters = char_end > char_start
        for c, spans in enumerate(self.spans):
            if len(spans):
                first = np.searchsorted(spans[:, 1], char_start, side="right")
                starts = np.append(spans[:, 0], np.iinfo(np.int64).max)
                out[:, c] = (starts[first] < char_end) & has_characters
        return out


class Tagger:
    """Compiled concepts: ``Tagger(concepts).tag(document)``."""

    def __init__(self, concepts: Sequence[Concept], *, timeout: float = TIMEOUT_SECONDS) -> None:
        import regex

        self.concepts = tuple(concepts)
        self.timeout = timeout
        patterns = {c.labeller.pattern for c in self.concepts if isinstance(c.labeller, Regex)}
        self._compiled: dict[str, Any] = {p: regex.compile(p) for p in patterns}

    def tag(self, document: Document) -> DocumentTags:
        """Scope and character spans of all concepts in one document.

        Raises:
            BadConcept: a regular expression takes longer than the timeout.
        """
        scope = np.array([c.in_scope(document) for c in self.concepts], dtype=bool)
        rules = {
            c.labeller for c, on in zip(self.concepts, scope, strict=True) if on and isinstance(c.labeller, TokenClass)
        }
        lexed = class_spans(document, rules) if rules else {}
        regexes: dict[str, Int[ndarray, "span 2"]] = {}  # concepts of one group share a pattern
        columns: dict[tuple[str, ...], list[Tagged] | None] = {}
        none = np.zeros((0, 2), np.int64)
        out = []
        for i, concept in enumerate(self.concepts):
            rule, spans = concept.labeller, none
            if not scope[i]:
                pass
            elif isinstance(rule, Regex):
                if rule.pattern not in regexes:
                    regexes[rule.pattern] = self._matches(concept, rule.pattern, document)
                spans = regexes[rule.pattern]
            elif isinstance(rule, FieldEquals):
                if document.fields[rule.field] in rule.values:
                    spans = np.array([[0, len(document.text)]], np.int64)
            elif isinstance(rule, TokenClass):
                spans = lexed[rule]
            elif isinstance(rule, Column):
                if rule.columns not in columns:
                    columns[rule.columns] = tagged_spans(document, rule.columns)
                tagged = columns[rule.columns]
                scope[i] = tagged is not None
                spans = merged([(a, b) for a, b, tag in tagged or () if tag in rule.tags])
            out.append(spans)
        return DocumentTags(scope, tuple(out))

    def _matches(self, concept: Concept, pattern: str, document: Document) -> Int[ndarray, "span 2"]:
        budget = self.timeout * max(1.0, len(document.text) / 100_000)
        try:
            found = [m.span() for m in self._compiled[pattern].finditer(document.text, timeout=budget)]
        except TimeoutError:
            raise BadConcept(
                f"concept {concept.name!r}: its regular expression took more than {budget:g} s on document "
                f"{document.id!r}; avoid nested repeats, e.g. write (?:a|b)++ for (a|b)+"
            ) from None
        spans = np.array(found, np.int64).reshape(-1, 2)
        return spans[spans[:, 1] > spans[:, 0]]

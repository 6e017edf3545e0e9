"""Concepts to token bits: character spans of every concept in a document, then overlap with token spans.

Each regular expression runs once per document, a lexer once per document for all token classes. With spans
sorted and disjoint, token [a, b) is positive iff the first span that ends after a starts before b; one
`searchsorted` per concept, no loop over tokens or characters.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.corpus.columns import Tagged, tagged_spans
from moe_lens.corpus.concepts import Column, Concept, FieldEquals, Regex, TokenClass
from moe_lens.corpus.lexing import class_spans, merged
from moe_lens.corpus.patterns import TIMEOUT_CHARACTERS, TIMEOUT_SECONDS, find_spans, too_slow

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.corpus.text import Document

TIMEOUTS_IN_ALL = 12
"""Time one regular expression may take on all documents, in units of the limit for one document. A large corpus
gives it more: the limit for every `TIMEOUT_CHARACTERS`."""


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


@dataclass
class _Use:
    """What one regular expression took so far."""

    seconds: float = 0.0
    characters: int = 0
    documents: int = 0


class Tagger:
    """Labels documents, one after the other: ``Tagger(concepts).tag(document)``."""

    def __init__(self, concepts: Sequence[Concept], *, timeout: float = TIMEOUT_SECONDS) -> None:
        self.concepts = tuple(concepts)
        self.timeout = timeout
        self._used: defaultdict[str, _Use] = defaultdict(_Use)

    def tag(self, document: Document, *, until: int | None = None) -> DocumentTags:
        """Scope and character spans of all concepts in one document.

        Args:
            until: spans that start at this character or later are not needed.

        Raises:
            BadConcept: a regular expression takes too long on this document, or on all so far.
        """
        scope = np.array([c.in_scope(document) for c in self.concepts], dtype=bool)
        rules = {
            c.labeller for c, on in zip(self.concepts, scope, strict=True) if on and isinstance(c.labeller, TokenClass)
        }
        lexed = class_spans(document, rules, until=until) if rules else {}
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
                    regexes[rule.pattern] = self._matches(concept, rule.pattern, document, until)
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

    def _matches(self, concept: Concept, pattern: str, document: Document, until: int | None) -> Int[ndarray, "span 2"]:
        owner, text = f"concept {concept.name!r}", document.text
        started = time.thread_time()  # not the clock on the wall: another process is not the expression's fault
        spans = find_spans(pattern, text, owner=owner, document=document.id, limit=self.timeout, until=until)
        use = self._used[pattern]
        use.seconds += time.thread_time() - started
        use.characters += len(text)
        use.documents += 1
        allowed = self.timeout * max(TIMEOUTS_IN_ALL, use.characters / TIMEOUT_CHARACTERS)
        if use.seconds > allowed:
            raise too_slow(owner, pattern, allowed, f"on {use.documents} documents, the last of them {document.id!r}")
        return spans

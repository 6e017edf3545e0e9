"""Which tokens each concept is probed on: texts, their two copies, the stop rule.

A text yields two copies, one with its positive tokens and one with its negatives. Copies go to the model in
batches, and after each batch the source looks whether it has enough tokens. The released default is one copy a
batch, so sampling may end between the copies of a text. The random numbers are Python's.

    concepts    text                                  positives                         special tokens
    pos         first 400 characters                  tokens over words with the tag    as the tokenizer adds them
    code        last 300 characters                   tokens over a matched character   none
    all others  first 300 characters                  tokens over a matched character   none

Negatives are other tokens of the same text (pos: other words of its first sentence), as many as positives or all
there are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_lens.corpus.concepts import Column, Concept
from moe_lens.corpus.splits import domain_order
from moe_lens.corpus.tagging import DocumentTags, Tagger

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.corpus.text import Corpus, Document

CHARACTERS = 300
POS_CHARACTERS = 400


class Piece(NamedTuple):
    """Characters ``start:stop`` of a document, with or without the tokenizer's special tokens."""

    document: int
    start: int
    stop: int
    special: bool


@dataclass(frozen=True)
class Text:
    """A piece of a document as it goes through the model."""

    piece: Piece
    input_ids: Int[ndarray, "token"]
    spans: Int[ndarray, "token 2"]
    """The tokenizer's own offsets, in characters of the piece; empty on special tokens."""
    is_cut: bool
    """Whether it has more tokens than are read."""


@dataclass(frozen=True)
class Sample:
    """The sampled tokens of one concept in the order the source sees them: by copy, then position.

    A token of a POS text that lies over two words can be in it twice, once in either class.
    """

    text: Int[ndarray, "entry"]
    """Number among ``Sampler.texts``."""
    position: Int[ndarray, "entry"]
    batch: Int[ndarray, "entry"]
    """Batch of copies that the token came in."""
    positive: Bool[ndarray, "entry"]

    def __len__(self) -> int:
        return len(self.text)


class Sampler:
    """Samples tokens concept by concept; ``texts`` are the texts they are in, each once.

    Args:
        num_tokens: positives and negatives together after which sampling stops.
        batch_size: copies between two looks at the stop rule.
        max_length: tokens of a text that are read, None for all.
        seed: of the negatives, anew for each concept, and of the order of documents with a ``domain``.

    Documents come in the order of the corpus, like those of the source's shuffled data set. Corpora with a field
    ``domain`` are usually sorted by it, as the bundled one is: there every domain gets a turn (`domain_order`).
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Any, *, num_tokens: int, batch_size: int, max_length: int | None, seed: int
    ) -> None:
        self.texts: list[Text] = []
        self._corpus, self._tokenizer = corpus, tokenizer
        self._num_tokens, self._batch_size, self._max_length, self._seed = num_tokens, batch_size, max_length, seed
        has_domains = any("domain" in document.fields for document in corpus.documents)
        self._order = domain_order(corpus, seed=seed) if has_domains else list(range(len(corpus)))
        self._encoded: dict[Piece, Text] = {}
        self._numbers: dict[Piece, int] = {}

    def sample(self, concept: Concept) -> Sample:
        """Tokens of one concept, the same whatever was sampled before."""
        taken: list[tuple[int, list[int], int, bool]] = []
        total = 0
        for number, (piece, positions, positive) in enumerate(self._copies(concept)):
            batch = number // self._batch_size
            if positions:
                taken.append((self._number(piece), positions, batch, positive))
            total += len(positions)
            if (number + 1) % self._batch_size == 0 and total >= self._num_tokens:
                break
        lengths = [len(positions) for _, positions, _, _ in taken]
        text, batch, positive = (np.repeat(np.array([t[i] for t in taken], np.int64), lengths) for i in (0, 2, 3))
        position = np.concatenate([np.zeros(0, np.int64), *(t[1] for t in taken)]).astype(np.int64)
        return Sample(text, position, batch, positive.astype(bool))

    def _copies(self, concept: Concept) -> Iterator[tuple[Piece, list[int], bool]]:
        """(text, token positions, whether they are positives) of every copy."""
        rng = random.Random(self._seed)
        is_pos = concept.category == "pos" and isinstance(concept.labeller, Column)
        tagger = Tagger([concept])
        for i in self._order:
            document = self._corpus.documents[i]
            if not concept.in_scope(document):
                continue
            piece = _piece(i, len(document.text), concept.category, is_pos)
            positives, others = self._words(concept, piece) if is_pos else self._matches(tagger, piece)
            if positives:
                yield piece, sorted(set(positives)), True
            if others if is_pos else positives:  # the source's two loops differ in when they make this copy
                drawn = rng.sample(others, min(len(positives), len(others)))
                yield piece, sorted(set(drawn)), False

    def _matches(self, tagger: Tagger, piece: Piece) -> tuple[list[int], list[int]]:
        """Tokens over a marked character, and all others."""
        document = self._corpus.documents[piece.document]
        tags = _tags(tagger, document, piece)
        if not len(tags.spans[0]):
            return [], []
        spans = self._encode(piece).spans
        bits = tags.token_bits(spans[:, 0], spans[:, 1])[:, 0]
        return np.flatnonzero(bits).tolist(), np.flatnonzero(~bits).tolist()

    def _words(self, concept: Concept, piece: Piece) -> tuple[list[int], list[int]]:
        """Tokens over words with the concept's tag and over other words, word by word, so with repeats."""
        assert isinstance(concept.labeller, Column)
        document = self._corpus.documents[piece.document]
        words = first_sentence(document, concept.labeller.columns)
        found = _aligned(document.text[piece.start : piece.stop], words or [])
        if not found:
            return [], []
        start, end = self._encode(piece).spans.T
        classes: tuple[list[int], list[int]] = ([], [])
        for a, b, tag in found:
            over = np.flatnonzero((start < end) & (end > a) & (start < b))
            classes[tag not in concept.labeller.tags].extend(over.tolist())
        return classes

    def _encode(self, piece: Piece) -> Text:
        if piece not in self._encoded:
            text = self._corpus.documents[piece.document].text[piece.start : piece.stop]
            coded = self._tokenizer(
                text, add_special_tokens=piece.special, return_offsets_mapping=True, truncation=False, verbose=False
            )
            ids = np.array(coded["input_ids"], np.int64)
            spans = np.array(coded["offset_mapping"], np.int64).reshape(-1, 2)
            most = len(ids) if self._max_length is None else self._max_length
            self._encoded[piece] = Text(piece, ids[:most], spans[:most], len(ids) > most)
        return self._encoded[piece]

    def _number(self, piece: Piece) -> int:
        if piece not in self._numbers:
            self._numbers[piece] = len(self.texts)
            self.texts.append(self._encoded[piece])
        return self._numbers[piece]


def _piece(document: int, length: int, category: str, is_pos: bool) -> Piece:
    most = POS_CHARACTERS if is_pos else CHARACTERS
    start = max(0, length - most) if category == "code" else 0
    return Piece(document, start, min(length, start + most), is_pos)


def _tags(tagger: Tagger, document: Document, piece: Piece) -> DocumentTags:
    """Marked characters of the piece. Labels of a column speak of the whole text and are cut with it."""
    if isinstance(tagger.concepts[0].labeller, Column):
        tags = tagger.tag(document)
        inside = np.clip(tags.spans[0], piece.start, piece.stop) - piece.start
        return DocumentTags(tags.in_scope, (inside[inside[:, 1] > inside[:, 0]],))
    return tagger.tag(replace(document, text=document.text[piece.start : piece.stop]))


def first_sentence(document: Document, columns: tuple[str, ...]) -> list[tuple[str, str]] | None:
    """(word, tag) of the first sentence in the first of `columns` that has pairs, None if none has.

    A column holds sentences of pairs, as the source's data set does, or the pairs of one sentence.
    """
    for column in columns:
        try:
            value = json.loads(document.fields.get(column, "null"))
            pairs = value[0] if isinstance(value[0][0], list) else value
            return [(str(word), str(tag)) for word, tag in pairs]
        except (ValueError, TypeError, LookupError):  # no such column, no JSON, or no pairs
            continue
    return None


def _aligned(text: str, words: list[tuple[str, str]]) -> list[tuple[int, int, str]]:
    """(start, end, tag) of words, each looked for after the last; nothing if one is not there."""
    spans, cursor = [], 0
    for word, tag in words:
        start = text.find(word, cursor)
        if start < 0:
            return []
        cursor = start + len(word)
        spans.append((start, cursor, tag))
    return spans

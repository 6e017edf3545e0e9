"""Spans of words from a data-set column: POS tags, entities.

Shapes that are read (nested lists, such as sentences, are flattened)
    ``[["The", "DET"], ["cat", "NOUN"]]``                pairs of word and tag
    ``[{"start": 0, "end": 3, "tag": "DET"}, ...]``      character spans (key ``tag`` or ``label``)
    ``[{"token": "The", "tag": "DET"}, ...]``            records (keys ``token``, ``word`` or ``text``)
    ``["DET", "NOUN"]`` beside a column ``tokens``       parallel lists

Words are aligned by sequential search, as in the source: each is looked for after the end of the last one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moe_lens.corpus.text import Document

REACH = 200
"""Characters after the last word in which the next one is looked for, so that one bad word cannot jump ahead."""
MIN_ALIGNED = 0.9
"""Share of words that must be found for the column to be believed."""

Tagged = tuple[int, int, str]


def tagged_spans(document: Document, columns: tuple[str, ...]) -> list[Tagged] | None:
    """(start, end, tag) of the first of `columns` that is usable, sorted; None if there is none.

    A column is unusable if it cannot be read, if fewer than 90 % of its words are found in the text, or if
    the words leave more than a tenth of the text untagged (tags of the first sentence only would make every
    later noun a negative); the concept is then not defined on the document. Character spans may be sparse.
    """
    for column in columns:
        if column not in document.fields:
            continue
        try:
            entries = _flatten(json.loads(document.fields[column]))
        except json.JSONDecodeError:
            continue
        words = _entries(entries, document)
        if words is None:
            continue
        spans = _align(document.text, words)
        sparse = any(isinstance(word, tuple) for word, _ in words)
        if spans and len(spans) >= MIN_ALIGNED * len(words) and (sparse or _covers(document.text, spans)):
            return sorted(spans)
    return None


def _flatten(value: Any) -> list[Any]:
    """Entries of nested lists; a list of two words inside another list is one entry."""

    def walk(node: Any, depth: int) -> Iterator[Any]:
        if not isinstance(node, list):
            yield node
        elif depth and len(node) == 2 and all(isinstance(v, str) for v in node):
            yield tuple(node)
        else:
            for inner in node:
                yield from walk(inner, depth + 1)

    return list(walk(value, 0))


def _entries(entries: list[Any], document: Document) -> list[tuple[Any, str]] | None:
    """(word or (start, end), tag) of every entry, None when the shape is none of the known ones."""
    if not entries:
        return None
    if all(isinstance(e, tuple) for e in entries):
        return [(word, tag) for word, tag in entries]
    if all(isinstance(e, dict) for e in entries):
        return _records(entries)
    if all(isinstance(e, str) for e in entries) and "tokens" in document.fields:
        try:
            tokens = _flatten(json.loads(document.fields["tokens"]))
        except json.JSONDecodeError:
            return None
        if len(tokens) == len(entries) and all(isinstance(t, str) for t in tokens):
            return list(zip(tokens, entries, strict=True))
    return None


def _records(entries: list[dict[str, Any]]) -> list[tuple[Any, str]] | None:
    out: list[tuple[Any, str]] = []
    for entry in entries:
        tag = entry.get("tag", entry.get("label"))
        if tag is None:
            return None
        if "start" in entry and "end" in entry:
            out.append(((int(entry["start"]), int(entry["end"])), str(tag)))
            continue
        word = next((entry[k] for k in ("token", "word", "text") if isinstance(entry.get(k), str)), None)
        if word is None:
            return None
        out.append((word, str(tag)))
    return out


def _covers(text: str, spans: list[Tagged]) -> bool:
    letters = sum(not c.isspace() for c in text)
    tagged = sum(not c.isspace() for start, end, _ in spans for c in text[start:end])
    return tagged >= MIN_ALIGNED * letters


def _align(text: str, words: list[tuple[Any, str]]) -> list[Tagged]:
    spans: list[Tagged] = []
    cursor = 0
    for word, tag in words:
        if isinstance(word, tuple):
            if 0 <= word[0] < word[1] <= len(text):
                spans.append((*word, tag))
            continue
        at = text.find(word, cursor, cursor + len(word) + REACH) if word else -1
        if at >= 0:
            spans.append((at, at + len(word), tag))
            cursor = at + len(word)
    return spans

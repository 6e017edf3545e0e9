"""Contexts cut into pieces that a terminal or a page can shade: the focal token, tokens the expert also got, the rest.

Token text comes from anywhere. What would move a cursor, colour a terminal, turn the reading direction round or not
be seen at all is replaced by something to look at; escaping for HTML is left to who writes HTML.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

_NAMED = {"\n": "↵", "\t": "⇥", "\x7f": "␡"}
_JOINERS = "\u200c\u200d"  # within words of Persian and Hindi, and within emoji
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
NOTHING = "∅"
"""Stands for a focal token that covers no character."""


class Mark(StrEnum):
    """What a piece of a context is."""

    FOCAL = "focal"
    ROUTED = "routed"
    PLAIN = "plain"


@dataclass(frozen=True)
class Piece:
    """Neighbouring characters with the same mark; `text` is safe to show."""

    text: str
    mark: Mark


def visible(text: str) -> str:
    """`text` on one line, with control, direction and zero-width characters made visible."""
    return "".join(map(_visible, text))


def token_name(text: str) -> str:
    """A token on its own: `visible`, with spaces that can be seen."""
    return visible(text).replace(" ", "␣") or NOTHING


def _visible(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character.isascii() and character < " ":
        return chr(0x2400 + ord(character))
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    if unicodedata.bidirectional(character) == "AN":  # signs that enclose Arabic numbers are seen
        return character
    return f"\\u{ord(character):04x}"


def pieces(text: str, start: int, end: int, routed: Iterable[tuple[int, int]] = ()) -> list[Piece]:
    """Cut a context at the borders of its focal token and of the other tokens that the expert was routed.

    Args:
        start: first character of the focal token; `end` is the one after its last.
        routed: the same of each token that the expert got.
    """
    marks = [Mark.PLAIN] * len(text)
    for first, last in routed:
        marks[first:last] = [Mark.ROUTED] * len(marks[first:last])
    marks[start:end] = [Mark.FOCAL] * len(marks[start:end])
    shown = [(mark, visible(character)) for mark, character in zip(marks, text, strict=True)]
    if start >= end:
        shown.insert(start, (Mark.FOCAL, NOTHING))
    groups = groupby(shown, key=lambda pair: pair[0])
    return [Piece("".join(character for _, character in group), mark) for mark, group in groups]


def routed_spans(row: Any) -> list[tuple[int, int]]:
    """Characters of every token of a row's context that the expert got, special tokens left out."""
    spans = zip(row.token_starts, row.token_ends, row.routed_tokens, strict=True)
    return [(int(start), int(end)) for start, end, routed in spans if routed and start >= 0]

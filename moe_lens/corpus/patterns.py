"""Regular expressions that users write: checked when they are read, and never run without a time limit.

The syntax is that of the ``regex`` package (Apache-2.0), which can stop in the middle of a match; Python's own
``re`` holds the interpreter until it is done.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import BadConcept

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

TIMEOUT_SECONDS = 5.0
"""Time one expression may take on a text of up to `TIMEOUT_CHARACTERS`; longer ones get proportionally more."""
TIMEOUT_CHARACTERS = 100_000
_COPIES = 1_000_000
"""Most copies that nested counts may ask for: the compiler writes out ``((a{1000}){1000}){1000}`` in memory."""
_EMPTY_ONLY = r"(?:\^|\$|\||\\[bBAZzGmM]|\(\?(?:[=!]|<[=!])[^()]*+\)|\(\))*+"
"""Expressions of anchors and lookarounds alone."""


def check_pattern(pattern: Any, *, owner: str) -> str:
    """`pattern` itself, if it can be used.

    Args:
        owner: whose it is, for the message: ``concept 'ip'``.

    Raises:
        BadConcept: no text, bad syntax, too large, or an expression that only matches the empty string.
    """
    import regex

    if not isinstance(pattern, str) or not pattern:
        raise BadConcept(f"{owner}: the regular expression is empty or not text; write one, such as \\d+")
    if regex.fullmatch(_EMPTY_ONLY, pattern):
        raise BadConcept(f"{owner}: {pattern!r} matches only the empty string; write the characters it should mark")
    counts = regex.findall(r"(?<!\\)\{(\d+)", pattern)
    if sum(map(len, counts)) > 1000 or math.prod(map(int, filter(int, counts))) > _COPIES:
        raise BadConcept(f"{owner}: the counts in {pattern!r} multiply to more than {_COPIES:,}; use + or * instead")
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise BadConcept(f"{owner}: bad regular expression {pattern!r}: {error}; correct it") from None
    except (RecursionError, MemoryError, OverflowError):
        raise BadConcept(f"{owner}: the regular expression is too large or too deeply nested; simplify it") from None
    return pattern


def find_spans(
    pattern: str, text: str, *, owner: str, document: str, limit: float = TIMEOUT_SECONDS, until: int | None = None
) -> Int[ndarray, "span 2"]:
    """Half-open character spans of all non-empty matches, sorted and disjoint.

    Args:
        pattern: an expression that passed `check_pattern`.
        owner: whose expression it is, for the message: ``concept 'ip'``.
        document: id of the text, for the message.
        limit: seconds of computing, for a text of up to `TIMEOUT_CHARACTERS`.
        until: matches that start here or later are not looked for.

    Raises:
        BadConcept: the expression takes longer; it is interrupted.
    """
    budget = limit * max(1.0, len(text) / TIMEOUT_CHARACTERS)
    compiled, reverse = _compiled(pattern)
    end = len(text) if until is None else until
    try:
        matches = (match.span() for match in compiled.finditer(text, timeout=budget))
        if reverse:
            found = [span for span in matches if span[0] < end]
        else:
            found = list(takewhile(lambda span: span[0] < end, matches))
    except TimeoutError:
        raise too_slow(owner, pattern, budget, f"on document {document!r}") from None
    spans = np.array(found, np.int64).reshape(-1, 2)
    spans = spans[spans[:, 1] > spans[:, 0]]
    return spans[np.argsort(spans[:, 0], kind="stable")]  # (?r) searches from the end


@cache
def _compiled(pattern: str) -> tuple[Any, bool]:
    """The expression, and whether it searches from the end."""
    import regex

    compiled = regex.compile(pattern)
    return compiled, bool(compiled.flags & regex.REVERSE)


def too_slow(owner: str, pattern: str, seconds: float, where: str) -> BadConcept:
    """The error of an expression that takes too long."""
    return BadConcept(
        f"{owner}: its regular expression {pattern!r} took more than {seconds:.3g} s {where}; "
        "write it without a repeat inside a repeat, e.g. a+ for (a+)+, or (?:a|b)++ for (a|b)+"
    )

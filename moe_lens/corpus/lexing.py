"""Programming and markup languages: which lexer reads a document, and spans of its token classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.errors import BadConcept, nearest

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    from moe_lens.corpus.concepts import TokenClass
    from moe_lens.corpus.text import Document

LEXERS = {
    "bash": "bash", "c": "c", "c_headers": "c", "c++": "cpp", "cpp": "cpp", "c#": "csharp", "csharp": "csharp",
    "css": "css", "dart": "dart", "diff": "diff", "elixir": "elixir", "erlang": "erlang", "fortran": "fortran",
    "go": "go", "golang": "go", "haskell": "haskell", "html": "html", "java": "java", "javascript": "javascript",
    "json": "json", "jsx": "jsx", "julia": "julia", "kotlin": "kotlin", "latex": "tex", "lua": "lua",
    "makefile": "make", "matlab": "matlab", "objc": "objective-c", "objective-c": "objective-c",
    "objective_c": "objective-c", "objectivec": "objective-c", "ocaml": "ocaml", "perl": "perl", "php": "php",
    "markdown": "markdown", "rst": "rst",
    "po": "po", "gettext": "po", "powershell": "powershell", "python": "python", "ruby": "ruby", "rust": "rust",
    "scala": "scala", "scss": "scss", "shell": "bash", "sql": "sql", "svg": "xml", "swift": "swift", "tex": "tex",
    "toml": "toml", "tsx": "tsx", "typescript": "typescript", "xml": "xml", "yaml": "yaml", "zig": "zig",
}  # fmt: skip
"""Language names that documents use -> pygments lexer. Spelled out rather than looked up in pygments, where
``cs``, ``sv`` or ``pl`` (Czech, Swedish, Polish) would name programming languages."""


def language_of(document: Document) -> str | None:
    """Pygments lexer for a document's ``language``, else ``domain``; None if neither names a language."""
    for key in ("language", "domain"):
        name = document.fields.get(key, "").lower()
        if name in LEXERS:
            return LEXERS[name]
    return None


_SHORT = {"String": "Literal.String", "Number": "Literal.Number"}


def _full_name(name: str) -> str:
    name = name.removeprefix("Token.")
    head, _, rest = name.partition(".")
    return _SHORT.get(head, head) + (f".{rest}" if rest else "")


def checked_class(concept: str, name: str) -> str:
    """Full name of a pygments token class such as ``Comment`` or ``String.Doc``.

    Raises:
        BadConcept: pygments has no such class.
    """
    from pygments.token import STANDARD_TYPES

    known = {str(t).removeprefix("Token.") for t in STANDARD_TYPES} - {"Token"}
    full = _full_name(name)
    if full not in known:
        raise BadConcept(f"concept {concept!r}: pygments has no token class {name!r}{nearest(full, known)}")
    return full


@cache
def _token_type(full_name: str) -> Any:
    from pygments.token import string_to_tokentype

    return string_to_tokentype("Token." + full_name)


@cache
def _lexer(alias: str) -> Any:
    from pygments.lexers import get_lexer_by_name

    return get_lexer_by_name(alias)


def class_spans(
    document: Document, rules: Iterable[TokenClass], *, until: int | None = None
) -> dict[TokenClass, Int[ndarray, "span 2"]]:
    """Character spans of several token-class rules; the document is lexed once. Spans are sorted, disjoint.

    Args:
        until: tokens that start here or later are not looked for.
    """
    language = language_of(document)
    spans: dict[TokenClass, list[tuple[int, int]]] = {rule: [] for rule in rules}
    if language is None:
        return {rule: np.zeros((0, 2), np.int64) for rule in spans}
    wanted = [
        (rule, [_token_type(c) for c in rule.classes], [_token_type(c) for c in rule.excluding]) for rule in spans
    ]
    hits: dict[Any, list[TokenClass]] = {}  # rules of each token type met: a lexer uses a few dozen types
    for start, kind, value in _lexer(language).get_tokens_unprocessed(document.text):
        if until is not None and start >= until:
            break
        if kind not in hits:
            hits[kind] = [
                rule for rule, types, but in wanted if any(kind in t for t in types) and not any(kind in t for t in but)
            ]
        for rule in hits[kind]:
            if not rule.characters:
                spans[rule].append((start, start + len(value)))
            else:
                spans[rule].extend((start + i, start + i + 1) for i, c in enumerate(value) if c in rule.characters)
    return {rule: merged(found) for rule, found in spans.items()}


def merged(spans: Sequence[tuple[int, int]]) -> Int[ndarray, "span 2"]:
    """Union of spans as sorted disjoint spans."""
    out: list[list[int]] = []
    for start, end in sorted(spans):
        if out and start < out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        elif end > start:
            out.append([start, end])
    return np.array(out, np.int64).reshape(-1, 2)

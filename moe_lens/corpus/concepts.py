"""Concepts: named labellers of tokens, with a scope and a granularity (METRICS 1.1).

A labeller is one of
    Regex       every character of a match is marked (the whole match, never a capture group)
    FieldEquals every character of a document whose field has one of the values
    TokenClass  characters that a pygments lexer gives one of the token classes
    Column      words of a data-set column (POS tags, entity spans) that carry one of the tags
and a token is positive iff one of its characters is marked.

Built-in concepts live in tables: `source58` (the 58 of Herbst et al. 2026), `bundled_truth` (what the
bundled corpus has ground truth for), and one concept per domain, kind, register and language of a corpus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.corpus.patterns import check_pattern
from moe_lens.errors import BadConcept, UnknownConcept, nearest
from moe_lens.types import Granularity

if TYPE_CHECKING:
    from moe_lens.corpus.text import Corpus, Document

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
MIN_DOCUMENTS = 20
"""A field value is a concept from this many documents on: METRICS 1.1 asks for 10 + 5 + 5 with positives."""
WRITTEN = "user"
"""Collection of the concepts that a user wrote."""
DOCUMENT_FIELDS = ("domain", "kind", "register", "language")
CHAT_COLUMN = "chat_spans"
"""Document field with the roles of a conversation: ``[{"start": 0, "end": 3, "tag": "user"}, ...]``."""


@dataclass(frozen=True)
class Regex:
    """A regular expression over the characters of a document, in the syntax of the `regex` package."""

    pattern: str


@dataclass(frozen=True)
class FieldEquals:
    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class TokenClass:
    """Pygments token classes, their subclasses included except `excluding`."""

    classes: tuple[str, ...]
    characters: str = ""
    """If given, only these characters of such tokens are marked."""
    excluding: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """Words or spans in one of these columns that carry one of these tags (see `moe_lens.corpus.columns`)."""

    columns: tuple[str, ...]
    tags: tuple[str, ...]


Labeller = Regex | FieldEquals | TokenClass | Column


@dataclass(frozen=True)
class Concept:
    """A named property of tokens."""

    name: str
    category: str
    labeller: Labeller
    granularity: Granularity | None = None
    """None until `tokenize` has looked: a regular expression may or may not depend on context."""
    scope: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Fields that must have one of the values for the concept to be defined on a document; a field that the
    document does not have does not exclude it. Empty: defined everywhere."""
    group: str | None = None
    """Concepts with the same positives share a group; it counts as one."""
    doc: str = ""
    collection: str = WRITTEN

    def in_scope(self, document: Document) -> bool:
        """Whether the concept is defined on `document`."""
        for key, values in self.scope.items():
            if key in document.fields and document.fields[key] not in values:
                return False
        if isinstance(self.labeller, FieldEquals):
            return self.labeller.field in document.fields
        if isinstance(self.labeller, Column):
            return any(c in document.fields for c in self.labeller.columns)
        if isinstance(self.labeller, TokenClass):
            from moe_lens.corpus.lexing import language_of

            return language_of(document) is not None
        return True


def concept(
    name: str,
    *,
    category: str = "user",
    regex: str | None = None,
    field: str | None = None,
    equals: str | Sequence[str] | None = None,
    token_class: str | Sequence[str] | None = None,
    granularity: Granularity | str | None = None,
    scope: Mapping[str, str | Sequence[str]] | None = None,
    doc: str = "",
) -> Concept:
    """Define a concept by one of `regex`, `field` with `equals`, or `token_class`.

    Args:
        name: letters, digits, ``_ . + -``.
        regex: over the characters of a document; every character of a match is marked.
        field: document field; the concept holds for whole documents where it is one of `equals`.
        token_class: pygments class or classes such as ``Comment``, ``Name.Function`` or ``String``.
        granularity: ``type``, ``span`` or ``document``. A regular expression's is detected if not given.
        scope: fields and values that a document must have for the concept to be defined there.

    Raises:
        BadConcept: not exactly one labeller, an invalid name, pattern, class or granularity.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadConcept(f"concept name {name!r}: use letters, digits and _ . + - only")
    given = [k for k, v in (("regex", regex), ("field", field), ("token_class", token_class)) if v is not None]
    if len(given) != 1:
        what = " and ".join(given) if given else "no labeller"
        raise BadConcept(f"concept {name!r} has {what}: give exactly one of regex, field + equals, token_class")
    if (field is None) != (equals is None):
        raise BadConcept(f"concept {name!r}: field and equals go together, such as field='language', equals='fr'")
    labeller: Labeller
    natural: Granularity | None = None
    if regex is not None:
        labeller = Regex(check_pattern(regex, owner=f"concept {name!r}"))
    elif field is not None:
        labeller, natural = FieldEquals(str(field), _strings(equals)), Granularity.DOCUMENT
    else:
        from moe_lens.corpus.lexing import checked_class

        classes = tuple(checked_class(name, c) for c in _strings(token_class))
        labeller, natural = TokenClass(classes), Granularity.SPAN
    return Concept(
        name,
        category,
        labeller,
        _granularity(name, granularity) or natural,
        {str(k): _strings(v) for k, v in (scope or {}).items()},
        doc=doc,
    )


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(str(v) for v in value)
    return (str(value),)


def _granularity(name: str, value: Granularity | str | None) -> Granularity | None:
    if value is None:
        return None
    try:
        return Granularity(value)
    except ValueError:
        raise BadConcept(
            f"concept {name!r}: granularity {value!r} is not one of {', '.join(Granularity)}"
            f"{nearest(str(value), [str(g) for g in Granularity])}"
        ) from None


@cache
def builtin_concepts() -> tuple[Concept, ...]:
    """The 58 of the source, those of the bundled ground truth, roles in chats. Names are unique and stable."""
    from moe_lens.corpus import bundled_truth, chat, source58

    return source58.CONCEPTS + bundled_truth.CONCEPTS + chat.CONCEPTS


def field_concepts(corpus: Corpus) -> tuple[Concept, ...]:
    """One document-level concept for each common value of domain, kind, register and language.

    A value is a concept when at least `MIN_DOCUMENTS` documents have it and at least as many do not.
    """
    out: dict[str, Concept] = {}
    for key in DOCUMENT_FIELDS:
        counts: dict[str, int] = {}
        for doc in corpus.documents:
            if key in doc.fields:
                counts[doc.fields[key]] = counts.get(doc.fields[key], 0) + 1
        total = sum(counts.values())
        for value, n in sorted(counts.items()):
            name = f"{key}_{_slug(value)}"
            if n < MIN_DOCUMENTS or total - n < MIN_DOCUMENTS or name in out:
                continue
            out[name] = Concept(
                name,
                key,
                FieldEquals(key, (value,)),
                Granularity.DOCUMENT,
                doc=f"documents whose {key} is {value}",
                collection="fields",
            )
    return tuple(out.values())


def _slug(value: str) -> str:
    value = value.lower().replace("c++", "cpp").replace("c#", "csharp")
    return re.sub(r"\W+", "_", value).strip("_") or "other"


def concepts_for(corpus: Corpus, names: Any = None) -> list[Concept]:
    """The concepts to use on a corpus.

    Args:
        names: None for every built-in and field concept that applies; or one or several of: a concept name,
            a category (``text``, ``code``, ``latex``, ``pos``, ``syntax``, ``domain`` ...), a collection
            (``source58``, ``bundled``, ``fields``, ``chat``), the path of a YAML file, or a `Concept`.

    Concepts that a category or collection contributes are left out where the corpus has no document in their
    scope; a concept asked for by its own name is refused then. Of two field concepts that hold for the same
    documents (``domain_fr`` and ``language_fr``) None and ``fields`` take the first.

    Raises:
        UnknownConcept: a name that nothing defines, with the nearest known one.
        BadConcept: a concept that this corpus cannot label, or a bad YAML file.
    """
    of_fields = field_concepts(corpus)
    known = {c.name: c for c in (*builtin_concepts(), *of_fields)}
    if names is None:
        is_chat = any(CHAT_COLUMN in document.fields for document in corpus.documents)
        names = ["source58", "bundled", *(["fields"] if of_fields else []), *(["chat"] if is_chat else [])]
    elif isinstance(names, str | Path | Concept):
        names = [names]
    chosen: dict[str, Concept] = {}
    for entry in names:
        for found in _resolve(entry, known, corpus):
            if chosen.setdefault(found.name, found) != found:
                raise BadConcept(f"two different concepts are named {found.name!r}: rename one")
    return list(chosen.values())


def _resolve(entry: Any, known: Mapping[str, Concept], corpus: Corpus) -> list[Concept]:
    if isinstance(entry, Concept):
        return [_required(entry, corpus)]
    if isinstance(entry, Path) or str(entry).lower().endswith((".yaml", ".yml")):
        from moe_lens.corpus.yaml_concepts import load_concepts

        return [_required(c, corpus) for c in load_concepts(entry)]
    if entry in known:
        return [_required(known[entry], corpus)]
    members = [c for c in known.values() if entry in (c.category, c.collection)]
    if members:
        applicable = [c for c in members if _applies(c, corpus)]
        if not applicable:
            raise BadConcept(
                f"none of the {len(members)} concepts of {entry!r} apply to {corpus.name}: {_why(members[0])}"
            )
        return _distinct(applicable, corpus) if entry == "fields" else applicable
    choices = [*known, *dict.fromkeys(c.category for c in known.values()), "source58", "bundled", "fields"]
    raise UnknownConcept(
        f"no concept, category or collection is named {entry!r}{nearest(str(entry), choices)}; "
        "your own go into a YAML file or moe_lens.concept(...)"
    )


def _applies(one: Concept, corpus: Corpus) -> bool:
    return any(one.in_scope(d) for d in corpus.documents)


def _required(one: Concept, corpus: Corpus) -> Concept:
    if not _applies(one, corpus):
        raise BadConcept(f"concept {one.name!r} is not defined on any document of {corpus.name}: {_why(one)}")
    return one


def _why(one: Concept) -> str:
    if isinstance(one.labeller, FieldEquals):
        return f"its documents need a field {one.labeller.field!r}"
    if isinstance(one.labeller, Column) and CHAT_COLUMN in one.labeller.columns:
        return "its rows need a column messages (or conversations) with a list of messages"
    if isinstance(one.labeller, Column):
        return f"its documents need a column of tags named {' or '.join(one.labeller.columns)}"
    if isinstance(one.labeller, TokenClass):
        return "its documents need a field language or domain that names a programming language"
    return "it needs " + ", ".join(f"{k} in ({', '.join(v)})" for k, v in one.scope.items())


def _distinct(found: list[Concept], corpus: Corpus) -> list[Concept]:
    """Leave out field concepts that hold for exactly the same documents as an earlier one."""
    seen: set[frozenset[int]] = set()
    out = []
    for one in found:
        assert isinstance(one.labeller, FieldEquals)
        key, values = one.labeller.field, one.labeller.values
        holds = frozenset(i for i, d in enumerate(corpus.documents) if d.fields.get(key) in values)
        if holds not in seen:
            seen.add(holds)
            out.append(one)
    return out


def load_concepts(path: str | Path) -> list[Concept]:
    """Concepts of a YAML file; see `moe_lens.corpus.yaml_concepts`."""
    from moe_lens.corpus.yaml_concepts import load_concepts as load

    return load(path)

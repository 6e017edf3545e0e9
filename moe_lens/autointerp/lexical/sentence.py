"""Rules in words."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lens.autointerp.lexical.predicates import CharacterClass, Predicate, String, Term, quoted

MOST_WORDS = 25
_SHOWN_STRINGS = (5, 4, 3, 2, 1)


def sentence(terms: Sequence[Term], promoted: Sequence[str] = ()) -> str:
    """One sentence for a rule, its terms in the given order, as short as `MOST_WORDS` where its parts allow.

    Args:
        promoted: tokens that the expert writes toward; no part of the rule.
    """
    written = ", ".join(map(quoted, promoted))
    for n in _SHOWN_STRINGS:
        text = "; also ".join(phrase(term, n) for term in terms)
        text += f"; writes toward {written}" if written else ""
        if len(text.split()) <= MOST_WORDS:
            break
    return text


def phrase(term: Term, n: int = _SHOWN_STRINGS[0]) -> str:
    """One term in words, at most `n` strings of a list by name."""
    near = f"near {_listed([p.phrase for p in term.near], min(n, 4))}" if term.near else ""
    if not term.tokens:
        return f"text {near}"
    return f"{_tokens(term.tokens, n)} {'not ' if term.negated else ''}{near}".rstrip()


def _tokens(predicates: Sequence[Predicate], n: int) -> str:
    strings = [p for p in predicates if isinstance(p, String)]
    kinds = {
        "tokens": [p.phrase for p in strings if p.token],
        "words": [p.phrase for p in strings if p.whole_word],
        "tokens with": [p.phrase for p in strings if not (p.whole_word or p.after or p.token)],
        "words after": [p.phrase for p in strings if p.after],
    }
    parts = [p.phrase for p in predicates if isinstance(p, CharacterClass)]
    parts += [f"{kind} {_listed(phrases, n)}" for kind, phrases in kinds.items() if phrases]
    return " and ".join(parts)


def _listed(phrases: Sequence[str], n: int) -> str:
    if len(phrases) > n + 1:
        return f"{', '.join(phrases[:n])} and {len(phrases) - n} more"
    *first, last = phrases
    return f"{', '.join(first)} or {last}" if first else last

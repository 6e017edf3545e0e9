"""Rules in words.

Strings stand in quotes, with a dash where a word goes on: "-ing" ends a word, "un-" starts one, "-n-" is inside one.
"␣" is a lone blank. A token fits "within 80 characters after" if one of the strings named ends so close before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from moe_lens.autointerp.lexical.predicates import NEAR, CharacterClass, Predicate, String, Term, quoted

MOST_WORDS = 25
"""Of a rule in words; what its expert writes toward comes on top."""
_SHOWN_STRINGS = (4, 3, 2)


def sentence(terms: Sequence[Term], promoted: Sequence[str] = ()) -> str:
    """One sentence for a rule: its terms in the given order, those that do not fit into `MOST_WORDS` as "and more".

    Args:
        promoted: tokens that the expert writes toward; no part of the rule. Those that cannot be shown are left out.
    """
    written = ", ".join(quoted(token) for token in promoted if legible(token))
    return _within(terms) + (f"; writes toward {written}" if written else "")


def _within(terms: Sequence[Term]) -> str:
    text = ""
    for kept, n in [*product(range(len(terms), 0, -1), _SHOWN_STRINGS), (1, 1)]:
        text = "; also ".join(phrase(term, n) for term in terms[:kept])
        text += "; and more" if kept < len(terms) else ""
        if len(text.split()) <= MOST_WORDS:
            break
    return text


def legible(token: str) -> bool:
    """Whether a reader can see what it is: no control characters but line ends and tabs, nothing undecodable."""
    return bool(token) and all(c.isprintable() or c in "\n\t\r" for c in token) and "\ufffd" not in token


def phrase(term: Term, n: int = _SHOWN_STRINGS[0]) -> str:
    """One term in words, at most `n` strings of a list by name."""
    near = ""
    if markers := [p.phrase for p in term.near]:
        shown = [*markers[:n], "others"] if len(markers) > n else markers
        near = f"within {NEAR} characters after {_listed(shown)}"
    if not term.tokens:
        return f"text {near}"
    *first, last = _parts(term.tokens, n)
    text = f"{', '.join(first)} and {last}" if first else last
    return f"{text}{',' if first else ''} {'not ' if term.negated else ''}{near}" if near else text


def _parts(predicates: Sequence[Predicate], n: int) -> list[str]:
    kinds = {
        "the word|words": [p.phrase for p in predicates if isinstance(p, String) and p.whole_word],
        "words after|words after": [p.phrase for p in predicates if isinstance(p, String) and p.after],
        "the piece|pieces": [p.phrase for p in predicates if isinstance(p, String) and not (p.whole_word or p.after)],
    }
    parts = [p.phrase for p in predicates if isinstance(p, CharacterClass)]
    for names, found in kinds.items():
        if phrases := list(dict.fromkeys(found)):
            one, many = names.split("|")
            such = " such as" if len(phrases) > n else ""
            parts.append(f"{one if len(phrases) == 1 else many}{such} {_listed(phrases[:n])}")
    return parts


def _listed(phrases: Sequence[str]) -> str:
    *first, last = phrases
    return f"{', '.join(first)} or {last}" if first else last

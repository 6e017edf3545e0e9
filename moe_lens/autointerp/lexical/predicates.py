"""What a rule is made of, as regular expressions over characters.

Every predicate matches exactly one character, and looks at its neighbours without consuming them. Matches of
alternatives therefore never hide one another, and a rule marks the union of what its parts mark. The one exception,
a near-list on its own, consumes whole stretches; it comes first in a rule, and all it consumes is marked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

NEAR = 80
"""Characters within which a marker counts as near; only text before a token counts, as a router sees no other."""
REACH = NEAR + 48
"""No predicate looks at a character further back than this."""
LONGEST = 16
"""Characters of the longest string that is a candidate."""
_LEFT = {"any": "", "start": r"(?<!\w)", "inside": r"(?<=\w)"}
_RIGHT = {"any": "", "end": r"(?!\w)"}
_NAMED = {"\n": r"\n", "\t": r"\t", "\r": r"\r", " ": r"\x20"}


@dataclass(frozen=True, order=True)
class String:
    """The last character of every occurrence of `text` at the boundaries `left` and `right` of a word."""

    text: str
    left: str = "any"
    right: str = "any"
    after: bool = False
    """The character after the occurrence instead, unless it is white space."""
    not_before: str = ""
    """Characters that the occurrence must not follow,"""
    not_behind: str = ""
    """and that must not follow it: where they do, the tokenizer makes another token of it."""
    token: bool = False
    """Whether the two were looked for: the occurrence then stands for the token itself."""

    @property
    def whole_word(self) -> bool:
        return (self.left, self.right) == ("start", "end")

    @property
    def phrase(self) -> str:
        """How a sentence names it: a dash where a word goes on."""
        if self.token:
            return quoted(self.text)
        bounded = self.left != "any" or not self.text[0].isalnum()
        before = "-" if self.left == "inside" else ""
        behind = "-" if self.right == "any" and self.text[-1].isalnum() and bounded else ""
        return quoted(self.text.strip(" ") if self.after else self.text, before, behind)


@dataclass(frozen=True, order=True)
class CharacterClass:
    """Characters of the set `here`, where the characters before them are right."""

    phrase: str
    here: str
    before: tuple[str, ...] = ()
    """Sets of the characters right before, in the order of the text."""
    unless: str = ""
    """Set of characters that must not stand right before."""
    look: str = ""
    """What must end with the character itself, where sets do not say it."""

    @property
    def regex(self) -> str:
        """Matches one character."""
        look = self.look or ("".join(self.before) + self.here if self.before else "")
        return (f"(?<!{self.unless})" if self.unless else "") + self.here + (f"(?<={look})" if look else "")


Predicate = String | CharacterClass


@dataclass(frozen=True)
class Term:
    """Any of `tokens`, and that with (or, `negated`, without) any of `near` before it. No tokens: all near text."""

    tokens: tuple[Predicate, ...]
    near: tuple[String, ...] = ()
    negated: bool = False

    @property
    def parts(self) -> tuple[Term, ...]:
        """Terms that together mark the same, every class on its own."""
        classes = [p for p in self.tokens if isinstance(p, CharacterClass)]
        strings = tuple(p for p in self.tokens if isinstance(p, String))
        if self.near or not ((classes and strings) or len(classes) > 1):
            return (self,)
        return (*(Term((p,)) for p in classes), *([Term(strings)] if strings else []))

    @property
    def regex(self) -> str:
        """The term as a regular expression."""
        if not self.tokens:
            marker = _union(self.near)
            return rf"{marker}(?:(?!{marker})[\s\S]){{0,{NEAR}}}+"
        token = _union(self.tokens)
        if not self.near:
            return token
        return rf"{token}(?<{'!' if self.negated else '='}{_strings(self.near)}[\s\S]{{0,{NEAR}}}?)"


def rule_of(terms: Iterable[Term]) -> str:
    """The regular expression of a disjunction, of which at most one term has no tokens."""
    ordered = sorted(terms, key=lambda term: bool(term.tokens))
    return "|".join(term.regex for term in ordered)


def _union(predicates: Iterable[Predicate]) -> str:
    """Any of the predicates, strings of a kind together."""
    strings = [p for p in predicates if isinstance(p, String) and not p.token]
    parts = [_token(p) for p in predicates if isinstance(p, String) and p.token]
    for (after, left, right), group in _grouped(strings):
        texts = [s.text for s in group]
        if after:
            parts.append(rf"\S(?<={_LEFT[left]}{_any(texts)}\S)")
        else:
            last = "".join(sorted({_escaped(t[-1]) for t in texts}))
            parts.append(rf"[{last}](?<={_LEFT[left]}{_any(texts)}){_RIGHT[right]}")
    parts += [p.regex for p in predicates if isinstance(p, CharacterClass)]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _token(string: String) -> str:
    text = "".join(map(_escaped, string.text))
    before = f"(?<!{_set(string.not_before)}{text})" if string.not_before else ""
    behind = f"(?!{_set(string.not_behind)})" if string.not_behind else ""
    return f"{_escaped(string.text[-1])}{f'(?<={text})' if len(string.text) > 1 else ''}{before}{behind}"


def _set(characters: str) -> str:
    """A set of characters, four or more in a row as a range."""
    parts = []
    codes = sorted(map(ord, set(characters)))
    for _, run in groupby(enumerate(codes), lambda pair: pair[1] - pair[0]):
        row = [chr(code) for _, code in run]
        parts += [f"{_escaped(row[0])}-{_escaped(row[-1])}"] if len(row) > 3 else map(_escaped, row)
    return f"[{''.join(parts)}]"


def _strings(markers: Iterable[String]) -> str:
    """Whole occurrences of the markers."""
    groups = _grouped(markers)
    parts = [f"{_LEFT[left]}{_any([s.text for s in group])}{_RIGHT[right]}" for (_, left, right), group in groups]
    return f"(?:{'|'.join(parts)})"


def _grouped(strings: Iterable[String]) -> list[tuple[tuple[bool, str, str], list[String]]]:
    def kind(s: String) -> tuple[bool, str, str]:
        return s.after, s.left, s.right

    return [(key, list(group)) for key, group in groupby(sorted(strings, key=kind), kind)]


def _any(texts: list[str]) -> str:
    return "(?:" + "|".join("".join(map(_escaped, text)) for text in texts) + ")"


def _escaped(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character.isalnum() or character == "_":
        return character
    return "\\" + character if character.isascii() and character.isprintable() else f"\\U{ord(character):08x}"


def quoted(text: str, before: str = "", behind: str = "") -> str:
    """`text` as `shown`, in quotes that it does not hold."""
    mark = "'" if '"' in text else '"'
    return f"{mark}{before}{shown(text)}{behind}{mark}"


def shown(text: str) -> str:
    """`text` with its line ends and tabs visible, on one line; a lone blank is ␣."""
    if not text.strip(" "):
        return "␣" * len(text)
    named = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
    return "".join(named.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


_SCRIPTS = (
    "Cyrillic", "Greek", "Han", "Hiragana", "Katakana", "Hangul", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil",
    "Thai", "Armenian", "Georgian",
)  # fmt: skip
_AFTER = {
    "a digit": r"\d", '"."': r"\.", '","': ",", '"("': r"\(", '")"': r"\)", '"["': r"\[", '"]"': r"\]", '"{"': r"\{",
    '"}"': r"\}", '"="': "=", '"<"': "<", '">"': ">", '"/"': "/", '"-"': r"\-", '"_"': "_", '":"': ":", '";"': ";",
    '"\\"': r"\\", '"$"': r"\$", '"#"': r"\#", '"@"': "@", '"&"': "&", '"*"': r"\*", '"+"': r"\+", '"|"': r"\|",
    "a quote": "[\"'`“”‘’«»]", "a capital letter": r"\p{Lu}", "a lower-case letter": r"\p{Ll}",
    "white space": r"\s",
}  # fmt: skip
_AFTER_WITH_BLANK = {'","': ",", '"."': r"\.", '":"': ":", '";"': ";", '")"': r"\)", '"="': "=", "a digit": r"\d"}

_L, _UPPER, _LOWER, _LINE = r"\p{L}", r"\p{Lu}", r"\p{Ll}", r"[^\n]"
_BARE = r"[\p{L}\p{N}_]"
CLASSES: tuple[CharacterClass, ...] = (
    CharacterClass("digits", r"\d"),
    CharacterClass("letters", _L),
    CharacterClass("digits, signs and symbols", r"[^\p{L}\s]"),
    CharacterClass("capitals that start a word", _UPPER, unless=_BARE),
    CharacterClass("starts of lower-case words", _LOWER, unless=_BARE),
    CharacterClass("word starts", _L, unless=_BARE),
    CharacterClass("capitals", _UPPER),
    CharacterClass("capitals after capitals", _UPPER, (_UPPER,)),
    CharacterClass("letters inside words", _L, (_L,)),
    CharacterClass("4th and later letters of words", _L, (_L,) * 3),
    CharacterClass("6th and later letters of words", _L, (_L,) * 5),
    CharacterClass("9th and later letters of words", _L, (_L,) * 8),
    CharacterClass("capitals inside CamelCase", _UPPER, (_LOWER,)),
    CharacterClass("parts of snake_case names", r"\w", look=r"_[^\W_]{0,10}"),
    CharacterClass("letters after digits", _L, (r"\d",)),
    CharacterClass("digits inside numbers", r"\d", (r"\d",)),
    CharacterClass("digits of numbers with four or more", r"\d", (r"\d",) * 3),
    CharacterClass("white space", r"\s"),
    CharacterClass("line ends", r"\n"),
    CharacterClass("empty lines", r"\n", look=r"\n[ \t]{0,8}\n"),
    CharacterClass("indentation", r"[ \t]", look=r"(?<![^\n])[ \t]{1,32}"),
    CharacterClass("double blanks", r"\x20", (r"\x20",)),
    CharacterClass("tabs", r"\t"),
    CharacterClass("opening brackets", r"[(\[{]"),
    CharacterClass("closing brackets", r"[)\]}]"),
    CharacterClass("quotes", "[\"'`“”‘’«»]"),
    CharacterClass("punctuation", r"\p{P}"),
    CharacterClass("punctuation and symbols", r"[\p{P}\p{S}]"),
    CharacterClass("punctuation, symbols and white space", r"[\p{P}\p{S}\s]"),
    CharacterClass("ends of sentences", r"[.!?]"),
    CharacterClass("commas, colons and semicolons", r"[,;:]"),
    CharacterClass("operators", r"[=+*/<>|&^%~\-]"),
    CharacterClass("symbols", r"\p{S}"),
    CharacterClass("dashes", r"\p{Pd}"),
    CharacterClass("repeated punctuation", r"[^\w\s]", (r"[^\w\s]",)),
    CharacterClass("characters outside ASCII", r"[^\x00-\x7f]"),
    CharacterClass("accented Latin letters", r"(?=\p{Script=Latin})[^\x00-\x7f]"),
    CharacterClass("letters of other scripts than Latin", r"(?!\p{Script=Latin})\p{L}"),
    CharacterClass("vowels", r"[aeiouAEIOU]"),
    CharacterClass("consonants", r"(?![aeiouAEIOU])[a-zA-Z]"),
    CharacterClass("vowels inside words", r"[aeiou]", (_L,)),
    CharacterClass("consonants inside words", r"(?![aeiou])[a-z]", (_L,)),
    CharacterClass("line starts", _LINE, unless=_LINE),
    CharacterClass("first words of indented lines", r"\S", look=r"(?<![^\n])[ \t]{1,32}\S"),
    CharacterClass("first words of deeply indented lines", r"\S", look=r"(?<![^\n])(?: {8,32}|\t{2,16})\S"),
    CharacterClass("first 20 characters of a line", _LINE, look=r"(?<![^\n])[^\n]{1,20}"),
    CharacterClass("lines from their 40th character on", _LINE, look=r"[^\n]{40}"),
    CharacterClass("first words of sentences", _L, look=r"[.!?][\"')”]?\s{1,2}\p{L}"),
    *(CharacterClass(f"{script} script", rf"\p{{Script={script}}}") for script in _SCRIPTS),
    *(CharacterClass(f"what follows {name}", r"[\s\S]", (p,)) for name, p in _AFTER.items()),
    *(CharacterClass(f"words after {name}", _L, (p, r"\s")) for name, p in _AFTER_WITH_BLANK.items()),
)
"""Token classes, positions and contexts of one character."""

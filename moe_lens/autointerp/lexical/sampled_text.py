"""The sampled windows of the select split as one array of characters, and where predicates mark it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.autointerp.contexts import Contexts
from moe_lens.autointerp.lexical.predicates import NEAR, REACH, CharacterClass, Predicate, String, Term
from moe_lens.corpus.patterns import find_spans
from moe_lens.corpus.splits import code_of
from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from numpy import ndarray

    from moe_lens.capture.exemplars import TopExemplars
    from moe_lens.capture.window_sample import WindowSample
    from moe_lens.corpus.batches import Tokenized

_NOTHING = -1
"""Between two windows, where no character stands."""
_AHEAD = 4
_NODE = 1 << 21
"""Above every code point."""


class SampledText:
    """Eligible tokens of the sampled select windows, and the characters in and shortly before these windows.

    Windows stand one after the other, `NEAR` empty places between them, so that nothing reaches from one into
    the next. ``start`` and ``end`` are the characters of each token, ``document`` its document.
    """

    def __init__(self, kept: TopExemplars, tokenized: Tokenized, tokenizer: Any) -> None:
        self._tokenized, self._contexts, self._sample = tokenized, Contexts(tokenized, tokenizer), kept.windows
        windows, shift = self._read(kept.windows)
        size = np.diff(tokenized.offsets)[windows]
        token = np.arange(size.sum()) + np.repeat(tokenized.offsets[windows] - (size.cumsum() - size), size)
        shift, eligible = np.repeat(shift, size), tokenized.eligible[token]
        token, shift = token[eligible], shift[eligible]
        self.start = tokenized.char_start[token].astype(np.int64) + shift
        self.end = tokenized.char_end[token].astype(np.int64) + shift
        self.token = token
        self.document = tokenized.document[tokenized.window_of[token]]
        self._rows = self._rows[eligible]
        # tokens of every character, mostly one; the bytes of one character may be several tokens
        size = self.end - self.start
        char = np.arange(size.sum()) + np.repeat(self.start - (size.cumsum() - size), size)
        self._owner = np.repeat(np.arange(len(size)), size)[np.argsort(char, kind="stable")]
        self._first_owner = np.concatenate([[0], np.bincount(char, minlength=len(self.char)).cumsum()])
        # tokens before each character: those that end at or before it, those that start at or before it
        places = np.arange(len(self.char))
        self._ended = np.searchsorted(self.end, places, side="right")
        self._started = np.searchsorted(self.start, places, side="right")
        self._codes, self._code = np.unique(self.char, return_inverse=True)
        self._sets: dict[str, Bool[ndarray, "character"]] = {}
        self.word, self.space = self._is(r"\w"), self._is(r"\s")

    def _read(self, sample: WindowSample) -> tuple[Int[ndarray, "window"], Int[ndarray, "window"]]:
        """Numbers of the windows, and what to add to a document's characters to get those of `char`."""
        mine = sample.column("split").numpy() == code_of(Split.SELECT)
        length = sample.column("length").numpy()
        self._rows = np.flatnonzero(np.repeat(mine, length))
        places = {"document": sample.column("document").numpy()[mine], "position": length[mine] - 1}
        places["window_char"] = sample.column("first_char").numpy()[mine]
        windows = self._contexts.locate(pd.DataFrame(places))["window"].to_numpy(np.int64)
        around = [_around(self._tokenized, window) for window in windows.tolist()]
        self.texts = [text for text, _ in around]
        self.first = np.cumsum([NEAR, *(len(text) + NEAR for text in self.texts)])
        self.char = np.full(self.first[-1], _NOTHING, np.int32)
        for at, text in zip(self.first.tolist(), self.texts, strict=False):
            self.char[at : at + len(text)] = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.int32)
        self.first = self.first[:-1]
        return windows, self.first - np.array([begin for _, begin in around], np.int64)

    def __len__(self) -> int:
        return len(self.start)

    def chosen(self, layer: int) -> Int[ndarray, "token slot"]:
        """Experts of every token."""
        return self._sample.column(f"chosen.{layer}").numpy()[self._rows]

    def _is(self, pattern: str) -> Bool[ndarray, "character"]:
        """Which characters the pattern, of one character, matches."""
        import regex

        if pattern not in self._sets:
            matches = regex.compile(pattern).match
            found = [c >= 0 and matches(chr(c)) is not None for c in self._codes.tolist()]
            self._sets[pattern] = np.array(found, bool)[self._code]
        return self._sets[pattern]

    def surfaces(self) -> list[str]:
        """The characters of every token."""
        whole = np.maximum(self.char, 0).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        return [whole[a:b] for a, b in zip(self.start.tolist(), self.end.tolist(), strict=True)]

    def as_tokens(self, texts: Iterable[str], proposing: Bool[ndarray, "token"]) -> list[String]:
        """Each text with the characters beside it that keep it from being a token, as the tokens `proposing` show.

        Such a character stands there at least twice, and in most of these cases the text is no token.
        """
        first = np.full(len(self.char), _NOTHING)  # of the token that ends at a character
        start, end = self.start[proposing], self.end[proposing]
        first[end - 1] = start
        seen = np.zeros(len(self.char) + 1, np.int64)
        np.add.at(seen, start, 1)
        np.add.at(seen, end, -1)
        inside = seen.cumsum() > 0
        out = []
        for text, at in _occurrences(self.char, texts).items():
            at = at[inside[at]]
            behind = self._against(at + 1, first[at] == at - len(text) + 1)
            at = at[~np.isin(self.char[at + 1], [ord(c) for c in behind])]
            before = self._against(at - len(text), first[at] == at - len(text) + 1)
            out.append(String(text, not_before=before, not_behind=behind, token=True))
        return out

    def _against(self, beside: Int[ndarray, "occurrence"], token: Bool[ndarray, "occurrence"]) -> str:
        codes, inverse, counts = np.unique(self.char[beside], return_inverse=True, return_counts=True)
        share = np.bincount(inverse, token, len(codes)) / np.maximum(counts, 1)
        return "".join(chr(c) for c in codes[(share < 0.5) & (counts > 1) & (codes >= 0)].tolist())

    def marks(self, predicates: Sequence[Predicate]) -> list[Int[ndarray, "mark"]]:
        """Characters that each predicate marks, ascending."""
        strings = [p for p in predicates if isinstance(p, String)]
        found = _occurrences(self.char, {s.text for s in strings})
        return [
            self._string_marks(p, found[p.text]) if isinstance(p, String) else self._class_marks(p) for p in predicates
        ]

    def _string_marks(self, string: String, at: Int[ndarray, "occurrence"]) -> Int[ndarray, "mark"]:
        before = self.word[at - len(string.text)]
        keep = np.ones(len(at), bool)
        if string.left != "any":
            keep &= before if string.left == "inside" else ~before
        if string.right == "end":
            keep &= ~self.word[at + 1]
        for characters, beside in ((string.not_before, at - len(string.text)), (string.not_behind, at + 1)):
            if characters:
                keep &= ~np.isin(self.char[beside], [ord(c) for c in characters])
        if not string.after:
            return at[keep]
        at = at[keep] + 1
        return at[~self.space[at] & (self.char[at] != _NOTHING)]

    def _class_marks(self, predicate: CharacterClass) -> Int[ndarray, "mark"]:
        found = self._is(predicate.here).copy()
        for back, characters in enumerate(reversed(predicate.before), start=1):
            found[back:] &= self._is(characters)[:-back]
        if predicate.unless:
            found[1:] &= ~self._is(predicate.unless)[:-1]
        return np.flatnonzero(found & self._looked(predicate) if predicate.look else found)

    def _looked(self, predicate: CharacterClass) -> Bool[ndarray, "character"]:
        # a run of single-character matches marks what the matches mark, and is one match instead of many
        pattern = f"(?:{predicate.regex})++"
        steps = np.zeros(len(self.char) + 1, np.int8)
        for begin, text in zip(self.first.tolist(), self.texts, strict=True):
            spans = find_spans(pattern, text, owner=predicate.phrase, document="the sample") + begin
            steps[spans[:, 0]] += 1
            steps[spans[:, 1]] -= 1
        return steps[:-1].cumsum(dtype=np.int8) > 0

    def tokens_with(self, marks: Int[ndarray, "mark"]) -> Bool[ndarray, "token"]:
        """Whether one of a token's characters is marked."""
        found = np.zeros(len(self), bool)
        first, last = self._first_owner[marks], self._first_owner[marks + 1]
        while len(first):
            has = first < last
            first, last = first[has], last[has]
            found[self._owner[first]] = True
            first = first + 1
        return found

    def tokens_near(self, marks: Int[ndarray, "mark"]) -> Bool[ndarray, "token"]:
        """Whether one of a token's characters stands at most `NEAR` after a mark, or on it."""
        steps = np.bincount(self._ended[marks], minlength=len(self) + 1)
        steps -= np.bincount(self._started[marks + NEAR], minlength=len(self) + 1)
        return steps[:-1].cumsum() > 0

    def tokens_of(self, term: Term, marks: dict[Predicate, Int[ndarray, "mark"]]) -> Bool[ndarray, "token"]:
        """What the regular expression of `term` finds, from the marks of its predicates."""
        near = self._marked(marks[p] for p in term.near)
        if not term.tokens:
            return self.tokens_near(np.flatnonzero(near))
        found = np.flatnonzero(self._marked(marks[p] for p in term.tokens))
        if term.near:
            before = np.concatenate([[0], near.cumsum()])
            found = found[(before[found + 1] > before[found - NEAR]) != term.negated]
        return self.tokens_with(found)

    def _marked(self, marks: Iterable[Int[ndarray, "mark"]]) -> Bool[ndarray, "character"]:
        out = np.zeros(len(self.char), bool)
        for at in marks:
            out[at] = True
        return out

    def fits(self, rule: str, rows: pd.DataFrame) -> Bool[ndarray, "row"]:
        """Whether the rule marks the tokens of exemplars, wherever in the corpus they stand."""
        window = self._contexts.locate(rows)["window"].to_numpy(np.int64)
        tokens = self._tokenized.offsets[window] + rows["position"].to_numpy(np.int64)
        out = np.zeros(len(rows), bool)
        for i, token in enumerate(tokens.tolist()):
            start, end = int(self._tokenized.char_start[token]), int(self._tokenized.char_end[token])
            document = self._tokenized.corpus.documents[int(rows["document"].iloc[i])]
            begin = max(0, start - REACH)
            spans = find_spans(rule, document.text[begin : end + _AHEAD], owner="the rule", document=document.id)
            out[i] = ((spans[:, 0] < end - begin) & (spans[:, 1] > start - begin)).any()
        return out


def _around(tokenized: Tokenized, window: int) -> tuple[str, int]:
    """Text of a window with what predicates may look at beside it, and its first character in the document."""
    at = slice(tokenized.offsets[window], tokenized.offsets[window + 1])
    start, end = tokenized.char_start[at], tokenized.char_end[at]
    text = tokenized.corpus.documents[int(tokenized.document[window])].text
    begin = max(0, int(start[start >= 0].min()) - REACH)
    return text[begin : int(end.max()) + _AHEAD], begin


def _occurrences(char: Int[ndarray, "character"], texts: Iterable[str]) -> dict[str, Int[ndarray, "occurrence"]]:
    """Last character of every occurrence of each text, overlapping ones too: a walk through their trie."""
    left = sorted(set(texts))
    found = {text: np.zeros(0, np.int64) for text in left}
    node_of = {"": 0}
    at = np.arange(len(char))
    node = np.zeros(len(char), np.int64)
    for length in range(1, max(map(len, left), default=0) + 1):
        left = [text for text in left if len(text) >= length]
        edges = sorted({(node_of[t[: length - 1]] * _NODE + ord(t[length - 1]), t[:length]) for t in left})
        keys = np.array([key for key, _ in edges])
        key = node * _NODE + char[at]
        to = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        alive = keys[to] == key
        at, node = at[alive], to[alive]
        node_of = {prefix: i for i, (_, prefix) in enumerate(edges)}
        order = np.argsort(node, kind="stable")
        bounds = np.searchsorted(node[order], np.arange(len(keys) + 1))
        for text in left:
            if len(text) == length:
                i = node_of[text]
                found[text] = at[order[bounds[i] : bounds[i + 1]]]
        at, node = at[at + 1 < len(char)], node[at + 1 < len(char)]
        at = at + 1
    return found

"""Users' regular expressions: what is refused when they are read, and the time limit when they run."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.corpus import tagging
from moe_lens.corpus.concepts import Regex, builtin_concepts, concept
from moe_lens.corpus.patterns import check_pattern, find_spans
from moe_lens.corpus.tagging import Tagger
from moe_lens.corpus.text import Document
from moe_lens.errors import BadConcept

SLOW = "(a|aa)+$"
SLOW_TEXT = "a" * 100 + "!"

REFUSED = {
    "": "is empty",
    "(a": "bad regular expression",
    r"\p{Nonsense}": "bad regular expression",
    "*a": "bad regular expression",
    "^": "only the empty string",
    "$": "only the empty string",
    "^$": "only the empty string",
    r"\b": "only the empty string",
    "(?=a)": "only the empty string",
    r"(?<!x)$|\Z": "only the empty string",
    "((a{1000}){1000}){1000}": "multiply to more than 1,000,000",
    "(" * 3000 + "a" + ")" * 3000: "too deeply nested",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_unusable_expressions_are_refused_when_they_are_read(pattern):
    with pytest.raises(BadConcept, match=rf"concept 'x': .*{REFUSED[pattern]}"):
        concept("x", regex=pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"\d*", r"a?", "日*", "^a", r"\$", r"\b\w", "(?=a)a", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "(a+)+b"],
)
def test_usable_expressions_are_not_refused(pattern):
    assert check_pattern(pattern, owner="concept 'x'") == pattern


def test_builtin_expressions_are_usable():
    patterns = [c.labeller.pattern for c in builtin_concepts() if isinstance(c.labeller, Regex)]
    assert len(patterns) > 50
    for pattern in patterns:
        check_pattern(pattern, owner="built in")


@given(st.text(r"ab()[]{}*+?|^$.\1,-:=!<P>", max_size=12))
@settings(max_examples=300, deadline=None)
def test_no_text_makes_the_check_raise_anything_but_bad_concept(pattern):
    with contextlib.suppress(BadConcept):
        regex.compile(check_pattern(pattern, owner="concept 'x'"))


def test_spans_are_those_of_every_match_in_order():
    text = "ab 12 c 345"
    expected = [list(m.span()) for m in re.finditer(r"\d+", text)]
    for pattern in (r"\d+", r"\d*", r"(?r)\d+"):
        assert find_spans(pattern, text, owner="o", document="d").tolist() == expected


def test_a_catastrophic_expression_is_interrupted_and_named():
    started = time.perf_counter()
    with pytest.raises(BadConcept) as caught:
        find_spans(SLOW, SLOW_TEXT, owner="label 3", document="doc 7", limit=0.1)
    assert time.perf_counter() - started < 5
    for word in ("label 3", repr(SLOW), "0.1 s", "'doc 7'", "without a repeat inside a repeat"):
        assert word in str(caught.value)


def test_a_long_text_has_more_time():
    with pytest.raises(BadConcept, match=r"more than 0\.3 s"):
        find_spans(SLOW, SLOW_TEXT + "b" * 300_000, owner="o", document="d", limit=0.1)


def test_an_expression_that_is_slow_on_every_document_is_stopped(monkeypatch):
    """None of the documents reaches the limit for one."""
    clock = iter(range(1000))
    monkeypatch.setattr(tagging.time, "thread_time", lambda: next(clock) * 4.0)  # every text takes 4 s
    tagger = Tagger([concept("slow", regex="a")], timeout=5.0)
    for i in range(15):
        tagger.tag(Document(f"d{i}", "a" * 100))
    with pytest.raises(BadConcept, match=r"'slow'.* more than 60 s on 16 documents, the last of them 'd15'"):
        tagger.tag(Document("d15", "a" * 100))


def test_a_large_corpus_has_time_in_proportion(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(tagging.time, "thread_time", lambda: next(clock) * 4.0)
    tagger = Tagger([concept("fine", regex="b")], timeout=5.0)
    for i in range(40):
        tagger.tag(Document(f"d{i}", "a" * 100_000))

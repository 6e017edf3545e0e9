"""A lexical rule, run on whole documents as any rule is, marks the tokens that it was fitted with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import regex

import moe_lens as ml
from moe_lens.autointerp.labels import label_frame, read_labels
from moe_lens.autointerp.lexical.candidates import Candidates
from moe_lens.autointerp.lexical.predicates import (
    CLASSES,
    NEAR,
    CharacterClass,
    Predicate,
    String,
    Term,
    rule_of,
    shown,
)
from moe_lens.autointerp.lexical.sampled_text import SampledText
from moe_lens.autointerp.lexical.search import Search, grow, price
from moe_lens.autointerp.lexical.sentence import MOST_WORDS, legible, phrase, sentence
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.corpus.batches import Tokenized, tokenize
from moe_lens.corpus.patterns import check_pattern, find_spans
from moe_lens.corpus.tagging import DocumentTags
from moe_lens.corpus.text import Corpus, Document
from moe_lens.errors import BadCorpus
from tests.autointerp.lexical_routing import bundled_tokenizer, route

HARD = [
    "le chat le le\nle\n\n\tthe café le" * 9,
    "naïve 👩‍👩‍👧 x_y fooBar  12345 (le) 'le' <le>\u2028le\x0b\x00 \\frac{1}{2} " * 8,
    "  \n    def le(self):\n        return [le]\r\n" * 12,
    "ab" * 150 + "\n" + "é" * 40 + " the" * 60,
]
"""Boundaries, letters of several tokens, characters of several bytes, odd white space, repeats."""


@pytest.fixture(scope="module")
def tokenized() -> Tokenized:
    """Windows of 64 tokens, most of them amid a document."""
    real = ml.corpus("bundled:").documents[::60]
    short = [Document(d.id, d.text[:700]) for d in real]
    made = [Document(f"hard{i}", text) for i, text in enumerate(HARD)]
    corpus = Corpus.of([*made, *short], id="real and hard")
    return tokenize(corpus, bundled_tokenizer(), [], max_length=64, splits=np.zeros(len(corpus), np.int8))


@pytest.fixture(scope="module")
def text(tokenized: Tokenized) -> SampledText:
    kept = TopExemplars(tokenized.splits, window_tokens=5000)  # not all windows
    route(kept, tokenized, lambda start, end, document: np.zeros((len(start), 1), np.int64), n_experts=1)
    return SampledText(kept, tokenized, bundled_tokenizer())


@pytest.fixture(scope="module")
def candidates(text: SampledText) -> Candidates:
    return Candidates(text, np.ones(len(text), bool))


def found_in_documents(rule: str, text: SampledText, tokenized: Tokenized) -> np.ndarray:
    """Bits of the sampled tokens, as `corpus.tagging` would give them to a concept with this expression."""
    tokens = np.isin(tokenized.document, text.document)[tokenized.window_of]
    bits = {}
    for d in np.unique(text.document).tolist():
        at = np.flatnonzero(tokens & tokenized.eligible & (tokenized.document[tokenized.window_of] == d))
        spans = find_spans(rule, tokenized.corpus.documents[d].text, owner="rule", document=str(d))
        start, end = tokenized.char_start[at], tokenized.char_end[at]
        found = DocumentTags(np.ones(1, bool), (spans,)).token_bits(start, end)[:, 0]
        bits |= dict(zip(at.tolist(), found.tolist(), strict=True))
    return np.array([bits[t] for t in text.token.tolist()])


def a_term(candidates: Candidates, rng: np.random.Generator, *, near_alone: bool) -> Term:
    markers = [p for p in candidates.near.predicates if isinstance(p, String)]
    near = tuple(markers[i] for i in rng.choice(len(markers), rng.integers(1, 5), replace=False))
    tokens = candidates.tokens.predicates
    if near_alone:
        return Term((), near)
    chosen = tuple(tokens[i] for i in rng.choice(len(tokens), rng.integers(1, 9), replace=False))
    return Term(chosen, near if rng.random() < 0.7 else (), negated=bool(rng.random() < 0.5))


def test_every_kind_of_predicate_marks_in_documents_what_it_marks_in_the_sample(text, candidates, tokenized):
    rng = np.random.default_rng(0)
    strings = [p for p in candidates.tokens.predicates if isinstance(p, String)]
    drawn = [strings[i] for i in rng.choice(len(strings), 60, replace=False)]
    assert any(p.token and p.not_before and p.not_behind for p in drawn)
    predicates: list[Predicate] = [*CLASSES, *drawn, *[p for p in strings if p.after][:5]]
    for predicate, marks in zip(predicates, text.marks(predicates), strict=True):
        want = found_in_documents(rule_of([Term((predicate,))]), text, tokenized)
        assert np.array_equal(text.tokens_with(marks), want), predicate


@pytest.mark.parametrize("seed", range(24))
def test_a_rule_marks_in_documents_the_union_of_what_its_terms_mark_in_the_sample(seed, text, candidates, tokenized):
    rng = np.random.default_rng(seed)
    terms = [a_term(candidates, rng, near_alone=i == 0 and seed % 2 == 0) for i in range(1 + seed % 4)]
    rng.shuffle(terms)  # type: ignore[arg-type]
    bits = np.any([text.tokens_of(term, candidates.marks) for term in terms], axis=0)
    assert bits.any()
    assert np.array_equal(found_in_documents(rule_of(terms), text, tokenized), bits)


def test_every_class_matches_one_character_at_a_time(tokenized):
    for predicate in CLASSES:
        for document in tokenized.corpus.documents[:12]:
            assert {len(m.group()) for m in regex.finditer(predicate.regex, document.text)} <= {1}


def test_a_string_as_a_token_is_the_token_more_often_than_the_bare_string_is(text, candidates):
    surfaces = np.array(text.surfaces())
    improved = 0.0
    for string in [p for p in candidates.tokens.predicates if isinstance(p, String) and p.token][:100]:
        truth = surfaces == string.text
        plain = String(string.text)
        wrong = [(text.tokens_with(marks) != truth).sum() for marks in text.marks([string, plain])]
        improved += np.log((wrong[1] + 1) / (wrong[0] + 1))
    assert improved / 100 > 0.15


@pytest.mark.parametrize("seed", range(8))
def test_a_rule_survives_a_csv_file_and_the_check_of_patterns(seed, candidates, tmp_path: Path):
    rng = np.random.default_rng(seed)
    terms = [a_term(candidates, rng, near_alone=False), Term((String(" "), String('"'), String("\n"), String(",")))]
    rule = rule_of(terms)
    check_pattern(rule, owner="rule")
    assert rule.isprintable()
    labels = label_frame([{"layer": 1, "expert": 2, "label": sentence(terms), "rule": rule}])
    labels.to_csv(tmp_path / "labels.csv", index=False)
    assert read_labels(tmp_path / "labels.csv")["rule"].tolist() == [rule]


def test_a_list_takes_what_adds_most_until_the_price_or_the_limit_of_its_kind():
    bits = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    weight = np.array([0.3, 0.3, 0.1, 0.2, 0.05], np.float32)
    price, kind = np.full(4, 0.1, np.float32), np.array([0, 0, 1, 1])
    listed, total = grow(bits, weight, price, kind, (2, 2))
    assert listed == [0, 2]  # 1 marks nothing more, 3 less than its price
    assert total == pytest.approx(0.7 + 0.2 - 2 * 0.1)
    assert grow(bits, weight, price / 10, kind, (2, 2))[0] == [0, 2, 3]
    assert grow(bits, weight, price / 10, kind, (2, 1))[0] == [0, 2]
    assert grow(bits, weight, price / 10, kind, (0, 2))[0] == [2, 3]
    shared = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    assert grow(shared, np.array([0.5, 0.4, 0.3, 0.2]), price[:3], kind[:3] * 0, (3,))[0] == [0, 1, 2]


def test_a_finished_rule_loses_what_it_can_do_without_and_nothing_else(text, candidates):
    search = Search(text, candidates, np.ones(len(text), bool))
    named = {p.phrase: p for p in candidates.tokens.predicates if isinstance(p, CharacterClass)}
    digits, more, letters = named["digits"], named["digits inside numbers"], named["letters"]
    marker = next(p for p in candidates.near.predicates if isinstance(p, String))
    near, guarded = Term((), (marker,)), Term((letters,), (marker,))
    for terms, want in (
        ([Term((more,)), Term((digits,))], [Term((digits,))]),
        ([Term((digits,)), Term((letters,))], [Term((digits, letters))]),
        ([Term((digits,)), guarded], [Term((digits,)), guarded]),
        ([guarded, near], [near]),
    ):
        routed = np.any([text.tokens_of(term, candidates.marks) for term in terms], axis=0)
        assert search.pruned(terms, routed) == want
        assert routed.any()


def test_longer_predicates_cost_more():
    assert price(String("le", "start", "end")) < price(String("le", "inside", "end"))
    strange = String("le", not_before="".join(map(chr, range(200, 400, 2))), token=True)
    assert price(strange) > 1.5 * price(String("le", "start", "end"))


def test_long_documents_of_repeats_take_linear_time(candidates):
    rng = np.random.default_rng(1)
    for text in ("a" * 100_000, " the" * 25_000, "\n" * 100_000, '{"' * 50_000):
        for near_alone in (True, False):
            rule = rule_of([a_term(candidates, rng, near_alone=near_alone)])
            find_spans(rule, text, owner="rule", document="repeats")  # raises after 5 s


def test_near_means_up_to_eighty_characters_after_the_end_of_a_marker():
    marker = String("le", "start", "end")
    rule = rule_of([Term((), (marker,))])
    document = "a le " + "x" * 200
    spans = find_spans(rule, document, owner="rule", document="d")
    assert spans.tolist() == [[3, 3 + NEAR + 1]]
    assert not len(find_spans(rule, "lemon ale", owner="rule", document="d"))
    x = rule_of([Term((String("x"),), (marker,))])
    assert find_spans(x, document, owner="rule", document="d")[:, 1].max() == 3 + NEAR + 1
    without = rule_of([Term((String("x"),), (marker,), negated=True)])
    assert find_spans(without, document, owner="rule", document="d")[:, 0].min() == 3 + NEAR + 1


def test_a_rule_in_words_is_short_and_what_does_not_fit_is_owned_up_to():
    words = tuple(String(f"word{i}", "start", "end") for i in range(12))
    near = (String("le", "start", "end"), String("la", "start", "end"), String("\n\n"))
    terms = [Term(words, near), Term((CLASSES[0],), near, negated=True), Term((String("ing", "inside", "end"),))]
    text = sentence(terms, [" de", "\n"])
    rule, written = text.split("; writes toward ")
    assert len(rule.split()) <= MOST_WORDS
    assert rule.startswith('words such as "word0"')
    assert rule.endswith("; and more")
    assert written == '" de", "\\n"'
    assert "and more" not in sentence(terms[1:])
    longest = sentence([Term((CLASSES[0], words[0], near[2]), near)] * 2)
    assert len(longest.split()) <= MOST_WORDS


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (Term((String("ing", "inside", "end"),)), 'the piece "-ing"'),
        (Term((String("un", "start"), String("n", "inside"), String("e"))), 'pieces "un-", "-n-" or "e"'),
        (Term(tuple(String(c) for c in "abcdef")), 'pieces such as "a", "b", "c" or "d"'),
        (Term((String("a"), String("a", token=True))), 'the piece "a"'),
        (Term((CLASSES[0], String("of", "start", "end"))), 'digits and the word "of"'),
        (Term((String("the ", "start", after=True),)), 'words after "the"'),
        (Term((), (String("\n\n"), String("le"))), r'text within 80 characters after "\n\n" or "le"'),
        (Term((CLASSES[0],), (String("le"),), negated=True), 'digits not within 80 characters after "le"'),
    ],
)
def test_a_term_in_words(term, words):
    assert phrase(term) == words


def test_a_shortened_list_says_so():
    term = Term(tuple(String(c) for c in "ab"), tuple(String(c) for c in "xyz"))
    assert phrase(term) == 'pieces "a" or "b" within 80 characters after "x", "y" or "z"'
    assert phrase(term, 1) == 'pieces such as "a" within 80 characters after "x" or others'


def test_white_space_is_shown_and_what_cannot_be_read_is_left_out():
    assert (shown("  "), shown("\t\x07"), shown(" a")) == ("␣␣", r"\t\u0007", " a")
    assert [legible(t) for t in ("a", " a", "\n\t", "é", "", "\ufffd", "a\ufffd", "\x16", "\u200b")] == [True] * 4 + [
        False
    ] * 5
    digits = [Term((CLASSES[0],))]
    assert sentence(digits, ["\ufffd", "\x16"]) == "digits"
    assert sentence(digits, ["\ufffd", "x"]) == 'digits; writes toward "x"'


def test_a_sample_of_other_windows_is_refused(tokenized):
    kept = TopExemplars(tokenized.splits, window_tokens=2000)
    route(kept, tokenized, lambda start, end, document: np.zeros((len(start), 1), np.int64), n_experts=1)
    other = tokenize(tokenized.corpus, bundled_tokenizer(), [], max_length=48, splits=tokenized.splits)
    with pytest.raises(BadCorpus, match="same corpus, tokenizer"):
        SampledText(kept, other, bundled_tokenizer())


def test_no_windows_give_no_tokens(tokenized):
    kept = TopExemplars(np.ones_like(tokenized.splits), window_tokens=2000)
    route(kept, tokenized, lambda start, end, document: np.zeros((len(start), 1), np.int64), n_experts=1)
    assert len(SampledText(kept, tokenized, bundled_tokenizer())) == 0

"""A lexical rule, run on whole documents as any rule is, marks the tokens that it was fitted with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import regex

import moe_lens as ml
from moe_lens.autointerp.labels import label_frame, read_labels
from moe_lens.autointerp.lexical.candidates import Candidates
from moe_lens.autointerp.lexical.predicates import CLASSES, NEAR, Predicate, String, Term, rule_of, shown
from moe_lens.autointerp.lexical.sampled_text import SampledText
from moe_lens.autointerp.lexical.sentence import MOST_WORDS, phrase, sentence
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


def test_sentences_are_short_and_show_white_space():
    words = tuple(String(f"word{i}", "start", "end") for i in range(12))
    near = (String("le", "start", "end"), String("la", "start", "end"), String("\n\n"))
    terms = [Term(words, near), Term((CLASSES[0],), near, negated=True), Term((String("ing", "inside", "end"),))]
    text = sentence(terms, [" de", "\n"])
    assert len(text.split()) <= MOST_WORDS + 3
    assert "\n" not in text
    assert text.endswith('writes toward " de", "\\n"')
    assert phrase(Term((String("ing", "inside", "end"),))) == 'tokens with "-ing"'
    assert phrase(Term((), near)) == r'text near "le", "la" or "\n\n"'
    assert (shown("  "), shown("\t\x07"), shown(" a")) == ("␣␣", r"\t\u0007", " a")


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

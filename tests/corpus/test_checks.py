"""Texts on which nothing can be scored are refused; what is partly unusable is said."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.corpus import checks
from moe_lens.corpus.batches import tokenize
from moe_lens.corpus.checks import check_corpus, check_scorable, constant_concepts
from moe_lens.corpus.concepts import concept
from moe_lens.corpus.tagging import Tagger
from moe_lens.corpus.text import Corpus, Document
from moe_lens.errors import BadConcept, BadCorpus
from moe_lens.types import Split

NEEDED = {Split.SELECT: 10, Split.VALIDATE: 5, Split.TEST: 5}
NEVER, EVERY, DIGIT = (concept(n, regex=r) for n, r in (("never", "qqq"), ("every", "(?s).+"), ("digit", r"\d+")))


def corpus_of(n: int, words: str = "cat 12 ") -> Corpus:
    names = [chr(97 + i % 26) * (1 + i // 26) for i in range(n)]  # texts that differ in digits alone count as copies
    return Corpus.of([Document(x, f"{words * (2 + i % 3)}{x}") for i, x in enumerate(names)], id="t", name="t.txt")


def test_twenty_documents_are_enough_and_nineteen_are_not():
    check_corpus(corpus_of(20), [], NEEDED)
    with pytest.raises(BadCorpus, match=r"t\.txt has 19 documents: .*; give at least 20 different documents") as caught:
        check_corpus(corpus_of(19), [], NEEDED)
    assert "a probe needs 10 to select, 5 to validate, 5 to test" in str(caught.value)


def test_copies_do_not_make_a_corpus_larger():
    copies = Corpus.of([Document(f"d{i}", "the same words") for i in range(200)], id="t")
    with pytest.raises(BadCorpus, match="has 200 documents in 1 groups"):
        check_corpus(copies, [], NEEDED)


def test_a_limit_that_leaves_too_few_documents_is_named(tokenizer):
    few = tokenize(corpus_of(80), tokenizer, [DIGIT], limit_tokens=40)
    with pytest.raises(BadCorpus, match=r"\d documents of t\.txt are read: .*; raise the limit on tokens"):
        check_scorable(few, NEEDED)
    check_scorable(tokenize(corpus_of(80), tokenizer, [DIGIT]), NEEDED)


def test_an_expression_of_the_users_is_tried_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(Tagger.__init__.__kwdefaults__, "timeout", 0.1)
    docs = [*corpus_of(40).documents, Document("trap", "a" * 100 + "!")]
    with pytest.raises(BadConcept, match=r"'slow'.* on document 'trap'"):
        check_corpus(Corpus.of(docs, id="t"), [concept("slow", regex="(a|aa)+$")], NEEDED)
    monkeypatch.setattr(checks, "_TRIED", 10)  # a taste of a large corpus, not all of it
    check_corpus(Corpus.of(docs, id="t"), [concept("slow", regex="(a|aa)+$")], NEEDED)


def test_concepts_that_never_vary_are_named_and_the_others_go_on(tokenizer, caplog):
    tokenized = tokenize(corpus_of(40), tokenizer, [NEVER, DIGIT, EVERY])
    check_scorable(tokenized, NEEDED)
    said = "in t.txt concept 'never' matches no token and concept 'every' matches every token: not scored"
    assert [r.getMessage() for r in caplog.records] == [said]
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(("alone", "what"), [([NEVER], "no token"), ([EVERY], "every token")])
def test_a_concept_that_never_varies_is_refused_when_it_is_alone(tokenizer, alone, what):
    with pytest.raises(BadConcept, match=f"nothing to probe: .*{alone[0].name!r} matches {what}; choose or write"):
        check_scorable(tokenize(corpus_of(40), tokenizer, alone), NEEDED)


def test_ordinary_text_is_passed_in_silence(tokenizer, caplog):
    check_scorable(tokenize(corpus_of(40), tokenizer, [DIGIT]), NEEDED)
    assert not caplog.records


def test_the_tokens_of_every_document_are_counted(tokenizer):
    docs = [*corpus_of(40).documents, Document("long", "cat 12 " * 200), Document("longer", "dog 7 " * 300)]
    tokenized = tokenize(Corpus.of(docs, id="t"), tokenizer, [DIGIT], max_length=64)
    assert (tokenized.document_lengths > 64).sum() == 2, "what is read in several windows"
    assert tokenized.document_lengths.sum() == tokenized.n_tokens


def test_a_list_of_many_names_is_cut(tokenizer, caplog):
    many = [concept(f"n{i}", regex=f"q{i}q") for i in range(9)]
    check_scorable(tokenize(corpus_of(40), tokenizer, [*many, DIGIT]), NEEDED)
    assert "'n4' and 4 more match no token" in caplog.records[0].getMessage()


@given(st.lists(st.text("ab1 ", min_size=2, max_size=12), min_size=1, max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_constant_concepts_agree_with_counts(tokenizer, texts, scoped):
    scope = {"kind": "x"} if scoped else None
    concepts = [
        concept(n, regex=r, scope=scope) for n, r in zip("pqrst", ("a", "b+", r"\d", ".", "[ab] ?"), strict=True)
    ]
    docs = [Document(f"d{i}", t, {"kind": "xy"[i % 2]}) for i, t in enumerate(texts)]
    try:
        tokenized = tokenize(Corpus.of(docs, id="t"), tokenizer, concepts, splits=np.zeros(len(docs), int))
    except BadCorpus:
        return
    totals = tokenized.counts().groupby("concept")[["positives", "tokens"]].sum()
    never, always = constant_concepts(tokenized)
    assert set(never) == set(totals.index[totals.positives == 0])
    assert set(always) == set(totals.index[(totals.positives == totals.tokens) & (totals.tokens > 0)])

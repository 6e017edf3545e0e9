"""Reading only the start of documents must not change how that start is labelled."""

import numpy as np

import moe_lens as ml
from moe_lens.corpus.concepts import concepts_for
from moe_lens.corpus.patterns import find_spans
from moe_lens.corpus.tagging import Tagger


def test_spans_before_a_character_are_those_of_the_whole_text():
    corpus = ml.corpus("bundled:")
    tagger = Tagger(concepts_for(corpus, None))
    cut = 0
    for document in corpus.documents[::23]:
        whole, start = tagger.tag(document), tagger.tag(document, until=200)
        np.testing.assert_array_equal(whole.in_scope, start.in_scope)
        for every, some in zip(whole.spans, start.spans, strict=True):
            np.testing.assert_array_equal(every[every[:, 0] < 200], some)
            cut += len(every) - len(some)
    assert cut > 10_000, "most spans lie beyond"


def test_a_pattern_that_searches_from_the_end_is_cut_as_well():
    assert find_spans("(?r)a", "a-a-a", owner="o", document="d", until=3).tolist() == [[0, 1], [2, 3]]

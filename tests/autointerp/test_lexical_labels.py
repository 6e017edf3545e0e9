"""Lexical labels of routing whose true rule is known, and of routing that has none."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.autointerp.exemplars import exemplar_table
from moe_lens.autointerp.labels import LABEL_COLUMNS
from moe_lens.autointerp.lexical import lexical_labels
from moe_lens.autointerp.lexical.labeller import CONFIDENT_FROM, LEAST_VISITS
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.corpus.batches import Tokenized, tokenize
from moe_lens.corpus.patterns import find_spans
from moe_lens.corpus.splits import assign_splits
from moe_lens.corpus.tagging import DocumentTags
from moe_lens.corpus.text import Corpus, Document
from moe_lens.errors import OutOfRange
from tests.autointerp.lexical_routing import Router, bundled_tokenizer, from_marks, route

pytestmark = pytest.mark.slow

PLANTED = {
    "digits": r"\d",
    "after the": r"(?<=\bthe )\S",
    "line starts": r"(?m)^.",
    "near the": r"(?s)\bthe\b.{0,60}",
    "digits or quotes": r"[\d\"']",
    "rare": r"\bzebra\b",
    "words, not near the": r"(?<!\w)[a-zà-öø-ÿ]",
}
N_RANDOM = 40
STEP = 3
"""Every third document is read."""


def read(corpus: Corpus) -> Tokenized:
    splits = assign_splits(ml.corpus("bundled:"))[::STEP]
    return tokenize(corpus, bundled_tokenizer(), [], max_length=128, document_tokens=128, splits=splits)


def at_random(*, by_document: bool) -> Router:
    """Each expert gets a fifth of the tokens, or of the documents, by lot."""

    def router(start: np.ndarray, end: np.ndarray, document: np.ndarray) -> np.ndarray:
        drawn = np.empty((len(start), N_RANDOM))
        for d in np.unique(document).tolist():
            at = document == d
            rng = np.random.default_rng([d, by_document])
            drawn[at] = rng.random((1 if by_document else int(at.sum()), N_RANDOM))
        return np.where(drawn < 0.2, np.arange(N_RANDOM), N_RANDOM)

    return router


def planted(tokenized: Tokenized) -> Router:
    patterns = dict(PLANTED)
    near = r"(?s)\bthe\b.{0,80}"
    router = from_marks(tokenized, [*patterns.values(), near])

    def without(start: np.ndarray, end: np.ndarray, document: np.ndarray) -> np.ndarray:
        chosen = router(start, end, document)
        last = len(patterns)  # the number of the helper, and of no expert
        chosen[:, last - 1] = np.where(chosen[:, last] == last, last + 1, chosen[:, last - 1])
        return np.where(chosen[:, :last] < last, chosen[:, :last], N_RANDOM)

    return without


@cache
def captured(change: bool = False) -> tuple[TopExemplars, Tokenized]:
    """Layer 0 planted, layer 1 at random by token, layer 2 at random by document."""
    corpus = Corpus.of(ml.corpus("bundled:").documents[::STEP], id="a part of the bundled text")
    tokenized = read(corpus)
    if change:  # other texts in all splits but select
        documents = [
            d if code == 0 else replace(d, text=d.text[::-1])
            for d, code in zip(tokenized.corpus.documents, tokenized.splits, strict=True)
        ]
        tokenized = read(Corpus.of(documents, id="a part of the bundled text"))
    kept = TopExemplars(tokenized.splits)
    routers = [planted(tokenized), at_random(by_document=False), at_random(by_document=True)]
    return route(kept, tokenized, *routers, n_experts=N_RANDOM + 1), tokenized


def lens_rows() -> pd.DataFrame:
    row = {"layer": 0, "expert": 0, "document": pd.NA, "promoted": ["\ufffd", " de", "\n", "x"]}
    return pd.DataFrame([row, {**row, "document": 3, "promoted": ["no"]}])


def labels_of(kept: TopExemplars, tokenized: Tokenized, **settings) -> pd.DataFrame:
    table = exemplar_table(kept, tokenized, bundled_tokenizer(), layers=[0])
    return lexical_labels(kept, tokenized, bundled_tokenizer(), table, lens_rows(), progress=False, **settings)


EXPERTS = [(0, e) for e in range(len(PLANTED))]
RANDOM = [(layer, e) for layer in (1, 2) for e in range(N_RANDOM)]


@pytest.fixture(scope="module")
def everything() -> pd.DataFrame:
    return labels_of(*captured(), experts=[*EXPERTS, *RANDOM])


@pytest.fixture(scope="module")
def labels(everything: pd.DataFrame) -> pd.DataFrame:
    return everything[everything["layer"] == 0].set_index("expert", drop=False)


def on_validate(rule: str, expert: int) -> tuple[float, float]:
    """Recall and false positive rate of a rule on the validate split."""
    _, tokenized = captured()
    code = tokenized.window_split[tokenized.window_of]
    document = tokenized.document[tokenized.window_of]
    use = tokenized.eligible & (code == 1)
    start, end = tokenized.char_start, tokenized.char_end
    chosen = planted(tokenized)(start, end, document)
    truth, found = (chosen == expert).any(1), np.zeros(len(start), bool)
    for d in np.unique(document[use]).tolist():
        at = document == d
        spans = find_spans(rule, tokenized.corpus.documents[d].text, owner="rule", document=str(d))
        found[at] = DocumentTags(np.ones(1, bool), (spans,)).token_bits(start[at], end[at])[:, 0]
    return float(found[use & truth].mean()), float(found[use & ~truth].mean())


@pytest.mark.parametrize(
    ("name", "recall", "false_positives"),
    [
        ("digits", 1.0, 0.0),
        ("after the", 0.999, 0.001),
        ("line starts", 0.999, 0.001),
        ("near the", 0.95, 0.1),
        ("digits or quotes", 0.95, 0.01),
        ("words, not near the", 0.95, 0.01),
    ],
)
def test_planted_routing_is_found_and_holds_on_documents_that_were_not_read(labels, name, recall, false_positives):
    expert = list(PLANTED).index(name)
    row = labels.loc[expert]
    assert row["status"] == "ok"
    got = on_validate(row["rule"], expert)
    assert got[0] >= recall
    assert got[1] <= false_positives
    assert row["confidence"] == 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digits", ["digits"]),
        ("after the", ['words after "the"']),
        ("line starts", ["line starts"]),
        ("near the", ['text within 80 characters after "the"']),
        ("digits or quotes", ["digits", "quotes"]),
        ("words, not near the", ['not within 80 characters after "the"']),
    ],
)
def test_the_sentence_names_what_was_planted(labels, name, words):
    label = labels.loc[list(PLANTED).index(name), "label"]
    assert all(word in label for word in words), label


def test_a_label_comes_with_evidence_and_with_what_the_expert_writes(labels):
    row = labels.loc[0]
    assert list(labels.columns) == list(LABEL_COLUMNS)
    assert row["label"].endswith('digits; writes toward " de", "\\n"')
    assert row["labeller"] == "lexical"
    kept, _ = captured()
    share = kept.n_visits(0, "select")[0] / len(kept.windows.column("split"))
    assert row["n_exemplars"] == kept.n_visits(0, "select")[0] > share
    first, *_, last = row["evidence"]
    assert first.startswith("digits: covers 100% of visits, ")
    assert last == "covers 20 of its 20 highest scores"


def test_an_expert_with_few_visits_gets_no_label_and_a_reason(labels):
    row = labels.loc[list(PLANTED).index("rare")]
    assert (row["status"], row["label"], row["rule"]) == ("too_few", None, None)
    assert str(LEAST_VISITS) in row["why"]


@pytest.mark.parametrize("layer", [1, 2])
def test_random_routing_has_no_label(layer, everything):
    table = everything[everything["layer"] == layer]
    assert len(table) == N_RANDOM
    assert set(table["status"]) <= {"abstained", "ok"}
    assert (table["status"] == "ok").mean() <= 0.05
    assert set(table.loc[table["status"] == "abstained", "why"]) == {"no token rule separates its tokens"}


def test_neither_texts_of_other_splits_nor_other_experts_change_a_label(labels):
    kept, tokenized = captured(change=True)
    assert tokenized.corpus.sha256 != captured()[1].corpus.sha256
    other = labels_of(kept, tokenized, layers=[0], experts=[(0, 1), (0, 3)]).set_index("expert", drop=False)
    pd.testing.assert_frame_equal(other, labels.loc[[1, 3]])


def test_no_expert_and_a_layer_that_is_not_there():
    kept, tokenized = captured()
    assert labels_of(kept, tokenized, experts=[]).empty
    with pytest.raises(OutOfRange, match="layer 9"):
        labels_of(kept, tokenized, layers=[9])
    assert list(CONFIDENT_FROM) == sorted(CONFIDENT_FROM)


def test_without_select_documents_every_expert_has_too_few():
    documents = [Document(f"d{i}", "one two three four five six " * 9) for i in range(3)]
    corpus = Corpus.of(documents, id="no select")
    tokenized = tokenize(corpus, bundled_tokenizer(), [], max_length=64, splits=np.ones(3, np.int8))
    kept = TopExemplars(tokenized.splits)
    route(kept, tokenized, at_random(by_document=False), n_experts=N_RANDOM + 1)
    assert set(labels_of(kept, tokenized)["status"]) == {"too_few"}

"""The document split: what stays together, what it depends on, and how large the parts are."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.corpus.splits import _duplicates, _near, assign_splits, code_of, domain_order, units
from moe_lens.corpus.text import Corpus, Document
from moe_lens.types import Split

WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu") for b in ("ra", "ne", "so") for c in ("", "n", "st", "lle")]


def sentence(seed: int, n: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n))


def make(rows) -> Corpus:
    docs = [Document(f"d{i}", sentence(i), {"domain": d}, g) for i, (d, g) in enumerate(rows)]
    return Corpus.of(docs, id="made")


ROWS = st.lists(st.tuples(st.sampled_from(["fr", "de", "c"]), st.integers(0, 30).map(str)), min_size=1, max_size=60)


@given(ROWS, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_no_group_is_in_two_splits(rows, seed):
    corpus = make(rows)
    code = assign_splits(corpus, seed=seed)
    assert set(code.tolist()) <= {0, 1, 2}
    for group in {d.group for d in corpus.documents}:
        assert len({int(c) for c, d in zip(code, corpus.documents, strict=True) if d.group == group}) == 1


@given(ROWS, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_permuting_documents_changes_nothing(rows, rng):
    corpus = make(rows)
    order = list(range(len(corpus)))
    rng.shuffle(order)
    permuted = Corpus.of([corpus.documents[i] for i in order], id="made")
    assert assign_splits(permuted).tolist() == assign_splits(corpus)[order].tolist()


def test_shares_are_50_25_25_in_every_domain_when_groups_are_small():
    corpus = make([(d, f"{d}{i // 2}") for d in ("fr", "de", "c") for i in range(80)])
    code = assign_splits(corpus)
    for domain in ("fr", "de", "c"):
        of = Counter(int(c) for c, d in zip(code, corpus.documents, strict=True) if d.fields["domain"] == domain)
        assert (of[0], of[1], of[2]) == (40, 20, 20)


def test_single_units_are_spread_by_their_hash():
    corpus = make([(f"domain{i}", f"g{i}") for i in range(400)])
    share = np.bincount(assign_splits(corpus), minlength=3) / 400
    assert np.abs(share - [0.5, 0.25, 0.25]).max() < 0.08


def test_a_giant_group_leaves_every_split_something():
    corpus = make([("fr", "giant")] * 40 + [("fr", "a"), ("fr", "b"), ("fr", "c")])
    for seed in range(5):
        assert set(assign_splits(corpus, seed=seed).tolist()) == {0, 1, 2}


def test_seed_and_corpus_id_change_the_split():
    corpus = make([("fr", f"g{i}") for i in range(60)])
    other = Corpus.of(corpus.documents, id="other")
    assert assign_splits(corpus).tolist() != assign_splits(corpus, seed=1).tolist()
    assert assign_splits(corpus).tolist() != assign_splits(other).tolist()
    assert assign_splits(corpus).tolist() == assign_splits(corpus).tolist()


def test_duplicates_up_to_blanks_case_and_digits_stay_together():
    docs = [Document("a", "Version 1.2 of  the tool"), Document("b", "version 3.9 of the\ttool"), Document("c", "else")]
    assert units(Corpus.of(docs, id="t")) == ["a", "a", "c"]


def test_near_duplicates_stay_together_and_others_do_not():
    base = sentence(1, 300)
    edited = base.replace(base.split()[100], "completelydifferentword", 1)
    docs = [Document("a", base), Document("b", edited), Document("c", sentence(2, 300)), Document("z", sentence(3, 9))]
    assert units(Corpus.of(docs, id="t")) == ["a", "a", "c", "z"]


def test_shared_boilerplate_does_not_tie_different_documents():
    licence = sentence(0, 60)
    docs = [Document(f"d{i}", licence + " " + sentence(i + 1, 300)) for i in range(20)]
    assert _duplicates(docs) == []


def test_signatures_tie_only_if_most_bins_agree():
    rng = np.random.default_rng(0)
    a, other = rng.integers(0, 2**63, (2, 32)).astype(np.uint64)
    one_band, most = other.copy(), other.copy()
    one_band[:4] = a[:4]
    most[:20] = a[:20]
    assert _near([a, one_band]) == []
    assert _near([a, other, most]) == [(0, 2)]


def test_near_duplicates_in_other_scripts():
    rng = random.Random(0)
    base = "".join(chr(0x4E00 + rng.randrange(2000)) for _ in range(600))
    docs = [Document("a", base), Document("b", base[:300] + "新" + base[300:]), Document("c", base[::-1])]
    assert units(Corpus.of(docs, id="t")) == ["a", "a", "c"]


def test_domain_order_takes_every_domain_and_split_in_turn():
    corpus = make([("fr", f"f{i}") for i in range(60)] + [("de", f"d{i}") for i in range(8)])
    code = assign_splits(corpus)
    order = domain_order(corpus, codes=code.tolist())
    assert sorted(order) == list(range(68))
    seen = Counter((corpus.documents[i].fields["domain"], int(code[i])) for i in order[:16])
    assert seen == {("fr", 0): 4, ("fr", 1): 2, ("fr", 2): 2, ("de", 0): 4, ("de", 1): 2, ("de", 2): 2}


def test_codes_follow_the_split_enum():
    assert [code_of(s) for s in (Split.SELECT, "validate", Split.TEST)] == [0, 1, 2]

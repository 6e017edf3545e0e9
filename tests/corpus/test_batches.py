"""Windows and batches: offsets, special tokens, eligibility, packing, limits, granularity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.corpus.batches import batches, tokenize
from moe_lens.corpus.concepts import builtin_concepts, concept
from moe_lens.corpus.splits import assign_splits, domain_order
from moe_lens.corpus.text import Corpus, Document
from moe_lens.corpus.windows import whole_spans, window_bounds
from moe_lens.errors import BadConfig, BadCorpus, UnsupportedModel
from moe_lens.types import Granularity, Split

DIGIT = concept("digit", regex=r"\d+")
CJK = concept("cjk", regex=r"\p{Han}+")
FRENCH = concept("french", field="language", equals="fr")
THREE = [DIGIT, CJK, FRENCH]


def one(text: str, **fields: str) -> Corpus:
    return Corpus.of([Document("d", text, fields)], id="one")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    docs = [
        Document(
            f"d{i}", f"Word{i} has {i} of {'日本' * (i % 4)} " * (1 + i % 5), {"domain": f"x{i % 3}", "language": "fr"}
        )
        for i in range(40)
    ]
    docs.append(Document("plain", "no fields here 7"))
    return Corpus.of(docs, id="forty")


@pytest.fixture(scope="module")
def tokenized(corpus, tokenizer):
    return tokenize(corpus, tokenizer, THREE, max_length=24)


TEXTS = st.text(st.sampled_from("ab 1日é🎉\n\t"), min_size=1, max_size=60)


@given(TEXTS, st.integers(5, 12), st.booleans())
@settings(max_examples=80, deadline=None)
def test_windows_cover_every_character_at_most_once_and_labels_are_overlaps(
    tokenizer, bos_tokenizer, text, length, with_bos
):
    used = bos_tokenizer if with_bos else tokenizer
    try:
        t = tokenize(one(text), used, THREE[:2], max_length=length)
    except BadCorpus:
        assert len(tokenizer(text)["input_ids"]) < 2
        return
    covered: list[int] = []
    for w in range(len(t)):
        part = slice(t.offsets[w], t.offsets[w + 1])
        assert part.stop - part.start <= length
        real = t.char_start[part] >= 0
        covered += sorted(
            {i for a, b in zip(t.char_start[part][real], t.char_end[part][real], strict=True) for i in range(a, b)}
        )
    assert len(covered) == len(set(covered))
    for c, characters in enumerate(("1", "日")):
        for a, b, bit in zip(t.char_start, t.char_end, t.label(c), strict=True):
            assert bit == (a >= 0 and any(ch in characters for ch in text[max(a, 0) : b]))


def test_multibyte_characters_give_their_tokens_character_offsets(tokenizer):
    text = "é日x1"
    t = tokenize(one(text), tokenizer, THREE[:2])
    assert len(t.input_ids) > 4  # 日 is not in the vocabulary: three byte tokens
    seen = list(zip(t.char_start.tolist(), t.char_end.tolist(), t.label(0).tolist(), t.label(1).tolist(), strict=True))
    assert seen[-5:] == [(1, 2, False, True)] * 3 + [(2, 3, False, False), (3, 4, True, False)]


def test_trimmed_offsets_give_the_same_spans_and_labels(make_tokenizer):
    blank = concept("blank", regex=r"\s")
    corpus = one("The cat  sat\n\n  on 12 mats. ")
    whole, trimmed = (tokenize(corpus, make_tokenizer(trim_offsets=x), [blank, DIGIT]) for x in (False, True))
    assert whole.input_ids.tolist() == trimmed.input_ids.tolist()
    assert whole.char_start.tolist() == trimmed.char_start.tolist()
    assert whole.label(0).tolist() == trimmed.label(0).tolist()
    assert 0 < whole.label(0).sum() < len(whole.input_ids)


def test_gaps_that_are_not_blank_stay_gaps():
    start, end = whole_spans("a b--c", np.array([[0, 1], [2, 3], [5, 6]]))
    assert start.tolist() == [0, 1, 5]
    assert end.tolist() == [1, 3, 6]


def test_no_window_is_cut_inside_a_character():
    start, end = np.array([0, 1, 2, 2, 2, 3]), np.array([1, 2, 3, 3, 3, 4])
    assert window_bounds(start, end, 3) == [(0, 2), (2, 5), (5, 6)]
    assert window_bounds(start, end, 6) == [(0, 6)]


def test_first_tokens_and_specials_are_not_eligible(tokenizer, bos_tokenizer):
    text = "The cat sat on the mat. " * 8
    plain = tokenize(one(text), tokenizer, THREE, max_length=16)
    with_bos = tokenize(one(text), bos_tokenizer, THREE, max_length=16)
    asked = tokenize(one(text), tokenizer, THREE, max_length=16, add_bos=True)
    assert with_bos.input_ids.tolist() == asked.input_ids.tolist()
    bos = tokenizer.bos_token_id
    for t, front in ((plain, 0), (with_bos, 1), (asked, 1)):
        assert len(t) > 2
        for a, b in zip(t.offsets, t.offsets[1:], strict=False):
            assert b - a <= 16
            assert t.eligible[a:b].tolist() == [False] * (front + 1) + [True] * (b - a - front - 1)
            assert (t.input_ids[a : a + front] == bos).all()
            assert (t.char_start[a : a + front] == -1).all()
    assert bos not in plain.input_ids


def test_special_tokens_written_in_the_text_are_not_eligible(tokenizer):
    t = tokenize(one("The cat 1<eos>1 sat"), tokenizer, THREE)
    at = t.input_ids.tolist().index(tokenizer.eos_token_id)
    assert (t.eligible[at], t.char_start[at], t.char_end[at], t.label(0)[at]) == (False, -1, -1, False)
    assert t.eligible[at + 1]


def test_batches_hold_every_window_once_with_padding_silent(tokenized):
    loader = batches(tokenized, tokens_per_batch=100)
    seen = []
    for batch in loader:
        assert batch.input_ids.numel() <= 100
        assert batch.labels.shape == (*batch.input_ids.shape, 3)
        pad = batch.attention_mask == 0
        assert (batch.input_ids[pad] == tokenized.pad_id).all()
        assert not batch.eligible[pad].any()
        assert not batch.labels[pad].any()
        assert (batch.char_start[pad] == -1).all()
        assert not (batch.attention_mask.diff(dim=1) > 0).any()  # right padding
        for w in range(len(batch.document)):
            n = int(batch.attention_mask[w].sum())
            parts = batch.input_ids[w, :n], batch.eligible[w, :n], batch.labels[w, :n], batch.in_scope[w]
            seen.append((int(batch.document[w]), *(x.tolist() for x in parts)))
    assert len(loader) == len(list(loader))
    expected = []
    for w, (a, b) in enumerate(zip(tokenized.offsets, tokenized.offsets[1:], strict=False)):
        parts = tokenized.input_ids[a:b], tokenized.eligible[a:b], tokenized.labels(a, b), tokenized.in_scope[w]
        expected.append((int(tokenized.document[w]), *(x.tolist() for x in parts)))
    assert sorted(seen) == sorted(expected)
    assert loader.n_tokens == tokenized.n_tokens


def test_batches_of_the_three_splits_partition_the_windows(tokenized):
    parts = [batches(tokenized, split=s) for s in Split]
    assert sum(p.n_tokens for p in parts) == tokenized.n_tokens
    code = assign_splits(tokenized.corpus)
    for k, part in enumerate(parts):
        assert {int(code[d]) for b in part for d in b.document} == {k}


def test_a_document_without_the_field_is_out_of_scope(tokenized):
    plain = tokenized.document == 40
    assert plain.sum() == 1
    assert tokenized.in_scope[plain].tolist() == [[True, True, False]]
    assert tokenized.in_scope[~plain].all()


def test_batches_are_the_same_every_time(corpus, tokenizer, tokenized):
    again = tokenize(corpus, tokenizer, THREE, max_length=24)
    for a, b in zip(batches(tokenized), batches(again), strict=True):
        assert a.input_ids.equal(b.input_ids)
        assert a.labels.equal(b.labels)


def test_a_window_longer_than_the_batch_is_a_batch(tokenized):
    assert len(batches(tokenized, tokens_per_batch=1)) == len(tokenized)


def test_labels_survive_packing_with_many_concepts(tokenizer):
    letters = [concept(f"c{i}", regex=chr(97 + i)) for i in range(19)]
    t = tokenize(one("a cab fed the big lion 1"), tokenizer, letters)
    assert t.packed_labels.shape[1] == 3
    text = t.corpus.documents[0].text
    for i in range(19):
        expected = [chr(97 + i) in text[a:b] for a, b in zip(t.char_start, t.char_end, strict=True)]
        assert t.label(i).tolist() == t.labels()[:, i].tolist() == expected


def test_counts_by_hand(tokenizer):
    docs = [Document(i, "a 1 b 2", {"language": "fr"}) for i in "xyz"] + [Document("w", "no digit", {"language": "de"})]
    t = tokenize(Corpus.of(docs, id="t"), tokenizer, [DIGIT, FRENCH], splits=np.array([0, 0, 1, 2]))
    counts = t.counts().set_index(["concept", "split"])
    tokens = (np.diff(t.offsets) - 1).tolist()  # without the first of each window
    per_document = int(t.label(0)[t.offsets[0] : t.offsets[1]].sum())
    assert per_document == 2
    row = counts.loc[("digit", "select")]
    assert (row.positives, row.tokens, row.documents) == (4, tokens[0] + tokens[1], 2)
    assert counts.loc[("digit", "test"), ["positives", "tokens", "documents"]].tolist() == [0, tokens[3], 0]
    assert counts.loc[("french", "validate"), ["positives", "tokens", "documents"]].tolist() == [tokens[2]] * 2 + [1]


def test_limit_takes_whole_documents_from_every_domain_and_only_adds(corpus, tokenizer):
    whole = tokenize(corpus, tokenizer, THREE, max_length=24)
    last: set[int] = set()
    for limit in (1, 300, 600, 1200):
        t = tokenize(corpus, tokenizer, THREE, max_length=24, limit_tokens=limit)
        taken = set(t.document.tolist())
        assert last <= taken
        assert t.n_tokens <= limit or len(taken) == 1
        for d in taken:
            assert (t.document == d).sum() == (whole.document == d).sum()
        order = domain_order(corpus, codes=t.splits.tolist())
        assert taken == set(order[: len(taken)])
        last = taken
    assert {corpus.documents[d].fields.get("domain") for d in last} == {"x0", "x1", "x2", None}
    assert t.splits.tolist() == whole.splits.tolist()


def test_granularity_is_detected_from_the_tokens(tokenizer):
    quoted = concept("quoted", regex='"[^"]*"')
    docs = [Document(f"d{i}", f'the cat {i} "the cat {i}" sat on {i} mats ' * 3) for i in range(30)]
    t = tokenize(
        Corpus.of(docs, id="t"), tokenizer, [DIGIT, quoted, FRENCH, concept("s", regex="q", granularity="type")]
    )
    assert [c.granularity for c in t.concepts] == [
        Granularity.TYPE, Granularity.SPAN, Granularity.DOCUMENT, Granularity.TYPE,
    ]  # fmt: skip


def test_a_rare_span_is_not_called_a_type(tokenizer):
    docs = [Document(f"d{i}", "the cat sat on the mat and " * 20 + ("[the cat]" if i == 0 else "")) for i in range(20)]
    t = tokenize(Corpus.of(docs, id="t"), tokenizer, [concept("rare", regex=r"\[[^\]]*\]")])
    assert t.label(0).mean() < 0.01
    assert t.concepts[0].granularity is Granularity.SPAN


def test_a_slow_tokenizer_is_refused(corpus):
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModel, match=r"Slow reports no character offsets.*fast tokenizer"):
        tokenize(corpus, Slow(), THREE)


def test_impossible_settings_are_refused(corpus, tokenizer, tokenized):
    with pytest.raises(BadConfig, match="max_length=1 leaves no room"):
        tokenize(corpus, tokenizer, THREE, max_length=1)
    with pytest.raises(BadConfig, match="limit_tokens=0"):
        tokenize(corpus, tokenizer, THREE, limit_tokens=0)
    with pytest.raises(BadConfig, match="tokens_per_batch=0"):
        batches(tokenized, tokens_per_batch=0)
    with pytest.raises(BadCorpus, match="nothing to probe"):
        tokenize(one("a"), tokenizer, THREE)


def test_all_builtin_concepts_at_once(tokenizer):
    text = 'def f(x):\n    return "é" # 12\n'
    t = tokenize(one(text, language="python", kind="code", domain="python"), tokenizer, builtin_concepts())
    names = [c.name for c in t.concepts]
    comment = t.label(names.index("syntax_comment"))
    assert "".join(text[a:b] for a, b in zip(t.char_start[comment], t.char_end[comment], strict=True)).strip() == "# 12"
    assert not t.in_scope[0, names.index("is_frac")]
    assert all(c.granularity is not None for c in t.concepts)


def test_a_second_model_can_read_the_documents_of_the_first(corpus, tokenizer, bos_tokenizer):
    first = tokenize(corpus, tokenizer, THREE, limit_tokens=300)
    second = tokenize(corpus, bos_tokenizer, THREE, documents=np.unique(first.document).tolist())
    assert set(second.document.tolist()) == set(first.document.tolist())
    assert second.splits.tolist() == first.splits.tolist()

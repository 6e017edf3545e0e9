"""Items, rules, baselines and the shuffled control, on a tiny model whose every window was kept."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_lens as ml
from moe_lens.autointerp.labels import label_frame
from moe_lens.autointerp.scoring import rule as rule_module
from moe_lens.autointerp.scoring.baselines import Baselines
from moe_lens.autointerp.scoring.controls import shuffled
from moe_lens.autointerp.scoring.items import MOVED, NEGATIVES, make_items, sample_items
from moe_lens.autointerp.scoring.metrics import label_scores
from moe_lens.autointerp.scoring.rule import rule_answers
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.corpus.batches import tokenize
from moe_lens.corpus.tagging import Tagger
from moe_lens.errors import BadConcept, BadConfig, BadCorpus, OutOfRange
from tests.autointerp.scoring_tables import N_EXPERTS, Captured, captured
from tests.models import tiny

PLACE = ["document", "window_char", "position"]
CONTEXT = ["document", "window_char", "text"]


@pytest.fixture(scope="module")
def soup(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    return captured(tmp_path_factory.mktemp("soup"))


@pytest.fixture(scope="module")
def items(soup: Captured) -> pd.DataFrame:
    return make_items(soup.exemplars)


def test_items_are_the_validate_tokens_and_only_positives_were_routed(soup, items):
    t = soup.tokenized
    assert items["item"].is_unique
    assert set(items["split"]) == {"validate"}
    assert set(items["negatives"]) == {"", *NEGATIVES}
    experts = {layer: soup.experts(layer) for layer in (0, 1)}
    for r in items.itertuples():
        at = soup.token(r)
        routed = r.expert in experts[r.layer][r.document, r.window_char, r.position]
        assert routed == r.routed == (r.negatives == "")
        assert t.eligible[at]
        assert r.token_id == (-1 if r.negatives == MOVED else t.input_ids[at])
    validate = soup.exemplars[soup.exemplars["split"] == "validate"]
    kept = validate[validate["routed"] == validate["kind"].isin(("quantile", "random"))]
    assert len(kept) < len(validate)
    unmoved = items[items["negatives"] != MOVED]
    columns = ["layer", "expert", "kind", *PLACE, "token"]
    assert sorted(map(tuple, unmoved[columns].values)) == sorted(map(tuple, kept[columns].values))


def test_a_moved_mark_is_another_token_of_the_context_of_a_positive(soup, items):
    positives, moved = items[items["negatives"] == ""], items[items["negatives"] == MOVED]
    assert len(moved) > 0.5 * len(positives)
    contexts = positives.groupby(["layer", "expert", *CONTEXT])
    for r in moved.itertuples():
        around = contexts.get_group((r.layer, r.expert, r.document, r.window_char, r.text))
        at = soup.token(r)
        start, end = soup.tokenized.char_start[at], soup.tokenized.char_end[at]
        document = soup.tokenized.corpus.documents[r.document].text
        assert document[start:end] == r.token == r.text[r.char_start : r.char_end] != ""
        assert document.startswith(r.text, start - r.char_start)
        assert ((around["char_end"] <= r.char_start) | (around["char_start"] >= r.char_end)).any()


@pytest.mark.parametrize(
    ("starts", "ends", "routed", "moves_to"),
    [
        ([0, 1, 3], [2, 3, 4], [0, 1, 0], (22, 3, 4)),  # the first token shares a letter with the marked one
        ([0, 1, 1, 3], [1, 3, 3, 4], [0, 1, 0, 0], None),  # two tokens of one letter: which was marked?
        ([0, 1, -1], [1, 3, -1], [0, 1, 0], (20, 0, 1)),  # the last one is special
        ([0, 1, 3], [1, 3, 4], [1, 1, 1], None),
        ([0, 1, 3], [1, 3, 3], [1, 1, 0], None),  # the last one has no characters
    ],
)
def test_a_mark_moves_only_to_a_token_that_cannot_be_mistaken(starts, ends, routed, moves_to):
    row = {
        "layer": 0,
        "expert": 0,
        "split": "validate",
        "kind": "random",
        "routed": True,
        "position": 21,
        "text": "abcd",
    }
    row |= {"char_start": 1, "char_end": 3, "token_starts": starts, "token_ends": ends, "routed_tokens": routed}
    for seed in range(5):
        items = make_items(pd.DataFrame([row]), seed=seed)
        moved = items.loc[items["negatives"] == MOVED, ["position", "char_start", "char_end"]]
        assert moved.values.tolist() == ([] if moves_to is None else [list(moves_to)])


def test_marks_move_everywhere_in_the_context(soup):
    places = [make_items(soup.exemplars, seed=seed) for seed in range(8)]
    first = pd.concat([i[i["negatives"] == MOVED].assign(seed=seed) for seed, i in enumerate(places)])
    spread = first.groupby(["layer", "expert", *CONTEXT])["char_start"].nunique()
    assert spread.mean() > 3


def test_an_experts_items_do_not_depend_on_the_other_experts(soup, items):
    alone = soup.exemplars[(soup.exemplars["layer"] == 1) & (soup.exemplars["expert"] == 2)]
    columns = ["kind", "negatives", *PLACE, "char_start", "token"]
    here = items[(items["layer"] == 1) & (items["expert"] == 2)]
    assert make_items(alone)[columns].values.tolist() == here[columns].values.tolist()
    sample = sample_items(items, 4, seed=3)
    sample = sample[(sample["layer"] == 1) & (sample["expert"] == 2)]
    assert make_items(alone)[columns].values.tolist() != make_items(alone, seed=1)[columns].values.tolist()
    assert sample_items(here, 4, seed=3)["item"].tolist() == sample["item"].tolist()
    assert sample_items(here, 4, seed=4)["item"].tolist() != sample["item"].tolist()


def test_a_sample_has_few_of_each_kind_and_negatives_that_go_with_its_positives(soup, items):
    sample = sample_items(items, 6)
    assert set(sample["item"]) < set(items["item"])
    assert sample.groupby(["layer", "expert", "negatives"]).size().max() == 6
    for _, mine in sample.groupby(["layer", "expert"]):
        positives, same = mine[mine["negatives"] == ""], mine[mine["negatives"] == "same_token"]
        assert len(positives) == 6
        assert not Counter(same["token_id"]) - Counter(positives["token_id"])
        moved = mine[mine["negatives"] == MOVED]
        assert set(map(tuple, moved[CONTEXT].values)) <= set(map(tuple, positives[CONTEXT].values))
    assert (sample["negatives"] == "same_token").sum() > 20
    pd.testing.assert_frame_equal(make_items(soup.exemplars, n_per_kind=6), sample)
    with pytest.raises(BadConfig, match="give 1 or more"):
        sample_items(items, 0)
    with pytest.raises(BadConfig, match="give 1 or more"):
        make_items(soup.exemplars, n_per_kind=0)


def labels_of(rules: dict[int, str | None], layer: int = 0) -> pd.DataFrame:
    return label_frame(
        {"layer": layer, "expert": expert, "label": f"label {expert}", "rule": rule, "labeller": "lexical"}
        for expert, rule in rules.items()
    )


RULES = {0: "a", 1: "(?<=b)[cd]", 2: "é+", 3: "b(?=.*e)", 4: "^.", 5: None}


def test_a_rule_marks_what_a_concept_with_its_expression_marks(soup, items):
    concepts = [ml.concept(f"c{expert}", regex=rule) for expert, rule in RULES.items() if rule]
    corpus = soup.tokenized.corpus
    tagged = tokenize(corpus, tiny.tokenizer(), concepts, max_length=40, add_bos=True).labels()
    answers = rule_answers(labels_of(RULES), items, soup.tokenized, progress=False)
    by_item = items.set_index("item")
    assert set(answers["expert"]) == {0, 1, 2, 3, 4}
    asked = items[(items["layer"] == 0) & (items["expert"] < 5)]
    assert sorted(answers["item"]) == sorted(asked["item"])
    for r in answers.itertuples():
        fits = tagged[soup.token(by_item.loc[r.item]), r.expert]
        assert r.score == (4 if fits else 0)
    assert set(answers["score"]) == {0, 4}
    assert answers.groupby("expert")["score"].nunique()[:4].eq(2).all()
    assert (answers[["scorer", "control", "outcome"]] == ["rule", "none", "ok"]).all(axis=None)


def test_a_rule_reads_each_document_once_and_no_further_than_its_last_item(soup, items, monkeypatch):
    asked = []

    class Counting(Tagger):
        def tag(self, document, *, until=None):
            asked.append((self.concepts[0].labeller.pattern, document.id, until))
            return super().tag(document, until=until)

    monkeypatch.setattr(rule_module, "Tagger", Counting)
    answers = rule_answers(labels_of({0: "a", 1: "a", 2: "b"}), items, soup.tokenized, progress=False)
    assert len({entry[:2] for entry in asked}) == len(asked)
    texts = {document.id: document.text for document in soup.tokenized.corpus.documents}
    assert any(until < len(texts[name]) for _, name, until in asked)
    alone = rule_answers(labels_of({1: "a"}), items, soup.tokenized, progress=False)
    assert alone["score"].tolist() == answers.loc[answers["expert"] == 1, "score"].tolist()


def test_a_bad_rule_is_named_with_its_expert(soup, items, monkeypatch):
    with pytest.raises(BadConcept, match=r"L0\.E3.*\(unclosed"):
        rule_answers(labels_of({3: "(unclosed"}), items, soup.tokenized, progress=False)
    monkeypatch.setattr(rule_module, "Tagger", partial(Tagger, timeout=1e-6))
    with pytest.raises(BadConcept, match=r"L0\.E2.*took more than"):
        rule_answers(labels_of({2: "(?:[a-e]+)+x"}), items, soup.tokenized, progress=False)


def test_labels_that_hold_no_label_are_not_asked(soup, items):
    labels = labels_of({0: "a", 1: "a"})
    labels.loc[1, "status"] = "abstained"
    assert set(rule_answers(labels, items, soup.tokenized, progress=False)["expert"]) == {0}
    none = rule_answers(labels_of({0: None}), items, soup.tokenized, progress=False)
    assert list(none.columns) == ["layer", "expert", "facet", "scorer", "control", "item", "score", "outcome"]
    assert not len(none)


def test_baselines_are_counts_of_the_select_tokens(soup, items):
    """The same rates from dictionaries, token by token."""
    t, windows = soup.tokenized, soup.kept.windows
    place = zip(*(windows.column(name).tolist() for name in ("document", "first_char", "length")), strict=True)
    read = [(t.splits[d], (d, c, p)) for d, c, n in place for p in range(n)]
    ids, eligible = windows.column("input_ids").tolist(), windows.column("eligible").tolist()
    found = Baselines.fit(soup.kept, t).scores(items, t).set_index("item")
    for layer in (0, 1):
        experts = soup.experts(layer)
        one, two, hit_one, hit_two, hits, n = Counter(), Counter(), Counter(), Counter(), Counter(), 0
        for i, (split, at) in enumerate(read):
            if split != 0 or not eligible[i]:
                continue
            n += 1
            one[ids[i]] += 1
            two[ids[i - 1], ids[i]] += 1
            for e in experts[at]:
                hits[e] += 1
                hit_one[ids[i], e] += 1
                hit_two[ids[i - 1], ids[i], e] += 1
        for r in items[items["layer"] == layer].itertuples():
            at = soup.token(r)
            previous, present, e = int(t.input_ids[at - 1]), int(t.input_ids[at]), r.expert
            base = hits[e] / n
            unigram = (hit_one[present, e] + base) / (one[present] + 1)
            bigram = (hit_two[previous, present, e] + unigram) / (two[previous, present] + 1)
            assert found.loc[r.item].tolist() == pytest.approx([unigram, bigram, base])
    assert found["bigram"].nunique() > 100


def test_a_baseline_worked_out_on_paper(soup, items):
    """Five tokens, a a b a b after x x a b a; expert 0 gets the first, second and fourth."""
    a, b, x = (tiny.tokenizer().get_vocab()[c] for c in "abx")
    ids, previous = np.array([a, a, b, a, b]), np.array([x, x, a, b, a])
    chosen = np.array([[0, 1], [0, 1], [1, 2], [0, 2], [1, 2]], np.uint8)
    table = Baselines(ids, previous, {0: chosen}, {0: 3}, strength=2.0)
    assert table.base_rate(0).tolist() == [0.6, 0.8, 0.6]
    t = soup.tokenized
    asked = items[(items["layer"] == 0) & (items["expert"] == 0)]
    at = np.array([soup.token(r) for r in asked.itertuples()])
    found = table.scores(asked, t)
    uni = {a: (3 + 2 * 0.6) / 5, b: (0 + 2 * 0.6) / 4}
    pair = {(b, a): (1 + 2 * uni[a]) / 3, (a, b): (0 + 2 * uni[b]) / 4}
    for i, place in enumerate(at):
        present, before = int(t.input_ids[place]), int(t.input_ids[place - 1])
        unigram = uni.get(present, 0.6)
        assert found["unigram"][i] == pytest.approx(unigram)
        assert found["bigram"][i] == pytest.approx(pair.get((before, present), unigram))
    assert {a, b} <= set(t.input_ids[at].tolist())


def test_a_rate_of_a_common_token_is_near_its_share_and_a_new_one_at_the_base_rate(soup, items):
    """Empty slots are nobody, and larger ids than were ever seen fall back."""
    n = 10_000
    chosen = np.where(np.arange(n)[:, None] % 4 == 0, [[1, 255]], [[0, 255]]).astype(np.uint8)
    table = Baselines(np.full(n, 2_000_000), np.full(n, 150_000), {0: chosen}, {0: N_EXPERTS})
    assert table.base_rate(0)[:3].tolist() == [0.75, 0.25, 0]
    found = table.scores(items[(items["layer"] == 0) & (items["expert"] == 1)], soup.tokenized)
    assert (found[["unigram", "bigram", "base_rate"]] == 0.25).all(axis=None)


def test_baselines_need_select_windows_of_the_same_text(soup, items):
    t = soup.tokenized
    other = tokenize(t.corpus, tiny.tokenizer(), [], max_length=30)
    with pytest.raises(BadCorpus, match="max_length"):
        Baselines.fit(soup.kept, other)
    with pytest.raises(BadCorpus, match="no window of the select split"):
        Baselines.fit(TopExemplars(t.splits), t)
    table = Baselines.fit(soup.kept, t)
    with pytest.raises(OutOfRange, match="layer 7 was not captured"):
        table.scores(items.assign(layer=7), t)
    with pytest.raises(BadCorpus, match="max_length"):
        table.scores(items, other)


def test_a_rule_for_a_token_is_scored_like_the_unigram_baseline_that_knows_it(soup, items):
    """From exemplars to scores: rules that are single characters cannot beat a coin on same_token."""
    letters = dict(enumerate("abcde1"))
    labels = labels_of(letters)
    answers = rule_answers(labels, items, soup.tokenized, progress=False)
    others = rule_answers(shuffled(labels), items, soup.tokenized, control="shuffled", progress=False)
    baselines = Baselines.fit(soup.kept, soup.tokenized).scores(items, soup.tokenized)
    frame = label_scores(items, pd.concat([answers, others]), labels, baselines, draws=50).frame
    assert len(frame) == N_EXPERTS * len(NEGATIVES) * 2
    same = frame[(frame["negatives"] == "same_token") & (frame["status"] == "ok")]
    assert len(same) >= N_EXPERTS
    assert (same[["auroc", "unigram"]] == 0.5).all(axis=None)
    assert (frame.loc[frame["negatives"] == "random", "auroc"] != 0.5).any()
    assert not frame["same_model"].any()


@given(
    words=st.lists(st.integers(0, 5), min_size=2, max_size=9),
    layers=st.integers(1, 3),
    facets=st.integers(0, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_shuffled_labels_are_a_derangement_of_each_layer(words, layers, facets, seed):
    numbers = range(1, facets + 1) if facets else [0]
    labels = label_frame(
        {
            "layer": layer,
            "expert": 3 * e,
            "facet": f,
            "label": f"w{word}",
            "rule": f"r{word}",
            "model_id": f"{layer}.{e}",
        }
        for layer in range(layers)
        for e, word in enumerate(words)
        for f in numbers
    )
    moved = shuffled(labels, seed=seed)
    assert list(moved.columns) == list(labels.columns)
    for layer in range(layers):
        before, after = (table[table["layer"] == layer] for table in (labels, moved))
        assert sorted(after["model_id"]) == sorted(before["model_id"])
        assert set(map(tuple, after[["expert", "facet"]].values)) == set(map(tuple, before[["expert", "facet"]].values))
        came = after["model_id"].str.split(".", expand=True).astype(int)
        assert (came[0] == layer).all()
        assert (3 * came[1] != after["expert"]).all()
        assert (after["label"].str[1:] == after["rule"].str[1:]).all()
        own = {3 * e: f"w{word}" for e, word in enumerate(words)}
        if 2 * max(Counter(words).values()) <= len(words):
            assert (after["label"] != after["expert"].map(own)).all()


def test_shuffling_needs_two_experts_and_is_a_matter_of_the_layer_and_the_seed():
    labels = pd.concat([labels_of(dict.fromkeys(range(12), "a"), layer=layer) for layer in (0, 2)])
    labels["label"] = [f"label {i}" for i in range(24)]
    labels = pd.concat([labels, labels_of({4: "a"}, layer=1)], ignore_index=True)
    moved = shuffled(labels)
    assert set(moved["layer"]) == {0, 2}
    alone = shuffled(labels[labels["layer"] == 2])
    assert moved.loc[moved["layer"] == 2, "label"].tolist() == alone["label"].tolist()
    assert moved["label"].tolist() != shuffled(labels, seed=1)["label"].tolist()
    labels.loc[labels["layer"] == 0, "status"] = "abstained"
    assert set(shuffled(labels)["layer"]) == {2}
    assert not len(shuffled(labels[:0]))

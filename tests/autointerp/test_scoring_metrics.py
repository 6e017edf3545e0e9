"""Scores of labels against hand-computed tables, scikit-learn, and what must not change them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from moe_lens.autointerp.scoring.items import NEGATIVES
from moe_lens.autointerp.scoring.metrics import (
    SCORE_COLUMNS,
    SUMMARY_COLUMNS,
    binary_scores,
    label_scores,
    summary,
)
from moe_lens.autointerp.scoring.resampled import weighted_auroc
from moe_lens.errors import BadConfig
from tests.autointerp.scoring_tables import Tables, drawn, tables

seeds = st.integers(0, 10_000)
NUMBERS = [
    "balanced_accuracy", "auroc", "f1", "f1_always_yes", "ci_low", "ci_high", "unigram", "bigram", "margin_unigram",
    "margin_unigram_low", "margin_unigram_high", "margin_bigram", "margin_bigram_low", "margin_bigram_high",
]  # fmt: skip


def by_hand() -> Tables:
    """Six positives and five random negatives, one of each without an answer, in documents 0 to 5."""
    positives = [(4, 0.9, 0), (4, 0.5, 1), (3, 0.5, 2), (2, 0.1, 3), (0, 0.1, 4), (np.nan, 0.9, 5)]
    negatives = [(4, 0.5, 0), (2, 0.5, 0), (1, 0.1, 1), (1, 0.1, 2), (0, 0.1, 3), (np.nan, 0.9, 4)]
    rows = [
        {"negatives": kind, "score": score, "unigram": unigram, "bigram": score, "document": document, "base_rate": 0.1}
        for kind, side in (("", positives), ("random", negatives))
        for score, unigram, document in side
    ]
    return tables(rows)


def test_every_column_of_a_table_worked_out_on_paper():
    row = by_hand().score().frame.iloc[0]
    assert (row.n_pos, row.n_neg, row.n_abstain, row.n_documents) == (5, 5, 2, 5)
    # of the 25 pairs, 4: 4.5 won, 4: 4.5, 3: 4, 2: 3.5, 0: 0.5
    assert row.auroc == pytest.approx(17 / 25)
    # yes to 3 positives (4, 4, 3) and to 1 negative (4)
    assert row.balanced_accuracy == pytest.approx((3 / 5 + 4 / 5) / 2)
    assert row.f1 == pytest.approx(6 / 9)
    assert row.f1_always_yes == pytest.approx(10 / 15)
    assert row.coverage == pytest.approx(3 / 5)
    assert row.purity == pytest.approx(0.1 * 0.6 / (0.1 * 0.6 + 0.9 * 0.2))
    # unigram .9: 5 won, .5: 1 + 3, twice, .1: 1.5, twice
    assert row.unigram == pytest.approx((5 + 4 + 4 + 1.5 + 1.5) / 25)
    assert row.margin_unigram == pytest.approx(1 / 25)
    assert row.bigram == row.auroc
    assert (row.margin_bigram, row.margin_bigram_low, row.margin_bigram_high) == (0, 0, 0)
    assert row.ci_low < row.auroc < row.ci_high
    assert (row.labeller, row.scorer, row.negatives, row.control) == ("openai:m", "detection", "random", "none")
    assert (row.status, row.facet, row.same_model) == ("ok", 0, False)


def test_a_grade_of_2_does_not_say_that_the_label_fits():
    either = by_hand()
    frame = either.answered(score=either.answers["score"].replace({2: 3})).score().frame
    assert either.score().frame["coverage"].item() == pytest.approx(3 / 5)
    assert frame["coverage"].item() == pytest.approx(4 / 5)


@given(seed=seeds)
@settings(max_examples=6, deadline=None)
def test_scores_equal_scikit_learn(seed):
    t = drawn(seed)
    frame = t.score(draws=3).frame
    rows = t.answers.merge(t.items, on=["layer", "expert", "item"]).merge(t.baselines, on="item")
    for r in frame[frame["negatives"] != "same_token"].itertuples():
        mine = rows[(rows["expert"] == r.expert) & rows["negatives"].isin(("", r.negatives))]
        truth, yes = mine["negatives"] == "", mine["score"] >= 3
        for name in ("auroc", "unigram", "bigram"):
            score = mine["score" if name == "auroc" else name]
            assert getattr(r, name) == pytest.approx(metrics.roc_auc_score(truth, score), abs=1e-12)
        assert r.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(truth, yes))
        assert r.f1 == pytest.approx(metrics.f1_score(truth, yes))
        assert r.f1_always_yes == pytest.approx(metrics.f1_score(truth, np.ones(len(truth))))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_draw_is_scikit_learns_auroc_with_items_weighted_by_document(seed):
    r = np.random.default_rng(seed)
    pos, neg = r.integers(0, 5, (7, 1)) * 1.0, r.integers(0, 5, (9, 1)) * 1.0
    weight = r.integers(0, 3, (16, 4)).astype(np.float32)
    found = weighted_auroc(pos, neg, weight[:7], weight[7:])[0]
    truth, score = np.arange(16) < 7, np.concatenate([pos, neg])[:, 0]
    for draw in range(4):
        w = weight[:, draw]
        if w[:7].any() and w[7:].any():
            assert found[draw] == pytest.approx(metrics.roc_auc_score(truth, score, sample_weight=w), abs=1e-12)
        else:
            assert np.isnan(found[draw])


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_no_function_of_the_token_id_beats_a_coin_on_same_token(seed):
    t = drawn(seed)
    grades = np.random.default_rng(seed).integers(0, 5, 6)[t.items["token_id"]]
    missing = np.random.default_rng(seed).random(len(grades)) < 0.1
    frame = t.answered(score=np.where(missing, np.nan, grades)).score(draws=3, seed=seed).frame
    same = frame[(frame["negatives"] == "same_token") & (frame["status"] == "ok")]
    assert len(same)
    assert (same["auroc"] == 0.5).all()
    assert (same["n_pos"] == same["n_neg"]).all()
    others = frame[frame["negatives"] == "random"]
    assert (others["auroc"] != 0.5).any()
    judged = t.items[~missing]
    for r in same.itertuples():
        mine = judged[judged["expert"] == r.expert]
        counts = [mine[mine["negatives"] == kind]["token_id"].value_counts() for kind in ("", "same_token")]
        assert r.n_pos == pd.concat(counts, axis=1).min(axis=1, skipna=False).sum()


def test_perfect_constant_and_inverted_judges():
    t = drawn(1)
    positive = t.items["negatives"] == ""
    perfect = t.answered(score=np.where(positive, 4.0, 0.0)).score().frame
    assert (perfect[["auroc", "f1", "balanced_accuracy", "ci_low", "ci_high"]] == 1).all(axis=None)
    assert (perfect.loc[perfect["negatives"] == "random", ["coverage", "purity"]] == 1).all(axis=None)
    constant = t.answered(score=4.0).score().frame
    assert (constant[["auroc", "balanced_accuracy", "ci_low", "ci_high"]] == 0.5).all(axis=None)
    assert (constant["f1"] == constant["f1_always_yes"]).all()
    random = constant[constant["negatives"] == "random"]
    assert random["purity"].to_numpy() == pytest.approx(0.25)  # the base rate
    mine, inverted = t.score().frame, t.answered(score=4 - t.answers["score"]).score().frame
    assert inverted["auroc"].to_numpy() == pytest.approx(1 - mine["auroc"].to_numpy())
    assert inverted["ci_low"].to_numpy() == pytest.approx(1 - mine["ci_high"].to_numpy(), abs=1e-6)


def test_only_the_order_of_scores_matters_to_auroc():
    t = drawn(2)
    a, b = t.score().frame, t.answered(score=np.exp(t.answers["score"]) - 9).score().frame
    pd.testing.assert_frame_equal(a[["auroc", "ci_low", "ci_high"]], b[["auroc", "ci_low", "ci_high"]])


def test_order_of_rows_and_other_experts_change_no_score():
    t = drawn(3)
    shuffled = Tables(*(table.sample(frac=1, random_state=1) for table in (t.items, t.answers, t.labels, t.baselines)))
    pd.testing.assert_frame_equal(shuffled.score().frame, t.score().frame)
    alone = Tables(t.items, t.answers[t.answers["expert"] == 1], t.labels, t.baselines).score().frame
    counts = [name for name in SCORE_COLUMNS if name.startswith("n_")]
    exact = [*counts, "auroc", "f1", "balanced_accuracy", "unigram", "bigram", "coverage", "purity"]
    together = t.score().frame
    together = together[together["expert"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone[exact], together[exact])


def test_more_tokens_of_the_same_documents_make_no_interval_narrower():
    t = drawn(4)
    n = len(t.items)
    columns = t.items.merge(t.answers[["item", "score"]], on="item").merge(t.baselines, on="item")
    again = columns.assign(token_id=columns["token_id"] + 100)
    twice = tables(pd.concat([columns, again], ignore_index=True))
    a, b = t.score().frame, twice.score().frame
    unmatched = a["negatives"] != "same_token"
    pd.testing.assert_frame_equal(a.loc[unmatched, NUMBERS], b.loc[unmatched, NUMBERS])
    # as documents of their own they would
    columns["document"] = np.arange(n)
    again["document"] = n + np.arange(n)
    apart = tables(pd.concat([columns, again], ignore_index=True)).score().frame
    width = [(frame["ci_high"] - frame["ci_low"])[unmatched].mean() for frame in (apart, a)]
    assert width[0] < 0.85 * width[1]


def test_draws_of_documents_are_the_same_for_every_expert():
    t = drawn(5, n_experts=2)
    first = t.answers[t.answers["expert"] == 0]
    copied = t.answers.assign(score=np.tile(first["score"], 2))
    items, baselines = t.items.copy(), t.baselines.copy()
    for name in ("document", "token_id"):
        items[name] = np.tile(items[name][: len(first)], 2)
    for name in ("unigram", "bigram"):
        baselines[name] = np.tile(baselines[name][: len(first)], 2)
    scores = Tables(items, copied, t.labels, baselines).score()
    frame = scores.frame[scores.frame["negatives"] != "same_token"]  # there, chance decides what is left out
    one, two = (frame.loc[frame["expert"] == e, NUMBERS].reset_index(drop=True) for e in (0, 1))
    pd.testing.assert_frame_equal(one, two)
    means = summary(scores).set_index("negatives").loc[frame["negatives"].unique()]
    intervals = ["ci_low", "ci_high", "margin_bigram_low", "margin_bigram_high"]
    assert means[intervals].to_numpy() == pytest.approx(one[intervals].to_numpy())


def test_a_label_that_is_its_baseline_has_no_margin_and_no_doubt_about_it():
    t = drawn(6)
    frame = t.answered(score=t.baselines["unigram"].to_numpy()).score().frame
    margin = frame[["margin_unigram", "margin_unigram_low", "margin_unigram_high"]]
    assert (margin == 0).all(axis=None)
    assert (frame["margin_bigram_low"] < frame["margin_bigram"]).all()
    assert (frame["margin_bigram_high"] > frame["margin_bigram"]).all()


def test_items_without_an_answer_are_counted_and_not_scored():
    t = drawn(7)
    missing = np.random.default_rng(0).random(len(t.answers)) < 0.2
    frame = t.answered(score=t.answers["score"].where(~missing)).score().frame
    without = Tables(t.items, t.answers[~missing], t.labels, t.baselines).score().frame
    numbers = [*NUMBERS, "n_pos", "n_neg", "coverage", "purity", "n_documents"]
    # the documents that are drawn are those of all items asked about
    points = [name for name in numbers if not name.endswith(("low", "high"))]
    pd.testing.assert_frame_equal(frame[points], without[points])
    assert (without["n_abstain"] == 0).all()
    kind = t.items["negatives"].to_numpy()
    for r in frame.itertuples():
        mine = (t.items["expert"] == r.expert).to_numpy() & np.isin(kind, ("", r.negatives))
        assert r.n_abstain == (missing & mine).sum()


@pytest.mark.parametrize(
    ("n_pos", "n_neg", "documents", "status"),
    [(5, 5, 3, "ok"), (4, 9, 9, "too_few"), (9, 4, 9, "too_few"), (9, 9, 2, "too_few"), (5, 0, 5, "too_few")],
)
def test_too_few_items_or_documents_have_counts_and_no_number(n_pos, n_neg, documents, status):
    sides = [("", n_pos), ("other", n_neg)]
    rows = [
        {"expert": 0, "negatives": k, "document": i % documents, "score": i % 5} for k, n in sides for i in range(n)
    ]
    rows += [{"expert": 1, "negatives": kind, "document": i, "score": 1} for kind in ("", "other") for i in range(5)]
    frame = tables(rows).score().frame
    row = frame[frame["expert"] == 0].iloc[0]
    assert (row["n_pos"], row["n_neg"], row["status"]) == (n_pos, n_neg, status)
    assert row["n_documents"] == len({i % documents for _, n in sides for i in range(n)})
    assert row[NUMBERS].isna().all() == (status == "too_few")


def test_a_side_from_two_documents_is_too_few_whatever_the_other_side_has():
    rows = [{"negatives": kind, "document": i % n} for kind, n in (("", 2), ("random", 8)) for i in range(8)]
    assert tables(rows).score().frame["status"].tolist() == ["too_few"]


def test_a_kind_that_nobody_was_asked_about_has_no_row():
    t = drawn(8)
    moved = t.items["negatives"].isin(("", "moved")).to_numpy()
    fuzz = Tables(t.items, t.answers[moved].assign(scorer="fuzz"), t.labels, t.baselines).score().frame
    assert set(fuzz["negatives"]) == {"moved"}
    assert fuzz["coverage"].isna().all()
    few = t.items["negatives"].isin(("", "same_token", "random")).to_numpy()
    both = pd.concat([t.answers, t.answers[few].assign(control="shuffled")])
    frame = label_scores(t.items, both, t.labels, t.baselines).frame
    assert set(frame.loc[frame["control"] == "shuffled", "negatives"]) == {"same_token", "random"}
    assert set(frame.loc[frame["control"] == "none", "negatives"]) == set(NEGATIVES)


def test_similarities_are_ranked_and_never_cut():
    t = drawn(9)
    graded = t.score().frame
    frame = t.answered(scorer="embedding", score=t.answers["score"] / 7 - 0.2).score().frame
    assert frame[["balanced_accuracy", "f1", "f1_always_yes", "coverage", "purity"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(frame[["auroc", "ci_low", "ci_high"]], graded[["auroc", "ci_low", "ci_high"]])


def test_the_table_says_when_a_model_judges_its_own_label():
    t = drawn(10).and_answered(scorer="fuzz")
    frame = t.score({"detection": "m", "fuzz": "another"}).frame
    assert set(frame.loc[frame["same_model"], "scorer"]) == {"detection"}
    assert set(frame["scorer_model"]) == {"m", "another"}
    lexical = Tables(t.items, t.answers, t.labels.assign(model_id=""), t.baselines)
    assert not lexical.score().frame["same_model"].any()  # no model at all is not the same model


def test_the_summary_averages_experts_and_pairs_the_control():
    t = drawn(11)
    constant = t.and_answered(control="shuffled", score=1.0).score()
    means = summary(constant).set_index(["negatives", "control"])
    assert list(summary(constant).columns) == list(SUMMARY_COLUMNS)
    frame = constant.frame
    for (negatives, control), row in means.iterrows():
        mine = frame[(frame["negatives"] == negatives) & (frame["control"] == control)]
        for name in ("auroc", "unigram", "bigram", "margin_unigram", "margin_bigram"):
            assert row[name] == pytest.approx(mine[name].mean())
        assert row["n_experts"] == 3
        assert row["n_above_bigram"] == (mine["margin_bigram_low"] > 0).sum()
        assert row["n_above_unigram"] == (mine["margin_unigram_low"] > 0).sum()
        if control == "none":
            assert row["over_shuffled"] == pytest.approx(row["auroc"] - 0.5)
            assert row["over_shuffled_low"] == pytest.approx(row["ci_low"] - 0.5)
            assert row["ci_high"] - row["ci_low"] < (mine["ci_high"] - mine["ci_low"]).mean()
        else:
            assert np.isnan(row["over_shuffled"])
    equal = summary(t.and_answered(control="shuffled").score())
    real = equal[equal["control"] == "none"]
    assert (real[["over_shuffled", "over_shuffled_low", "over_shuffled_high"]] == 0).all(axis=None)
    assert summary(t.score())["over_shuffled"].isna().all()


def test_the_difference_from_shuffled_is_over_experts_that_have_both():
    t = drawn(12)
    of_0 = t.answers[t.answers["expert"] == 0]
    answers = pd.concat([t.answers, of_0.assign(control="shuffled", score=1.0)])
    scores = label_scores(t.items, answers, t.labels, t.baselines)
    real = scores.frame[(scores.frame["expert"] == 0) & (scores.frame["control"] == "none")].set_index("negatives")
    means = summary(scores)
    means = means[means["control"] == "none"].set_index("negatives")
    assert means["over_shuffled"].to_dict() == pytest.approx((real["auroc"] - 0.5).to_dict())


def test_the_summary_counts_experts_once_and_leaves_out_those_without_a_score():
    t = drawn(13)
    positive = (t.items["negatives"] == "").to_numpy()
    score = np.where(positive, 4.0, 0.0)
    gone = (t.items["expert"] == 2).to_numpy() & positive
    answers = t.answers.assign(score=np.where(gone, np.nan, score))
    facets = pd.concat([answers.assign(facet=1), answers.assign(facet=2)])
    means = summary(label_scores(t.items, facets, t.labels, t.baselines)).set_index("negatives").loc["random"]
    assert means["n_experts"] == means["n_above_unigram"] == 2
    assert means["auroc"] == 1
    assert means["n_abstained"] == 2 * 15


def test_answers_that_cannot_be_placed_are_refused():
    t = drawn(14)
    with pytest.raises(BadConfig, match="two answers"):
        t.and_answered(score=0.0).score()
    with pytest.raises(BadConfig, match="90 answers"):
        Tables(t.items, t.answers, t.labels[t.labels["expert"] > 0], t.baselines).score()
    with pytest.raises(BadConfig, match="5 answers"):
        Tables(t.items[5:], t.answers, t.labels, t.baselines).score()


def test_nothing_judged_is_an_empty_table():
    t = drawn(15)
    scores = Tables(t.items, t.answers[:0], t.labels, t.baselines).score()
    assert list(scores.frame.columns) == list(SCORE_COLUMNS)
    assert not len(scores.frame)
    assert list(summary(scores).columns) == list(SUMMARY_COLUMNS)
    silent = t.answered(score=np.nan).score()
    assert set(silent.frame["status"]) == {"too_few"}
    assert silent.frame["n_abstain"].sum() == 3 * 5 * 30
    assert summary(silent)["auroc"].isna().all()


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_binary_scores_equal_scikit_learn(seed):
    r = np.random.default_rng(seed)
    truth, answer, used = (r.random((20, 4)) < p for p in (0.5, 0.6, 0.8))
    truth[:2], answer[:2], used[:2] = [[True], [False]], True, True
    found = binary_scores(truth, answer, used)
    for j in range(4):
        t, a = truth[used[:, j], j], answer[used[:, j], j]
        row = found.iloc[j]
        assert row["f1"] == pytest.approx(metrics.f1_score(t, a))
        assert row["precision"] == pytest.approx(metrics.precision_score(t, a))
        assert row["recall"] == pytest.approx(metrics.recall_score(t, a))
        assert row["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(t, a))
        assert row["f1_always_yes"] == pytest.approx(metrics.f1_score(t, np.ones(len(t))))
        assert (row["n_pos"], row["n_neg"]) == (t.sum(), (~t).sum())

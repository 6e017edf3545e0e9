"""The arms with equal candidates: the same cells, neurons and tokens on both sides, and what follows from that."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

import moe_lens as ml
from moe_lens.corpus.batches import tokenize
from moe_lens.errors import BadConfig, MemoryLimit
from moe_lens.probing.arms.base import METRICS, f1_of_counts
from moe_lens.probing.equal import CHOICES
from moe_lens.probing.equal.pairing import draw_pairs, layer_pairs
from moe_lens.probing.equal.rows import ARMS, RANDOM, ROUTER, Matched, TwoModels
from moe_lens.probing.scan import scan
from moe_lens.types import Role, Split
from tests.models import tiny
from tests.probing.conftest import soup
from tests.probing.equal_runs import CONCEPTS, MEAN, SETTINGS, mean_row, parts, run, table
from tests.probing.fake_lens import FakeLens, neurons


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return ml.corpus(str(soup(tmp_path_factory.mktemp("soup") / "soup.jsonl", n_documents=160)))


@pytest.fixture(scope="module")
def tokens(text):
    return tokenize(text, tiny.tokenizer(), CONCEPTS, max_length=64)


def pair_tokenizer():
    """Bytes, but two neighbouring digits are one token."""
    digits = "0123456789"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, *(a + b for a in digits for b in digits)])}
    core = Tokenizer(BPE(vocab=vocab, merges=[(a, b) for a in digits for b in digits]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<pad>", "<s>"])
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>")


def wide(scores):
    """MoE and dense side by side."""
    at = ["arm", "draw", "concept", "k", "choice", "metric"]
    return scores.frame.set_index([*at, "role"]).unstack("role")


# ---- the real objects


@pytest.fixture(scope="module")
def real(moe, dense, tokens):
    return run(moe, dense, tokens)


def test_both_sides_have_the_same_cells_neurons_and_rows(real):
    frame = wide(real)
    scored = frame["entry"]["moe"] >= 0
    assert scored.mean() > 0.3
    assert (scored == (frame["entry"]["dense"] >= 0)).all()
    for column in ("n_cells", "n_neurons"):
        assert (frame[column]["moe"] == frame[column]["dense"]).all(), column
    assert (frame["n_neurons"]["moe"] == 24 * frame["n_cells"]["moe"]).all()
    assert frame["n_cells"]["moe"].max() == 4, "two layers, two blocks of 24 of the 48 dense neurons"
    chosen = real.chosen("validate")
    assert set(chosen[chosen.role == "dense"].block) == {0, 1}


def assert_equal_samples(models, split, draws=2):
    """Equal counts of each class in both samples of every pair, with the labels of their own tokens."""
    moe, dense = models.moe, models.dense
    group = layer_pairs(moe.spec, dense.spec, moe_layers=moe.layers, dense_layers=dense.layers)
    rows = Matched(models, split, group)
    seen = 0
    for pair in [p for two in group for p in draw_pairs(*two, rows.load(two[0]), draws=draws, seed=0)]:
        for arm in ARMS:
            found = rows.samples(arm, pair, models.possible)
            if found is None:
                continue
            a, b = found
            seen += len(a.concepts)
            assert (a.concepts == b.concepts).all()
            assert (a.n == b.n).all()
            assert (a.n_pos == b.n_pos).all()
            for sample, side, at in ((a, rows.moe, (pair.layer, pair.expert)), (b, rows.dense, (pair.dense_layer, 0))):
                token = side.token(*at)[sample.row]
                label = side.tokens.labels[token, torch.from_numpy(sample.concepts)[:, None]]
                assert (label == sample.positive)[sample.used].all()
                assert (side.tokens.document[token] == sample.document)[sample.used].all()
                assert all(len(set(t[u].tolist())) == u.sum() for t, u in zip(token, sample.used, strict=True))
    assert seen > 10


@pytest.mark.parametrize("split", list(Split))
def test_every_pair_has_equal_positives_and_negatives(moe, dense, tokens, split):
    assert_equal_samples(TwoModels(moe, dense, tokens, tokens, SETTINGS, 0, False), split)


def test_router_tokens_are_exactly_the_partners_with_one_tokenizer(moe, dense, tokens):
    models = TwoModels(moe, dense, tokens, tokens, SETTINGS, 0, False)
    group = layer_pairs(moe.spec, dense.spec, moe_layers=moe.layers, dense_layers=dense.layers)
    rows = Matched(models, Split.SELECT, group)
    for pair in draw_pairs(*group[1], rows.load(group[1][0]), draws=2, seed=0):
        routed, given = rows.visits(ROUTER, pair)
        assert 0 < len(routed.token) < len(rows.dense.token(0, 0))
        assert set(routed.token.tolist()) == set(given.token.tolist()) == set(rows.moe.token(1, pair.expert).tolist())
        a, b = rows.samples(ROUTER, pair, models.possible)
        for c in range(len(a.concepts)):
            taken = [side.token(*at)[s.row[c][s.used[c]]] for side, at, s in
                     ((rows.moe, (1, pair.expert), a), (rows.dense, (pair.dense_layer, 0), b))]  # fmt: skip
            assert sorted(taken[0].tolist()) == sorted(taken[1].tolist())
        _, anywhere = rows.visits(RANDOM, pair)
        assert len(anywhere.token) == len(rows.dense.token(0, 0))


def test_router_tokens_across_tokenizers_follow_the_characters(text, tokens):
    moe = FakeLens(neurons(1, 4, 8, 6, signal=1.0, seed=0), name="moe")
    dense = FakeLens(neurons(1, 1, 8, 12, signal=1.0, seed=1), name="dense")
    other = tokenize(text, pair_tokenizer(), CONCEPTS, max_length=64)
    assert other.n_tokens < tokens.n_tokens
    models = TwoModels(moe, dense, tokens, other, SETTINGS, 0, False)
    rows = Matched(models, Split.SELECT, [(moe.spec.layers[0], dense.spec.layers[0])])
    (pair, *_) = draw_pairs(moe.spec.layers[0], dense.spec.layers[0], np.ones(4), draws=1, seed=0)
    routed, given = rows.visits(ROUTER, pair)
    a, b = rows.moe.tokens, rows.dense.tokens
    characters = {(int(a.document[t]), int(c)) for t in routed.token for c in range(a.char_start[t], a.char_end[t])}
    want = []
    for t in rows.dense.token(0, 0).tolist():
        mine = [(int(b.document[t]), c) in characters for c in range(int(b.char_start[t]), int(b.char_end[t]))]
        if 2 * sum(mine) > len(mine):
            want.append(t)
    assert sorted(given.token.tolist()) == sorted(want)
    assert len(want) != len(routed.token)
    assert_equal_samples(models, Split.SELECT, draws=1)
    assert (run(moe, dense, tokens, other).frame.entry >= 0).any()


def test_documents_that_a_chat_template_writes_otherwise_give_no_router_tokens(text, tokens):
    moe = FakeLens(neurons(1, 4, 8, 6, signal=1.0, seed=0), name="moe")
    dense = FakeLens(neurons(1, 1, 8, 12, signal=1.0, seed=1), name="dense")
    documents = [replace(d, text=f"<user>{d.text}") if i % 2 else d for i, d in enumerate(text.documents)]
    other = replace(tokens, corpus=replace(text, documents=tuple(documents)))
    rows = Matched(TwoModels(moe, dense, tokens, other, SETTINGS, 0, False), Split.TEST,
                   [(moe.spec.layers[0], dense.spec.layers[0])])  # fmt: skip
    (pair, *_) = draw_pairs(moe.spec.layers[0], dense.spec.layers[0], np.ones(4), draws=1, seed=0)
    for side in rows.visits(ROUTER, pair):
        assert len(side.document)
        assert not (side.document % 2).any()
    assert all((side.document % 2).any() for side in rows.visits(RANDOM, pair))


def test_swapping_the_models_flips_the_sign(moe, dense, tokens, real):
    there, back = table(real), table(run(dense, moe, tokens))
    assert len(there) > 20
    np.testing.assert_allclose(there.gap, -back.gap)
    np.testing.assert_allclose(there.ci_low, -back.ci_high)
    np.testing.assert_allclose(there.moe, back.dense)


def test_a_dense_model_against_itself_has_no_gap(dense, tokens):
    scores = run(dense, dense, tokens, k=(1, 4))
    for choice in CHOICES:
        rows = table(scores, choice)
        assert set(rows.arm) == set(ARMS)
        assert (rows.gap.abs() < 1e-12).all()
        assert ((rows.ci_low <= 1e-12) & (rows.ci_high >= -1e-12)).all()


def test_layer_groups_choose_the_same_cells_as_one_pass(moe, dense, tokens, real, monkeypatch):
    import moe_lens.probing.equal.run as module

    monkeypatch.setattr(module, "_groups", lambda _models, pairs, _limit: [[pair] for pair in pairs])
    two = run(moe, dense, tokens)
    assert (two.n_passes, real.n_passes) == (2, 1)
    columns = [c for c in real.frame if c not in ("entry", "neurons", "sign")]
    np.testing.assert_array_equal(two.frame[columns].to_numpy(str), real.frame[columns].to_numpy(str))


def test_counts_give_back_the_reported_scores(real):
    counts = real.counts.astype(float).sum(1)
    frame = real.frame[real.frame.entry >= 0].set_index("metric")
    for metric in METRICS:
        here = frame.loc[metric]
        tp, fp, fn, tn, up, down = counts[here.entry].T
        np.testing.assert_allclose(here.n_test.astype(int), tp + fp + fn + tn)
        if metric == "auroc":
            np.testing.assert_allclose(here.value, up / (tp + fn), rtol=1e-5)
            np.testing.assert_allclose(here.value, down / (fp + tn), rtol=1e-5)
        else:
            np.testing.assert_allclose(here.value, f1_of_counts(counts[here.entry], metric))


def test_probes_equal_those_of_scikit_learn(moe, dense, tokens):
    from sklearn.linear_model import LogisticRegression

    from moe_lens.probing.equal.probes import fit_cell

    models = TwoModels(moe, dense, tokens, tokens, SETTINGS, 0, False)
    group = layer_pairs(moe.spec, dense.spec, moe_layers=moe.layers, dense_layers=dense.layers)
    rows = Matched(models, Split.SELECT, group)
    (pair, *_) = draw_pairs(*group[0], rows.load(group[0][0]), draws=1, seed=0)
    _, sample = rows.samples(RANDOM, pair, models.possible)
    h = rows.dense.activation(pair.dense_layer, 0)
    found = fit_cell(h, pair.dense_neurons, sample, [1, 4], rank="standardised")
    for c in range(2):
        y = sample.positive[c][sample.used[c]].numpy()
        every = h[sample.row[c][sample.used[c]]][:, pair.dense_neurons].double().numpy()
        gap = np.abs(every[y].mean(0) - every[~y].mean(0))
        best = pair.dense_neurons[np.argmax(gap / np.sqrt((every[y].var(0) + every[~y].var(0)) / 2))]
        assert found[1].neurons[c, 0] == best
        x = h[sample.row[c][sample.used[c]]][:, found[4].neurons[c]].double().numpy()
        sd = x.std(0)
        model = LogisticRegression(class_weight="balanced", solver="newton-cholesky", tol=1e-10)
        model.fit((x - x.mean(0)) / sd, y)
        np.testing.assert_allclose(found[4].coef[c], model.coef_[0] / sd, atol=1e-5)


# ---- known answers and metamorphic tests on neurons made to order


def test_with_equal_neurons_there_is_no_gap_although_the_moe_has_more_cells(tokens):
    moe = FakeLens(neurons(2, 12, 8, 8, signal=0.3, seed=0), name="moe")
    dense = FakeLens(neurons(2, 1, 8, 16, signal=0.3, seed=1), name="dense")
    rows = table(run(moe, dense, tokens, draws=12, k=(1,)))
    for arm in ARMS:
        row = mean_row(rows, arm)
        assert row.n_cells_moe == row.n_cells_dense > 2
        assert row.n_neurons_moe == row.n_neurons_dense
        assert row.ci_low < 0 < row.ci_high, arm
    best = []
    for lens, role in ((moe, Role.MOE), (dense, Role.DENSE)):
        cells = scan(lens, tokens, SETTINGS, layers=lens.spec.layers, role=role, progress=False).scores.cells
        best.append(cells[cells.k == 1].groupby("concept").auroc.max().mean())
    assert best[0] - best[1] > max(mean_row(rows, arm).ci_high for arm in ARMS), "raw does show a gap"


def test_better_neurons_show(tokens):
    moe = FakeLens(neurons(2, 4, 8, 8, signal=1.0, seed=0), name="moe")
    dense = FakeLens(neurons(2, 1, 8, 16, signal=0.2, seed=1), name="dense")
    rows = table(run(moe, dense, tokens))
    for arm in ARMS:
        assert mean_row(rows, arm).ci_low > 0.02


def test_copying_the_experts_changes_nothing_in_expectation(tokens):
    weights = neurons(2, 4, 8, 8, signal=0.6, seed=0)
    dense = FakeLens(neurons(2, 1, 8, 16, signal=0.4, seed=1), name="dense")
    one, two = (table(run(FakeLens(weights, copies=n), dense, tokens, draws=8, k=(1,))) for n in (1, 2))
    for arm in ARMS:
        a, b = mean_row(one, arm), mean_row(two, arm)
        assert a.n_cells_moe == b.n_cells_moe
        assert max(a.ci_low, b.ci_low) < min(a.ci_high, b.ci_high)
        assert abs(a.gap - b.gap) < 0.03


def test_labels_of_other_documents_bring_both_arms_to_chance(tokens):
    moe = FakeLens(neurons(2, 4, 8, 8, signal=1.0, seed=0), name="moe")
    dense = FakeLens(neurons(2, 1, 8, 16, signal=1.0, seed=1), name="dense")
    shifted = replace(tokens, packed_labels=np.roll(tokens.packed_labels, len(tokens.packed_labels) // 3, axis=0))
    moe.reads = dense.reads = tokens  # activations follow the true labels
    rows = table(run(moe, dense, shifted, draws=6, k=(1,)))
    for arm in ARMS:
        row = mean_row(rows, arm)
        assert row.ci_low < 0 < row.ci_high
        assert abs(row.moe - 0.5) < 0.03
        assert abs(row.dense - 0.5) < 0.03


def test_one_more_planted_neuron_moves_the_concept_it_serves_and_no_other(tokens):
    weights = neurons(2, 4, 8, 8, signal=0.3, seed=0)
    dense = FakeLens(neurons(2, 1, 8, 16, signal=0.3, seed=1), name="dense")
    planted = weights.clone()
    planted[:, :, :, 0] = 0
    planted[:, :, 3, 0] = 3.0
    silent = weights.clone()
    silent[:, :, :, 0] = 0
    before, after = (
        table(run(FakeLens(w, name="moe"), dense, tokens, k=(1,)))
        .query("metric == 'auroc'")
        .set_index(["arm", "concept"])
        for w in (silent, planted)
    )
    for arm in ARMS:
        moved = (after.gap - before.gap)[arm].drop(MEAN)
        assert moved["c3"] > 0.3
        assert after.moe[arm, "c3"] == 1.0
        assert moved.drop("c3").abs().max() < 0.05


# ---- refusals


def test_what_cannot_be_compared_is_refused(moe, dense, tokens):
    with pytest.raises(BadConfig, match="dense baseline"):
        run(moe, moe, tokens)
    with pytest.raises(BadConfig, match="1 to 24"):
        run(moe, dense, tokens, k=(1, 25))
    with pytest.raises(BadConfig, match="draws"):
        run(moe, dense, tokens, draws=0)
    with pytest.raises(MemoryLimit, match="raise --max-memory"):
        run(moe, dense, tokens, max_memory=1_000_000)


def test_a_corpus_that_is_too_small_says_so(moe, dense, text):
    few = tokenize(text, tiny.tokenizer(), CONCEPTS, max_length=64, documents=range(12))
    scores = run(moe, dense, few)
    assert set(scores.frame.status) == {"too_few"}
    assert (scores.frame.n_cells == 0).all()
    assert scores.frame.value.isna().all()
    assert parts(scores, np.ones((2, len(scores.documents)))) == {}


def test_layers_of_the_lens_can_be_chosen(moe, dense, tokens):
    assert set(run(moe, dense, tokens, layers=[1], k=(1,)).chosen("validate").layer) == {1}

"""AUROC of every neuron by ranks and one product; its spread over documents."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

import moe_lens.probing.polysemanticity.auroc as module
from moe_lens.probing.equal.pairing import Sample
from moe_lens.probing.polysemanticity import neuron_aurocs
from moe_lens.probing.polysemanticity.auroc import centred_ranks, clustered_aurocs, t_tail
from moe_lens.stats import auroc_null_se
from tests.probing.simulate import simulate


def tied_data(n=300, neurons=7, concepts=5, seed=0):
    """Activations in few distinct values, some of them 0 and -0.0, and labels that some neurons know."""
    r = np.random.default_rng(seed)
    y = r.random((n, concepts)) < 0.3
    h = np.round(r.standard_normal((n, neurons)) + y[:, :1] * np.linspace(-1, 1, neurons), 1).clip(-1)
    h[:, -1] = np.where(r.random(n) < 0.5, 0.0, -0.0)
    return torch.from_numpy(h).float(), torch.from_numpy(y)


def by_sklearn(h, y, used):
    return np.array([
        [roc_auc_score(y[u, c], h[u, i]) for c, u in enumerate(used.T.numpy())] for i in range(h.shape[1])
    ])  # fmt: skip


@pytest.mark.parametrize("subsets", ["all rows", "own rows", "two blocks"])
def test_equal_to_scikit_learn_with_ties(subsets):
    h, y = tied_data()
    used = torch.ones_like(y)
    if subsets == "own rows":
        used = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    if subsets == "two blocks":
        used[:150, ::2] = False
    found = neuron_aurocs(h, y, None if subsets == "all rows" else used)
    np.testing.assert_allclose(found, by_sklearn(h, y, used), atol=1e-12)


def test_bfloat16_is_compared_as_it_is():
    h, y = tied_data()
    coarse = h.bfloat16()
    np.testing.assert_allclose(neuron_aurocs(coarse, y), by_sklearn(coarse.float(), y, torch.ones_like(y)), atol=1e-12)


def test_many_rows_lose_no_digit():
    r = np.random.default_rng(0)
    y = r.random((60_000, 2)) < 0.5
    h = (r.standard_normal((60_000, 3)) + 2 * y[:, :1]).astype(np.float32)  # sums leave float32's whole numbers
    found = neuron_aurocs(torch.from_numpy(h), torch.from_numpy(y))
    n_pos = y.sum(0)
    above = stats.rankdata(h, axis=0).T @ y - n_pos * (n_pos + 1) / 2
    np.testing.assert_allclose(found, above / (n_pos * (60_000 - n_pos)), rtol=0, atol=1e-13)
    np.testing.assert_allclose(found, by_sklearn(h, y, torch.ones(60_000, 2, dtype=torch.bool)), rtol=0, atol=1e-12)


def test_ranks_are_whole_numbers_of_sum_zero_and_shared_by_ties():
    r = np.random.default_rng(0)
    x = np.round(r.standard_normal((4, 5, 90)), 1).astype(np.float32)
    ranks = centred_ranks(x).numpy()
    np.testing.assert_array_equal(ranks, 2 * stats.rankdata(x, axis=-1) - 91)
    assert (ranks.sum(-1) == 0).all()


def test_padding_takes_no_rank():
    x = np.array([[3, 1, 1, np.inf, np.inf], [2, 2, 2, 2, 0]], np.float32)
    ranks = centred_ranks(x, np.array([3, 5])).numpy()
    np.testing.assert_array_equal(ranks[0, :3], [2, -1, -1])
    np.testing.assert_array_equal(ranks[1], [1, 1, 1, 1, -4])


def test_chunks_of_neurons_change_nothing(monkeypatch):
    h, y = tied_data()
    whole = neuron_aurocs(h, y)
    monkeypatch.setattr(module, "_CHUNK", 1)
    assert torch.equal(neuron_aurocs(h, y), whole)


def test_a_concept_without_one_of_the_classes_is_nan():
    h, y = tied_data()
    y[:, 0], y[:, 1] = False, True
    found = neuron_aurocs(h, y)
    assert found[:, :2].isnan().all()
    assert not found[:, 2:].isnan().any()
    assert neuron_aurocs(h[:0], y[:0]).isnan().all()


def test_a_rising_function_changes_nothing_and_the_sign_mirrors():
    h, y = tied_data()
    found = neuron_aurocs(h, y)
    assert torch.equal(neuron_aurocs(h * 8 + 1, y), found)
    torch.testing.assert_close(neuron_aurocs(-h, y), 1 - found)


@pytest.mark.slow
def test_one_product_beats_a_loop_by_far():
    r = np.random.default_rng(0)
    h, y = torch.from_numpy(r.standard_normal((2000, 16), np.float32)), torch.from_numpy(r.random((2000, 40)) < 0.3)
    neuron_aurocs(h, y)
    start = time.process_time()
    found = neuron_aurocs(h, y)
    ours = time.process_time() - start
    start = time.process_time()
    want = by_sklearn(h.numpy(), y.numpy(), torch.ones_like(y))
    assert time.process_time() - start > 20 * ours
    np.testing.assert_allclose(found, want, atol=1e-12)


# ---- spread over documents


def sample_of(y, document):
    """Every row, for every concept."""
    y, document = torch.from_numpy(np.asarray(y)), torch.from_numpy(np.asarray(document))
    rows = torch.arange(len(y)).expand(y.shape[1], -1)
    docs = np.array([[len(document[side].unique()) for side in (c, ~c)] for c in y.T]).reshape(-1, 2)
    return Sample(np.arange(y.shape[1]), rows, y.T, torch.ones_like(y.T), document.expand(y.shape[1], -1), docs)


def test_padded_samples_of_own_rows_equal_scikit_learn():
    h, y = tied_data()
    r = np.random.default_rng(0)
    n = [40, 300, 77, 120, 5]
    rows = [np.concatenate([r.permutation(300)[: m - 2], [y[:, c].int().argmax(), (~y[:, c]).int().argmax()]])
            for c, m in enumerate(n)]  # fmt: skip
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in rows], batch_first=True)
    used = torch.arange(300) < torch.tensor(n)[:, None]
    positive = y.T.gather(1, padded) & used
    sample = Sample(np.arange(5), padded, positive, used, padded * used, np.full((5, 2), 9))
    found = clustered_aurocs(h, sample, torch.arange(300) % 10, 10)
    want = np.array([[roc_auc_score(y[rows[c], c], h[rows[c], i]) for i in range(7)] for c in range(5)])
    np.testing.assert_allclose(found.excess[0] + 0.5, want, atol=1e-6)


def test_the_value_without_a_fold_compares_mean_ranks_of_what_is_left():
    h, y = tied_data(n=200)
    document = np.arange(200) // 5
    fold = torch.arange(40) % 10
    found = clustered_aurocs(h, sample_of(y.numpy(), document), fold, 10)
    ranks = stats.rankdata(h.numpy(), axis=0)
    left = (fold.numpy() != 3)[document]
    for c in range(5):
        pos, neg = (ranks[left & side].mean(0) for side in (y[:, c].numpy(), ~y[:, c].numpy()))
        np.testing.assert_allclose(found.excess[4, c], (pos - neg) / 200, atol=1e-6)
        again = neuron_aurocs(h[left], y[left][:, [c]])[:, 0] - 0.5
        np.testing.assert_allclose(found.excess[4, c], again, atol=0.02)


def test_a_fold_that_holds_all_positives_leaves_nothing_to_compare():
    h, y = tied_data(n=200)
    y[:, 0] = torch.arange(200) < 20
    found = clustered_aurocs(h, sample_of(y.numpy(), np.arange(200) // 20), torch.arange(10), 10)
    assert np.isnan(found.excess[1, 0]).all()
    assert np.isfinite(found.excess[2:, 0]).all()


def spread(r, *, document_sd, shift, n_documents=40, length=25, repeats=400):
    """AUROCs of many data sets with labels of whole documents, and the standard errors given for them."""
    document = np.repeat(np.arange(n_documents), length)
    y = (np.arange(n_documents) % 4 == 0)[document][:, None]
    h = r.standard_normal((len(document), repeats)) + document_sd * r.standard_normal((n_documents, repeats))[document]
    h = h + shift * y
    return clustered_aurocs(torch.from_numpy(h), sample_of(y, document), torch.arange(n_documents) % 10, 10)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_standard_error_knows_that_tokens_of_a_document_are_alike(shift):
    found = spread(np.random.default_rng(0), document_sd=1.0, shift=shift)
    truth, given = found.excess[0].std(), np.sqrt(np.square(found.se).mean())
    assert 0.85 < given / truth < 1.25
    assert truth > 3 * auroc_null_se(250, 750)


def test_independent_tokens_get_the_null_standard_error():
    found = spread(np.random.default_rng(0), document_sd=0.0, shift=0.0)
    null = auroc_null_se(250, 750)
    assert (found.se >= null).all()
    assert np.median(found.se) < 1.25 * null
    np.testing.assert_allclose(found.excess[0].std(), null, rtol=0.1)


@pytest.mark.parametrize("kind", ["span", "document"])
def test_p_values_hold_their_level_where_no_neuron_knows_the_concept(kind):
    """Autocorrelated activations with document effects; taking tokens as independent rejects far too often."""
    naive, ours = [], []
    for seed in range(4):
        simulation = simulate(kind, seed=seed, n_simulations=50, source_effect=0)
        h, y = (torch.from_numpy(x) for x in simulation.dense())
        document = simulation.tracks.document
        found = clustered_aurocs(h, sample_of(y.numpy(), document), torch.arange(48) % 10, 10)
        own = np.arange(50)
        d, se, n_pos = found.excess[0][own, own], found.se[own, own], y.sum(0).numpy()
        ours.append(2 * t_tail(np.abs(d / se), found.df))
        naive.append(2 * stats.norm.sf(np.abs(d) / auroc_null_se(n_pos, len(y) - n_pos)))
    assert (np.concatenate(ours) < 0.05).mean() < 0.09
    assert (np.concatenate(naive) < 0.05).mean() > 0.3


@pytest.mark.parametrize(("df", "excess"), [(4, 0.7), (7, 0.25), (20, 0.05), (300, 0.02)])
def test_the_tail_of_t_is_that_of_scipy_and_errs_on_the_cautious_side(df, excess):
    p = np.logspace(-6, np.log10(0.5), 40)
    ratio = t_tail(stats.t.isf(p, df), np.full(40, df)) / p
    assert ratio.min() > 0.98
    assert ratio.max() < 1 + excess
    assert ratio[p > 0.01].max() < 1.03
    np.testing.assert_allclose(t_tail(-stats.t.isf(p, df), np.full(40, df)), 1 - p, rtol=0.02)

"""Drawing rows, fitting and scoring probes on planted neurons, without a model."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

from moe_lens.capture.moments import ClassMoments
from moe_lens.capture.rows import Rows, RowStore
from moe_lens.capture.tokens import TokenTable
from moe_lens.probing.evaluate import Evaluator, columns_needed
from moe_lens.probing.fit import LayerFitter, distinct_documents, draw_rows
from moe_lens.probing.settings import ProbeSettings
from moe_lens.types import Split, Status
from tests.synthetic import feed, make_batch, make_tap

N_DOCS, SEQ, D_FF = 60, 40, 6


def planted_stream(seed=0, noise=1.0):
    """Expert 0 neuron 4 follows concept 0, expert 1 neuron 2 follows concept 1 with a minus sign."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for start in range(0, N_DOCS, 10):
        labels = torch.rand(10, SEQ, 3, generator=g) < 0.3
        labels[..., 2] = False
        batch = make_batch(labels, documents=list(range(start, start + 10)))
        flat = batch.token_labels.float()
        h = noise * torch.randn(10 * SEQ, 1, D_FF, generator=g)
        experts = torch.randint(0, 2, (10 * SEQ, 1), generator=g)
        h[:, 0, 4] += 3 * flat[:, 0] * (experts[:, 0] == 0)
        h[:, 0, 2] -= 3 * flat[:, 1] * (experts[:, 0] == 1)
        out.append((batch, [make_tap(batch, experts, h, n_experts=2)]))
    return out


def fitted(k=(1, 2), max_rows=2000):
    tokens, moments = TokenTable(), ClassMoments([0, 0, 0])
    rows = RowStore(tokens, [0, 0, 0], max_rows=max_rows)
    feed([tokens, moments, rows], planted_stream())
    fitter = LayerFitter(0, moments.moments(0), tokens, ProbeSettings(k=k, max_rows=max_rows))
    probes = [p for e in range(2) for p in fitter.fit(e, rows.rows(0, e), range(3), k)]
    return probes, rows, tokens


def find(probes, **at):
    (found,) = [p for p in probes if all(getattr(p, name) == value for name, value in at.items())]
    return found


def test_the_planted_neurons_are_found_with_their_sign():
    probes, *_ = fitted()
    assert find(probes, expert=0, concept=0, k=1).neurons.tolist() == [4]
    assert find(probes, expert=0, concept=0, k=1).coef[0] > 0
    assert find(probes, expert=1, concept=1, k=1).neurons.tolist() == [2]
    assert find(probes, expert=1, concept=1, k=1).coef[0] < 0
    assert find(probes, expert=0, concept=0, k=1).auroc_select > 0.95
    assert find(probes, expert=1, concept=0, k=1).auroc_select < 0.65


def test_a_concept_without_positives_is_too_few():
    probes, *_ = fitted()
    assert {p.status for p in probes if p.concept == 2} == {Status.TOO_FEW}
    assert all(len(p.neurons) == 0 for p in probes if p.concept == 2)


def test_fits_equal_scikit_learn_on_the_same_rows():
    probes, rows, tokens = fitted(k=(2,), max_rows=400)
    drawn = draw_rows(rows.rows(0, 0), tokens, 400)
    probe = find(probes, expert=0, concept=1, k=2)
    used = drawn.used[:, 1].numpy()
    x = drawn.activation.numpy()[used][:, probe.neurons].astype(float)
    y = drawn.positive[:, 1].numpy()[used]
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(solver="newton-cholesky", class_weight="balanced", tol=1e-10)
    model.fit(scaler.transform(x), y)
    np.testing.assert_allclose(
        x @ probe.coef + probe.intercept, model.decision_function(scaler.transform(x)), atol=1e-6
    )


def test_fits_do_not_depend_on_how_many_are_made_together(monkeypatch):
    together, *_ = fitted(k=(2,))
    monkeypatch.setattr("moe_lens.probing.fit._CHUNK_BYTES", 1)
    apart, *_ = fitted(k=(2,))
    for a, b in zip(together, apart, strict=True):
        assert (a.expert, a.concept, a.status) == (b.expert, b.concept, b.status)
        np.testing.assert_allclose(a.coef, b.coef, atol=1e-6)
        if a.two_part is not None:
            assert b.two_part is not None
            np.testing.assert_allclose(a.two_part.coef, b.two_part.coef, atol=1e-6)


def test_every_fitted_probe_of_planted_and_of_noise_neurons_has_a_two_part_score_at_the_smallest_k():
    probes, *_ = fitted()
    assert {p.two_part is not None for p in probes if p.fitted and p.k == 1} == {True}
    assert {p.two_part is not None for p in probes if not p.fitted or p.k > 1} == {False}


def test_drawn_rows_are_half_positive_and_bounded():
    _, rows, tokens = fitted(k=(1,))
    drawn = draw_rows(rows.rows(0, 0), tokens, 200)
    assert (drawn.used.sum(0) <= 200).all()
    assert (drawn.used & drawn.positive).sum(0).tolist()[:2] == [100, 100]


def test_positives_take_what_rare_negatives_leave():
    labels = torch.ones(1, 100, 1, dtype=torch.bool)
    labels[0, :10] = False
    batch = make_batch(labels, documents=[0])
    tokens = TokenTable()
    tokens.start_batch(batch)
    n = torch.arange(100)
    drawn = draw_rows(Rows(n, torch.zeros(100, 2), torch.ones(100), n), tokens, 60)
    assert drawn.used[:, 0].sum() == 60
    assert int((drawn.used & ~drawn.positive).sum()) == 10


def test_distinct_documents_by_hand():
    member = torch.tensor([[1, 0], [1, 0], [1, 1], [0, 1]], dtype=torch.bool)
    assert distinct_documents(torch.tensor([7, 7, 3, 9]), member).tolist() == [2, 2]


@pytest.fixture(scope="module")
def scored():
    probes, *_ = fitted()
    columns = columns_needed(probes, {0: 2})
    tokens = TokenTable()
    rows = RowStore(tokens, [0, 0, 0], max_rows=None, columns=columns)
    stream = planted_stream(seed=1)
    feed([tokens, rows], stream)
    splits = [Split.VALIDATE if d % 2 else Split.TEST for d in range(N_DOCS)]
    evaluator = Evaluator(rows, columns, splits)
    return probes, evaluator, stream, splits


def test_scores_equal_scikit_learn_on_raw_activations(scored):
    probes, evaluator, stream, splits = scored
    probe = find(probes, expert=0, concept=0, k=2)
    (row,) = evaluator.score(0, 0, [probe])
    logit, truth = [], []
    for batch, (tap,) in stream:
        documents = batch.token_document[tap.token]
        mine = (tap.expert == 0) & torch.tensor([splits[d] == Split.TEST for d in documents])
        logit.append(tap.activation[mine][:, probe.neurons].double() @ torch.from_numpy(probe.coef) + probe.intercept)
        truth.append(batch.token_labels[tap.token[mine], 0])
    logit, truth = torch.cat(logit).numpy(), torch.cat(truth).numpy()
    assert row["status"] == "ok"
    assert row["n_test"] == len(truth)
    assert row["n_pos_test"] == truth.sum()
    assert row["f1"] == pytest.approx(f1_score(truth, logit >= 0))
    assert row["auroc"] == pytest.approx(roc_auc_score(truth, logit), abs=1e-6)
    assert row["f1_always_positive"] == pytest.approx(f1_score(truth, np.ones_like(truth)))


def test_the_planted_neuron_scores_high_and_the_other_expert_does_not(scored):
    probes, evaluator, *_ = scored
    (good,) = evaluator.score(0, 0, [find(probes, expert=0, concept=0, k=1)])
    (bad,) = evaluator.score(0, 1, [find(probes, expert=1, concept=0, k=1)])
    assert good["auroc"] > 0.95
    assert bad["auroc"] < 0.6
    assert good["auroc_validate"] > 0.95


def test_document_counts_add_up_to_the_score(scored):
    probes, evaluator, *_ = scored
    probe = find(probes, expert=0, concept=0, k=1)
    (row,) = evaluator.score(0, 0, [probe])
    (counts,) = evaluator.document_counts([probe], N_DOCS)
    total = counts.sum(0)
    tp, fp, fn, tn, placed_pos, placed_neg = total
    assert 2 * tp / (2 * tp + fp + fn) == pytest.approx(row["f1"])
    assert placed_pos / (tp + fn) == pytest.approx(row["auroc"], abs=1e-9)
    assert placed_neg / (fp + tn) == pytest.approx(row["auroc"], abs=1e-9)
    assert (counts[1::2] == 0).all()  # validate documents


def test_too_few_test_tokens_carry_no_number(scored):
    probes, evaluator, *_ = scored
    few = Evaluator(evaluator.rows, evaluator.columns, [Split.TEST] * 3 + [Split.VALIDATE] * (N_DOCS - 3))
    (row,) = few.score(0, 0, [find(probes, expert=0, concept=0, k=1)])
    assert row["status"] == "too_few"
    assert np.isnan(row["f1"])
    assert row["n_test"] > 0


def test_a_fit_that_does_not_converge_is_flagged_and_scored_by_nobody(monkeypatch):
    monkeypatch.setattr("moe_lens.probing.solve.MAX_STEPS", 1)
    probes, *_ = fitted()
    assert {p.status for p in probes} <= {Status.NOT_CONVERGED, Status.TOO_FEW, Status.CONSTANT}
    assert Status.NOT_CONVERGED in {p.status for p in probes}
    assert not any(p.fitted for p in probes)

"""The batched Newton solver against scikit-learn, and on awkward data."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from moe_lens.probing.solve import balanced_weights, fit_logistic, fit_standardised


def problems(n, rows, k, seed, signal=2.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rows, k, generator=g, dtype=torch.double)
    y = (torch.rand(n, rows, generator=g) < torch.sigmoid(signal * x[..., 0] - 1)).double()
    used = torch.rand(n, rows, generator=g) < 0.8
    return x, y, used


@given(k=st.sampled_from([1, 2, 8, 32]), seed=st.integers(0, 1000), signal=st.sampled_from([0.0, 2.0, 8.0]))
@settings(max_examples=12, deadline=None)
def test_coefficients_equal_scikit_learn(k, seed, signal):
    x, y, used = problems(4, 300, k, seed, signal)
    fit = fit_logistic(x, y, balanced_weights(y, used))
    assert fit.converged.all()
    for p in range(4):
        m = used[p].numpy()
        model = LogisticRegression(solver="newton-cholesky", class_weight="balanced", tol=1e-10)
        model.fit(x[p].numpy()[m], y[p].numpy()[m])
        np.testing.assert_allclose(fit.coef[p], model.coef_[0], atol=1e-5)
        np.testing.assert_allclose(fit.intercept[p], model.intercept_[0], atol=1e-5)


def test_heavy_tailed_features_are_solved_as_exactly():
    r = np.random.default_rng(0)
    for _ in range(12):
        x = r.standard_t(1.5, (2000, 1))
        x = (x - x.mean()) / x.std()
        y = r.random(2000) < 0.1 + 0.2 * (x[:, 0] > 1)
        used = torch.ones(1, 2000, dtype=torch.bool)
        labels = torch.from_numpy(y.astype(float))[None]
        fit = fit_logistic(torch.from_numpy(x)[None], labels, balanced_weights(labels, used))
        model = LogisticRegression(solver="newton-cholesky", class_weight="balanced", tol=1e-12).fit(x, y)
        assert fit.converged.all()
        np.testing.assert_allclose(fit.coef[0], model.coef_[0], atol=1e-5)


def test_rows_of_weight_zero_do_not_matter():
    x, y, used = problems(2, 200, 3, 0)
    garbage = torch.where(used[..., None], x, 1e6 * torch.ones_like(x))
    a = fit_logistic(x, y, balanced_weights(y, used))
    b = fit_logistic(garbage, y, balanced_weights(y, used))
    torch.testing.assert_close(a.coef, b.coef)


def test_perfectly_separable_data_converge_to_a_finite_optimum():
    x = torch.linspace(-1, 1, 100, dtype=torch.double).view(1, -1, 1)
    y = (x[..., 0] > 0).double()
    fit = fit_logistic(x, y, torch.ones_like(y))
    model = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(x[0].numpy(), y[0].numpy())
    assert fit.converged.all()
    assert fit.coef[0, 0].item() == pytest.approx(model.coef_[0, 0], abs=1e-5)


def test_a_constant_column_gets_no_weight():
    x, y, used = problems(1, 200, 2, 0)
    x[..., 1] = 0
    assert fit_logistic(x, y, balanced_weights(y, used)).coef[0, 1] == 0


def test_standardised_fits_equal_a_scaler_and_scikit_learn_and_come_back_on_the_raw_scale():
    x, y, used = problems(3, 300, 4, 1)
    x = x * torch.tensor([1.0, 50.0, 0.01, 3.0]) + torch.tensor([0.0, 7.0, -2.0, 1e3])
    x[0, :, 3] = 5.0
    garbage = torch.where(used[..., None], x, 1e6)
    fit = fit_standardised(garbage, y, used)
    assert fit.converged.all()
    for p in range(3):
        m = used[p].numpy()
        raw, truth = x[p].numpy()[m], y[p].numpy()[m]
        scaler = StandardScaler().fit(raw)
        model = LogisticRegression(solver="newton-cholesky", class_weight="balanced", tol=1e-10)
        model.fit(scaler.transform(raw), truth)
        np.testing.assert_allclose(fit.sd[p], np.where(raw.std(0) > 1e-9, raw.std(0), 0), rtol=1e-6)
        np.testing.assert_allclose(fit.coef[p].numpy() * scaler.scale_, model.coef_[0], atol=1e-5)
        want = model.decision_function(scaler.transform(raw))
        np.testing.assert_allclose(fit.logit[p][used[p]], want, atol=1e-4)
        np.testing.assert_allclose(x[p][used[p]] @ fit.coef[p] + fit.intercept[p], want, atol=1e-4)
    assert fit.sd[0, 3] == fit.coef[0, 3] == 0

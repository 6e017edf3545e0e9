"""Ranking of neurons: the formula by hand, ties, and what each ranking prefers."""

import pytest
import torch

from moe_lens.capture.moments import Moments
from moe_lens.errors import BadConfig
from moe_lens.probing.select import neuron_scores, top_neurons


def moments(mean_pos, mean_neg, var_pos, var_neg, var):
    t = lambda v: torch.tensor(v, dtype=torch.double).view(1, 1, -1)  # noqa: E731
    n = torch.ones(1, 1, dtype=torch.double)
    total = torch.tensor(var, dtype=torch.double).view(1, -1)
    return Moments(n, n, t(mean_pos), t(mean_neg), t(var_pos), t(var_neg), n[0], torch.zeros_like(total), total)


def test_standardised_score_by_hand():
    m = moments([3.0, 0.0, 1.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0], [2.0, 1.0, 0.0], [9.0, 1.0, 4.0])
    eps = 1e-2 * 2.0  # median of sd 3, 1, 2
    scores = neuron_scores(m)[0, 0]
    assert scores[0].item() == pytest.approx(2 / (3 + eps**2) ** 0.5)
    assert scores[1:].tolist() == [0.0, 0.0]


def test_loud_neurons_win_only_under_mean_diff():
    m = moments([100.0, 1.0], [90.0, 0.0], [1e4, 0.01], [1e4, 0.01], [1e4, 0.25])
    assert top_neurons(neuron_scores(m), 1).item() == 1
    assert top_neurons(neuron_scores(m, rank="mean_diff"), 1).item() == 0


def test_ties_go_to_the_lower_index():
    m = moments([1.0] * 5, [0.0] * 5, [1.0] * 5, [1.0] * 5, [1.0] * 5)
    assert top_neurons(neuron_scores(m), 3)[0, 0].tolist() == [0, 1, 2]


def test_an_unknown_ranking_is_refused_by_name():
    with pytest.raises(BadConfig, match="standardised"):
        neuron_scores(moments([1.0], [0.0], [1.0], [1.0], [1.0]), rank="magic")

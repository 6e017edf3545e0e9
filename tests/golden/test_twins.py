"""An MoE and a dense model that carry the same neurons: ``raw`` shows a gap, and no honest arm does."""

from __future__ import annotations

import pytest
import torch

import moe_lens as ml
from tests.planted import planted_twins

HONEST = ("held_out", "equal_random_tokens", "equal_router_tokens")
METRICS = ("f1", "f1_balanced", "auroc")


def probed(folder, seed):
    moe, dense, text, concepts = planted_twins(folder, seed=seed)
    given = {"baseline": dense, "concepts": concepts, "k": (1,), "draws": 10, "permutations": 99}
    found = ml.probe(moe, text, **given, progress=False)
    table = found.comparison[found.comparison.concept == "__mean__"].set_index(["arm", "metric"])
    return moe, dense, table, found


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    return probed(tmp_path_factory.mktemp("twins"), seed=0)


def test_every_expert_is_one_half_of_the_dense_ffn(twins):
    moe, dense, *_ = twins
    for sparse, layer in zip(moe.model.model.layers, dense.model.model.layers, strict=True):
        pair = torch.stack([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
        for e, weight in enumerate(sparse.mlp.experts.gate_up_proj):
            assert torch.equal(weight.view(2, 16, -1), pair[:, 16 * (e % 2) :][:, :16])


def test_both_models_read_the_same_stream(twins):
    moe, dense, *_ = twins
    ids = torch.arange(40)[None]
    one, two = (lens.model(ids, output_hidden_states=True).hidden_states for lens in (moe, dense))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_raw_shows_a_gap_all_the_same(twins, metric):
    row = twins[2].loc["raw", metric]
    assert row.ci_low > 0.02
    assert row.n_cells_moe > 10 * row.n_cells_dense


@pytest.mark.parametrize("metric", METRICS)
def test_the_search_alone_explains_it(twins, metric):
    raw, alike = (twins[2].loc[arm, metric] for arm in ("raw", "homogeneous"))
    lift = (alike.moe - alike.one_cell_moe) - (alike.dense - alike.one_cell_dense)
    assert lift == pytest.approx(raw.gap, rel=0.4)
    assert abs(alike.one_cell_moe - alike.one_cell_dense) < 0.02


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("arm", HONEST)
def test_no_honest_arm_shows_a_gap(twins, arm, metric):
    row, raw = twins[2].loc[arm, metric], twins[2].loc["raw", metric]
    assert row.ci_low < 0 < row.ci_high
    assert abs(row.gap) < 0.5 * raw.gap
    assert row.ci_high < raw.gap


@pytest.mark.parametrize("metric", METRICS)
def test_equal_arms_search_between_as_many_cells_and_neurons(twins, metric):
    for arm in HONEST[1:]:
        row = twins[2].loc[arm, metric]
        assert row.n_cells_moe == row.n_cells_dense > 2
        assert row.n_distinct_neurons_moe == row.n_distinct_neurons_dense


def test_a_neuron_of_either_serves_one_concept(twins):
    row = twins[3].neurons.overall()
    assert row.ci_low < 0 < row.ci_high
    assert row.moe == pytest.approx(1, abs=0.05)
    assert row.dense == pytest.approx(1, abs=0.05)


def test_routing_tells_nothing_of_the_concepts(twins):
    row = twins[2].loc["routing_only", "auroc"]
    assert abs(row.moe - 0.5) < 0.01
    assert row.dense == 0.5


def test_over_all_tokens_one_expert_in_sixteen_is_worth_less_than_the_layer_it_is_cut_from(twins):
    """No claim about neurons: the best cell of the MoE sees a part of the tokens, the dense layer all of them."""
    row = twins[2].loc["whole_population", "auroc_increment"]
    assert 0 < row.moe < 0.5 * row.dense


def test_the_null_has_no_gap_either_and_both_models_beat_it(twins):
    row = twins[2].loc["null", "auroc"]
    assert row.ci_low < 0 < row.ci_high
    assert row.p_value == row.p_value_dense == 0.01


def test_the_neurons_are_equally_good_in_every_cell(twins):
    """The premise: what differs between cells is the size of their samples."""
    cells = twins[3].cells
    by_layer = cells[cells.role == "dense"].groupby("layer").auroc.mean()
    assert by_layer.max() - by_layer.min() < 0.02


@pytest.mark.slow
def test_over_other_texts_and_neurons_the_gap_of_every_honest_arm_averages_out(twins, tmp_path_factory):
    """Intervals are for the neurons and cells at hand; over seeds the gaps of the honest arms lie around zero."""
    one, two = (probed(tmp_path_factory.mktemp(f"twins{seed}"), seed)[2] for seed in (1, 2))
    gap = (twins[2].gap + one.gap + two.gap) / 3
    for metric in METRICS:
        assert gap["raw", metric] > 0.05
        for arm in HONEST:
            assert abs(gap[arm, metric]) < 0.3 * gap["raw", metric]

"""How many concept groups a neuron serves: known answers, and what must make no difference between two models."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import moe_lens as ml
import moe_lens.probing.polysemanticity.cells as cells_module
import moe_lens.probing.polysemanticity.measure as measure_module
from moe_lens.corpus.batches import tokenize
from moe_lens.errors import BadConfig, MemoryLimit
from moe_lens.probing.polysemanticity import concept_groups, polysemanticity
from moe_lens.probing.polysemanticity.auroc import ClusteredAurocs
from moe_lens.probing.polysemanticity.cells import Cell, CellAurocs, common_counts, firing_rate
from moe_lens.probing.polysemanticity.compare import (
    compare_layer,
    firing_bins,
    jackknife_interval,
    layer_table,
    match_weights,
)
from moe_lens.probing.polysemanticity.figure import weighted_quantiles
from moe_lens.probing.polysemanticity.neurons import N_FOLDS, describe, join, participation_ratio
from moe_lens.probing.settings import ProbeSettings
from moe_lens.stats import auroc_null_se
from moe_lens.types import Role
from tests.models import tiny
from tests.probing.conftest import soup
from tests.probing.fake_lens import NOISE, FakeLens, neurons

SETTINGS = ProbeSettings(max_length=64)
LETTERS = ["abAB", "cdCD", "efEF", "ghGH", "ijIJ", "012", "345", "678"]
CONCEPTS = [ml.concept(f"c{i}", regex=f"[{x}]", granularity="type") for i, x in enumerate(LETTERS)]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    corpus = ml.corpus(str(soup(tmp_path_factory.mktemp("soup") / "soup.jsonl", n_documents=160)))
    return tokenize(corpus, tiny.tokenizer(), CONCEPTS, max_length=64)


def run(lens, tokens, baseline=None, **kwargs):
    return polysemanticity(lens, tokens, baseline=baseline, settings=SETTINGS, progress=False, **kwargs)


# ---- the participation ratio


def simulated(n_pos, n_neg, *, strength, n_groups=58, n_neurons=400, seed=0, role=Role.MOE, rate=None, layer=0):
    """A cell of neurons with the given |AUROC - .5| in their first groups; all else is noise of independent tokens."""
    r = np.random.default_rng(seed)
    se = float(auroc_null_se(n_pos, n_neg))
    truth = np.zeros((n_groups, n_neurons))
    truth[: len(strength)] = np.array(strength)[:, None]
    sides = []
    for _ in range(2):
        noise = se * r.standard_normal((N_FOLDS, n_groups, n_neurons)) * np.sqrt(N_FOLDS)
        noise[:, truth >= 0.5] = 0  # a perfect score does not vary
        every = truth + noise.mean(0)
        without = truth + (noise.sum(0) - noise) / (N_FOLDS - 1)
        excess = np.clip(np.concatenate([every[None], without]), -0.5, 0.5)
        df = np.full(n_groups, n_pos + n_neg - 1)
        sides.append(ClusteredAurocs(excess, np.full((n_groups, n_neurons), se), df))
    rates = np.full(n_neurons, 0.1) if rate is None else rate
    return CellAurocs(Cell(role, layer, 0, None), rates, np.arange(n_groups), *sides)


@pytest.mark.parametrize(("n", "uncorrected", "each_group"), [(1300, 1.35, 1.16), (80, 9.85, 4.6)])
def test_a_one_concept_neuron_has_ratio_one_at_any_n(n, uncorrected, each_group):
    """METRICS 1.4: uncorrected it reads 1.3 and 9.9; correcting each group alone is not enough at n = 80."""
    cell = simulated(n // 10, n - n // 10, strength=[0.5], n_neurons=2000)
    raw = participation_ratio(np.square(cell.test.excess[0])).mean()
    table = describe(join([cell], 58, seed=0))
    assert raw == pytest.approx(uncorrected, rel=0.03)
    assert table.participation_ratio_all.mean() == pytest.approx(each_group, rel=0.04)
    assert np.isfinite(table.participation_ratio).all()
    assert 1 <= table.participation_ratio.mean() < 1.06
    assert (table.best_group == 0).all()
    assert table.n_groups_detected.mean() < 1.1


def test_three_equal_groups_have_ratio_three():
    table = describe(join([simulated(100, 200, strength=[0.4, 0.4, 0.4])], 58, seed=0))
    assert table.participation_ratio.mean() == pytest.approx(3, abs=0.1)
    assert (table.n_groups_detected == 3).mean() > 0.9
    assert abs(table.selectivity.mean()) < 0.02


def test_neurons_that_know_nothing_are_not_significant():
    table = describe(join([simulated(50, 100, strength=[])], 58, seed=0))
    assert (table.q_value <= 0.05).mean() < 0.02
    assert table.n_groups_detected.mean() < 0.02
    assert abs(np.nanmean(table.best_auroc) - 0.5) < 0.01  # chosen on validate, not on test


def test_a_group_that_test_does_not_confirm_counts_for_nothing():
    cell = simulated(100, 200, strength=[0.4, 0.3])
    turned = cell.test.excess.copy()
    turned[:, 1] *= -1
    table = describe(join([replace(cell, test=replace(cell.test, excess=turned))], 58, seed=0))
    assert (table.n_groups_found >= 2).all()
    assert table.participation_ratio.mean() < 1.05
    assert np.median(table.selectivity) == pytest.approx(0.7, abs=0.02)


def test_more_concepts_do_not_make_the_same_neuron_more_polysemantic():
    few, many = (
        describe(join([simulated(100, 200, strength=[0.4, 0.3], n_groups=g)], g, seed=0)) for g in (10, 100)
    )  # fmt: skip
    assert many.participation_ratio.mean() == pytest.approx(few.participation_ratio.mean(), abs=0.05)
    assert many.participation_ratio_all.mean() > few.participation_ratio_all.mean() + 0.5


# ---- equal rows, equal chances, equal firing rates


def test_every_cell_is_cut_to_the_lower_decile_of_those_that_reach_the_minimum():
    n = np.zeros((22, 2, 2, 2), int)
    n[:, :, 0, 0] = np.array([10, *range(25, 46)])[:, None]
    n[:, :, 1, 0] = 1000
    n[:, :, 0, 1], n[:, :, 1, 1] = 3000, np.array([24, *[150] * 21])[:, None]
    take, usable = common_counts(n)
    assert take[:, :, 0].tolist() == [[27, 54], [27, 54]]
    assert usable[:, 0].tolist() == [False] * 3 + [True] * 19
    assert take[:, :, 1].tolist() == [[100, 150], [100, 150]]
    assert usable[:, 1].tolist() == [False] + [True] * 21


def test_a_group_that_no_cell_reaches_is_left_out():
    assert not common_counts(np.full((3, 2, 2, 1), 24))[1].any()


def test_a_dense_neuron_has_as_many_chances_as_an_experts_neuron():
    cells = [simulated(50, 100, strength=[0.3], n_groups=10, n_neurons=40) for _ in range(4)]
    cells = [replace(c, groups=np.arange(2 * i + 2)) for i, c in enumerate(cells)]
    cells = [
        replace(c, **{s: ClusteredAurocs(a.excess[:, c.groups], a.se[c.groups], a.df[c.groups])
                      for s, a in (("validate", c.validate), ("test", c.test))})
        for c in cells
    ]  # fmt: skip
    dense = simulated(50, 100, strength=[0.3], n_groups=10, n_neurons=80, role=Role.DENSE)
    layer = join([*cells, dense], 10, seed=0)
    n = layer.considered.sum(0)
    assert sorted(set(n[layer.moe])) == [2, 4, 6, 8]
    assert (np.bincount(n[~layer.moe]) * 2 == np.bincount(n[layer.moe])).all()


def test_matching_removes_a_difference_that_is_only_in_firing_rate():
    r = np.random.default_rng(0)
    rate = np.concatenate([r.beta(2, 8, 4000), r.beta(3, 6, 1000)])
    moe = np.arange(5000) < 4000
    serves = 1 + 5 * rate + 0.1 * r.standard_normal(5000)
    weight = match_weights(rate, moe, firing_bins(rate, moe))
    for side in (moe, ~moe):
        assert weight[side].sum() == pytest.approx(1)
    raw = serves[moe].mean() - serves[~moe].mean()
    matched = (serves * weight)[moe].sum() - (serves * weight)[~moe].sum()
    assert abs(raw) > 0.5
    assert abs(matched) < 0.1 * abs(raw)


def test_neurons_without_a_partner_of_their_firing_rate_get_no_weight():
    rate, moe = np.array([0.1, 0.2, 0.9, 0.1, 0.2, 0.01]), np.array([1, 1, 1, 0, 0, 0], bool)
    weight = match_weights(rate, moe, np.array([0.05, 0.15, 0.5]))
    np.testing.assert_allclose(weight, [0.5, 0.5, 0, 0.5, 0.5, 0])
    assert not match_weights(np.array([0.1, 0.9]), np.array([True, False]), np.array([0.5])).any()


def test_matched_models_differ_by_what_firing_rate_does_not_explain():
    """Rare neurons serve one group, frequent ones three, in both models; the MoE has more frequent ones."""
    rare, often = np.full(300, 0.05), np.full(300, 0.3)
    cells = []
    for role, n_often in ((Role.MOE, 240), (Role.DENSE, 60)):
        one = simulated(100, 200, strength=[0.4], n_groups=12, n_neurons=300, seed=n_often)
        three = simulated(100, 200, strength=[0.4] * 3, n_groups=12, n_neurons=300, seed=n_often + 1)
        pick = np.arange(300) < n_often
        mixed = {
            s: replace(getattr(one, s), excess=np.where(pick, getattr(three, s).excess, getattr(one, s).excess))
            for s in ("validate", "test")
        }
        cells.append(CellAurocs(Cell(role, 0, 0, None), np.where(pick, often, rare), np.arange(12), **mixed))
    found = compare_layer(join(cells, 12, seed=0))
    table = layer_table([found], [(0, 0)]).set_index(["pair", "measure", "matched"])
    assert table.gap[0, "participation_ratio", False] > 1
    assert abs(table.gap[0, "participation_ratio", True]) < 0.05
    assert table.loc[(0, "firing_rate", True), "gap"] == pytest.approx(0)
    assert table.loc[(-1, "participation_ratio", True), "gap"] == table.loc[(0, "participation_ratio", True), "gap"]


def test_the_interval_of_a_mean_is_that_of_its_ten_parts():
    from scipy import stats

    parts = np.random.default_rng(0).standard_normal(10)
    without = (parts.sum() - parts) / 9
    low, high = jackknife_interval(np.array([parts.mean(), *without]))
    half = stats.t.ppf(0.975, 9) * parts.std(ddof=1) / np.sqrt(10)
    np.testing.assert_allclose([low, high], [parts.mean() - half, parts.mean() + half])


def test_the_firing_rate_counts_rows_above_one_standard_deviation():
    h = torch.tensor([[0.0, 5, 0], [0, 5, -4], [2, 5, 0], [0, 5, 0]])
    np.testing.assert_allclose(firing_rate(h), [0.25, np.nan, 0.25])
    assert np.isnan(firing_rate(h[:0])).all()


# ---- concept groups


def labelled(labels, scope, groups):
    concepts = tuple(SimpleNamespace(name=f"c{i}", group=g) for i, g in enumerate(groups))
    labels, n = np.asarray(labels, bool), len(labels)
    return SimpleNamespace(
        concepts=concepts, eligible=np.ones(n, bool), n_tokens=n, window_of=np.zeros(n, int),
        in_scope=np.asarray([scope], bool), label=lambda c: labels[:, c], labels=lambda a, b: labels[a:b],
    )  # fmt: skip


def test_concepts_that_agree_are_represented_once_by_the_largest():
    token, r = np.arange(4000), np.random.default_rng(0)
    a, b, c = ((token >= x) & (token < y) for x, y in ((0, 1000), (300, 1300), (600, 1700)))
    other, named, rare = (r.random(4000) < p for p in (0.3, 0.4, 0.1))
    labels = np.stack([a, other, b, c, named, rare], 1)
    assert np.corrcoef(a, c)[0, 1] < 0.5 < min(np.corrcoef(a, b)[0, 1], np.corrcoef(b, c)[0, 1])
    found = concept_groups(labelled(labels, [True] * 6, [None, None, None, None, "g", "g"]))
    assert [(g.name, g.members) for g in found] == [
        ("c1", ("c1",)), ("c3", ("c0", "c2", "c3")), ("c4", ("c4", "c5")),
    ]  # fmt: skip


def test_opposites_and_constants_are_groups_of_their_own():
    a = np.arange(100) < 40
    labels = np.stack([a, ~a, np.zeros(100, bool), np.ones(100, bool)], 1)
    assert len(concept_groups(labelled(labels, [True] * 4, [None] * 4))) == 4


# ---- neurons made to order, through the whole pipeline


def silent(n_layers=1, n_experts=4, d_ff=8):
    """Neurons that hear noise and read no concept."""
    return neurons(n_layers, n_experts, 8, d_ff, signal=0.0, seed=3)


def test_planted_neurons_serve_one_and_three_groups(tokens):
    weights = silent()
    weights[:, :, :, :2] = 0
    weights[0, :, 2, 0] = 3.0
    weights[0, :, [3, 4, 5], 1] = 3.0
    found = run(FakeLens(weights), tokens).frame
    one, three, rest = (found[found.neuron.isin(n)] for n in ([0], [1], range(2, 8)))
    assert (one.best_group == "c2").all()
    assert (one.best_auroc == 1).all()
    assert (one.n_groups_detected == 1).all()
    assert one.participation_ratio.between(1, 1.3).all()
    assert one.selectivity.min() > 0.3
    assert set(three.best_group) <= {"c3", "c4", "c5"}
    assert (three.n_groups_detected == 3).all()
    assert three.participation_ratio.between(2.7, 3.8).all()  # groups that exclude each other lower each other
    assert three.selectivity.abs().max() < 0.1
    assert (rest.n_groups_detected == 0).all()


def test_a_constant_neuron_is_left_out_with_a_status(tokens):
    weights = neurons(1, 4, 8, 8, signal=0.8, seed=0)
    weights[:, :, :, 3] = 0
    found = run(FakeLens(weights), tokens, baseline=FakeLens(neurons(1, 1, 8, 16, signal=0.8, seed=1))).frame
    dead = found[(found.role == "moe") & (found.neuron == 3)]
    assert len(dead) == 4
    assert (dead.status == "constant").all()
    assert dead[["participation_ratio", "best_auroc", "selectivity", "q_value", "weight"]].isna().all(axis=None)
    assert (dead.n_groups == 0).all()
    assert (found.drop(dead.index).status == "ok").all()


def test_an_expert_that_sees_too_little_is_left_out_with_a_status(tokens):
    found = run(FakeLens(neurons(1, 64, 8, 4, signal=0.8, seed=0)), tokens).frame
    assert (found.status == "too_few").all()
    assert (found.n_groups == 0).all()
    assert found[["participation_ratio", "q_value"]].isna().all(axis=None)


def same_neurons(n_experts=6, d_ff=24, signal=0.5):
    """The same neurons in six experts and in one dense layer that sees every token."""
    weights = neurons(2, n_experts, 8, d_ff, signal=signal, seed=0)
    together = weights.permute(0, 2, 1, 3).reshape(2, 1, 8 + NOISE, n_experts * d_ff)
    return FakeLens(weights, name="moe"), FakeLens(together, name="dense")


def test_the_same_neurons_show_no_gap_although_the_dense_ones_see_more_tokens(tokens, monkeypatch):
    moe, dense = same_neurons()
    fair = run(moe, tokens, dense)
    assert abs(fair.overall().gap) < 0.12
    assert fair.overall().ci_low < 0 < fair.overall().ci_high
    assert abs(fair.overall("two_or_more").gap) < 0.06
    everything = lambda n: (np.full(n.shape[1:], 10**6), (n >= 25).all((1, 2)))  # noqa: E731
    monkeypatch.setattr(cells_module, "common_counts", everything)
    unfair = run(moe, tokens, dense)
    assert unfair.overall().gap < -0.3


def test_labels_of_other_documents_leave_no_significant_neuron(tokens):
    moe, dense = same_neurons(signal=1.0)
    moe.reads = dense.reads = tokens
    shifted = replace(tokens, packed_labels=np.roll(tokens.packed_labels, len(tokens.packed_labels) // 3, axis=0))
    found = run(moe, shifted, dense).frame
    assert (found.q_value <= 0.05).mean() < 0.03
    assert (run(moe, tokens, dense).frame.q_value <= 0.05).mean() > 0.5


def test_a_model_whose_neurons_serve_two_concepts_each_stands_out(tokens):
    moe, dense = same_neurons(signal=0.0)
    moe.weights[:, :, [0, 1], :4] = 3.0
    dense.weights[:, :, 0, :30] = 3.0
    found = run(moe, tokens, dense)
    two, ratio = (found.overall(name, matched=False) for name in ("two_or_more", "participation_ratio"))
    assert two.ci_low > 0.4
    assert ratio.ci_low > 0.4
    assert two.dense < 0.1


# ---- the result


@pytest.fixture(scope="module")
def real(moe, dense, tokens):
    return run(moe, tokens, dense)


def test_every_neuron_of_both_models_has_a_row(real):
    frame = real.frame
    assert not frame.duplicated(["role", "layer", "expert", "neuron"]).any()
    assert frame.groupby("role").size().to_dict() == {"moe": 2 * 6 * 24, "dense": 2 * 48}
    assert set(frame.status) <= {"ok", "too_few", "constant"}
    ok = frame[frame.status == "ok"]
    assert ok.firing_rate.between(0, 1).all()
    assert ok.participation_ratio.dropna().between(1, ok.n_groups.max()).all()
    sums = frame.groupby(["role", "pair"]).weight.sum()
    assert np.allclose(sums, 1) or np.allclose(sums, 0)


def test_a_model_alone_gives_its_own_table(moe, tokens, real):
    alone = run(moe, tokens)
    assert not alone.has_baseline
    assert alone.layers.dense.isna().all()
    assert alone.layers.dense_layer.isna().all()
    assert np.isfinite(alone.overall().moe)
    assert "dense" not in alone.finding()
    assert alone.plot().data


def test_a_dense_model_alone_is_dense(dense, tokens):
    alone = run(dense, tokens)
    assert set(alone.frame.role) == {"dense"}
    assert alone.layers.moe.isna().all()
    assert alone.finding()


def test_layer_groups_change_nothing(moe, dense, tokens, real, monkeypatch):
    monkeypatch.setattr(measure_module, "_memory_groups", lambda _sides, pairs, *_: [[pair] for pair in pairs])
    again = run(moe, tokens, dense)
    np.testing.assert_array_equal(again.frame.to_numpy(str), real.frame.to_numpy(str))
    np.testing.assert_array_equal(again.layers.to_numpy(str), real.layers.to_numpy(str))


def test_finding_figure_and_table_say_the_same(real):
    row = real.overall()
    assert f"{row.moe:.2f}" in real.finding()
    assert real.finding().endswith(".")
    assert real._repr_html_().count("<tr") == 1 + 3 * 3
    figure = real.plot()
    assert {trace.name for trace in figure.data} == {"MoE", "dense"}
    assert real.summary()["participation_ratio"]["moe"] == round(row.moe, 6)


def test_weighted_quantiles_repeat_a_value_as_often_as_it_weighs():
    shares = (np.arange(200) + 0.5) / 200
    found = weighted_quantiles(np.array([3.0, 1.0, 2.0]), np.array([0.25, 0.5, 0.25]), at=shares)
    assert [int((found == v).sum()) for v in (1, 2, 3)] == [100, 50, 50]


def test_nothing_significant_is_said_so(tokens):
    found = run(FakeLens(silent()), tokens)
    assert "nothing can be said" in found.finding()
    assert found.overall().isna().moe
    assert not found.plot().data


def test_a_baseline_with_experts_other_texts_and_too_little_memory_are_refused(moe, dense, tokens):
    with pytest.raises(BadConfig, match="is an MoE"):
        run(dense, tokens, moe)
    with pytest.raises(BadConfig, match="other documents or concepts"):
        run(moe, tokens, dense, tokenized_baseline=replace(tokens, concepts=tokens.concepts[:3]))
    with pytest.raises(BadConfig, match="validate split"):
        run(moe, replace(tokens, splits=np.where(tokens.splits == 1, 0, tokens.splits)), dense)
    with pytest.raises(MemoryLimit, match="--max-memory"):
        run(moe, tokens, dense, max_memory=1 << 20)

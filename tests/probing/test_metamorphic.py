"""What must happen to every arm of the comparison when a model or the labels are changed in a known way."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import moe_lens as ml
from moe_lens.probing import job
from moe_lens.probing.arms import LADDER
from moe_lens.types import Granularity
from tests.planted import plant, planted_twins, remade

MEAN = "__mean__"
METRICS = dict.fromkeys(LADDER, ("f1", "f1_balanced", "auroc")) | {
    "whole_population": ("auroc", "average_precision", "auroc_increment", "average_precision_increment"),
    "null": ("f1_balanced", "auroc"),
}
EQUAL = ("equal_random_tokens", "equal_router_tokens")
SERVED = "c3"
PLACE = (1, 2, 15)
"""Layer, expert, neuron: one of those that read noise alone."""
every_arm = pytest.mark.parametrize(("arm", "metric"), [(arm, metric) for arm in LADDER for metric in METRICS[arm]])


class World:
    """A dense model, an MoE whose neurons are better, a text, and what the probe makes of them."""

    def __init__(self, folder):
        self.folder = folder
        _, self.dense, self.text, concepts = planted_twins(folder, seed=0, n_experts=4, n_layers=2, n_texts=240)
        self.concepts = [replace(c, granularity=Granularity.SPAN) for c in concepts[:6]]
        self.moe = self.moe_after(better, "better")

    def moe_after(self, change, name):
        return remade(str(self.folder / "moe"), self.folder / name, change)

    def probe(self, lens, baseline, *, draws=4, layers=None):
        """The comparison by arm, metric and concept, and the table of cells."""
        found = ml.probe(
            lens, self.text, baseline=baseline, concepts=self.concepts, k=(1,), draws=draws, permutations=49,
            layers=layers, neurons=False, progress=False,
        )  # fmt: skip
        return found.comparison.set_index(["arm", "metric", "concept"]).sort_index(), found.cells


def better(model):
    """Neurons that hear their concept half again as loud."""
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj.data[:, :16, :8] *= 1.5


def silenced(model):
    """And one neuron that says nothing."""
    better(model)
    plant(model, PLACE, torch.zeros(80), torch.zeros(80))


def planted(model):
    """The same neuron fires for one concept and nothing else."""
    better(model)
    plant(model, PLACE, 5 * torch.eye(80)[int(SERVED[1:])], torch.eye(80)[8])


def doubled(model):
    """Every expert twice. Which copy a token goes to depends on the fifth and sixth characters before it, that
    nothing else reads, and so little that hardly a token changes its expert: the function is the same."""
    better(model)
    config = copy.deepcopy(model.config)
    config.num_experts *= 2
    twice = type(model)(config)
    state = model.state_dict()
    for name in state:
        if ".experts." in name:
            state[name] = state[name].repeat(2, 1, 1)
        elif name.endswith("mlp.gate.weight"):
            tie = torch.zeros_like(state[name])
            tie[:, 57:73] = 1e-3 * torch.randn(tie[:, 57:73].shape, generator=torch.Generator().manual_seed(0))
            state[name] = torch.cat([state[name] + tie, state[name] - tie])
    twice.load_state_dict(state)
    return twice


def upcycled(model):
    """Every expert is the whole dense FFN: both of its halves."""
    config = copy.deepcopy(model.config)
    config.moe_intermediate_size *= 2
    wide = type(model)(config)
    state = model.state_dict()
    for name in state:
        if name.endswith("gate_up_proj"):
            halves = state[name][:2].view(2, 2, 16, -1)
            state[name] = halves.transpose(0, 1).flatten(0, 2).repeat(config.num_experts, 1, 1)
        elif name.endswith("experts.down_proj"):
            state[name] = torch.cat([state[name], state[name]], 2)
    wide.load_state_dict(state)
    return wide


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("twins"))


@pytest.fixture(scope="module")
def forth(world):
    return world.probe(world.moe, world.dense)[0]


def test_every_arm_is_there_and_shows_that_the_neurons_are_better(forth):
    assert set(LADDER) <= set(forth.index.get_level_values("arm"))
    for arm in ("raw", "held_out", *EQUAL):
        assert forth.ci_low[arm, "auroc", MEAN] > 0.05


class TestSwappingTheModels:
    @pytest.fixture(scope="class")
    @classmethod
    def back(cls, world):
        return world.probe(world.dense, world.moe)[0]

    @every_arm
    def test_flips_the_sign_of_the_gap(self, forth, back, arm, metric):
        one, two = forth.loc[arm, metric], back.loc[arm, metric]
        assert (one.status == "ok").all()
        np.testing.assert_allclose(one.gap, -two.gap, atol=1e-9)
        np.testing.assert_allclose(one.moe, two.dense, atol=1e-9)
        assert (one.gap.abs() > 1e-6).all(), "or nothing was flipped"

    @every_arm
    def test_mirrors_the_interval_or_band(self, forth, back, arm, metric):
        one, two = forth.loc[arm, metric], back.loc[arm, metric]
        np.testing.assert_allclose(one.ci_low, -two.ci_high, atol=1e-6)
        np.testing.assert_allclose(one.ci_high, -two.ci_low, atol=1e-6)


class TestADenseModelAgainstItself:
    @pytest.fixture(scope="class")
    @classmethod
    def same(cls, world):
        return world.probe(world.dense, world.dense)[0]

    @every_arm
    def test_has_no_gap(self, same, arm, metric):
        rows = same.loc[arm, metric]
        assert (rows.status == "ok").all()
        np.testing.assert_allclose(rows.gap, 0, atol=1e-12)
        assert (rows.ci_low <= 1e-12).all()
        assert (rows.ci_high >= -1e-12).all()


class TestCopyingTheExperts:
    @pytest.fixture(scope="class")
    @classmethod
    def once(cls, world):
        return world.probe(world.moe, world.dense, draws=16)[0]

    @pytest.fixture(scope="class")
    @classmethod
    def copies(cls, world):
        return world.moe_after(doubled, "doubled")

    @pytest.fixture(scope="class")
    @classmethod
    def twice(cls, world, copies):
        return world.probe(copies, world.dense, draws=16)[0]

    def test_sends_nearly_every_token_to_a_copy_of_its_expert_and_to_either_copy_alike(self, world, copies):
        routed = []
        for lens in (world.moe, copies):
            tables = [lens.trace(document.text).routing for document in world.text.documents[:12]]
            routed.append(np.concatenate([table.expert for table in tables]))
        assert (routed[0] == routed[1] % 4).mean() > 0.999
        second = [(routed[1] >= 4)[routed[0] == expert].mean() for expert in range(4)]
        assert np.ptp([0.5, *second]) < 0.2

    def test_leaves_every_expert_as_it_is(self, world, copies):
        for one, two in zip(world.moe.model.model.layers, copies.model.model.layers, strict=True):
            weight = one.mlp.experts.gate_up_proj
            assert torch.equal(torch.cat([weight, weight]), two.mlp.experts.gate_up_proj)

    @pytest.mark.parametrize("metric", METRICS["raw"])
    @pytest.mark.parametrize("arm", EQUAL)
    def test_changes_no_equal_arm_beyond_the_spread_of_its_draws(self, once, twice, arm, metric):
        a, b = once.loc[arm, metric, MEAN], twice.loc[arm, metric, MEAN]
        spread = np.hypot(a.sd_draws, b.sd_draws) / 2  # two experts of four: no more than four draws are independent
        assert abs(a.gap - b.gap) < 2 * spread
        assert 2 * spread < 0.4 * a.gap, "or the claim would be empty"
        assert a.n_cells_moe == b.n_cells_moe == b.n_cells_dense

    @pytest.mark.parametrize("metric", METRICS["raw"])
    @pytest.mark.parametrize("arm", ["raw", "homogeneous"])
    def test_makes_a_search_over_all_cells_find_more(self, once, twice, arm, metric):
        a, b = once.loc[arm, metric, MEAN], twice.loc[arm, metric, MEAN]
        assert b.n_cells_moe == 2 * a.n_cells_moe
        assert b.gap > a.gap + 0.005
        assert b.dense == a.dense

    @pytest.mark.parametrize(("arm", "metric"), [("held_out", m) for m in METRICS["raw"]] + [("routing_only", "auroc")])
    def test_leaves_what_is_held_out_inside_its_interval(self, once, twice, arm, metric):
        a, b = once.loc[arm, metric, MEAN], twice.loc[arm, metric, MEAN]
        assert max(a.ci_low, b.ci_low) <= min(a.ci_high, b.ci_high)

    def test_halves_what_one_cell_sees_of_all_tokens(self, once, twice):
        a, b = (table.moe["whole_population", "auroc_increment", MEAN] for table in (once, twice))
        assert 0.35 < b / a < 0.75

    @pytest.mark.parametrize("metric", METRICS["null"])
    def test_leaves_the_null_at_no_gap(self, twice, metric):
        rows = twice.loc["null", metric]
        assert ((rows.ci_low < 0) & (rows.ci_high > 0)).all()


class TestExpertsThatAreTheDenseFFN:
    """With one layer there is one pair of cells a draw, so both models are scored in the same pair."""

    @pytest.fixture(scope="class")
    @classmethod
    def same(cls, world):
        return world.probe(world.moe_after(upcycled, "upcycled"), world.dense, draws=12, layers=[0])[0]

    @pytest.mark.parametrize("metric", METRICS["raw"])
    def test_have_no_gap_at_all_on_the_tokens_of_the_router(self, same, metric):
        rows = same.loc["equal_router_tokens", metric]
        assert (rows.status == "ok").all()
        assert (rows[["n_cells_moe", "n_cells_dense"]] == 1).all(axis=None)
        np.testing.assert_allclose(rows.gap, 0, atol=1e-6)

    @pytest.mark.parametrize("metric", METRICS["raw"])
    def test_have_a_gap_of_chance_on_as_many_random_tokens(self, same, metric):
        row = same.loc["equal_random_tokens", metric, MEAN]
        assert row.ci_low < 0 < row.ci_high
        assert 0 < abs(row.gap) < 0.02


class TestOneMoreNeuron:
    @pytest.fixture(scope="class")
    @classmethod
    def before(cls, world):
        return world.probe(world.moe_after(silenced, "silenced"), world.dense)

    @pytest.fixture(scope="class")
    @classmethod
    def after(cls, world):
        return world.probe(world.moe_after(planted, "planted"), world.dense)

    def test_changes_the_cell_it_is_in_for_the_concept_it_serves_and_no_other_number(self, before, after):
        a, b = (cells.drop(columns="model").map(str) for _, cells in (before, after))
        changed = a.index[(a != b).any(axis=1)]
        (row,) = before[1].loc[changed].itertuples()
        assert (row.role, row.layer, row.expert, row.concept) == ("moe", *PLACE[:2], SERVED)
        assert after[1].neurons[row.Index][0] == PLACE[2]
        assert after[1].auroc[row.Index] == after[1].f1[row.Index] == 1.0

    @every_arm
    def test_moves_no_other_concept_in_any_arm(self, before, after, arm, metric):
        numbers = ["moe", "dense", "gap", "ci_low", "ci_high"]
        a, b = (table.loc[arm, metric][numbers].drop(index=[SERVED, MEAN]) for table, _ in (before, after))
        assert len(a) == 5
        assert a.equals(b)

    @every_arm
    def test_moves_its_concept_where_its_cell_was_chosen(self, before, after, arm, metric):
        a, b = (table.loc[arm, metric, SERVED] for table, _ in (before, after))
        assert a.dense == pytest.approx(b.dense, abs=1e-12)
        if arm == "routing_only":
            assert a.moe == b.moe, "no neuron is read"
        elif arm in ("raw", "held_out"):
            assert b.moe == 1.0
            assert b.gap > a.gap + 0.1
        elif arm == "null":
            assert abs(b.moe - a.moe) < 0.05, "labels of other documents do not know of it"
        else:
            assert b.gap > a.gap + 0.01


class TestLabelsOfOtherDocuments:
    @pytest.fixture(scope="class")
    @classmethod
    def shifted(cls, world):
        """Every document is given the labels of the one before; all have 60 characters."""
        tokenize = job.tokenize

        def with_other_labels(*args, **kwargs):
            found = tokenize(*args, **kwargs)
            assert set(np.diff(found.offsets)) == {60}
            return replace(found, packed_labels=np.roll(found.packed_labels, 60, axis=0))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "tokenize", with_other_labels)
            return world.probe(world.moe, world.dense)[0]

    @pytest.mark.parametrize("side", ["moe", "dense"])
    @pytest.mark.parametrize("arm", ["held_out", *EQUAL, "routing_only", "whole_population", "null"])
    def test_bring_every_arm_to_chance(self, shifted, arm, side):
        row = shifted.loc[arm, "auroc", MEAN]
        assert abs(row[side] - 0.5) < 0.02

    @pytest.mark.parametrize("side", ["moe", "dense"])
    def test_bring_held_out_scores_into_the_band_of_the_null(self, shifted, side):
        held, null = (shifted.loc[arm, "auroc"].drop(index=MEAN) for arm in ("held_out", "null"))
        inside = (null[f"{side}_low"] <= held[side]) & (held[side] <= null[f"{side}_high"])
        assert inside.sum() >= 5
        assert (null[["p_value", "p_value_dense"]] > 0.02).all(axis=None)

    @pytest.mark.parametrize(
        ("arm", "metric"),
        [(arm, "auroc") for arm in ("held_out", *EQUAL, "routing_only", "null")]
        + [("whole_population", "auroc_increment")],
    )
    def test_leave_no_gap(self, shifted, arm, metric):
        row = shifted.loc[arm, metric, MEAN]
        assert row.ci_low <= 0 <= row.ci_high
        assert abs(row.gap) < 0.02

    @pytest.mark.parametrize("metric", METRICS["raw"])
    def test_leave_in_raw_what_the_search_alone_makes_of_chance(self, shifted, metric):
        raw, alike = (shifted.loc[arm, metric, MEAN] for arm in ("raw", "homogeneous"))
        assert raw.moe > shifted.moe["held_out", metric, MEAN]
        assert raw.moe == pytest.approx(alike.moe, abs=0.05)

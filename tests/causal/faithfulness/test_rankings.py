"""Scores of experts: hand-made routing sums, planted models, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_lens.causal.effects import Effects
from moe_lens.causal.faithfulness.alignment import routing_alignment, routing_spread
from moe_lens.causal.faithfulness.rankings import FROM_VISITS, Ranking, check_names, rank, read_scores, stability
from moe_lens.causal.faithfulness.visits import Visits, visits
from moe_lens.errors import BadConfig, OutOfRange
from moe_lens.models.edits import zero
from moe_lens.models.lens import Lens
from moe_lens.types import ExpertAddress
from tests.causal.small import some_text
from tests.models import tiny

TEXT = some_text()
UNITS = tuple(ExpertAddress(0, e) for e in range(3))


def hand_made(**changes) -> Visits:
    """Two documents of 4 and 6 tokens, one expert a token; expert 2 is never visited."""
    sums = {
        "load": [[3, 1, 0], [0, 6, 0]],
        "mass": [[1.5, 0.9, 0], [0, 3.0, 0]],
        "norm": [[6, 10, 0], [0, 12, 0]],
        "weighted_norm": [[3, 9, 0], [0, 6, 0]],
        "peak": [[1, 9, 0], [0, 2, 0]],
    }
    arrays = {name: np.array(values, float) for name, values in {**sums, **changes}.items()}
    return Visits(UNITS, np.array([4.0, 6.0]), router_entropy={0: np.array([2.0, 3.0])}, **arrays)


@pytest.mark.parametrize(
    ("name", "wanted", "first_document"),
    [
        ("load", [3, 7, 0], [3, 1, 0]),
        ("gate_mass", [1.5, 3.9, 0], [1.5, 0.9, 0]),
        ("gate_norm", [3, 15, 0], [3, 9, 0]),
        ("reap", [1, 15 / 7, np.nan], [1, 9, np.nan]),
        ("ean", [2, 22 / 7, np.nan], [2, 10, np.nan]),
        ("max_activation", [1, 9, 0], [1, 9, 0]),
        ("esft_gate", [1.5 / 8, (0.9 / 4 + 0.5) / 2, 0], [1.5 / 4, 0.9 / 4, 0]),
        ("esft_token", [3 / 8, (1 / 4 + 1) / 2, 0], [3 / 4, 1 / 4, 0]),
    ],
)
def test_scores_made_of_routing_sums(name, wanted, first_document):
    v = hand_made()
    np.testing.assert_allclose(FROM_VISITS[name](v, np.ones(2)), wanted)
    np.testing.assert_allclose(FROM_VISITS[name](v, np.array([1.0, 0.0])), first_document)


def test_token_shares_of_esft_add_up_to_one_in_each_layer():
    v = visits(Effects(Lens(tiny.build("olmoe"), None), TEXT, progress=False))
    share = FROM_VISITS["esft_token"](v, np.ones(len(v.n_tokens)))
    assert [share[v.layer == at].sum() for at in (0, 1)] == pytest.approx([1, 1])


def test_effects_rank_first_what_the_model_needs():
    model = tiny.build("olmoe")
    with torch.no_grad():  # all experts but two write next to nothing
        for layer, kept in ((0, 4), (1, 2)):
            others = [e for e in range(6) if e != kept]
            model.model.layers[layer].mlp.experts.down_proj[others] *= 1e-3
    effects = Effects(Lens(model, None), TEXT, progress=False)
    v = visits(effects)
    found = rank(["gradient", "leave_one_out", "gate_norm", "random"], effects, v)
    assert list(found) == ["gradient", "leave_one_out", "gate_norm"]
    for name in ("leave_one_out", "gate_norm"):
        assert set(np.argsort(-np.abs(found[name].score))[:2]) == {4, 8}, name
    assert set(np.argsort(-np.abs(found["gradient"].score))[:2]) == {4, 8}
    exact = effects.of(zero("L0.E4")).delta.sum(dtype=np.float64)
    assert found["leave_one_out"].score[4] == pytest.approx(exact, abs=1e-3)


def test_a_file_ranks_what_it_names_and_the_rest_comes_last(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("layer,expert,score,why\n0,1,0.5,x\n0,0,2,y\n")
    np.testing.assert_array_equal(read_scores(path, UNITS), [2, 0.5, np.nan])


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("layer,expert,score\n0,1,2\n0,1,3\n", BadConfig, "ranks L0.E1 twice"),
        ("layer,expert,score\n0,9,2\n", OutOfRange, "ranks L0.E9"),
        ("layer,expert,score\n0,1,\n", BadConfig, "1 of 1 scores empty"),
        ("layer,expert,score\n", BadConfig, "0 of 0 scores empty"),
        ("layer,expert\n0,1\n", BadConfig, "give a CSV with the columns"),
        ("layer,expert,score\n0,1,high\n", BadConfig, "give a CSV with the columns"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, error, why):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(error, match=why):
        read_scores(path, UNITS)


def test_bad_names_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "load.csv").write_text("layer,expert,score\n")
    files = [str(tmp_path / folder / "load.csv") for folder in ("a", "b")]
    for names in (files, ["load", files[0]]):
        with pytest.raises(BadConfig, match="two rankings would be called 'load'"):
            check_names(names)
    with pytest.raises(BadConfig, match="did you mean 'load'"):
        check_names(["laod"])
    with pytest.raises(BadConfig, match=r"nowhere.csv is not there"):
        check_names(["nowhere.csv"])
    with pytest.raises(BadConfig, match="random is the control"):
        check_names(["random"])
    assert check_names(["load", "load", "random"]) == ("load", "random")


def test_a_ranking_is_stable_if_every_document_says_the_same():
    same = Ranking("same", lambda t: t.sum() * np.arange(40.0), 20)
    noise = np.random.default_rng(0).normal(size=(40, 20))
    lots = Ranking("lots", lambda t: noise @ t, 20)
    given = Ranking("given", lambda _t: np.arange(40.0), 20, from_documents=False)
    found = stability([same, lots, given]).set_index("ranking")
    assert found.loc["same", "spearman"] == pytest.approx(1)
    assert found.loc["same", "top_jaccard"] == 1
    assert abs(found.loc["lots", "spearman"]) < 0.5
    assert np.isnan(found.loc["given", "spearman"])
    assert found.loc["same", "n_top"] == 4


def eight_experts(seed: int = 0) -> Visits:
    """Two layers of eight experts, 30 documents; the last expert is never visited."""
    r = np.random.default_rng(seed)
    units = tuple(ExpertAddress(layer, e) for layer in (0, 1) for e in range(8))
    load = r.poisson(np.tile(np.arange(8)[::-1] * 5 + 1, 2), (30, 16)).astype(float)
    load[:, [7, 15]] = 0
    mass = load * r.uniform(0.2, 0.8, 16)
    tokens = np.full(30, 100.0)
    return Visits(units, tokens, load, mass, load, mass, load, {0: tokens, 1: tokens})


def test_importance_that_is_gate_mass_aligns_with_it_in_every_layer():
    v = eight_experts()
    found = routing_alignment([Ranking("mine", lambda t: 3 * (t @ v.mass) - 1, 30)], v, draws=20)
    mass = found[found["routing"] == "gate_mass"]
    assert mass["spearman"].tolist() == pytest.approx([1, 1, 1])
    assert mass["kendall"].tolist() == pytest.approx([1, 1, 1])
    assert mass["partial_spearman"].tolist() == pytest.approx([1, 1, 1])
    assert mass["layer"].isna().tolist() == [False, False, True]
    assert mass["n_units"].tolist() == [7, 7, 14]
    load = found[found["routing"] == "load"]
    assert load["partial_spearman"].isna().all()
    assert (load["spearman_low"] <= load["spearman"]).all()
    assert (load["spearman"] <= load["spearman_high"]).all()


def test_importance_that_follows_load_alone_has_no_correlation_left_given_load():
    v = eight_experts()
    loads = routing_alignment([Ranking("mine", lambda t: t @ v.load, 30)], v, draws=5)
    assert loads.loc[loads["routing"] == "gate_mass", "partial_spearman"].isna().all()
    assert routing_alignment([Ranking("load", lambda t: t @ v.load, 30)], v, draws=5).empty  # not with itself


def test_the_mean_over_layers_ignores_differences_between_layers():
    v = eight_experts()
    up = np.where(v.layer == 0, -1.0, 1.0)  # the order is reversed in layer 0
    found = routing_alignment([Ranking("mine", lambda t: up * (t @ v.load) + 1e6 * v.layer, 30)], v, draws=5)
    rows = found[found["routing"] == "load"]["spearman"].tolist()
    assert rows == pytest.approx([-1, 1, 0], abs=0.02)


def test_the_spread_of_routing_is_per_layer():
    load = [[6.0, 3, 2, 1]]
    units = tuple(ExpertAddress(3, e) for e in range(4))
    v = Visits(units, np.array([12.0]), *[np.array(load)] * 5, {3: np.array([12 * 1.02965])})
    row = routing_spread(v).iloc[0]
    assert row["load_cv"] == pytest.approx(0.62361, abs=5e-6)
    assert row["load_gini"] == pytest.approx(1 / 3)
    assert row["load_max_over_mean"] == 2
    assert row["load_evenness"] == pytest.approx(0.86479, abs=5e-6)
    assert row["effective_experts"] == pytest.approx(2.80009, abs=2e-5)

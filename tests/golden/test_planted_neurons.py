"""Neurons that fire for chosen concepts and nothing else: every table must name exactly these, and how well they do."""

from __future__ import annotations

import pytest

import moe_lens as ml
from moe_lens.corpus.batches import tokenize
from tests.planted import CONCEPTS, ONE_CONCEPT, THREE_CONCEPTS, planted_model, planted_text


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return ml.load(str(planted_model(folder / "moe"))), ml.corpus(str(planted_text(folder / "text.jsonl")))


@pytest.fixture(scope="module")
def result(planted):
    lens, text = planted
    return ml.probe(lens, text, concepts=CONCEPTS, k=(1,), permutations=99, progress=False)


@pytest.fixture(scope="module")
def best(result):
    return result.best().set_index("concept")


@pytest.fixture(scope="module")
def neurons(result):
    return result.neurons.frame.set_index(["layer", "expert", "neuron"])


@pytest.fixture(scope="module")
def auroc(result):
    table = result.comparison
    return table[table.metric == "auroc"].set_index(["arm", "concept"])


@pytest.mark.parametrize("concept", ONE_CONCEPT)
def test_a_planted_neuron_is_found_with_perfect_held_out_score(best, concept):
    row = best.loc[concept]
    assert (row.layer, row.expert, *row.neurons, *row.sign) == (*ONE_CONCEPT[concept], 1)
    assert row.f1 == row.auroc == row.auroc_validate == 1.0
    assert row.n_pos_test >= 100
    assert row.status == "separable"


def test_no_other_probe_of_any_cell_is_perfect(result):
    perfect = result.cells[(result.cells.f1 == 1) | (result.cells.auroc == 1)]
    found = {(row.concept, row.layer, row.expert, *row.neurons) for row in perfect.itertuples()}
    assert found == {(concept, *place) for concept, place in ONE_CONCEPT.items()}


def test_the_answer_is_not_trivial(result):
    """Other experts see both classes of every concept, and have neurons that tell something of some."""
    usable = result.cells[result.cells.status.isin(["ok", "separable"])].groupby("concept")
    assert (usable.size() >= 10).all()
    second = usable.auroc.apply(lambda scores: scores.nlargest(2).iloc[1])
    assert second.between(0.5, 0.95).all()
    assert second.max() > 0.8


def test_the_digit_neuron_does_not_tell_domains_with_equally_many_digits_apart(result):
    layer, expert, neuron = ONE_CONCEPT["digit"]
    cells = result.cells
    (here,) = cells[(cells.layer == layer) & (cells.expert == expert) & (cells.concept == "upper")].itertuples()
    assert here.status == "ok"
    assert here.neurons[0] != neuron


@pytest.mark.parametrize("concept", THREE_CONCEPTS)
def test_a_neuron_planted_for_three_concepts_is_the_best_for_each(best, concept):
    row = best.loc[concept]
    assert (row.layer, row.expert, *row.neurons, *row.sign) == (*THREE_CONCEPTS[concept], 1)
    assert 0.8 < row.auroc < 0.95, "it fires for the other two as well"


def test_polysemanticity_is_reported_of_that_neuron_and_of_no_other(neurons):
    (place,) = set(THREE_CONCEPTS.values())
    assert neurons.participation_ratio[place] > 3
    assert abs(neurons.selectivity[place]) < 0.05
    assert neurons.index[neurons.n_groups_detected >= 3].tolist() == [place]
    assert neurons.participation_ratio.idxmax() == place


@pytest.mark.parametrize("concept", ONE_CONCEPT)
def test_a_neuron_with_one_concept_is_reported_as_serving_one(neurons, concept):
    row = neurons.loc[ONE_CONCEPT[concept]]
    assert (row.best_group, row.best_auroc) == (concept, 1.0)
    assert row.participation_ratio < 2
    assert row.selectivity > 0.25


def test_raw_and_held_out_agree_where_one_cell_is_perfect(auroc):
    for concept in ONE_CONCEPT:
        assert auroc.moe["raw", concept] == auroc.moe["held_out", concept] == 1.0
        assert auroc.moe["homogeneous", concept] < 0.9, "cells that were all alike would not reach it"


def test_over_all_tokens_a_perfect_neuron_scores_what_its_routing_lets_it_see(planted, result, best, auroc):
    """A positive it sees comes first; one it misses ties with the negatives it misses, and comes before the others."""
    counts = tokenize(planted[1], planted[0].tokenizer, CONCEPTS, max_length=64).counts()
    every, seen = counts[(counts.concept == "digit") & (counts.split == "test")].iloc[0], best.loc["digit"]
    missed_pos = 1 - seen.n_pos_test / every.positives
    missed_neg = 1 - (seen.n_test - seen.n_pos_test) / (every.tokens - every.positives)
    assert auroc.moe["whole_population", "digit"] == pytest.approx(1 - missed_pos * missed_neg / 2, abs=1e-6)


def test_the_router_knows_what_came_before_and_not_the_present_character(auroc):
    for concept in ("digit", *THREE_CONCEPTS):
        assert abs(auroc.moe["routing_only", concept] - 0.5) < 0.05, concept
    for concept in ("after_digit", "upper"):
        assert auroc.moe_low["routing_only", concept] > 0.55, concept


def test_exchanged_labels_never_do_as_well_as_what_is_planted(auroc):
    null = auroc.loc["null"].drop(index="__mean__")
    assert (null.p_value[list(ONE_CONCEPT)] == 0.01).all()
    assert (null.p_value[list(THREE_CONCEPTS)] <= 0.05).all()
    assert (auroc.moe["held_out"][list(ONE_CONCEPT)] > null.moe_high[list(ONE_CONCEPT)]).all()


def test_a_label_drawn_by_lot_is_not_found(auroc):
    coin = auroc.xs("coin", level="concept")
    assert coin.moe_low["null"] < coin.moe["held_out"] < coin.moe_high["null"]
    assert coin.p_value["null"] > 0.05
    for arm in ("held_out", "routing_only", "whole_population"):
        assert abs(coin.moe[arm] - 0.5) < 0.12, arm

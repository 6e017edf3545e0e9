"""Contrasts, need, assignment and the verdict against numbers worked by hand (METRICS 3, O7, O8)."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score

from moe_lens.causal.trial import cells
from moe_lens.causal.trial.assignment import assignment, standardised_effects
from moe_lens.causal.trial.cells import Interval
from moe_lens.causal.trial.matching import deranged, load_matched, load_strata, stratified_sample
from moe_lens.causal.trial.need import Beside, GateCurve, Need, _Cell, _difference, needed, studentised_p
from moe_lens.causal.trial.verdict import Evidence, exclusive, q_values, shares, verdict
from moe_lens.errors import BadConfig
from moe_lens.stats import document_multiplicities

NEED = Interval(0.2, 0.1, 0.3)
POWERED = {"documents_z1": 40, "documents_r1": 50, "visits": 400, "abstained": 0.0, "routing": Interval(0.8, 0.7, 0.9)}


def times(n_documents: int, draws: int = 500) -> np.ndarray:
    return document_multiplicities(n_documents, draws, seed=0).astype(np.float64)


def a_need(
    need: Interval = NEED, *, exclusivity: Interval = NEED, documents: int = 20, effect: Interval | None = None
) -> Need:
    """What is lost without the expert is its need, if not said otherwise: the one beside it costs nothing."""
    return Need(need, 0.001, "co-selected", exclusivity, documents, 40, 0.0, effect or need)


def test_o7_specificity_is_the_contrast_minus_that_of_the_controls():
    z = np.array([True, False])
    of = [cells.contrast(np.array(pair), z) for pair in ((0.30, 0.05), (0.10, 0.08), (0.06, 0.04))]
    assert cells.specificity(of[0], of[1:]) == pytest.approx(0.23)
    assert np.isnan(cells.specificity(of[0], []))


def test_contrasts_of_a_worked_example():
    z = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    r = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0], bool)
    effect = np.array([0.4, 0.2, 0.3, 0, 0.1, 0, 0, 0, 0, 0])
    assert cells.contrast(effect, z) == pytest.approx(0.9 / 4 - 0.1 / 6)
    assert cells.conditional_contrast(effect, z, r) == pytest.approx(0.2)
    assert cells.decomposition(effect, z, r) == pytest.approx(((3 / 4 - 1 / 6) * 0.3, 1 / 6 * 0.2))
    assert cells.lift(effect, z) == pytest.approx(0.9 / 0.4)
    assert cells.effect_ranking(effect, z)[0] == pytest.approx((3 * 6 + 2.5) / 24)
    counts = cells.cell_counts(z, r, np.repeat([0, 1], 5), 2)
    assert counts.tolist() == [[3, 1, 1, 0], [0, 0, 0, 5]]
    assert cells.routing_auroc(counts, times(2)).value == pytest.approx((3 / 4 + 5 / 6) / 2)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(-50, 50)), min_size=2, max_size=40))
def test_the_decomposition_is_exact_where_nothing_happens_off_the_route(rows):
    z, r, effect = (np.array(column) for column in zip(*rows, strict=True))
    z[:2] = True, False
    effect = np.where(r, effect / 10, 0)
    assert sum(cells.decomposition(effect, z, r)) == pytest.approx(cells.contrast(effect, z), abs=1e-9)


@given(st.integers(0, 10_000))
def test_the_auroc_of_a_label_is_its_balanced_accuracy(seed):
    rng = np.random.default_rng(seed)
    z, r = rng.random((2, 60)) < 0.5
    found = cells.routing_auroc(cells.cell_counts(z, r, np.arange(60) // 6, 10), times(10))
    assert found.value == pytest.approx((z[r].mean() + (~z[~r]).mean()) / 2)
    assert found.low <= found.value <= found.high


def visits(*documents: tuple[list[float], list[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effects, z and document of visits; each document gives those at z=1 and those at z=0."""
    rows = [
        (e, z, d) for d, cell in enumerate(documents) for z, effects in zip((1, 0), cell, strict=True) for e in effects
    ]
    effect, z, document = zip(*rows, strict=True)
    return np.array(effect), np.array(z, bool), np.array(document)


def others(n_visits: int, n_documents: int, *, effect: float = 0.0, gate: float = 0.5) -> Beside:
    """Co-selected experts that all lose the same at the same gate."""
    flat = GateCurve(np.zeros(0), np.ones((n_documents, 1)), np.full((n_documents, 1), effect))
    return Beside(np.full(n_visits, effect), np.full(n_visits, gate), np.full(n_visits, 0.5), flat)


def test_need_is_a_mean_over_documents_of_means_over_tokens():
    rows = visits(([0.1, 0.1, 0.1, 0.5], [0.3]), ([0.6], []), ([], [0.2]))
    found = needed(*rows, times(3), beside=others(7, 3, effect=0.05))
    assert (found.need.value, found.basis) == (pytest.approx(0.4 - 0.05), "co-selected")
    assert (found.documents, found.documents_off) == (2, 2)
    assert np.isnan(found.exclusivity.value)  # two documents are too few


def test_exclusivity_is_the_need_at_the_label_minus_elsewhere():
    found = needed(*visits(*[([0.5, 0.3], [0.1])] * 15, *[([], [0.3])] * 15), times(30), beside=others(60, 30))
    assert found.exclusivity.value == pytest.approx(0.4 - 0.2)


@pytest.mark.parametrize(("off", "basis", "value"), [(30, "off-label", 0.3), (29, "absolute", 0.4)])
def test_without_a_co_selected_expert_need_is_against_its_other_tokens_if_there_are_enough(off, basis, value):
    found = needed(*visits(*[([0.4], [0.1])] * off, *[([0.4], [])] * 5), times(off + 5))
    assert (found.basis, found.need.value) == (basis, pytest.approx(value))


def at_gates(own: float, *, does: float = 0.0, seed: int = 0, n: int = 4000) -> Need:
    """Need of an expert whose gate is `own` of the two; every expert loses gate squared, this one `does` more."""
    rng = np.random.default_rng(seed)
    document = rng.integers(0, 100, n)
    gate, expert = rng.uniform(0.02, 0.98, n), rng.integers(0, 8, n)
    curve = GateCurve.of_layer(expert, gate, gate**2, document, n_experts=8, n_documents=100)[3]
    share = np.clip(own + rng.normal(0, 0.02, 500), 0.02, 0.98)
    beside = Beside((1 - share) ** 2, 1 - share, share, curve)
    return needed(share**2 + does, np.ones(500, bool), np.sort(rng.integers(0, 100, 500)), times(100), beside=beside)


@pytest.mark.parametrize("own", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_gate_larger_or_smaller_than_the_others_is_no_need_by_itself(own):
    assert at_gates(own).need.value == pytest.approx(0, abs=0.05)
    assert at_gates(own, does=0.2).need.value == pytest.approx(0.2, abs=0.05)
    assert at_gates(own).gate_advantage == pytest.approx(own**2 - (1 - own) ** 2, abs=0.05)


def test_an_expert_with_a_small_gate_that_does_nothing_is_not_credited_with_what_others_do():
    rng = np.random.default_rng(0)
    gate, document = rng.uniform(0.02, 0.98, 4000), rng.integers(0, 100, 4000)
    curve = GateCurve.of_layer(np.zeros(4000, int), gate, 0.3 * gate, document, n_experts=2, n_documents=100)[1]
    own = rng.uniform(0.02, 0.1, 500)
    beside = Beside(0.3 * (1 - own), 1 - own, own, curve)
    found = needed(np.zeros(500), np.ones(500, bool), np.sort(rng.integers(0, 100, 500)), times(100), beside=beside)
    assert found.need.value < 0.0


def test_the_curve_leaves_out_the_expert_under_test():
    gate, document = np.full(100, 0.5), np.arange(100) % 10
    expert = np.arange(100) % 2
    effect = np.where(expert == 0, 1.0, 0.25)
    curves = GateCurve.of_layer(expert, gate, effect, document, n_experts=2, n_documents=10)
    assert curves[0].heights(np.ones((1, 10)))[0, -1] == pytest.approx(0.25)
    assert curves[1].heights(np.ones((1, 10)))[0, -1] == pytest.approx(1.0)


def test_the_order_of_visits_changes_nothing():
    rng = np.random.default_rng(1)
    effect, z, document = rng.normal(size=300), rng.random(300) < 0.5, rng.integers(0, 40, 300)
    order = rng.permutation(300)
    a, b = (needed(effect[i], z[i], document[i], times(40)) for i in (np.arange(300), order))
    assert a.need.low == pytest.approx(b.need.low)
    assert a.p == b.p


def test_p_is_one_where_there_is_nothing_to_judge_by():
    assert needed(*visits(([0.5], []), ([], [0.2])), times(2)).p == 1
    assert needed(*visits(([], [0.5]), ([], [0.2])), times(2)).p == 1


def test_p_of_the_same_number_in_all_documents_is_the_smallest_there_is():
    for value, wanted in ((0.5, 1 / 501), (0.0, 1), (-0.5, 1)):
        assert needed(*visits(*[([value], [])] * 12), times(12)).p == wanted


def test_p_counts_draws_on_the_scale_of_their_errors():
    draws, errors = np.array([0.1, 0.3, 0.5, 0.3]), np.array([0.1, 0.1, 0.1, 0.0])
    assert studentised_p(0.2, 0.1, draws, errors) == pytest.approx((1 + 2) / 5)  # t 2; drawn -1, 1, 3, no spread


def test_the_error_of_a_difference_within_documents_is_that_of_a_paired_test():
    on, off = np.random.default_rng(0).normal(size=(2, 30)) + np.arange(30)
    cells_of = [_Cell(np.ones(30), y, np.zeros((30, 0))) for y in (on, off)]
    value, error = _difference(cells_of, np.ones((1, 30)), np.zeros((1, 0)))
    assert value[0] == pytest.approx((on - off).mean())
    assert error[0] == pytest.approx((on - off).std() / np.sqrt(30))


def test_o8_assignment_of_three_labels():
    found = assignment(np.array([[0.9, 0.1, 0.2], [0, 0.8, 0.1], [0.3, 0.2, 0.5]]))
    assert found.trace == pytest.approx(2.2)
    assert (found.p, found.p_floor) == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert found.reciprocal_rank == 1
    assert found.is_exact


def test_double_centring_takes_away_what_experts_and_labels_have_on_their_own():
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(2, 6))
    assert assignment(rows[:, None] + columns).score == pytest.approx(0)
    matrix = np.eye(6) + rows[:, None] + columns
    assert assignment(matrix).score == pytest.approx(1 - 1 / 6)
    assert assignment(matrix).p == pytest.approx(1 / 720)


def test_labels_change_places_within_strata_only():
    matrix = np.eye(4)
    assert assignment(matrix, stratum=np.array([0, 0, 1, 1])).p == pytest.approx(1 / 4)
    assert assignment(matrix).p == pytest.approx(1 / 24)


def test_drawn_permutations_give_nearly_the_exact_p():
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(6, 6)) + 0.4 * np.eye(6)
    exact, drawn = assignment(matrix), assignment(matrix, n_permutations=700)
    assert not drawn.is_exact
    assert drawn.p == pytest.approx(exact.p, abs=0.06)


def test_the_matrix_must_be_square():
    with pytest.raises(BadConfig, match="shape"):
        assignment(np.zeros((2, 3)))


def test_effects_are_standardised_by_their_spread_between_documents():
    effect = np.array([1.0, 3.0, 0.0, 0.0])[:, None]
    z, document = np.array([1, 1, 0, 0], bool)[:, None], np.array([0, 1, 0, 1])
    # difference 2; influences of documents (1-2)/2 and (3-2)/2: error sqrt(1/2)
    assert standardised_effects(effect, z, document).item() == pytest.approx(2 / np.sqrt(0.5))
    assert standardised_effects(effect, np.zeros((4, 1), bool), document).item() == 0


def test_tokens_that_stand_for_several_weigh_as_much_as_several():
    rng = np.random.default_rng(0)
    effect, times_each = rng.normal(size=(40, 3)).round(1), rng.integers(0, 4, 40)
    z, document = rng.random((40, 2)) < 0.4, np.arange(40) // 5
    many = np.repeat(np.arange(40), times_each)
    column, label, weight = effect[:, 0], z[:, 0], times_each.astype(float)
    for score in (cells.contrast, cells.lift, cells.effect_ranking):
        assert score(column, label, weight) == pytest.approx(score(column[many], label[many]))
    grade = rng.integers(0, 5, 40)
    expected = cells.dose_response(column[many], grade[many])
    assert cells.dose_response(column, grade, weight) == pytest.approx(expected)
    both = standardised_effects(effect, z, document, np.stack([weight, weight], 1))
    np.testing.assert_allclose(both, standardised_effects(effect[many], z[many], document[many]))


def test_ranking_and_dose_response_are_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(1)
    effect, z = rng.normal(size=200).round(1), rng.random(200) < 0.3
    weight, grade = rng.random(200), rng.integers(0, 5, 200)
    wanted = [f(z, effect, sample_weight=weight) for f in (roc_auc_score, average_precision_score)]
    assert cells.effect_ranking(effect, z, weight) == pytest.approx(wanted)
    assert cells.effect_ranking(np.zeros(200), z) == pytest.approx([0.5, z.mean()])
    assert np.isnan(cells.effect_ranking(effect, np.zeros(200, bool))).all()
    assert cells.dose_response(effect, grade) == pytest.approx(spearmanr(effect, grade).statistic)
    assert np.isnan(cells.dose_response(effect, np.zeros(200)))


def test_replaceability_is_a_ratio_of_means_over_documents():
    document = np.array([0, 0, 1, 2, 2])
    lost = np.array([1.0, 3, 2, 2.5, 1.5])  # means 2, 2, 2
    assert cells.replaceability(lost, lost / 4, document) == pytest.approx(0.75)
    assert cells.replaceability(lost, np.array([0, 0, 3.0, 0, 0]), document) == pytest.approx(0.5)
    assert np.isnan(cells.replaceability(np.array([1.0, 1, -1, 0, 0]), lost, document))
    assert np.isnan(cells.replaceability(lost[:2], lost[:2], document[:2]))


@pytest.mark.parametrize(
    ("change", "needs", "q", "wanted"),
    [
        ({}, [NEED, NEED], [0.01, 0.01], "supported"),
        ({"documents_z1": 29}, [NEED, NEED], [0.01, 0.01], "underpowered"),
        ({"documents_r1": 29}, [NEED, NEED], [0.01, 0.01], "underpowered"),
        ({"visits": 199}, [NEED, NEED], [0.01, 0.01], "underpowered"),
        ({"abstained": 0.21}, [NEED, NEED], [0.01, 0.01], "underpowered"),
        ({"visits": 199, "routing": Interval(0.5, 0.45, 0.54)}, [NEED, NEED], [0.01, 0.01], "underpowered"),
        ({"routing": Interval(0.5, 0.45, 0.54)}, [NEED, NEED], [0.01, 0.01], "refuted"),
        ({"routing": Interval(0.57, 0.54, 0.6)}, [NEED, NEED], [0.01, 0.01], "undecided"),
        ({}, [NEED, NEED], [0.01, 0.05], "undecided"),
        ({}, [NEED, Interval(0.2, -0.01, 0.4)], [0.01, 0.01], "undecided"),
        ({}, [NEED, Interval(0.019, 0.01, 0.03)], [0.01, 0.01], "undecided"),
        ({}, [Interval(0.2, -0.01, 0.4)] * 2, [0.001, 0.001], "undecided"),
        ({}, [Interval(0.0, -0.01, 0.01)] * 2, [0.9, 0.9], "routing-only"),
        ({}, [Interval(0.01, 0.001, 0.019)] * 2, [0.01, 0.01], "routing-only"),
        ({}, [Interval(0.0, -0.01, 0.01), NEED], [0.9, 0.01], "undecided"),
        ({"routing": Interval(0.57, 0.54, 0.6)}, [Interval(0.0, -0.01, 0.01)] * 2, [0.9, 0.9], "undecided"),
        ({}, [Interval()] * 2, [np.nan] * 2, "undecided"),
    ],
)  # fmt: skip
def test_the_rule_is_read_from_the_top(change, needs, q, wanted):
    assert verdict(Evidence(**{**POWERED, **change}), [a_need(need) for need in needs], q) == wanted


def test_support_needs_ten_documents_where_label_and_routing_meet():
    for documents, wanted in ((9, "undecided"), (10, "supported")):
        assert verdict(Evidence(**POWERED), [a_need(documents=documents)] * 2, [0.01] * 2) == wanted


@pytest.mark.parametrize(
    ("need", "effects", "wanted"),
    [
        (NEED, [Interval(0.3, 0.2, 0.4)] * 2, "supported"),
        (Interval(0.2, -0.01, 0.4), [Interval(0.3, 0.2, 0.4)] * 2, "undecided"),
        (NEED, [Interval(-0.001, -0.01, 0.01)] * 2, "undecided"),
        (NEED, [Interval(0.3, 0.2, 0.4), Interval(0.01, -0.001, 0.02)], "undecided"),
        (NEED, [Interval(0.3, 0.2, 0.4), Interval()], "undecided"),
        (Interval(-0.3, -0.4, -0.2), [Interval(0.6, 0.5, 0.7)] * 2, "undecided"),
        (Interval(-0.3, -0.4, -0.2), [Interval(0.6, 0.5, 0.7), Interval(0.0, -0.01, 0.01)], "routing-only"),
        (Interval(-0.3, -0.4, -0.2), [Interval(0.015, 0.01, 0.03)] * 2, "routing-only"),
    ],
)
def test_an_expert_that_costs_nothing_is_not_needed_and_one_that_costs_much_is_not_idle(need, effects, wanted):
    needs = [a_need(need, effect=effect) for effect in effects]
    assert verdict(Evidence(**POWERED), needs, [0.01, 0.01]) == wanted


def test_the_effect_beside_the_need_is_a_mean_of_documents_inside_and_outside_the_label():
    document = np.array([0, 0, 0, 1, 1, 2])
    z = np.array([1, 1, 0, 1, 0, 0], bool)
    effect = np.array([0.1, 0.3, 5.0, 0.6, 1.0, 3.0])
    times = np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0]], float)
    found = needed(effect, z, document, times)
    assert found.effect.value == pytest.approx((0.2 + 0.6) / 2)
    assert found.effect_off.value == pytest.approx((5 + 1 + 3) / 3)
    drawn = [0.4, 0.2, 0.6]
    assert (found.effect.low, found.effect.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.02)
    assert np.isnan(needed(effect, np.zeros(6, bool), document, times).effect.value)


def test_a_noise_floor_above_the_threshold_takes_its_place():
    assert verdict(Evidence(**POWERED), [a_need()] * 2, [0.01] * 2, delta=0.25) == "undecided"


@pytest.mark.parametrize(
    ("intervals", "wanted"),
    [
        ([NEED, NEED], "exclusive"),
        ([NEED, Interval(0.2, -0.1, 0.5)], "unknown"),
        ([NEED, Interval()], "by routing"),
        ([Interval(-0.1, -0.2, 0.01)] * 2, "not exclusive"),
    ],
)
def test_exclusivity_in_a_word(intervals, wanted):
    assert exclusive([a_need(exclusivity=x) for x in intervals]) == wanted


def test_underpowered_labels_are_no_members_of_the_family():
    assert q_values([0.01, 0.04, 0.5], [True, True, False]) == pytest.approx([0.02, 0.04, np.nan], nan_ok=True)


def test_shares_count_all_labels():
    table = shares(["supported"] * 2 + ["underpowered"] * 8).set_index("verdict")
    supported = table.T["supported"]
    assert [supported["n"], supported["share"]] == [2, 0.2]
    assert [supported["low"], supported["high"]] == pytest.approx([0.0567, 0.5098], abs=1e-3)
    assert table["n"].sum() == 10


def test_controls_lie_within_the_caliper_in_load_and_in_gate_mass():
    load = np.array([100, 120, 129, 100, 0, 80])
    mass = np.array([10, 11, 10, 13, 10, 8.0])
    assert load_matched(0, load, mass, among=range(6)) == [1, 5]  # 2: load, 3: gate mass, 4: never visited
    assert load_matched(0, load, mass, among=range(6), most=1) == [1]
    assert load_matched(4, load, mass, among=range(6)) == []


def test_strata_hold_experts_of_like_load():
    load = np.array([5, 50, 1, 30, 2, 40, 3, 60])
    assert load_strata(load).tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert set(load_strata(load[:7]).tolist()) == {0}


def test_a_sample_has_labels_of_all_loads():
    load = np.arange(40)[::-1]
    for seed in range(5):
        chosen = stratified_sample(load, 8, seed=seed)
        assert sorted(load[chosen] // 5) == list(range(8))
    assert len(stratified_sample(load, 50, seed=0)) == 40


@pytest.mark.parametrize(("n", "seed"), [*product((2, 3, 10), range(5))])
def test_a_derangement_moves_every_label_and_loses_none(n, seed):
    order = deranged(n, seed=seed)
    assert sorted(order) == list(range(n))
    assert (order != np.arange(n)).all()

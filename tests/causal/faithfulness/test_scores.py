"""Set-function scores against numbers made by hand (METRICS 6.1: O1, O2, O4, O5) and against brute force."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.causal.faithfulness.scores import (
    aopc,
    circuit_faithfulness,
    cmd,
    cpr,
    curves,
    limits,
    rank_p,
    top_jaccard,
)
from moe_lens.causal.faithfulness.sets import Bins
from moe_lens.errors import BadConfig

O1 = {(): 0.1, (0,): 0.6, (1,): 0.3, (2,): 0.1, (0, 1): 0.8, (0, 2): 0.6, (1, 2): 0.3, (0, 1, 2): 0.9}
THIRDS = Bins((1 / 3, 2 / 3, 1.0))


def o1(intact: frozenset[int]) -> float:
    return O1[tuple(sorted(intact))]


def comp_of(value, units):
    return lambda top: value(frozenset(units)) - value(frozenset(units) - top)


def suff_of(value, units):
    return lambda top: value(frozenset(units)) - value(top)


@st.composite
def set_functions(draw, most: int = 5):
    n = draw(st.integers(1, most))
    subsets = [frozenset(s) for size in range(n + 1) for s in combinations(range(n), size)]
    values = draw(st.lists(st.floats(-2, 1), min_size=len(subsets), max_size=len(subsets)))
    table = dict(zip(subsets, values, strict=True))
    return table.__getitem__, draw(st.permutations(range(n)))


def test_o1_scores_of_two_orders():
    comp, suff = curves(o1, (0, 1, 2), (1, 2, 3))
    np.testing.assert_allclose(comp, [0.6, 0.8, 0.8])
    np.testing.assert_allclose(suff, [0.3, 0.1, 0.0], atol=1e-12)
    assert aopc(comp, THIRDS) == pytest.approx(0.7333, abs=5e-5)
    assert aopc(suff, THIRDS) == pytest.approx(0.1333, abs=5e-5)
    comp, suff = curves(o1, (1, 0, 2), (1, 2, 3))
    assert aopc(comp, THIRDS) == pytest.approx(0.6333, abs=5e-5)
    assert aopc(suff, THIRDS) == pytest.approx(0.2333, abs=5e-5)


def test_o1_with_a_zero_bin():
    zero = Bins(THIRDS.shares, include_zero=True)
    comp, suff = curves(o1, (0, 1, 2), (1, 2, 3))
    assert aopc(comp, zero) == pytest.approx(0.55)
    assert aopc(suff, zero, at_zero=0.8) == pytest.approx((0.8 + 0.3 + 0.1) / 4)


def test_o1_limits_and_naopc():
    comp, suff = (limits(score(o1, range(3)), range(3)) for score in (comp_of, suff_of))
    assert (comp.low, comp.high) == pytest.approx((0.4, 0.7333), abs=5e-5)
    assert (suff.low, suff.high) == pytest.approx((0.1333, 0.4667), abs=5e-5)
    orders = [aopc(curves(o1, order, (1, 2, 3))[0], THIRDS) for order in permutations(range(3))]
    assert np.mean(orders) == pytest.approx(0.5667, abs=5e-5)
    assert comp.normalised(0.19 / 0.3) == pytest.approx(0.7)
    assert suff.normalised(0.07 / 0.3) == pytest.approx(0.3)


def test_o1_circuit_curve():
    kept = np.array([o1(frozenset(range(k))) for k in range(4)])
    f = circuit_faithfulness(kept, 0.9, 0.1)
    np.testing.assert_allclose(f, [0, 0.625, 0.875, 1], atol=1e-12)
    q = np.arange(4) / 3
    assert (cpr(f, q), cmd(f, q)) == pytest.approx((2 / 3, 1 / 3))


@given(set_functions())
def test_o2_summed_comprehensiveness_is_summed_sufficiency_of_the_reverse(given_):
    value, order = given_
    sizes = range(len(order) + 1)
    comp, _ = curves(value, order, sizes)
    _, suff = curves(value, order[::-1], sizes)
    assert comp.sum() == pytest.approx(suff.sum(), abs=1e-9)


@given(st.lists(st.floats(-3, 1), min_size=1, max_size=8))
def test_o2_cpr_and_cmd_add_up_to_one_where_f_stays_below_one(inner):
    f = np.array([0.0, *inner, 1.0])
    q = np.linspace(0, 1, len(f))
    assert cpr(f, q) + cmd(f, q) == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(set_functions(4), st.data())
def test_limits_are_the_extremes_over_all_orders(given_, data):
    value, order = given_
    sizes = data.draw(st.sets(st.integers(1, len(order)), min_size=1))
    for at, score in enumerate((comp_of, suff_of)):
        means = [curves(value, p, sizes)[at].mean() for p in permutations(order)]
        found = limits(score(value, order), order, sizes=sorted(sizes))
        assert (found.low, found.high) == pytest.approx((min(means), max(means)), abs=1e-9)
        narrow = limits(score(value, order), order, sizes=sorted(sizes), width=1)
        assert found.low - 1e-9 <= narrow.low
        assert narrow.high <= found.high + 1e-9
        wide = limits(score(value, order), order, sizes=sorted(sizes), width=99)
        assert (wide.low, wide.high) == pytest.approx((found.low, found.high))


def test_o4_in_an_additive_model_the_leave_one_out_order_is_optimal():
    effects = np.array([0.5, 0.1, 0.3, 0.0, 0.2])
    value = lambda intact: float(effects[list(intact)].sum())  # noqa: E731
    units = range(5)
    alone = [value(frozenset(units)) - value(frozenset(units) - {u}) for u in units]
    order = np.argsort(-np.array(alone), kind="stable").tolist()
    comp, suff = curves(value, order, range(1, 6))
    np.testing.assert_allclose(comp, np.sort(effects)[::-1].cumsum(), atol=1e-12)
    assert comp.mean() == pytest.approx(limits(comp_of(value, units), units).high)
    assert suff.mean() == pytest.approx(limits(suff_of(value, units), units).low)
    drawn = [curves(value, p, (2,))[0][0] for p in permutations(units)]
    assert np.mean(drawn) == pytest.approx(2 / 5 * effects.sum())
    pair = comp_of(value, units)
    assert pair(frozenset({0, 2})) - pair(frozenset({0})) - pair(frozenset({2})) == pytest.approx(0)


def test_o5_two_equal_units_show_nothing_alone_and_everything_together():
    value = lambda intact: float(bool(intact & {0, 1}))  # noqa: E731
    loss = comp_of(value, range(3))
    assert loss(frozenset({0})) == loss(frozenset({1})) == 0
    assert loss(frozenset({0, 1})) == 1


def test_a_trapezoid_weighs_bins_by_their_distance():
    bins = Bins((0.1, 0.2, 0.5), aggregate="trapezoid")
    assert aopc(np.array([0.0, 1.0, 1.0]), bins) == pytest.approx((0.05 + 0.3) / 0.4)
    assert aopc(np.array([[1.0, 1, 1], [2, 2, 2]]), bins).tolist() == pytest.approx([1, 2])
    assert aopc(np.array([0.7]), Bins((0.1,), aggregate="trapezoid")) == pytest.approx(0.7)


def test_a_share_of_nothing_is_refused():
    kept = np.array([0.5, 1.0])
    assert np.isnan(circuit_faithfulness(kept, 1.0, 0.7, standard_error=0.11)).all()
    assert np.isfinite(circuit_faithfulness(kept, 1.0, 0.7, standard_error=0.09)).all()
    assert np.isnan(circuit_faithfulness(kept, 1.0, 1.0)).all()


def test_rank_p_counts_random_sets_that_do_as_well():
    random = np.array([0.1, 0.2, 0.3])
    assert rank_p(0.25, random) == pytest.approx(2 / 4)
    assert rank_p(0.3, random) == pytest.approx(2 / 4)  # a tie does as well
    assert rank_p(0.25, random, low_is_good=True) == pytest.approx(3 / 4)
    assert rank_p(9.0, random) == pytest.approx(1 / 4)
    assert np.isnan(rank_p(0.3, random[:0]))


def test_top_jaccard():
    assert top_jaccard(np.array([1, 2, 3]), np.array([3, 4, 5])) == pytest.approx(1 / 5)


@pytest.mark.parametrize(
    ("units", "options", "why"),
    [
        (range(9), {}, "give 1 to 8"),
        (range(31), {"width": 5}, "or a beam and 30"),
        (range(3), {"sizes": [4]}, "give prefixes"),
        ((), {}, "limits over 0"),
    ],
)
def test_limits_refuse_what_they_cannot_search(units, options, why):
    with pytest.raises(BadConfig, match=why):
        limits(lambda _top: 0.0, units, **options)

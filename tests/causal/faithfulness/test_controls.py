"""Control sets: as many in each layer, nested over bins, and of equal load where they say so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.causal.faithfulness.controls import CALIPER, matched_like, random_like, random_orders

LAYER = np.repeat([0, 1, 2], 6)
EVERYONE = np.ones(18, bool)
SETS = st.lists(st.booleans(), min_size=18, max_size=18).map(np.array)


def per_layer(sets):
    return np.stack([sets[..., at == LAYER].sum(-1) for at in (0, 1, 2)], axis=-1)


@settings(deadline=None)
@given(SETS, SETS)
def test_control_sets_have_as_many_units_in_each_layer_and_stay_in_the_universe(wanted, member):
    chosen = wanted & member
    place = random_orders(LAYER, 4, seed=1)
    size = np.random.default_rng(0).integers(1, 5, 18).astype(float)
    matched, _ = matched_like(chosen, 3, layer=LAYER, member=member, load=size, mass=size)
    for found in (random_like(chosen, place, layer=LAYER, member=member), matched):
        assert (per_layer(found) == per_layer(chosen)).all()
        assert not (found & ~member).any()


def test_one_draw_is_nested_over_bins_and_draws_differ():
    place = random_orders(LAYER, 30, seed=0)
    small = np.isin(np.arange(18), [0, 7])
    large = np.isin(np.arange(18), [0, 7, 8, 9, 15])
    a, b = (random_like(one, place, layer=LAYER, member=EVERYONE) for one in (small, large))
    assert (b >= a).all()
    assert len(np.unique(a, axis=0)) > 10
    assert np.array_equal(place, random_orders(LAYER, 30, seed=0))


def test_every_unit_of_a_layer_is_drawn_equally_often():
    drawn = random_like(np.isin(np.arange(18), [0, 1]), random_orders(LAYER, 6000), layer=LAYER, member=EVERYONE)
    np.testing.assert_allclose(drawn[:, :6].mean(0), 1 / 3, atol=0.03)
    assert not drawn[:, 6:].any()


def test_matches_have_the_same_load_and_mass_and_are_other_units():
    load = np.tile([100.0, 110, 120, 400, 1000, 5000], 3)
    mass = np.tile([10.0, 11, 30, 40, 100, 500], 3)
    chosen = np.isin(np.arange(18), [0, 7])
    found, within = matched_like(chosen, 50, layer=LAYER, member=EVERYONE, load=load, mass=mass)
    assert within == 1
    assert (found == np.isin(np.arange(18), [1, 6])).all()  # 2 and 8 have the load and not the mass
    assert np.log(1.1) <= CALIPER < np.log(3)
    far, within = matched_like(np.isin(np.arange(18), [5]), 5, layer=LAYER, member=EVERYONE, load=load, mass=mass)
    assert within == 0
    assert (far == np.isin(np.arange(18), [4])).all()  # the nearest


def test_a_layer_without_others_stands_for_itself():
    same = np.ones(18)
    found, within = matched_like(LAYER == 1, 3, layer=LAYER, member=EVERYONE, load=same, mass=same)
    assert (found == (LAYER == 1)).all()
    assert within == 0


def test_matches_are_drawn_by_lot():
    same = np.ones(18)
    found, within = matched_like(np.isin(np.arange(18), [0]), 200, layer=LAYER, member=EVERYONE, load=same, mass=same)
    assert within == 1
    assert found[:, 1:6].mean(0) == pytest.approx(0.2, abs=0.12)

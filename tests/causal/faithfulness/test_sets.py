"""Bins: rounding, universes, axes, presets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.causal.faithfulness.sets import PRESETS, Bins, bins_of, emptied, ranked, top
from moe_lens.errors import BadConfig

LAYER = np.repeat([0, 1], 4)
EVERYONE = np.ones(8, bool)


def chosen(score, share, bins=None, **options):
    options = {"layer": LAYER, "member": EVERYONE, **options}
    return np.flatnonzero(top(np.asarray(score, float), share, bins or Bins((share,)), **options)).tolist()


@pytest.mark.parametrize(
    ("n", "share", "ceil", "truncate"),
    [(64, 0.01, 1, 0), (64, 0.05, 4, 3), (100, 0.07, 7, 7), (1024, 0.001, 2, 1), (10, 1.0, 10, 10), (3, 0.5, 2, 1)],
)
def test_rounding(n, share, ceil, truncate):
    assert Bins((share,)).count(n, share) == ceil
    assert Bins((share,), "truncate").count(n, share) == truncate


def test_presets_are_those_of_the_sources():
    assert bins_of("eraser").shares == (0.01, 0.05, 0.10, 0.20, 0.50)
    assert bins_of("seed").shares == (0.05, 0.10, 0.15, 0.20, 0.25)
    assert bins_of("mib").shares == (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    assert {name: bins.rounding for name, bins in PRESETS.items()} == {
        "default": "ceil", "eraser": "ceil", "seed": "ceil", "mib": "truncate",
    }  # fmt: skip
    assert not any(bins.include_zero for bins in PRESETS.values())
    assert bins_of([0.5]) == Bins((0.5,))
    assert bins_of(PRESETS["seed"]) is PRESETS["seed"]


@pytest.mark.parametrize("bad", [(), (0.0, 0.5), (0.5, 0.2), (0.5, 0.5), (0.5, 1.1), "erasr"])
def test_bad_bins_are_refused(bad):
    with pytest.raises(BadConfig):
        bins_of(bad)


def test_bad_rounding_is_refused():
    with pytest.raises(BadConfig, match="ceil or truncate"):
        Bins((0.5,), rounding="up")  # type: ignore[arg-type]


def test_ties_go_to_the_lower_address_and_nan_comes_last():
    assert ranked(np.array([1.0, np.nan, 2.0, 1.0])).tolist() == [2, 0, 3, 1]


def test_a_global_bin_may_take_one_layer_and_a_per_layer_bin_takes_each():
    score = [9, 8, 7, 6, 1, 2, 3, 4]
    assert chosen(score, 0.5) == [0, 1, 2, 3]
    assert chosen(score, 0.5, universe="per-layer") == [0, 1, 6, 7]


def test_units_outside_the_universe_are_neither_chosen_nor_counted():
    member = np.array([False, True, True, True, True, False, True, True])
    assert chosen([9, 8, 7, 6, 5, 99, 1, 0], 0.5, member=member) == [1, 2, 3]
    assert chosen(np.full(8, np.nan), 1.0, member=member) == np.flatnonzero(member).tolist()


def test_the_gate_mass_axis_takes_units_until_the_mass_is_reached():
    mass = np.array([5.0, 1, 1, 1, 1, 1, 0, 0])
    score = np.arange(8)[::-1]
    assert chosen(score, 0.5, mass=mass) == [0]
    assert chosen(score, 0.51, mass=mass) == [0, 1]
    assert chosen(score[::-1], 0.2, mass=mass) == [4, 5, 6, 7]  # two of no mass come first
    assert chosen(score, 0.55, Bins((0.55,), "truncate"), mass=mass) == [0]
    assert chosen(score, 0.5, mass=mass, universe="per-layer") == [0, 4]
    assert chosen(score, 1.0, mass=mass, universe="per-layer") == [0, 1, 2, 3, 4, 5]


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=8), st.floats(0.01, 1), st.floats(0.01, 1), st.booleans())
def test_a_larger_bin_holds_the_smaller_one(score, a, b, by_mass):
    mass = np.arange(1.0, 9.0) if by_mass else None
    for universe in ("global", "per-layer"):
        small, large = (set(chosen(score, q, mass=mass, universe=universe)) for q in sorted((a, b)))
        assert small <= large


def test_a_layer_is_emptied_only_when_all_of_it_goes():
    assert emptied(np.array([1, 1, 1, 1, 1, 1, 1, 0], bool), LAYER) == (0,)

"""METRICS 1.5 to its digits, on the tables as they were released (not part of this repository)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import moe_lens
from moe_lens.probing.published import Published, read_published

SHARED = Path(os.environ.get("MOE_LENS_REFERENCE", Path(moe_lens.__file__).parents[2] / "shared" / "reference"))
TABLES = SHARED / "expert_strikes_back" / "probing"

RAW = {
    "Mixtral-8x7B-v0.1": (0.9179, 0.9633), "Llama-3.2-3B": (0.8509, 0.9357), "OLMo-1B-0724-hf": (0.8201, 0.9383),
    "OLMo-7B-0724-hf": (0.8161, 0.9353), "pythia-12b": (0.8082, 0.9126),
}  # fmt: skip
CELLS = {
    "Mixtral-8x7B-v0.1": 256, "Llama-3.2-3B": 28, "OLMo-1B-0724-hf": 16, "OLMo-7B-0724-hf": 32, "pythia-12b": 36,
}  # fmt: skip


@pytest.fixture(scope="module")
def tables() -> Published:
    if not TABLES.is_dir():
        pytest.skip(f"no released tables in {TABLES}: set MOE_LENS_REFERENCE to the folder that holds them")
    return read_published([TABLES / f"{model}.csv.gz" for model in RAW])


@pytest.fixture(scope="module")
def found(tables: Published) -> pd.DataFrame:
    return tables.controls(k=1).set_index("model")


class TestParity:
    """METRICS 1.5 to its digits, and T3 of the study that its numbers come from."""

    def test_mean_best_f1(self, tables):
        curve = tables.curve().round(4)
        assert set(curve.index) == set(RAW)
        for model, (first, last) in RAW.items():
            assert (curve.loc[model, 1], curve.loc[model, 64]) == (first, last), model

    def test_always_positive(self, found):
        assert round(found.loc["Mixtral-8x7B-v0.1", "always_positive"], 4) == 0.8789
        dense = found[found["role"] == "dense"]["always_positive"]
        assert (round(dense.min(), 3), round(dense.max(), 3)) == (0.676, 0.679)

    def test_prevalence_standardised(self, tables, found):
        first, last = found["f1_balanced"].round(4), tables.controls(k=64).set_index("model")["f1_balanced"].round(4)
        assert (first["Mixtral-8x7B-v0.1"], last["Mixtral-8x7B-v0.1"]) == (0.9138, 0.9648)
        assert (first["Llama-3.2-3B"], last["Llama-3.2-3B"]) == (0.8456, 0.9336)

    def test_one_random_expert_a_layer(self, found):
        """METRICS has the mean of 300 draws, .8757; the exact mean lies inside that mean's noise."""
        moe = found.loc["Mixtral-8x7B-v0.1"]
        assert round(moe["one_expert_sd"], 4) == 0.0043
        assert moe["one_expert"] == pytest.approx(0.8757, abs=3 * 0.0043 / np.sqrt(300))
        assert moe["one_expert_balanced"] == pytest.approx(0.8677, abs=0.001)

    def test_cells_and_test_sets(self, tables, found):
        assert dict(found["n_cells"]) == CELLS
        assert set(found["n_concepts"]) == {58}
        moe = tables.frame[tables.frame["role"] == "moe"]
        assert (len(moe), int((moe["status"] == "too_few").sum())) == (103_936, 2_975)

    def test_winners_below_their_always_positive_probe(self, found):
        below = found["share_winners_below"].round(3)
        assert (below["Mixtral-8x7B-v0.1"], below["pythia-12b"]) == (0.034, 0.172)

    def test_the_typical_cell(self, found):
        typical = found["typical_cell"].round(4)
        assert (typical["Mixtral-8x7B-v0.1"], typical["Llama-3.2-3B"]) == (0.5969, 0.6605)

    def test_true_and_false_positives_are_whole_tokens(self, tables):
        """The recovered split explains every one of the 150,000 probes."""
        fitted = tables.frame[tables.frame["status"] == "ok"]
        for name in ("tp", "fp"):
            counts = fitted[name].dropna()
            assert (counts - counts.round()).abs().max() < 1e-9
        assert (fitted["fp"].dropna() <= (fitted["n_test"] - fitted["n_pos_test"])[fitted["fp"].notna()] + 1e-9).all()

    def test_search_explains_as_much_as_the_raw_gap(self, tables):
        gaps = tables.gaps(k=1).pivot(index="dense", columns="control", values="gap")
        assert (gaps["search_lift"] > 0.09).all()
        assert (gaps["one_expert"] < 0.65 * gaps["raw"]).all()
        assert (gaps["equal_tests"] < 0.65 * gaps["one_expert"]).all()

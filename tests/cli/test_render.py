"""Numbers and tables as they are shown."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from moe_lens.cli import render, terminal


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.1234, ".123"), (-0.05, "-.050"), (1.0, "1.000"), (0.0, ".000"), (math.nan, "-"), (None, "-"), (12.5, "12.500")],
)
def test_numbers_lose_their_leading_zero(value: float | None, shown: str) -> None:
    assert terminal.number(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(999, "999"), (6_110_000, "6.11M"), (1.28e9, "1.28B"), (2e12, "2T")])
def test_counts_are_short(value: float, shown: str) -> None:
    assert terminal.count(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(12, "12 B"), (1500, "1.5 kB"), (4e9, "4 GB")])
def test_sizes_have_units(value: float, shown: str) -> None:
    assert terminal.size(value) == shown


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json(
        {"a": math.nan, "b": np.float64(0.5), "c": [np.int64(3), (1, None)], 4: np.array([1.0, np.inf])}
    )
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": 0.5, "c": [3, [1, None]], "4": [1.0, None]}


def test_top_experts_are_those_that_a_domain_visits_more_than_the_text_does(capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame(
        {
            "field": "domain",
            "value": ["code", "code", "code", "prose"],
            "layer": 0,
            "expert": [1, 2, 3, 1],
            "n_tokens": 1000,
            "visits": [500, 900, 3, 100],
            "share": [0.5, 0.9, 0.003, 0.1],
            "lift": [2.5, 1.1, 9.0, 0.2],
        }
    )
    render.top_experts(frame)
    out = capsys.readouterr().out
    assert out.index("L0.E1 50% (2.5x)") < out.index("L0.E2 90% (1.1x)")
    assert "L0.E3" not in out, "three visits say nothing about a domain"

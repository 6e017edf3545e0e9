"""Colours used side by side stay apart for those who lack a cone, or a second channel tells them apart."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from moe_lens import plots
from moe_lens.causal.trial.figure import _SYMBOLS, HUES

MACHADO = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Severity 1, of linear RGB: Machado, Oliveira & Fernandes (2009)."""
SIDE_BY_SIDE = {
    "verdicts": {str(verdict): hue for verdict, hue in HUES.items()},
    "models": plots.MODEL_COLOURS,
    "waterfall": {"measured": plots.ORANGE, "routing": plots.SKY, "left": plots.BLUE},
    "heat maps": {"low": plots.RED, "high": plots.BLUE},
    "rankings": {"first": plots.BLUE, "second": plots.ORANGE, "third": plots.GREEN},
}
LEAST = 10.0
"""CIELAB distance (1976) from which on two patches are told apart at a glance; one that is just noticed is 2.3."""


def lab(colour: str, seen_by: str | None) -> Any:
    """CIELAB (D65) of a hex colour, as it is seen."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if seen_by:
        linear = np.clip(np.array(MACHADO[seen_by]) @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    x, y, z = (
        t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29
        for t in to_xyz @ linear / [0.95047, 1.0, 1.08883]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_lab_of_known_colours() -> None:
    np.testing.assert_allclose(lab("#FFFFFF", None), [100, 0, 0], atol=0.02)
    np.testing.assert_allclose(lab("#FF0000", None), [53.24, 80.09, 67.20], atol=0.05)


@pytest.mark.parametrize("eyes", [None, *MACHADO], ids=str)
@pytest.mark.parametrize("used", SIDE_BY_SIDE)
def test_colours_side_by_side_stay_apart(used: str, eyes: str | None) -> None:
    found = {
        f"{a} | {b}": float(np.linalg.norm(lab(x, eyes) - lab(y, eyes)))
        for (a, x), (b, y) in combinations(SIDE_BY_SIDE[used].items(), 2)
    }
    assert min(found.values()) > LEAST, min(found, key=found.__getitem__)


def test_verdicts_have_a_symbol_each() -> None:
    assert len(set(_SYMBOLS)) == len(_SYMBOLS) == len(HUES)

"""Seconds, paired ratios and a table. Nothing here asserts: tests check results, not times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
ROUNDS = 7


def timed(run: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def seconds(run: Callable[[], object]) -> float:
    return timed(run)[0]


def ratio(arm: Callable[[], object], base: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median paired ratio arm / base, and the median seconds of base.

    Rounds alternate between the two, so a machine whose speed drifts gives the same answer.
    """
    arm(), base()
    pairs = [(seconds(arm), seconds(base)) for _ in range(rounds)]
    return statistics.median(a / b for a, b in pairs), statistics.median(b for _, b in pairs)


def show(title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print (what, number, goal) under each other."""
    print(title)
    for what, number, goal in rows:
        print(f"  {what:<66}{number:>12}{f'   goal {goal}' if goal else ''}", flush=True)

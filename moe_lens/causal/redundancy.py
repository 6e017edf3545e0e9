"""Experts that stand in for each other: pair redundancy, replaceability, self-repair by re-routing (METRICS 2.3).

Leave-one-out is blind to backups: two experts that do the same show nothing one at a time. What they lose together,
beyond the sum of what each loses alone, says so. All numbers are ratios or differences of mean effects over the same
documents, with a bootstrap over these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.causal.faithfulness.scores import MIN_SE
from moe_lens.causal.trial.cells import Interval
from moe_lens.errors import BadConfig, nearest
from moe_lens.models.edits import MODES
from moe_lens.plots import number
from moe_lens.stats import document_multiplicities, percentile_interval

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.causal.effects import Effects
    from moe_lens.causal.result import TokenEffects
    from moe_lens.models.edits import Mode
    from moe_lens.models.edits.apply import DownstreamRouting
    from moe_lens.types import ExpertAddress

DRAWS = 10_000


class _Result(ABC):
    """What the three results share: `frame`, `to_dict` and the sentence as a page."""

    @abstractmethod
    def finding(self) -> str:
        """The result in a sentence."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, intervals as value, low and high; None where there is none."""
        flat: dict[str, Any] = {}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if isinstance(value, Interval):
                flat |= {entry.name: value.value, f"{entry.name}_low": value.low, f"{entry.name}_high": value.high}
            else:
                flat[entry.name] = value if isinstance(value, (int, float)) else str(value)
        return {name: None if isinstance(v, float) and np.isnan(v) else v for name, v in flat.items()}

    @property
    def frame(self) -> pd.DataFrame:
        """One row."""
        import pandas as pd

        return pd.DataFrame([self.to_dict()])

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.finding()}"

    def _repr_html_(self) -> str:
        from html import escape

        return f"<p>{escape(self.finding())}</p>"


@dataclass(frozen=True, repr=False)
class Redundancy(_Result):
    """Two experts, each taken away alone and both together: nats per token, 95 % intervals over documents.

    Redundancy 1: perfect backups, 0: effects add up, below 0: each needs the other. It says nothing about a third
    expert that could stand in for both, and under `zero` a large joint effect may come from an input that later layers
    have never seen.
    """

    a: ExpertAddress
    b: ExpertAddress
    mode: str
    routing: str
    alone_a: Interval
    alone_b: Interval
    together: Interval
    redundancy: Interval
    """1 - (alone_a + alone_b) / together; NaN where `together` is below 3 standard errors."""
    super_additivity: Interval
    """together - alone_a - alone_b; above 0 the experts stand in for each other."""
    n_documents: int

    def finding(self) -> str:
        """The numbers in a sentence."""
        refused = np.isnan(self.redundancy.value)
        ratio = "too little together for a ratio" if refused else f"redundancy {_said(self.redundancy)}"
        return (
            f"{self.mode}, {self.routing} routing, {self.n_documents} documents: {self.a} alone {_said(self.alone_a)}, "
            f"{self.b} alone {_said(self.alone_b)}, both {_said(self.together)} nats per token; beyond the sum "
            f"{_said(self.super_additivity)}, {ratio}."
        )


@dataclass(frozen=True, repr=False)
class Replaceability(_Result):
    """An expert dropped, and replaced by the router's next choice at its clean score.

    1: the replacement does all that the expert did, 0: nothing of it, below 0: it does harm. It says nothing about
    what the model could learn to do without the expert.
    """

    expert: ExpertAddress
    zero: Interval
    refilled: Interval
    """Effect of `mask_refill_keep`."""
    replaceability: Interval
    """1 - refilled / zero; NaN where `zero` is below 3 standard errors."""
    n_documents: int

    def finding(self) -> str:
        """The numbers in a sentence."""
        refused = np.isnan(self.replaceability.value)
        ratio = "too little dropped for a ratio" if refused else f"replaceability {_said(self.replaceability)}"
        return (
            f"{self.expert}, {self.n_documents} documents: dropped {_said(self.zero)}, replaced {_said(self.refilled)} "
            f"nats per token; {ratio}."
        )


@dataclass(frozen=True, repr=False)
class SelfRepair(_Result):
    """What later layers make good by choosing other experts.

    Later layers also compensate without choosing others, which frozen routing does not stop.
    """

    expert: ExpertAddress
    mode: str
    live: Interval
    frozen: Interval
    repaired: Interval
    """frozen - live, nats per token; below 0 the new choices make it worse."""
    n_documents: int

    def finding(self) -> str:
        """The numbers in a sentence."""
        return (
            f"{self.mode}({self.expert}), {self.n_documents} documents: {_said(self.frozen)} nats per token with the "
            f"clean choices of later layers, {_said(self.live)} with new ones; repaired by re-routing "
            f"{_said(self.repaired)}."
        )


def pair_redundancy(
    effects: Effects,
    a: str | ExpertAddress,
    b: str | ExpertAddress,
    mode: str | Callable[..., Mode] = "zero",
    *,
    routing: DownstreamRouting = "live",
    options: Mapping[str, Any] | None = None,
    n_resamples: int = DRAWS,
    seed: int = 0,
) -> Redundancy:
    """Red_ab = 1 - (D_a + D_b) / D_ab and super-additivity D_ab - D_a - D_b (METRICS 2.3), D in NLL.

    Args:
        mode: name of a mode, or a function that makes one of addresses; ``mask_refill`` asks whether others stand in.
        options: further arguments of the mode, such as ``reference`` for mean and mean_off.

    Raises:
        BadConfig: one expert twice, an unknown mode, fewer than two documents, or what `Effects.of` refuses.
        OutOfRange: an expert that the model does not have.

    See `Redundancy` for what the numbers do not show.
    """
    first, second = effects.lens.address(a), effects.lens.address(b)
    if first == second:
        raise BadConfig(f"{first} cannot be its own backup: name two experts")
    name, make = _mode(mode, options)
    found = effects.of_each(
        [make(first), make(second), make(first, second)], routing=routing, quantities=(), whole_layers=True
    )

    def statistic(t: Float[ndarray, "*shape count"]) -> Float[ndarray, "number *shape"]:
        d_a, d_b, d_ab = (t[..., i] / t[..., 0] for i in (1, 2, 3))
        return np.stack([d_a, d_b, d_ab, 1 - (d_a + d_b) / d_ab, d_ab - d_a - d_b])

    numbers, n = _estimates(found, statistic, denominator=2, ratio=3, n_resamples=n_resamples, seed=seed)
    return Redundancy(first, second, name, routing, *numbers, n_documents=n)


def replaceability(
    effects: Effects,
    expert: str | ExpertAddress,
    *,
    routing: DownstreamRouting = "live",
    n_resamples: int = DRAWS,
    seed: int = 0,
) -> Replaceability:
    """Repl_e = 1 - D(mask_refill_keep) / D(zero) (METRICS 2.3), D in NLL.

    Raises:
        BadConfig: a layer without a router, fewer than two documents, or what `Effects.of` refuses.
        OutOfRange: an expert that the model does not have.

    See `Replaceability` for what the number does not show.
    """
    address = effects.lens.address(expert)
    edits = [MODES["zero"](address), MODES["mask_refill_keep"](address)]
    found = effects.of_each(edits, routing=routing, quantities=())

    def statistic(t: Float[ndarray, "*shape count"]) -> Float[ndarray, "number *shape"]:
        dropped, refilled = t[..., 1] / t[..., 0], t[..., 2] / t[..., 0]
        return np.stack([dropped, refilled, 1 - refilled / dropped])

    numbers, n = _estimates(found, statistic, denominator=0, ratio=2, n_resamples=n_resamples, seed=seed)
    return Replaceability(address, *numbers, n_documents=n)


def self_repair(
    effects: Effects,
    expert: str | ExpertAddress,
    mode: str | Callable[..., Mode] = "zero",
    *,
    options: Mapping[str, Any] | None = None,
    n_resamples: int = DRAWS,
    seed: int = 0,
) -> SelfRepair:
    """Self-repair by re-routing, D(frozen) - D(live) (METRICS 2.3), D in NLL.

    Raises:
        BadConfig: an unknown mode, fewer than two documents, or what `Effects.of` refuses.
        OutOfRange: an expert that the model does not have.

    See `SelfRepair` for what the number does not show.
    """
    address = effects.lens.address(expert)
    name, make = _mode(mode, options)
    found = [effects.of(make(address), routing=routing, quantities=()) for routing in ("live", "frozen")]

    def statistic(t: Float[ndarray, "*shape count"]) -> Float[ndarray, "number *shape"]:
        live, frozen = t[..., 1] / t[..., 0], t[..., 2] / t[..., 0]
        return np.stack([live, frozen, frozen - live])

    numbers, n = _estimates(found, statistic, n_resamples=n_resamples, seed=seed)
    return SelfRepair(address, name, *numbers, n_documents=n)


def _mode(mode: str | Callable[..., Mode], options: Mapping[str, Any] | None) -> tuple[str, Callable[..., Mode]]:
    """Name of a mode and what makes it of addresses."""
    if isinstance(mode, str) and (mode not in MODES or mode == "swap"):
        raise BadConfig(f"unknown mode {mode!r}{nearest(mode, MODES)}: use one of {', '.join(MODES)}, but not swap")
    function = MODES[mode] if isinstance(mode, str) else mode

    def make(*experts: ExpertAddress) -> Mode:
        try:
            return function(*experts, **(options or {}))
        except TypeError as error:
            raise BadConfig(f"mode {mode!r} cannot be made ({error}): give what it needs in options=") from error

    return mode if isinstance(mode, str) else getattr(mode, "__name__", "mode"), make


def _estimates(
    found: Sequence[TokenEffects],
    statistic: Callable[[Float[ndarray, "*shape count"]], Float[ndarray, "number *shape"]],
    *,
    denominator: int | None = None,
    ratio: int | None = None,
    n_resamples: int,
    seed: int,
) -> tuple[list[Interval], int]:
    """Numbers made of mean effects, with percentile intervals over documents; and how many documents there are.

    Args:
        statistic: maps totals (tokens, then the summed effect of each of `found`) to numbers.
        denominator, ratio: the number `ratio` is refused where the number `denominator` is below 3 of its standard
            errors.

    Raises:
        BadConfig: fewer than two documents.
    """
    tables = [result.documents for result in found]
    counts = np.stack([tables[0]["tokens"], *(table["delta"] for table in tables)], axis=-1).astype(np.float64)
    if len(counts) < 2:
        raise BadConfig("standard errors are over documents, and the text has one: give at least two")
    times = document_multiplicities(len(counts), n_resamples, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(np.concatenate([counts.sum(0, keepdims=True), times @ counts]))
    estimate, draws = values[:, 0], values[:, 1:].T
    low, high = percentile_interval(draws)
    if denominator is not None and not estimate[denominator] > MIN_SE * draws[:, denominator].std():
        estimate[ratio] = low[ratio] = high[ratio] = np.nan
    numbers = [Interval(float(v), float(a), float(b)) for v, a, b in zip(estimate, low, high, strict=True)]
    return numbers, len(counts)


def _said(found: Interval) -> str:
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"

"""From effects of sets to tables: scores with intervals, gaps to controls, circuit numbers.

1. Every case (ranking, with or without super experts) has its sets by bin, and control sets like them.
2. Per-document sums of a set give its score on the text and on each bootstrap sample of documents at once; one
   set of samples serves all sets, so that differences are paired.
3. Control means are resampled over draws as well, nested in the documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.causal.faithfulness.scores import aopc, circuit_faithfulness, cmd, cpr, rank_p
from moe_lens.causal.faithfulness.sets import Bins, emptied
from moe_lens.stats import document_multiplicities, percentile_interval
from moe_lens.types import Status

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

    from moe_lens.causal.faithfulness.measure import Measured

SCORES = tuple(f"{side}_{metric}" for metric in ("kl", "logp") for side in ("comprehensiveness", "sufficiency"))
AOPC = "aopc"


@dataclass(frozen=True, eq=False)
class Case:
    """One ranking in one universe: the sets to measure."""

    ranking: str
    super_experts: str
    """included, or excluded: they are then never ablated."""
    member: Bool[ndarray, "unit"]
    """Units of the universe."""
    chosen: Bool[ndarray, "bin unit"]
    controls: dict[str, Bool[ndarray, "draw bin unit"]]
    matched_share: Float[ndarray, "bin"]
    """Share of load-matched replacements within the caliper."""

    def removed(self) -> Iterator[Bool[ndarray, "unit"]]:
        """Every set that is taken away for this case, for either side."""
        yield self.member
        for sets in (self.chosen, *self.controls.values()):
            flat = sets.reshape(-1, sets.shape[-1])
            yield from flat
            yield from self.member & ~flat


class Tabulator:
    """Scores of measured cases, with their bootstrap over documents."""

    def __init__(self, measured: Measured, bins: Bins, *, draws: int, seed: int) -> None:
        self.measured, self.bins, self.seed = measured, bins, seed
        n = len(measured.n_tokens)
        times = document_multiplicities(n, draws, seed=seed)
        self.times: Float[ndarray, "sample document"] = np.concatenate([np.ones((1, n)), times])
        """First the text as it is."""
        self._scored: dict[tuple[str, int], dict[str, dict[str, ndarray]]] = {}

    @cached_property
    def _weights(self) -> Float[ndarray, "document sample"]:
        return (self.times / (self.times @ self.measured.n_tokens)[:, None]).T

    def values(self, mode: str, sets: Bool[ndarray, "*shape unit"], metric: str) -> Float[ndarray, "*shape sample"]:
        """Mean effect per prediction of removing each set."""
        flat = sets.reshape(-1, sets.shape[-1])
        found = [self.measured.of(mode, removed) for removed in flat]
        sums = np.stack([effect.kl if metric == "kl" else effect.nll for effect in found])
        return (sums @ self._weights).reshape(*sets.shape[:-1], len(self.times))

    def scores(self, mode: str, case: Case, sets: Bool[ndarray, "*draw bin unit"]) -> dict[str, ndarray]:
        """Each score at every bin and, last, its AOPC: ``(*draw, bin+1, sample)``."""
        found = {}
        for metric in ("kl", "logp"):
            nothing = self.values(mode, case.member, metric)
            for side, removed, at_zero in (
                ("comprehensiveness", sets, np.zeros_like(nothing)),
                ("sufficiency", case.member & ~sets, nothing),
            ):
                by_bin = self.values(mode, removed, metric)
                area = aopc(np.moveaxis(by_bin, -2, -1), self.bins, at_zero=at_zero)
                found[f"{side}_{metric}"] = np.concatenate([by_bin, area[..., None, :]], axis=-2)
        return found

    def scored(self, mode: str, case: Case) -> dict[str, dict[str, Float[ndarray, "*draw bin sample"]]]:
        """`scores` of the ranking's own sets (``none``, no draw axis) and of its controls."""
        key = (mode, id(case))
        if key not in self._scored:
            sets = {"none": case.chosen, **case.controls}
            self._scored[key] = {name: self.scores(mode, case, found) for name, found in sets.items()}
        return self._scored[key]

    def mean_over_draws(self, values: Float[ndarray, "draw bin sample"]) -> Float[ndarray, "bin sample"]:
        """Control mean; draws are resampled along with the documents."""
        n = len(values)
        weights = np.ones((len(self.times), n)) / n
        weights[1:] = document_multiplicities(n, len(self.times) - 1, seed=self.seed + 1) / n
        return np.einsum("rbs,sr->bs", values, weights)

    # tables

    def frame(self, modes: Sequence[str], cases: Sequence[Case], constant: dict[str, Any]) -> pd.DataFrame:
        """faithfulness.parquet: one row per ranking, mode, bin or area, and control.

        Columns beside keys and scores: n_units and n_layers of the set, n_layers_removed (all experts gone) when it is
        taken away, layers_emptied when only it stays, mass_ratio of the touched tokens without the set and
        mass_ratio_kept with only the set (NaN where the mode changes no gates), short_tokens left with fewer than
        top-k experts with only the set, matched_share.
        """
        rows = [row for mode in modes for case in cases for row in self._rows(mode, case, constant)]
        return pd.DataFrame(rows).astype(dict.fromkeys(_COUNTS, "Int64"))

    def _rows(self, mode: str, case: Case, constant: dict[str, Any]) -> Iterator[dict[str, Any]]:
        scored = self.scored(mode, case)
        for control, found in scored.items():
            is_own = control == "none"
            table = found if is_own else {score: self.mean_over_draws(values) for score, values in found.items()}
            for at, share in enumerate((*self.bins.shares, np.nan)):
                row: dict[str, Any] = {
                    "ranking": case.ranking, "mode": mode, **constant, "super_experts": case.super_experts,
                    "quantity": AOPC if np.isnan(share) else "bin", "bin": share, "control": control,
                }  # fmt: skip
                row |= {score: float(table[score][at, 0]) for score in SCORES}
                for score in SCORES:
                    row |= dict(zip((f"{score}_low", f"{score}_high"), _interval(table[score][at]), strict=True))
                for score in SCORES:
                    row[f"{score}_p"] = np.nan
                    if is_own and "random" in scored:
                        low = score.startswith("sufficiency")
                        random = scored["random"][score][:, at, 0]
                        row[f"{score}_p"] = float(rank_p(row[score], random, low_is_good=low))
                yield row | self._set_columns(mode, case, control, at)

    def _set_columns(self, mode: str, case: Case, control: str, at: int) -> dict[str, Any]:
        is_bin = at < len(self.bins.shares)
        is_own = is_bin and control == "none"
        chosen = case.chosen[at] if is_bin else np.zeros(0, bool)
        away = self.measured.of(mode, chosen) if is_own else None
        kept = self.measured.of(mode, case.member & ~chosen) if is_own else None
        return {
            "n_units": int(chosen.sum()) if is_bin else pd.NA,
            "n_layers": len(np.unique(self.measured.layer[chosen])) if is_bin else pd.NA,
            "n_layers_removed": len(emptied(chosen, self.measured.layer)) if is_bin else pd.NA,
            "layers_emptied": len(emptied(case.member & ~chosen, self.measured.layer)) if is_bin else pd.NA,
            "mass_ratio": away.mass_ratio if away else np.nan,
            "mass_ratio_kept": kept.mass_ratio if kept else np.nan,
            "short_tokens": kept.short_tokens if kept else pd.NA,
            "matched_share": case.matched_share[at] if is_bin and control == "load-matched" else np.nan,
        }

    def gaps(self, modes: Sequence[str], cases: Sequence[Case]) -> pd.DataFrame:
        """How much better a ranking is than its controls; positive is better on either side.

        Columns: ranking, mode, super_experts, quantity, bin, control, score, value, control_value, gap, low, high, p.
        A gap can grow because its control got worse: look at the value too.
        """
        rows = []
        for mode in modes:
            for case in cases:
                scored = self.scored(mode, case)
                for control in case.controls:
                    for score in SCORES:
                        rows += self._gap_rows(
                            mode, case, control, score, scored["none"][score], scored[control][score]
                        )
        return pd.DataFrame(rows, columns=_GAPS)

    def _gap_rows(
        self, mode: str, case: Case, control: str, score: str, own: Float[ndarray, "bin sample"],
        drawn: Float[ndarray, "draw bin sample"],
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        is_low = score.startswith("sufficiency")
        other = self.mean_over_draws(drawn)
        gap = other - own if is_low else own - other
        p = rank_p(own[:, 0], drawn[..., 0], low_is_good=is_low)
        for at, share in enumerate((*self.bins.shares, np.nan)):
            quantity = AOPC if np.isnan(share) else "bin"
            low, high = _interval(gap[at])
            yield (
                case.ranking, mode, case.super_experts, quantity, share, control, score, float(own[at, 0]),
                float(other[at, 0]), float(gap[at, 0]), low, high, float(p[at]),
            )  # fmt: skip

    def draws(self, modes: Sequence[str], cases: Sequence[Case]) -> pd.DataFrame:
        """Scores of every control set: ranking, mode, super_experts, control, draw, quantity, bin, and the scores."""
        frames = []
        shares = np.array([*self.bins.shares, np.nan])
        for mode in modes:
            for case in cases:
                for control, sets in case.controls.items():
                    found = self.scored(mode, case)[control]
                    at = {"ranking": case.ranking, "mode": mode, "super_experts": case.super_experts}
                    draw = np.repeat(np.arange(len(sets)), len(shares))
                    share = np.tile(shares, len(sets))
                    values = {score: found[score][..., 0].reshape(-1) for score in SCORES}
                    quantity = np.where(np.isnan(share), AOPC, "bin")
                    frames.append(pd.DataFrame({
                        **at, "control": control, "draw": draw, "quantity": quantity, "bin": share, **values
                    }))  # fmt: skip
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_DRAWS)

    def circuit(self, modes: Sequence[str], cases: Sequence[Case], *, ends: bool) -> pd.DataFrame:
        """The circuit family on log-probabilities, ratios of means.

        Columns: ranking, mode, super_experts, quantity (faithfulness, completeness, cpr, cmd), bin, value, low, high,
        status (refused where F(U) - F(empty) is below 3 SE).

        Args:
            ends: integrate from 0 to 1, with f(0) = 0 and f(1) = 1, which hold by definition. A wide last step is a
                guess about what was not measured; MIB integrates over its own bins only.
        """
        rows = []
        for mode in modes:
            for case in cases:
                rows += self._circuit_rows(mode, case, ends)
        return pd.DataFrame(rows, columns=_CIRCUIT)

    def _circuit_rows(self, mode: str, case: Case, ends: bool) -> Iterator[tuple[Any, ...]]:
        nothing = self.values(mode, case.member, "logp")
        se = float(nothing[1:].std()) if len(nothing) > 1 else 0.0
        kept = self.values(mode, case.member & ~case.chosen, "logp")
        away = self.values(mode, case.chosen, "logp")
        refused = bool(np.isnan(circuit_faithfulness(np.zeros(()), 0.0, -float(nothing[0]), standard_error=se)))
        with np.errstate(divide="ignore", invalid="ignore"):
            f, completeness = (np.full(x.shape, np.nan) if refused else 1 - x / nothing for x in (kept, away))
        status = Status.REFUSED if refused else Status.OK
        curve, q = f, np.asarray(self.bins.shares)
        if ends:
            inside = q < 1
            curve = np.concatenate([np.zeros_like(f[:1]), f[inside], np.ones_like(f[:1]) + 0 * f[:1]])
            q = np.concatenate([[0.0], q[inside], [1.0]])
        found = [("faithfulness", share, f[at]) for at, share in enumerate(self.bins.shares)]
        found += [("completeness", share, completeness[at]) for at, share in enumerate(self.bins.shares)]
        found += [("cpr", np.nan, cpr(curve.T, q)), ("cmd", np.nan, cmd(curve.T, q))]
        for quantity, share, values in found:
            low, high = _interval(values)
            yield case.ranking, mode, case.super_experts, quantity, share, float(values[0]), low, high, str(status)


_COUNTS = ("n_units", "n_layers", "n_layers_removed", "layers_emptied", "short_tokens")
_GAPS = [
    "ranking", "mode", "super_experts", "quantity", "bin", "control", "score", "value", "control_value", "gap", "low",
    "high", "p",
]  # fmt: skip
_DRAWS = ["ranking", "mode", "super_experts", "control", "draw", "quantity", "bin", *SCORES]
_CIRCUIT = ["ranking", "mode", "super_experts", "quantity", "bin", "value", "low", "high", "status"]


def _interval(values: Float[ndarray, "sample"]) -> tuple[float, float]:
    """95 % percentile interval of all but the first, which is the estimate."""
    if len(values) < 2:
        return float("nan"), float("nan")
    low, high = percentile_interval(values[1:])
    return float(low), float(high)

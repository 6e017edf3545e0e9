"""What the model loses when a set of experts is ablated, document by document: ``Measured.of(mode, sets)``.

Each (mode, set) runs once, whoever asks for it: small bins of different rankings and draws often agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from moe_lens.causal.effects import TOGETHER, Effects
from moe_lens.causal.faithfulness.sets import emptied
from moe_lens.errors import BadConfig, BadCorpus, nearest
from moe_lens.models.edits import MODES, EditRecord, Mode

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.models.edits.apply import DownstreamRouting
    from moe_lens.models.reference import Reference
    from moe_lens.types import ExpertAddress

FROM_REFERENCE = ("mean", "mean_off", "resample")
SET_MODES = tuple(name for name in MODES if name not in ("swap", "patch"))
"""Modes that are defined for any set of experts: the other two need a partner."""
REFILL = ("mask_refill", "mask_refill_keep")

Key = tuple[str, bytes]


def check_modes(modes: str | Iterable[str]) -> tuple[str, ...]:
    """Names of modes, without repeats.

    Raises:
        BadConfig: an unknown mode, or none.
    """
    found = tuple(dict.fromkeys([modes] if isinstance(modes, str) else modes))
    for name in found:
        if name not in SET_MODES:
            raise BadConfig(f"unknown mode {name!r}{nearest(name, SET_MODES)}: use {', '.join(SET_MODES)}")
    if not found:
        raise BadConfig(f"no ablation mode was given: use {', '.join(SET_MODES)}")
    return found


@dataclass(frozen=True, eq=False)
class SetEffect:
    """Effect of one set of experts, summed over the predictions of each document."""

    kl: Float[ndarray, "document"]
    """KL(full || ablated), nats."""
    nll: Float[ndarray, "document"]
    """Rise of the NLL: the fall of the log-probability of what follows."""
    layers_emptied: int
    mass_ratio: float
    """Gate mass of the touched tokens after the edit over that before; NaN where the mode changes no gates."""
    short_tokens: int
    """Tokens (of one layer each) left with fewer experts than the model's top-k."""


def edit_maker(
    mode: str, units: tuple[ExpertAddress, ...], layer: Int[ndarray, "unit"], *, reference: Reference | None,
    effects: Effects,
) -> Callable[[Bool[ndarray, "unit"]], list[Mode]]:  # fmt: skip
    """A function from sets of units to the edit that removes them.

    Refill without survivors is no refill: where a whole layer goes, its units are zeroed. Units that the reference
    never visits have no mean and nothing to draw from, and are zeroed too.
    """
    by_name: Callable[..., Mode] = MODES[mode]
    whole, known = by_name, np.ones(len(units), bool)
    if mode in FROM_REFERENCE:
        assert reference is not None
        by_name = partial(by_name, reference=reference)
        whole = by_name
        if mode == "mean_off":  # runs every expert on 512 inputs, so once for all sets
            vectors = by_name(units).prepare(effects.lens, EditRecord())
            whole = lambda chosen: _prepared(by_name(chosen), vectors)  # noqa: E731
        else:
            known = np.array([bool(reference.count[u.layer][u.expert]) for u in units])

    def make(removed: Bool[ndarray, "unit"]) -> list[Mode]:
        by_mode = removed & known
        if mode in REFILL:
            by_mode = by_mode & ~np.isin(layer, emptied(removed, layer))
        zeroed = removed & ~by_mode
        chosen = [[units[i] for i in np.flatnonzero(part)] for part in (by_mode, zeroed)]
        return [f(group) for f, group in zip((whole, MODES["zero"]), chosen, strict=True) if group]

    return make


def _prepared(mode: Mode, state: Any) -> Mode:
    """`mode` with what its `prepare` would find."""
    ready = copy.copy(mode)
    object.__setattr__(ready, "prepare", lambda _lens, _record: state)
    return ready


class Measured:
    """Effects of sets on one evaluation text, each measured once."""

    def __init__(
        self,
        effects: Effects,
        units: tuple[ExpertAddress, ...],
        makers: Mapping[str, Callable[[Bool[ndarray, "unit"]], list[Mode]]],
        *,
        routing: DownstreamRouting = "live",
        reference: str = "",
    ) -> None:
        """Sets are boolean over `units`.

        Args:
            makers: what turns a set into an edit, by mode.
            reference: digest of the text that edits take their values from.

        Raises:
            BadCorpus: the evaluation text has one document, so that nothing can be resampled.
        """
        self.effects, self.units, self.makers = effects, units, makers
        self.routing: DownstreamRouting = routing
        self.reference = reference
        self.layer = np.array([unit.layer for unit in units])
        self.documents, self._which = np.unique(effects.text.document, return_inverse=True)
        if len(self.documents) < 2:
            raise BadCorpus(
                "intervals are over documents and the evaluation text has one: raise max_tokens or give more documents"
            )
        self.n_tokens: Float[ndarray, "document"] = self._sums(np.ones(len(effects.nll)))
        self._found: dict[Key, SetEffect] = {}

    @property
    def n_passes(self) -> int:
        """Edited passes over the text so far."""
        return sum(1 for _, removed in self._found if any(removed))

    def run(self, wanted: Iterable[tuple[str, Bool[ndarray, "unit"]]]) -> None:
        """Measure what has not been measured yet."""
        todo: dict[Key, Bool[ndarray, "unit"]] = {}
        for mode, removed in wanted:
            key = (mode, removed.tobytes())
            if key not in self._found:
                todo[key] = removed
        together = 1 if self.effects.is_kept else TOGETHER
        work = list(todo.items())
        silent = None if self.effects.progress and len(work) > 1 else True
        with tqdm(total=len(work), desc="ablate sets", unit="pass", disable=silent) as bar:
            for at in range(0, len(work), together):
                some = work[at : at + together]
                self._found.update(self._measure(some))
                bar.update(len(some))

    def of(self, mode: str, removed: Bool[ndarray, "unit"]) -> SetEffect:
        """Effect of removing a set."""
        key = (mode, removed.tobytes())
        if key not in self._found:
            self._found.update(self._measure([(key, removed)]))
        return self._found[key]

    def _measure(self, work: list[tuple[Key, Bool[ndarray, "unit"]]]) -> dict[Key, SetEffect]:
        nothing = np.zeros(len(self.documents))
        found = {key: SetEffect(nothing, nothing, 0, float("nan"), 0) for key, removed in work if not removed.any()}
        work = [(key, removed) for key, removed in work if removed.any()]
        edits = [self.makers[key[0]](removed) for key, removed in work]
        progress, self.effects.progress = self.effects.progress, False  # one bar, not one for each chunk
        try:
            results = self.effects.of_each(edits, routing=self.routing, whole_layers=True) if edits else []
        finally:
            self.effects.progress = progress
        for (key, removed), result in zip(work, results, strict=True):
            masses = [ratio for ratio in result.record.mass.values() if ratio[0]]
            before, after = (sum(mass[i] for mass in masses) for i in (0, 1))
            ratio = after / before if before else float("nan")
            n_emptied = len(emptied(removed, self.layer))
            short = result.record.total("short")
            found[key] = SetEffect(self._sums(result.kl), self._sums(result.delta), n_emptied, ratio, short)
        return found

    def _sums(self, values: Float[ndarray, "prediction"]) -> Float[ndarray, "document"]:
        return np.bincount(self._which, values.astype(np.float64), len(self.documents))

"""What the model loses when a set of experts is ablated, document by document: ``Measured.of(mode, sets)``.

Each (mode, set) runs once, whoever asks for it: small bins of different rankings and draws often agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from moe_lens.causal.ablation import prepared
from moe_lens.causal.effects import TOGETHER, Effects
from moe_lens.causal.faithfulness.kept import KeptSets, Key, SetEffect
from moe_lens.causal.faithfulness.sets import emptied
from moe_lens.errors import BadConfig, nearest
from moe_lens.models.edits import MODES, EditRecord, Mode

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from numpy import ndarray

    from moe_lens.causal.result import TokenEffects
    from moe_lens.models.edits.apply import DownstreamRouting
    from moe_lens.models.reference import Reference
    from moe_lens.types import ExpertAddress

FROM_REFERENCE = ("mean", "mean_off", "resample")
SET_MODES = tuple(name for name in MODES if name not in ("swap", "patch"))
"""Modes that are defined for any set of experts: the other two need a partner."""
REFILL = ("mask_refill", "mask_refill_keep")


def check_modes(modes: str | Iterable[str]) -> tuple[str, ...]:
    """Names of modes, without repeats.

    Raises:
        BadConfig: an unknown mode, or none.
    """
    found = tuple(dict.fromkeys(name.replace("-", "_") for name in ([modes] if isinstance(modes, str) else modes)))
    for name in found:
        if name not in SET_MODES:
            raise BadConfig(f"unknown mode {name!r}{nearest(name, SET_MODES)}: use {', '.join(SET_MODES)}")
    if not found:
        raise BadConfig(f"no ablation mode was given: use {', '.join(SET_MODES)}")
    return found


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
            whole = lambda chosen: prepared(by_name(chosen), vectors)  # noqa: E731
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
        quantities: Sequence[str] = ("nll", "kl"),
        kept: KeptSets | None = None,
    ) -> None:
        """Sets are boolean over `units`.

        Args:
            makers: what turns a set into an edit, by mode.
            reference: digest of the text that edits take their values from.
            quantities: as in `Effects.of`; without kl that is NaN.
            kept: effects of the same text, routing and reference that an earlier process measured.
        """
        self.effects, self.units, self.makers = effects, units, makers
        self.routing: DownstreamRouting = routing
        self.reference = reference
        self.layer = np.array([unit.layer for unit in units])
        self.documents, self._which = np.unique(effects.text.document, return_inverse=True)
        self.n_tokens: Float[ndarray, "document"] = self._sums(np.ones(len(effects.nll)))
        self.quantities, self.kept = tuple(quantities), kept
        self._found: dict[Key, SetEffect] = kept.read() if kept else {}
        self._asked: set[Key] = set()

    @property
    def n_passes(self) -> int:
        """Edited passes over the text that the sets asked for take, those of an earlier process included."""
        return sum(1 for _, removed in self._asked if any(removed))

    def run(self, wanted: Iterable[tuple[str, Bool[ndarray, "unit"]]], *, describe: str = "ablate sets") -> None:
        """Measure what has not been measured yet."""
        todo: dict[Key, Bool[ndarray, "unit"]] = {}
        for mode, removed in wanted:
            key = (mode, removed.tobytes())
            self._asked.add(key)
            if key not in self._found:
                todo[key] = removed
        together = 1 if self.effects.one_by_one else TOGETHER
        work = list(todo.items())
        silent = None if self.effects.progress and len(work) > 1 else True
        try:
            with tqdm(total=len(work), desc=describe, unit="pass", disable=silent) as bar:
                for at in range(0, len(work), together):
                    some = work[at : at + together]
                    self._add(self._measure(some))
                    bar.update(len(some))
        finally:
            if self.kept:
                self.kept.save()

    def of(self, mode: str, removed: Bool[ndarray, "unit"]) -> SetEffect:
        """Effect of removing a set."""
        key = (mode, removed.tobytes())
        self._asked.add(key)
        if key not in self._found:
            self._add(self._measure([(key, removed)]))
        return self._found[key]

    def _add(self, found: dict[Key, SetEffect]) -> None:
        self._found |= found
        if self.kept:
            self.kept.add({key: effect for key, effect in found.items() if any(key[1])})

    def _measure(self, work: list[tuple[Key, Bool[ndarray, "unit"]]]) -> dict[Key, SetEffect]:
        nothing = np.zeros(len(self.documents))
        found = {key: SetEffect(nothing, nothing, 0, float("nan"), 0) for key, removed in work if not removed.any()}
        work = [(key, removed) for key, removed in work if removed.any()]
        edits = [self.makers[key[0]](removed) for key, removed in work]
        progress, self.effects.progress = self.effects.progress, False  # one bar, not one for each chunk
        try:
            results = self._of_each(edits) if edits else []
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

    def _of_each(self, edits: list[list[Mode]]) -> list[TokenEffects]:
        return self.effects.of_each(edits, routing=self.routing, quantities=self.quantities, whole_layers=True)

    def _sums(self, values: Float[ndarray, "prediction"]) -> Float[ndarray, "document"]:
        return np.bincount(self._which, values.astype(np.float64), len(self.documents))

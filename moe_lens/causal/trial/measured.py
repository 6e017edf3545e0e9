"""One expert under one ablation mode: what each of its visits loses, and what another expert there would lose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from moe_lens.causal.ablation import per_visit
from moe_lens.causal.effects import TOGETHER
from moe_lens.causal.evaluation import evaluation
from moe_lens.corpus.batches import Batches
from moe_lens.models.edits import mask_refill_keep, mean, mean_off, resample, zero
from moe_lens.types import ExpertAddress, Split

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.causal.effects import Effects
    from moe_lens.corpus.batches import Tokenized
    from moe_lens.models.edits import Mode
    from moe_lens.models.lens import Lens
    from moe_lens.models.reference import Reference

Positions = Literal["all", "focal"]
MODES = ("zero", "mean_off", "mean", "resample", "mask_refill_keep")
WITH_OTHERS = ("zero", "mean_off", "mean")
"""Modes under which a co-selected expert is run beside: the others are columns whose need has another basis."""
RESAMPLES = 8
"""Draws that an effect under ``resample`` is the mean of (METRICS 2.3)."""
LATER = 8
"""Predictions over which the secondary effect is averaged (METRICS 3)."""
REFERENCE_TOKENS = 8192
"""Of the text that `mean_off`, `mean` and `resample` are made from."""


@dataclass(frozen=True, eq=False)
class CoSelected:
    """At every visit of an expert a random other one that was chosen there."""

    expert: Int[ndarray, "visit"]
    effect: Float[ndarray, "visit"]
    effect_8: Float[ndarray, "visit"]
    gate: Float[ndarray, "visit"]


@dataclass(frozen=True, eq=False)
class Measured:
    """Effects at the predictions that the expert's visits make."""

    expert: ExpertAddress
    mode: str
    at: Int[ndarray, "visit"]
    """Number of the prediction."""
    effect: Float[ndarray, "visit"]
    """D: rise of the NLL without the expert, nats."""
    effect_8: Float[ndarray, "visit"]
    """The same, averaged over the next `LATER` predictions from the visit on, or as many as the window holds."""
    gate: Float[ndarray, "visit"]
    beside: CoSelected | None = None
    """None in a layer that sends each token to one expert, and under modes outside `WITH_OTHERS`."""

    def everywhere(self, n_predictions: int, *, later: bool = False) -> Float[ndarray, "prediction"]:
        """D at every prediction, 0 where the expert is not visited."""
        out = np.zeros(n_predictions, np.float32)
        out[self.at] = self.effect_8 if later else self.effect
        return out


class Keeper(Protocol):
    """Where finished measurements are kept."""

    def read(self, expert: ExpertAddress, mode: str, *, alone: bool) -> Measured | None: ...

    def write(self, found: Measured, *, alone: bool) -> None: ...


@dataclass(frozen=True, eq=False)
class _Job:
    """The passes of one expert under one mode: of the expert itself, in one or several draws, and of those beside."""

    expert: ExpertAddress
    mode: str
    own: tuple[Mode, ...]
    beside: Mode | None = None
    choice: Int[ndarray, "corpus_token"] | None = None

    @property
    def edits(self) -> tuple[Mode, ...]:
        return self.own if self.beside is None else (*self.own, self.beside)


def measure(
    effects: Effects,
    experts: Sequence[ExpertAddress],
    modes: Sequence[str],
    *,
    reference: Reference | None = None,
    alone: Sequence[ExpertAddress] = (),
    positions: Positions = "all",
    horizon: int = 1,
    seed: int = 0,
    keeper: Keeper | None = None,
    progress: bool = True,
) -> dict[tuple[ExpertAddress, str], Measured]:
    """Run every expert under every mode, with its co-selected experts where there are any.

    Args:
        reference: what experts do on other text, for the modes that need it; None collects it (`reference_text`).
        alone: further experts, to be run without those beside them.
        positions: ``all`` edits every visit in one pass, ``focal`` each visit on its own (slow: one pass for every
            visit of the window with most of them).
        horizon: effects are means over this many predictions from the visit on, or as many as the window holds.
        keeper: what it holds is not measured again.

    An effect under ``all`` is that of all visits of the expert up to the token: earlier ones act through attention.
    """
    wanted = [(expert, mode, expert in alone) for expert in [*experts, *alone] for mode in modes]
    found: dict[tuple[ExpertAddress, str], Measured | None] = {
        (expert, mode): None if keeper is None else keeper.read(expert, mode, alone=only)
        for expert, mode, only in wanted
    }
    left = [entry for entry in wanted if found[entry[:2]] is None]
    edits = _Edits(effects, tuple(experts), reference, seed)
    total = sum(edits.n_passes(*entry) for entry in left)
    with tqdm(total=total, desc="ablate", unit="pass", disable=None if progress else True) as bar:
        for job, deltas in _run(effects, (edits.job(*entry) for entry in left), positions, (horizon, LATER), bar):
            found[job.expert, job.mode] = measured = _measured(effects, job, deltas)
            if keeper is not None:
                keeper.write(measured, alone=job.expert in alone)
    return {key: value for key, value in found.items() if value is not None}


def reference_text(
    lens: Lens,
    tokenized: Tokenized,
    layers: Sequence[int],
    *,
    experts: Sequence[ExpertAddress] = (),
    seed: int = 0,
    split: Split = Split.SELECT,
) -> Reference:
    """What experts of `layers` do on documents of another split than the one under test.

    Args:
        experts: whose outputs are sampled, for ``resample``.

    Raises:
        BadCorpus: no document of the split.
    """
    text = evaluation(tokenized, split=split, max_tokens=REFERENCE_TOKENS, include_first=False, seed=seed)
    chunks = tuple(np.array_split(text.windows, max(1, len(text.windows) // 16)))
    of_layers = [ExpertAddress(layer, 0) for layer in layers]
    return lens.reference(Batches(tokenized, chunks), experts=[*of_layers, *experts], seed=seed)


@dataclass
class _Edits:
    """Makes the edits of every pass; what they need of another text is collected once, when first asked for."""

    effects: Effects
    experts: tuple[ExpertAddress, ...]
    given: Reference | None
    seed: int
    stand_ins: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[int]:
        return sorted({expert.layer for expert in self.experts})

    @cached_property
    def reference(self) -> Reference:
        if self.given is not None:
            return self.given
        return reference_text(self.effects.lens, self.effects.text.tokenized, self.layers, seed=self.seed)

    @cached_property
    def samples(self) -> Reference:
        """With outputs of every expert on trial: a pass of its own, so that the other modes do not depend on it."""
        lens, text = self.effects.lens, self.effects.text.tokenized
        return reference_text(lens, text, self.layers, experts=self.experts, seed=self.seed)

    def n_passes(self, expert: ExpertAddress, mode: str, alone: bool) -> int:
        return (RESAMPLES if mode == "resample" else 1) + self._has_others(expert, mode, alone)

    def job(self, expert: ExpertAddress, mode: str, alone: bool) -> _Job:
        own = self._own(expert, mode)
        if not self._has_others(expert, mode, alone):
            return _Job(expert, mode, own)
        choice, key = self.effects.co_selected(expert, seed=self.seed), (expert.layer, mode)
        if key not in self.stand_ins:
            reference = None if mode == "zero" else self.reference
            self.stand_ins[key] = _stand_ins(self.effects, expert.layer, mode, reference)
        return _Job(expert, mode, own, per_visit(expert.layer, choice, vectors=self.stand_ins[key]), choice)

    def _own(self, expert: ExpertAddress, mode: str) -> tuple[Mode, ...]:
        if mode == "zero":
            return (zero(expert),)
        if mode == "mask_refill_keep":
            return (mask_refill_keep(expert),)
        if mode == "resample":
            first = self.seed * RESAMPLES
            return tuple(resample(expert, reference=self.samples, seed=first + n) for n in range(RESAMPLES))
        return ({"mean_off": mean_off, "mean": mean}[mode](expert, reference=self.reference),)

    def _has_others(self, expert: ExpertAddress, mode: str, alone: bool) -> bool:
        """Whether the expert is visited, and others are chosen and run beside it."""
        if alone or mode not in WITH_OTHERS or self.effects.routing[expert.layer][0].shape[1] < 2:
            return False
        return bool(self.effects.visits(expert).any())


def _stand_ins(
    effects: Effects, layer: int, mode: str, reference: Reference | None
) -> Float[Tensor, "expert d_model"] | None:
    """What `mode` puts in place of each expert of a layer; None for zero."""
    if mode == "zero" or reference is None:
        return None
    n_experts = next(entry.n_experts for entry in effects.lens.spec.layers if entry.layer == layer)
    vectors = []
    for number in range(n_experts):
        expert = ExpertAddress(layer, number)
        if mode == "mean":
            vectors.append(reference.mean[layer][number])
        else:
            vectors.append(_mean_off_vector(effects.lens, reference, expert))
    return torch.stack([vector.cpu() for vector in vectors])


def _mean_off_vector(lens: Lens, reference: Reference, expert: ExpertAddress) -> Float[Tensor, "d_model"]:
    edit: Any = mean_off(expert, reference=reference)
    return edit.vector(lens, reference, expert)


def _run(
    effects: Effects, jobs: Iterable[_Job], positions: Positions, horizons: Sequence[int], bar: tqdm
) -> Iterator[tuple[_Job, list[Float[ndarray, "horizon prediction"]]]]:
    """Every job with the effects of its edits."""
    left = ((job, edit) for job in jobs for edit in job.edits)
    done: list[ndarray] = []
    while group := list(islice(left, 1 if effects.one_by_one or positions == "focal" else TOGETHER)):
        if positions == "focal":
            deltas = [_one_by_one(effects, job.expert, edit, horizons) for job, edit in group]
        else:
            found = effects.of_each([edit for _, edit in group], quantities=("nll",))
            deltas = [_at_horizons(result.delta, effects, horizons) for result in found]
        for (job, _), delta in zip(group, deltas, strict=True):
            done.append(delta)
            bar.update()
            if len(done) == len(job.edits):
                yield job, done
                done = []


def _one_by_one(
    effects: Effects, expert: ExpertAddress, edit: Mode, horizons: Sequence[int]
) -> Float[ndarray, "horizon prediction"]:
    """Effect at every visit when it alone is edited: the k-th visits of all windows together, they cannot meet."""
    text = effects.text
    delta = np.zeros((len(horizons), len(text.token)), np.float32)
    at = np.flatnonzero(effects.visits(expert))
    window = text.window[at]
    turn = np.arange(len(at)) - np.searchsorted(window, window)
    for k in range(int(turn.max(initial=-1)) + 1):
        chosen = at[turn == k]
        scope = np.zeros(text.tokenized.n_tokens, bool)
        scope[text.token[chosen]] = True
        found = effects.of(edit, tokens=scope, quantities=("nll",)).delta
        delta[:, chosen] = _at_horizons(found, effects, horizons)[:, chosen]
    return delta


def _at_horizons(
    delta: Float[ndarray, "prediction"], effects: Effects, horizons: Sequence[int]
) -> Float[ndarray, "horizon prediction"]:
    return np.stack([ahead(delta, effects.text.window, horizon) for horizon in horizons])


def ahead(
    delta: Float[ndarray, "prediction"], window: Int[ndarray, "prediction"], horizon: int
) -> Float[ndarray, "prediction"]:
    """Mean over each prediction and the next ones of its window, `horizon` in all or as many as there are."""
    if horizon == 1:
        return delta
    total = np.concatenate([[0.0], np.cumsum(delta, dtype=np.float64)])
    at = np.arange(len(delta))
    stop = np.minimum(at + horizon, np.searchsorted(window, window, side="right"))
    return ((total[stop] - total[at]) / (stop - at)).astype(np.float32)


def _measured(effects: Effects, job: _Job, deltas: Sequence[Float[ndarray, "horizon prediction"]]) -> Measured:
    at = effects.visits(job.expert)
    now, later = np.mean(deltas[: len(job.own)], axis=0)[:, at]
    beside = None if job.choice is None else _co_selected(effects, job.expert, job.choice, deltas[-1])
    return Measured(job.expert, job.mode, np.flatnonzero(at), now, later, effects.gates(job.expert)[at], beside)


def _co_selected(
    effects: Effects,
    expert: ExpertAddress,
    choice: Int[ndarray, "corpus_token"],
    delta: Float[ndarray, "horizon prediction"],
) -> CoSelected:
    at = effects.visits(expert)
    token = effects.text.token[at]
    other = choice[token]
    index, weight = (values[np.searchsorted(effects.text.read, token)] for values in effects.routing[expert.layer])
    gate = np.where(index == other[:, None], weight, 0).sum(axis=1)
    return CoSelected(other, delta[0, at], delta[1, at], gate)

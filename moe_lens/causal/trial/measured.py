"""One expert under one ablation mode: what each of its visits loses, and what another expert there would lose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from moe_lens.causal.ablation import per_visit
from moe_lens.causal.effects import TOGETHER
from moe_lens.causal.evaluation import evaluation
from moe_lens.corpus.batches import Batches
from moe_lens.models.edits import mean, mean_off, zero
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
MODES = ("zero", "mean_off", "mean")
REFERENCE_TOKENS = 8192
"""Of the text that `mean_off` and `mean` are made from."""


@dataclass(frozen=True, eq=False)
class CoSelected:
    """At every visit of an expert a random other one that was chosen there."""

    expert: Int[ndarray, "visit"]
    effect: Float[ndarray, "visit"]
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
    gate: Float[ndarray, "visit"]
    beside: CoSelected | None = None
    """None in a layer that sends each token to one expert."""

    def everywhere(self, n_predictions: int) -> Float[ndarray, "prediction"]:
        """D at every prediction, 0 where the expert is not visited."""
        out = np.zeros(n_predictions, np.float32)
        out[self.at] = self.effect
        return out


@dataclass(frozen=True, eq=False)
class _Pass:
    """An edit to run: of the expert itself, or of those beside it."""

    expert: ExpertAddress
    mode: str
    edit: Mode
    choice: Int[ndarray, "corpus_token"] | None = None


def measure(
    effects: Effects,
    experts: Sequence[ExpertAddress],
    modes: Sequence[str],
    *,
    reference: Reference | None,
    alone: Sequence[ExpertAddress] = (),
    positions: Positions = "all",
    horizon: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> dict[tuple[ExpertAddress, str], Measured]:
    """Run every expert under every mode, with its co-selected experts where there are any.

    Args:
        alone: further experts, to be run without those beside them.
        positions: ``all`` edits every visit in one pass, ``focal`` each visit on its own (slow: one pass for every
            visit of the window with most of them).
        horizon: effects are means over this many predictions from the visit on, or as many as the window holds.
    """
    total = len(modes) * (len(experts) + len(alone) + sum(_has_others(effects, expert) for expert in experts))
    own: dict[tuple[ExpertAddress, str], ndarray] = {}
    beside: dict[tuple[ExpertAddress, str], CoSelected] = {}
    with tqdm(total=total, desc="ablate", unit="pass", disable=None if progress else True) as bar:
        passes = _passes(effects, experts, alone, modes, reference, seed)
        for job, delta in _run(effects, passes, positions, horizon):
            at = effects.visits(job.expert)
            if job.choice is None:
                own[job.expert, job.mode] = delta[at]
            else:
                beside[job.expert, job.mode] = _co_selected(effects, job.expert, job.choice, delta)
            bar.update()
    return {
        (expert, mode): Measured(
            expert, mode, np.flatnonzero(effects.visits(expert)), effect,
            effects.gates(expert)[effects.visits(expert)], beside.get((expert, mode)),
        )
        for (expert, mode), effect in own.items()
    }  # fmt: skip


def reference_text(
    lens: Lens, tokenized: Tokenized, layers: Sequence[int], *, seed: int = 0, split: Split = Split.SELECT
) -> Reference:
    """What experts of `layers` do on documents of another split than the one under test.

    Raises:
        BadCorpus: no document of the split.
    """
    text = evaluation(tokenized, split=split, max_tokens=REFERENCE_TOKENS, include_first=False, seed=seed)
    chunks = tuple(np.array_split(text.windows, max(1, len(text.windows) // 16)))
    return lens.reference(Batches(tokenized, chunks), experts=[ExpertAddress(layer, 0) for layer in layers], seed=seed)


def _passes(
    effects: Effects,
    experts: Sequence[ExpertAddress],
    alone: Sequence[ExpertAddress],
    modes: Sequence[str],
    reference: Reference | None,
    seed: int,
) -> Iterator[_Pass]:
    stand_ins: dict[tuple[int, str], Tensor | None] = {}
    for expert in [*experts, *alone]:
        choice = None
        if expert not in alone and _has_others(effects, expert):
            choice = effects.co_selected(expert, seed=seed)
        for mode in modes:
            yield _Pass(expert, mode, _edit(expert, mode, reference))
            if choice is not None:
                key = expert.layer, mode
                if key not in stand_ins:
                    stand_ins[key] = _stand_ins(effects, expert.layer, mode, reference)
                edit = per_visit(expert.layer, choice, vectors=stand_ins[key])
                yield _Pass(expert, mode, edit, choice)


def _has_others(effects: Effects, expert: ExpertAddress) -> bool:
    """Whether the expert is visited, and others are chosen beside it."""
    return effects.routing[expert.layer][0].shape[1] > 1 and bool(effects.visits(expert).any())


def _edit(expert: ExpertAddress, mode: str, reference: Reference | None) -> Mode:
    if mode == "zero":
        return zero(expert)
    return {"mean_off": mean_off, "mean": mean}[mode](expert, reference=reference)


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
    effects: Effects, passes: Iterable[_Pass], positions: Positions, horizon: int
) -> Iterator[tuple[_Pass, Float[ndarray, "prediction"]]]:
    if positions == "focal":
        yield from ((job, _one_by_one(effects, job, horizon)) for job in passes)
        return
    left = iter(passes)
    while jobs := list(islice(left, 1 if effects.is_kept else TOGETHER)):
        results = effects.of_each([job.edit for job in jobs], quantities=("nll",))
        for job, found in zip(jobs, results, strict=True):
            yield job, ahead(found.delta, effects.text.window, horizon)


def _one_by_one(effects: Effects, job: _Pass, horizon: int) -> Float[ndarray, "prediction"]:
    """Effect at every visit when it alone is edited: the k-th visits of all windows together, they cannot meet."""
    text = effects.text
    delta = np.zeros(len(text.token), np.float32)
    at = np.flatnonzero(effects.visits(job.expert))
    window = text.window[at]
    turn = np.arange(len(at)) - np.searchsorted(window, window)
    for k in range(int(turn.max(initial=-1)) + 1):
        chosen = at[turn == k]
        scope = np.zeros(text.tokenized.n_tokens, bool)
        scope[text.token[chosen]] = True
        found = effects.of(job.edit, tokens=scope, quantities=("nll",)).delta
        delta[chosen] = ahead(found, text.window, horizon)[chosen]
    return delta


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


def _co_selected(
    effects: Effects,
    expert: ExpertAddress,
    choice: Int[ndarray, "corpus_token"],
    delta: Float[ndarray, "prediction"],
) -> CoSelected:
    at = effects.visits(expert)
    token = effects.text.token[at]
    other = choice[token]
    index, weight = (values[np.searchsorted(effects.text.read, token)] for values in effects.routing[expert.layer])
    return CoSelected(other, delta[at], np.where(index == other[:, None], weight, 0).sum(axis=1))

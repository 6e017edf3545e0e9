"""What the target loses when the expert is taken away at the trigger, and nowhere else.

Every prediction of interest is made the last one of a window of its own: the text up to a token, then the target.
So the target's log-probability is read where it is meant, whatever the text goes on with.

==========  ===================================  ==============================================================
window      text up to                           edited there
==========  ===================================  ==============================================================
trigger     the trigger                          the expert, or one chosen beside it, at the trigger
place       the token before the target's place  the same (where the target does not follow the trigger at once)
control     another token                        an expert with a like gate, at that token
other       the trigger                          the expert; the target is one of another expert's
==========  ===================================  ==============================================================

No two windows see each other, so one pass edits all cases of all experts of a layer, each at its own token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from moe_lens.causal.ablation import PerVisit, per_visit
from moe_lens.causal.effects import Effects
from moe_lens.causal.triggers.cases import Located
from moe_lens.causal.triggers.direct import Direct
from moe_lens.corpus.batches import Tokenized
from moe_lens.corpus.text import Corpus, Document
from moe_lens.models.edits import mean, mean_off
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from moe_lens.models.lens import Lens
    from moe_lens.models.reference import Reference

MODES = ("zero", "mean_off", "mean")
OTHER_TARGETS = 4
"""Of other experts, that each case is measured with too."""
BESIDE = 7
"""Co-selected experts that are ablated in turn at a trigger, at most: all of them with top-8 routing."""


@dataclass(frozen=True)
class _Window:
    case: int
    kind: str
    ids: tuple[int, ...]
    edited: int
    """Position of the token that is edited."""
    expert: int
    """-1 where the expert is not visited."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of all cases of one layer."""

    rows: tuple[_Window, ...]
    pad_id: int

    @classmethod
    def of(
        cls,
        located: Sequence[Located],
        direct: Sequence[Direct],
        others: Sequence[Sequence[int]],
        *,
        pad_id: int,
    ) -> Windows:
        """`others` are token ids of targets that each case has no claim on."""
        rows: list[_Window] = []
        for number, (case, found) in enumerate(zip(located, direct, strict=True)):
            expert = case.case.expert.expert if found.routed else -1
            places = {"trigger": case.position} | ({"place": case.place} if case.gap else {})
            for kind, until in places.items():
                rows.append(_Window(number, kind, _read(case, until), case.position, expert))
            for control in found.controls:
                ids = _read(case, control.position)
                rows.append(_Window(number, "control", ids, control.position, control.expert))
            before = case.input_ids[: case.position + 1]
            rows += [_Window(number, "other", (*before, target), case.position, expert) for target in others[number]]
        return cls(tuple(rows), pad_id)

    @cached_property
    def case(self) -> Int[ndarray, "window"]:
        return np.array([row.case for row in self.rows])

    @cached_property
    def kind(self) -> ndarray:
        """Kind of each window, strings."""
        return np.array([row.kind for row in self.rows])

    @cached_property
    def edited(self) -> Int[ndarray, "window"]:
        """Index in the tokenised windows of the token that is edited."""
        return self.tokenized.offsets[:-1] + [row.edited for row in self.rows]

    @cached_property
    def tokenized(self) -> Tokenized:
        """The windows as a corpus in which only the target is predicted."""
        lengths = np.array([len(row.ids) for row in self.rows])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        n = int(offsets[-1])
        is_target = np.zeros(n, bool)
        is_target[offsets[1:] - 1] = True
        nowhere = np.full(n, -1, np.int32)
        corpus = Corpus.of((Document(str(i), str(i)) for i in range(len(self.rows))), id="triggers")
        return Tokenized(
            corpus, (), np.zeros(len(lengths), np.int8), self.pad_id, int(lengths.max()), offsets,
            np.arange(len(lengths)), np.concatenate([row.ids for row in self.rows]).astype(np.int32), nowhere, nowhere,
            is_target, np.zeros((n, 0), np.uint8), np.zeros((len(lengths), 0), bool),
        )  # fmt: skip


def other_targets(located: Sequence[Located], *, seed: int) -> list[tuple[int, ...]]:
    """For every case some targets of other experts' cases, as token ids; none of them starts its own expert's."""
    pairs = {(one.case.expert, one.target_id) for one in located if one.used}
    own = {expert: {target for owner, target in pairs if owner == expert} for expert, _ in pairs}
    pool = {expert: sorted({target for _, target in pairs} - targets) for expert, targets in own.items()}
    found = []
    for number, one in enumerate(located):
        targets = pool.get(one.case.expert, [])
        order = np.random.default_rng([seed, number]).permutation(len(targets))[:OTHER_TARGETS]
        found.append(tuple(targets[i] for i in order))
    return found


def _read(case: Located, until: int) -> tuple[int, ...]:
    return (*case.input_ids[: until + 1], case.target_id)


def measure_layer(
    lens: Lens,
    layer: int,
    located: Sequence[Located],
    direct: Sequence[Direct],
    others: Sequence[Sequence[int]],
    *,
    modes: Sequence[str],
    reference: Reference | None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[pd.DataFrame, float]:
    """Ablate every expert of `layer` that has cases, at their triggers.

    Args:
        others: of every case token ids of other experts' targets, see `other_targets`.
        reference: what ``mean_off`` and ``mean`` are made from; None for ``zero`` alone.

    Returns:
        One row per case and mode: case (its number in `located`), mode, log_p and log_p_at_place (of the target, clean,
        nats), effect (nats of log p(target) at the trigger that go with the expert), effect_co_selected (mean over the
        experts chosen beside it), effect_matched (mean over its controls), effect_other_targets (its own, on other
        targets), effect_at_place and effect_co_selected_at_place. And the 99th percentile of differences between two
        clean passes.

    An effect at one token does not show what the expert does for the target at others, and an expert that another one
    stands in for shows none.
    """
    windows = Windows.of(located, direct, others, pad_id=lens.tokenizer.pad_token_id or 0)
    effects = Effects(lens, windows.tokenized, split=None, include_first=True, seed=seed, progress=progress)
    own = np.array([row.expert for row in windows.rows])
    choices = [
        _choice(windows, own),
        *(_choice(windows, other) for other in _beside(effects, layer, windows, own, seed)),
    ]
    wanted = [choice for choice in choices if (choice >= 0).any()]
    tables = []
    for mode in modes:
        stand_ins = _stand_ins(lens, layer, mode, wanted, reference)
        edits: list[PerVisit] = [per_visit(layer, choice, vectors=stand_ins) for choice in wanted]
        found = (
            [result.delta for result in effects.of_each(edits, quantities=("nll",), whole_layers=True)] if edits else []
        )
        tables.append(_table(windows, effects.nll, found, own).assign(mode=mode))
    return pd.concat(tables, ignore_index=True), effects.noise_floor().nll


def _choice(windows: Windows, expert: Int[ndarray, "window"]) -> Int[ndarray, "corpus_token"]:
    """Each window's expert at the token that is edited in it."""
    choice = np.full(windows.tokenized.n_tokens, -1)
    choice[windows.edited] = expert
    return choice


def _beside(
    effects: Effects, layer: int, windows: Windows, own: Int[ndarray, "window"], seed: int
) -> list[Int[ndarray, "window"]]:
    """The experts chosen beside each trigger's own, one after the other in random order; -1 in other windows."""
    rows = np.searchsorted(effects.text.read, windows.edited)
    index = effects.routing[layer][0][rows]
    is_other = (index != own[:, None]) & (own >= 0)[:, None] & np.isin(windows.kind, ["trigger", "place"])[:, None]
    draw = np.random.default_rng(seed).random((int(windows.case.max()) + 1, index.shape[1]))[windows.case]
    order = np.argsort(np.where(is_other, draw, np.inf), axis=1)  # the same order in both windows of a case
    ordered = np.take_along_axis(np.where(is_other, index, -1), order, axis=1)
    return list(ordered[:, : min(index.shape[1] - 1, BESIDE)].T)


def _stand_ins(
    lens: Lens, layer: int, mode: str, choices: Sequence[Int[ndarray, "corpus_token"]], reference: Reference | None
) -> Float[torch.Tensor, "expert d_model"] | None:
    """What `mode` puts in place of each chosen expert; None for zero."""
    if mode == "zero" or not choices:
        return None
    assert reference is not None
    make: Any = {"mean_off": mean_off, "mean": mean}[mode]
    chosen = np.unique(np.concatenate(choices))
    experts = [ExpertAddress(layer, int(number)) for number in chosen[chosen >= 0]]
    vectors = [make(expert, reference=reference).vector(lens, reference, expert).cpu() for expert in experts]
    entry = lens.spec.at(layer)
    assert entry is not None
    out = torch.zeros(entry.n_experts, len(vectors[0]), dtype=vectors[0].dtype)
    out[[expert.expert for expert in experts]] = torch.stack(vectors)
    return out


def _table(
    windows: Windows,
    nll: Float[ndarray, "window"],
    deltas: Sequence[Float[ndarray, "window"]],
    own: Int[ndarray, "window"],
) -> pd.DataFrame:
    """One row per case, from the effects of the expert itself and of those beside it on each window."""
    n_cases = int(windows.case.max()) + 1
    alone = deltas[0] if deltas else np.zeros(len(nll), np.float32)
    beside = np.mean(deltas[1:], axis=0) if len(deltas) > 1 else np.full(len(nll), np.nan)
    beside = np.where(own >= 0, beside, np.nan)
    at = {kind: windows.kind == kind for kind in ("trigger", "place", "control", "other")}
    columns: Mapping[str, ndarray] = {
        "log_p": _mean(windows, -nll, at["trigger"]), "log_p_at_place": _mean(windows, -nll, at["place"]),
        "effect": _mean(windows, alone, at["trigger"]), "effect_at_place": _mean(windows, alone, at["place"]),
        "effect_co_selected": _mean(windows, beside, at["trigger"]),
        "effect_co_selected_at_place": _mean(windows, beside, at["place"]),
        "effect_matched": _mean(windows, alone, at["control"]),
        "effect_other_targets": _mean(windows, alone, at["other"]),
    }  # fmt: skip
    table = pd.DataFrame({"case": np.arange(n_cases), **columns})
    for name in ("log_p", "effect", "effect_co_selected"):  # where the target follows the trigger, the place is there
        table[f"{name}_at_place"] = table[f"{name}_at_place"].where(~np.isnan(columns["log_p_at_place"]), table[name])
    return table


def _mean(windows: Windows, values: Float[ndarray, "window"], at: ndarray) -> Float[ndarray, "case"]:
    """Mean over the windows `at` of each case; NaN where it has none."""
    n_cases = int(windows.case.max()) + 1
    n = np.bincount(windows.case[at], minlength=n_cases)
    total = np.bincount(windows.case[at], values[at], n_cases)
    return np.divide(total, n, out=np.full(n_cases, np.nan), where=n > 0)

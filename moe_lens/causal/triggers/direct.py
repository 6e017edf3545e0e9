"""One case in the clean model: is the expert at the trigger, and how does its write rank for the target's logit?

A rank among the K experts chosen there means little by itself: whoever has the largest gate writes most, so its rank
is first (or last) more often than one time in K. So each case has *matched controls*: at other tokens of its text,
up to the place of the target, another expert with a like gate (METRICS 3, preamble). They are ranked for the same
target among the experts chosen at *their* token, and ablated as the expert is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_lens.causal.trial.need import log_gate
from moe_lens.causal.triggers.cases import Located
from moe_lens.models import families
from moe_lens.types import Role

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    from moe_lens.models.lens import Lens
    from moe_lens.models.trace import Trace

CALIPER = 0.25
"""Of ln gate (METRICS 2.5)."""
MATCHED = 4
"""Matched controls of a case, at most."""


@dataclass(frozen=True)
class Control:
    """Another expert with a like gate at another token of the same text."""

    position: int
    expert: int
    gate: float
    logit: float
    """What it writes to the logit of the case's target there."""
    rank: float


@dataclass(frozen=True)
class Direct:
    """What the clean model does at the trigger of one case."""

    routed: bool
    gate: float = np.nan
    gate_rank: float = np.nan
    """1 for the largest gate at the token."""
    logit: float = np.nan
    """Of the target: gate x output . W_U with the scale of the final norm frozen. NaN where that is not defined."""
    rank: float = np.nan
    """Of `logit` among the experts chosen at the token, 1 is the largest, ties get their mean rank."""
    elsewhere: float = np.nan
    """Share of the other tokens of the text that visit the expert."""
    controls: tuple[Control, ...] = ()


def look(lens: Lens, located: Located, *, seed: int | Sequence[int] = 0) -> Direct:
    """Follow the text of one case through the clean model.

    Direct attribution does not show what later layers make of a write, nor whether the prediction would change
    without it: experts that write to one logit may stand in for each other.
    """
    layer, expert = located.case.expert.layer, located.case.expert.expert
    trace = lens.trace(located.text, layers=[layer])
    chosen, gates = _routing(trace)
    positions = np.arange(located.first + 1, len(located.input_ids))
    outside = positions[(positions < located.start) | (positions > located.position)]
    elsewhere = float((chosen[outside] == expert).any(axis=1).mean()) if len(outside) else np.nan
    slot = np.flatnonzero(chosen[located.position] == expert)
    if not len(slot):
        return Direct(False, elsewhere=elsewhere)
    gate, gate_rank = float(gates[located.position, slot[0]]), int(slot[0]) + 1
    near = _matched(chosen, gates, outside[outside <= located.place], expert, gate, gate_rank)
    rows = np.sort(np.random.default_rng(seed).permutation(len(near))[:MATCHED])
    controls = tuple(
        Control(at, int(chosen[at, k]), float(gates[at, k]), *_attributed(trace, located, at, int(chosen[at, k])))
        for at, k in (near[row] for row in rows)
    )
    logit, rank = _attributed(trace, located, located.position, expert)
    return Direct(True, gate, gate_rank, logit, rank, elsewhere, controls)


def _routing(trace: Trace) -> tuple[Int[ndarray, "token slot"], Float[ndarray, "token slot"]]:
    """Experts chosen at each token and their gates, largest gate first."""
    tap = next(tap for tap in trace.taps if tap.role is Role.MOE)
    order = np.lexsort((-tap.weight.float().numpy(), tap.token.numpy()))
    experts, gates = (values.numpy()[order] for values in (tap.expert, tap.weight.float()))
    return experts.reshape(tap.n_tokens, -1), gates.reshape(tap.n_tokens, -1)


def _matched(
    chosen: Int[ndarray, "token slot"],
    gates: Float[ndarray, "token slot"],
    positions: Int[ndarray, "position"],
    expert: int,
    gate: float,
    gate_rank: int,
) -> list[tuple[int, int]]:
    """(position, slot) of like gates of other experts, one at a token: like rank among the gates, then like gate."""
    off = np.abs(log_gate(gates[positions]) - log_gate(np.array(gate)))
    cost = np.abs(np.arange(gates.shape[1]) + 1 - gate_rank) + off / (2 * CALIPER)  # `off` decides between equal ranks
    cost[(off > CALIPER) | (chosen[positions] == expert)] = np.inf
    found = np.isfinite(cost).any(axis=1)
    return list(zip(positions[found].tolist(), cost[found].argmin(axis=1).tolist(), strict=True))


def _attributed(trace: Trace, located: Located, position: int, expert: int) -> tuple[float, float]:
    """What an expert writes to the target's logit at a token, and the rank of that."""
    if families.indirect_writes(trace.lens.model.config) is not None:
        return np.nan, np.nan
    found = trace.contributions(position, located.target_id)
    found = found[found["role"] == str(Role.MOE)]
    logit = float(found.loc[found["expert"] == expert, "logit"].iloc[0])
    if len(found) < 2:
        return logit, np.nan
    others = found["logit"].to_numpy()
    return logit, float(0.5 + (others > logit).sum() + (others == logit).sum() / 2)

"""What a run would cost, for ``--dry-run``: passes from the anatomy of the model, seconds from one timed pass."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_lens.causal.effects import Effects
from moe_lens.causal.faithfulness.rankings import GRADIENT
from moe_lens.causal.faithfulness.scores import EXACT_UNITS
from moe_lens.causal.faithfulness.settings import (
    BEAMS,
    DEFAULT_BINS,
    MODES,
    RANKING_TEXT,
    RANKINGS,
    SAMPLED,
    settings_of,
)
from moe_lens.errors import NotAnMoE
from moe_lens.models.edits import zero
from moe_lens.types import ExpertAddress, Role

if TYPE_CHECKING:
    from moe_lens.causal.faithfulness.sets import Bins
    from moe_lens.corpus.batches import Tokenized
    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import Spec

TIMED_TOKENS = 512


@dataclass(frozen=True)
class Passes:
    """Passes over the evaluation text by purpose. An upper bound: equal sets of one mode run once."""

    by_purpose: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_purpose.values())


def predict_passes(
    spec: Spec,
    *,
    rankings: Sequence[str] = RANKINGS,
    modes: Sequence[str] = MODES,
    bins: str | Bins | Sequence[float] = DEFAULT_BINS,
    n_random: int = 20,
    n_matched: int = 5,
    naopc: int = 0,
    routing: str = "live",
    n_units: int | None = None,
    super_experts: bool = False,
) -> Passes:
    """Count the passes of `faithfulness` with the same arguments; needs no weights.

    Args:
        n_units: experts of the universe, where not all are in it.
        super_experts: whether the model has some, which doubles the scored sets; only a run finds out.

    Raises:
        NotAnMoE, BadConfig: as `faithfulness`.
    """
    settings = settings_of(rankings, modes, bins, n_random=n_random, n_matched=n_matched, naopc=naopc, routing=routing)
    n_all = sum(entry.n_experts for entry in spec.layers if entry.role is Role.MOE)
    if not n_all:
        raise NotAnMoE(f"{spec.name} has no routed experts to rank: give a Mixture-of-Experts model")
    n_units = n_all if n_units is None else n_units
    naopc = min(naopc, n_units)
    samples = GRADIENT in settings.rankings and not settings.leaves_one_out
    n_modes, n_universes = len(settings.modes), 2 if super_experts else 1
    both = 2 * n_modes * len(settings.bins.shares) * settings.n_scored * n_universes
    exact = 2**naopc if naopc <= EXACT_UNITS else sum(BEAMS) * naopc * (naopc + 1)
    return Passes({
        "clean, noise floor": 2,
        "making rankings": RANKING_TEXT * 5,  # clean, routing sums, reference, forward and backward of the screen
        "leave one out": RANKING_TEXT * n_units if settings.leaves_one_out else 0,
        "recall of the screen": RANKING_TEXT * math.ceil(SAMPLED * n_units) if samples else 0,
        "sets of rankings": both + n_modes * n_universes,
        "random sets": both * settings.random_draws,
        "load-matched sets": both * n_matched,
        "naopc": n_modes * exact if naopc else 0,
        "churn": n_modes * settings.n_scored if routing == "live" else 0,
    })  # fmt: skip


def seconds_per_pass(lens: Lens, tokenized: Tokenized, *, max_tokens: int = 2048) -> float:
    """Time one pass without an expert of each layer on up to 512 tokens of any split, scaled to `max_tokens`.

    On this machine, as loaded as it is now; a quarter or so off either way.
    """
    effects = Effects(lens, tokenized, split=None, max_tokens=min(max_tokens, TIMED_TOKENS), progress=False)
    edit = zero([ExpertAddress(entry.layer, 0) for entry in lens.spec.layers if entry.role is Role.MOE])
    effects.of(edit)  # finds shortcuts, makes clean probabilities
    begin = time.perf_counter()
    effects.of(edit)
    return (time.perf_counter() - begin) * max_tokens / len(effects.text.read)

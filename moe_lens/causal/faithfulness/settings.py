"""What `faithfulness` scores, on which text and how: names checked before any pass, and what a run is known by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_lens.causal.evaluation import evaluation
from moe_lens.causal.faithfulness import rankings as ranking_module
from moe_lens.causal.faithfulness import sets
from moe_lens.causal.faithfulness.measure import check_modes
from moe_lens.causal.faithfulness.scores import BEAM_UNITS
from moe_lens.errors import BadConfig, BadCorpus
from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Bool
    from numpy import ndarray

    from moe_lens.corpus.batches import Tokenized
    from moe_lens.models.lens import Lens
    from moe_lens.types import ExpertAddress

DOCUMENT_TOKENS = 64
"""Tokens read of each document of a corpus: intervals are over documents, so many short ones tell more."""
RANKING_TEXT = 2
"""Tokens of the ranking text, in those of the evaluation text."""
BEAMS = (5, 10)
"""Widths of the two beams behind NAOPC limits that are not exact."""
SAMPLED = 0.1
"""Share of the experts on which the recall of the gradient screen is estimated."""
RANKINGS = ("load", "gate_norm", "gradient", "random")
MODES = ("mean_off", "mask_refill_keep")
DEFAULT_BINS = sets.PRESETS["default"].shares


@dataclass(frozen=True)
class Settings:
    """What is scored and how."""

    rankings: tuple[str, ...]
    modes: tuple[str, ...]
    bins: sets.Bins
    routing: Literal["live", "frozen"] = "live"
    universe: sets.Universe = "global"
    axis: sets.Axis = "count"
    n_random: int = 20
    n_matched: int = 5
    naopc: int = 0
    draws: int = 1000
    super_ratio: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("routing", ("live", "frozen")), ("universe", ("global", "per-layer")),
                            ("axis", ("count", "gate-mass"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise BadConfig(f"{name}={getattr(self, name)!r}: use {' or '.join(known)}")
        for name in ("n_random", "n_matched", "naopc", "draws"):
            if getattr(self, name) < 0:
                raise BadConfig(f"{name}={getattr(self, name)}: give 0 or more")
        if self.naopc > BEAM_UNITS:
            raise BadConfig(f"naopc={self.naopc}: limits are found for at most {BEAM_UNITS} candidate experts")

    @property
    def n_scored(self) -> int:
        """Rankings that are scored; ``random`` is their control."""
        return len([name for name in self.rankings if name != ranking_module.RANDOM])

    @property
    def leaves_one_out(self) -> bool:
        return ranking_module.LEAVE_ONE_OUT in self.rankings

    @property
    def random_draws(self) -> int:
        """Random sets are the control of every ranking, whether ``random`` is named or not."""
        return self.n_random


def settings_of(
    rankings: str | Sequence[str], modes: str | Sequence[str], bins: str | sets.Bins | Sequence[float], **more: Any
) -> Settings:
    """Settings with their names checked.

    Raises:
        BadConfig: an unknown name, or a number that cannot be.
    """
    return Settings(ranking_module.check_names(rankings), check_modes(modes), sets.bins_of(bins), **more)


@dataclass(frozen=True)
class Texts:
    """Which predictions are scored, and which documents rank."""

    max_tokens: int
    splits: tuple[Split | str | None, Split | str | None]
    include_first: bool
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise BadConfig(f"max_tokens={self.max_tokens}: give a positive number of tokens")

    def to_rank(self) -> dict[str, Any]:
        """Arguments of `evaluation` and `Effects` for the ranking text."""
        return {"split": self.splits[0], "max_tokens": RANKING_TEXT * self.max_tokens, "include_first": False}

    def to_score(self) -> dict[str, Any]:
        return {"split": self.splits[1], "max_tokens": self.max_tokens, "include_first": self.include_first}

    def check(self, tokenized: Tokenized, *, seed: int) -> None:
        """Refuse texts that cannot be scored, before the model runs.

        Raises:
            BadCorpus: a split without a token to predict, or one document to score on.
        """
        evaluation(tokenized, **self.to_rank(), seed=seed)
        if len(np.unique(evaluation(tokenized, **self.to_score(), seed=seed).document)) < 2:
            raise BadCorpus(
                "intervals are over documents and the evaluation text has one: raise max_tokens or give more documents"
            )


def chosen_units(
    lens: Lens,
    units: Sequence[ExpertAddress],
    layers: Sequence[int] | None,
    experts: Sequence[str | ExpertAddress] | None,
) -> Bool[ndarray, "unit"]:
    """Which routed experts are the universe: those of `layers`, and of them those in `experts`.

    Raises:
        OutOfRange: a layer or an expert that the model does not have.
        BadConfig: no routed expert is left.
    """
    wanted = set(lens.check_layers(layers))
    named = None if experts is None else {lens.address(expert) for expert in experts}
    found = np.array([unit.layer in wanted and (named is None or unit in named) for unit in units])
    if not found.any():
        raise BadConfig("none of the chosen layers and experts is a routed expert: choose from the model's MoE layers")
    return found


def request_of(
    settings: Settings,
    texts: Texts,
    tokenized: Tokenized,
    units: Sequence[ExpertAddress],
    member: Bool[ndarray, "unit"],
) -> dict[str, Any]:
    """What tells two runs in one directory apart, as JSON has it; files of scores by their content."""
    files = {
        name: hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]
        for name in settings.rankings
        if name not in ranking_module.KNOWN
    }
    asked = asdict(settings) | {"rankings": [f"{name} {files[name]}" if name in files else name
                                             for name in settings.rankings]}  # fmt: skip
    asked["experts"] = (
        None if member.all() else [str(unit) for unit, inside in zip(units, member, strict=True) if inside]
    )
    asked["text"] = asdict(texts) | {"tokens": _digest(tokenized)}
    return json.loads(json.dumps(asked))


_FREE = ("rankings", "bins", "n_random", "n_matched", "naopc", "draws", "super_ratio", "universe", "axis", "experts")
"""Settings that choose sets, or work on their effects; the effect of one set does not depend on them."""


def effect_request(request: dict[str, Any], reference: str) -> dict[str, Any]:
    """What the effect of one set depends on: a kept effect is used again only where all of it agrees."""
    return {name: value for name, value in request.items() if name not in _FREE} | {"reference": reference}


def _digest(tokenized: Tokenized) -> str:
    found = hashlib.sha256()
    for array in (tokenized.input_ids, tokenized.offsets, tokenized.document, tokenized.splits, tokenized.eligible):
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]

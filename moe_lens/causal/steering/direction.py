"""Which experts are pushed which way, and whether a model can be pushed like that."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_lens.errors import BadConfig, OutOfRange
from moe_lens.models.edits.base import Addresses, read_addresses
from moe_lens.models.edits.steered import FULL, Steered, steered
from moe_lens.types import ExpertAddress, Role

if TYPE_CHECKING:
    from moe_lens.models.spec import LayerSpec, Spec

WORDS = {"suppress": "suppressed", "force": "forced", "bias": "biased"}


@dataclass(frozen=True)
class Push:
    """One expert, and what is done to it."""

    expert: ExpertAddress
    way: str
    """One of `WORDS`."""
    value: float
    """-1 if suppressed, 1 if forced, else the bias that was asked for."""


@dataclass(frozen=True)
class Direction:
    """What is added to router logits, up to its size."""

    pushes: tuple[Push, ...]

    @property
    def experts(self) -> tuple[ExpertAddress, ...]:
        return tuple(push.expert for push in self.pushes)

    @property
    def size(self) -> float:
        """Largest bias that was asked for; 1 where none was."""
        return max(abs(push.value) for push in self.pushes)

    @property
    def given(self) -> float:
        """Strength of what was asked for where no KL is: biases as they are, else the utmost."""
        return self.size if all(push.way == "bias" for push in self.pushes) else math.inf

    def mode(self, strength: float) -> Steered:
        """The edit whose largest bias is `strength` logits.

        Infinity is the utmost: suppressed experts are never chosen, forced ones always, biases reach `FULL`.
        """
        found: dict[ExpertAddress, float] = {}
        for push in self.pushes:
            unit = push.value / self.size
            utmost = math.copysign(math.inf, unit) if push.way != "bias" else unit * FULL
            found[push.expert] = utmost if math.isinf(strength) else unit * strength
        return steered(found)

    def on(self, experts: Sequence[ExpertAddress]) -> Direction:
        """The same done to other experts, in the same order."""
        moved = zip(self.pushes, experts, strict=True)
        return Direction(tuple(replace(push, expert=expert) for push, expert in moved))

    @property
    def address(self) -> str:
        return ", ".join(map(str, self.experts))

    def __str__(self) -> str:
        parts = []
        for way, word in WORDS.items():
            if named := [str(push.expert) for push in self.pushes if push.way == way]:
                parts.append(f"{', '.join(named)} {word}")
        return " and ".join(parts)


def direction_of(
    suppress: Addresses = (),
    force: Addresses = (),
    bias: Mapping[str, float] | Mapping[ExpertAddress, float] | None = None,
) -> Direction:
    """Read what is to be done to which experts.

    Raises:
        BadConfig: nothing, an expert that is named for two things, or a bias that is no finite number or 0 alone.
        OutOfRange: an unreadable address.
    """
    pushes = [Push(e, "suppress", -1.0) for e in _read(suppress)] + [Push(e, "force", 1.0) for e in _read(force)]
    for address, value in (bias or {}).items():
        (expert,) = read_addresses([address])
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise BadConfig(f"the bias of {expert} is {value!r}: give a finite number, such as 2.5")
        pushes.append(Push(expert, "bias", float(value)))
    if not pushes:
        raise BadConfig("there is nothing to steer: name experts to suppress, to force or to bias, such as L2.E3")
    for expert, n in Counter(push.expert for push in pushes).items():
        if n > 1:
            words = " and ".join(WORDS[push.way] for push in pushes if push.expert == expert)
            raise BadConfig(f"{expert} is to be {words} at once: choose one")
    if not any(push.value for push in pushes):
        raise BadConfig("every bias is 0, which steers nowhere: give one above or below 0")
    return Direction(tuple(pushes))


def _read(given: Addresses) -> tuple[ExpertAddress, ...]:
    is_empty = not isinstance(given, str | ExpertAddress) and not list(given)
    return () if is_empty else read_addresses([given])


def check_direction(direction: Direction, spec: Spec) -> None:
    """Refuse what the model does not have, or what its router cannot do.

    Raises:
        OutOfRange: an expert that the model does not have.
        BadConfig: a neuron, a layer without router, too few experts left, or too many forced.
    """
    entries: dict[int, LayerSpec] = {}
    for expert in direction.experts:
        entry = spec.at(expert.layer)
        if entry is None or entry.role is not Role.MOE:
            layers = ", ".join(map(str, spec.moe_layers))
            raise OutOfRange(f"layer {expert.layer} of {spec.name!r} has no router to steer: choose from {layers}")
        if expert.expert >= entry.n_experts:
            raise OutOfRange(
                f"layer {expert.layer} of {spec.name!r} has no expert {expert.expert}: its experts are "
                f"0-{entry.n_experts - 1}"
            )
        if expert.neuron is not None:
            raise BadConfig(f"steering acts on whole experts, not on {expert}: name L{expert.layer}.E{expert.expert}")
        entries[expert.layer] = entry
    for layer, entry in entries.items():
        ways = Counter(push.way for push in direction.pushes if push.expert.layer == layer)
        if (left := entry.n_experts - ways["suppress"]) < entry.top_k:
            raise BadConfig(
                f"without {ways['suppress']} of its {entry.n_experts} experts layer {layer} has {left} left, and each "
                f"token visits {entry.top_k}: suppress at most {entry.n_experts - entry.top_k} there"
            )
        if ways["force"] > entry.top_k:
            raise BadConfig(
                f"{ways['force']} experts are forced in layer {layer}, where each token visits {entry.top_k}: "
                f"force at most {entry.top_k} there"
            )

"""What all ablation modes share: the experts they act on, and how they meet a forward pass.

A mode is a small frozen object that says what is wanted (`zero("L7.E12")`). A `Bound` joins it with a lens, a scope
and a record, and is what the seam calls. A new mode is one class in `outputs` or `routes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from moe_lens.errors import BadConfig, OutOfRange
from moe_lens.models.edits.record import EditRecord
from moe_lens.models.edits.scope import Scope
from moe_lens.models.seam import Edit, Routing
from moe_lens.types import ExpertAddress, ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Bool

    from moe_lens.models.lens import Lens

Address = str | ExpertAddress
Addresses = Address | Iterable[Address]


def read_addresses(given: Sequence[Addresses]) -> tuple[ExpertAddress, ...]:
    """Addresses from strings, addresses and lists of either, without repeats.

    Raises:
        OutOfRange: an unreadable address.
        BadConfig: none was given.
    """
    flat: list[ExpertAddress] = []
    for entry in given:
        items = list(entry) if isinstance(entry, Iterable) and not isinstance(entry, str) else [entry]
        for item in items:
            if not isinstance(item, str | ExpertAddress):
                raise OutOfRange(f"an expert is written as 'L7.E12', not {item!r}")
            flat.append(ExpertAddress.parse(item))
    if not flat:
        raise BadConfig("no expert was named: write it as L7.E12")
    return tuple(dict.fromkeys(flat))


@dataclass(frozen=True, eq=False)
class Mode:
    """One ablation mode and the experts it acts on (METRICS 2.3; μ in the faithfulness literature)."""

    experts: tuple[ExpertAddress, ...]

    name: ClassVar[str] = ""
    removes: ClassVar[bool] = False
    """Whether the router chooses again without the experts."""
    needs_router: ClassVar[bool] = False
    """Whether it changes gates or choices, which a dense FFN has not."""
    takes_neurons: ClassVar[bool] = False

    def prepare(self, lens: Lens, record: EditRecord) -> Any:
        """What the mode needs before the first pass (means, samples, generators); kept as `Bound.state`."""

    def routing(self, bound: Bound, routing: Routing) -> Routing | None:
        """See `Edit.routing`; called for layers with a named expert only."""

    def activation(self, bound: Bound, tap: ExpertTap) -> Tensor | None:
        """See `Edit.activation`."""

    def output(self, bound: Bound, tap: ExpertTap) -> Tensor | None:
        """See `Edit.output`."""

    def check(self, lens: Lens) -> None:
        """Refuse addresses that the model does not have or the mode cannot use.

        Raises:
            OutOfRange: an expert outside the model.
            BadConfig: a neuron, a dense FFN or a layer where the mode is not defined.
        """
        for expert in self.experts:
            lens.address(expert)
            if expert.neuron is not None and not self.takes_neurons:
                raise BadConfig(
                    f"{self.name} acts on whole experts, not on {expert}: name L{expert.layer}.E{expert.expert}"
                )
            entry = lens.spec.at(expert.layer)
            assert entry is not None
            if self.needs_router and entry.role is not Role.MOE:
                raise BadConfig(f"layer {expert.layer} has no router, so {self.name} means nothing there: use zero")


@dataclass
class Bound(Edit):
    """A mode at work in one `lens.edit` block."""

    mode: Mode
    lens: Lens
    scope: Scope
    record: EditRecord
    clean: dict[int, Routing] = field(default_factory=dict)
    """Routing of the clean pass, layer by layer, when downstream routing is frozen."""
    is_frozen: bool = False
    state: Any = None
    """What the mode prepared."""

    def experts_in(self, layer: int) -> list[int]:
        """Named experts of a layer, neurons apart."""
        return [e.expert for e in self.mode.experts if e.layer == layer and e.neuron is None]

    def rows(self, tap: ExpertTap, experts: Sequence[int]) -> Bool[Tensor, "row"]:
        """Visits of `experts` by tokens in scope."""
        wanted = torch.zeros(tap.n_experts, dtype=torch.bool, device=tap.token.device)
        wanted[list(experts)] = True
        rows = wanted[tap.expert]
        return rows if self.scope.mask is None else rows & self.scope.mask[tap.token]

    def removed(self, routing: Routing) -> Bool[Tensor, "token expert"]:
        """Which experts do not exist for which token: this mode's, and those that outer edits removed."""
        n_tokens = routing.index.shape[0]
        removed = torch.zeros(n_tokens, routing.site.n_experts, dtype=torch.bool, device=routing.index.device)
        removed[:, self.experts_in(routing.site.layer)] = True
        if self.scope.mask is not None:
            removed &= self.scope.mask[:, None]
        return removed if routing.removed is None else removed | routing.removed

    def routing(self, routing: Routing) -> Routing | None:
        return self.mode.routing(self, routing) if self.experts_in(routing.site.layer) else None

    def activation(self, tap: ExpertTap) -> Tensor | None:
        return self.mode.activation(self, tap)

    def output(self, tap: ExpertTap) -> Tensor | None:
        return self.mode.output(self, tap) if self.experts_in(tap.layer) else None


def check_layers_stay(lens: Lens, modes: Sequence[Mode], whole_layers: bool) -> None:
    """Refuse to leave an MoE layer without any expert, unless that is what is asked for.

    Raises:
        BadConfig: every expert of a layer is named.
    """
    modes = [mode for mode in modes if mode.name != "swap"]
    for layer in sorted({expert.layer for mode in modes for expert in mode.experts}):
        entry = lens.spec.at(layer)
        assert entry is not None
        named = {e.expert for mode in modes for e in mode.experts if e.layer == layer and e.neuron is None}
        masked = {e.expert for mode in modes if mode.removes for e in mode.experts if e.layer == layer}
        if entry.role is not Role.MOE or len(named) < entry.n_experts:
            continue
        if len(masked) == entry.n_experts:
            raise BadConfig(
                f"layer {layer} would have no expert to choose from: leave at least one of {entry.n_experts}"
            )
        if not whole_layers:
            raise BadConfig(
                f"all {entry.n_experts} experts of layer {layer} are named: leave at least one, or pass "
                "whole_layers=True to switch off the routed part of the layer"
            )


def out_of_reach(expert: ExpertAddress, other: ExpertAddress) -> OutOfRange:
    return OutOfRange(f"{expert} and {other} are in different layers: swap experts of one layer")

"""Modes that change which experts a token visits, or with what weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from moe_lens.errors import BadConfig
from moe_lens.models.edits.base import Address, Addresses, Bound, Mode, out_of_reach, read_addresses
from moe_lens.models.gates import rule_of_router
from moe_lens.models.rerouting import keep_gates, route_without
from moe_lens.models.seam import Routing
from moe_lens.types import ExpertAddress, Role

if TYPE_CHECKING:
    from moe_lens.models.edits.record import EditRecord
    from moe_lens.models.lens import Lens


class Reroute(Mode):
    needs_router: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class DropRenorm(Reroute):
    name: ClassVar[str] = "drop_renorm"
    total: Literal["kept", "one"] = "kept"

    def routing(self, bound: Bound, routing: Routing) -> Routing:
        """The same choice, the weights of removed experts moved to the others of the token."""
        lost = bound.removed(replace(routing, removed=None)).gather(1, routing.index)
        weight = routing.weight
        kept = weight.masked_fill(lost, 0)
        before, after = weight.sum(dim=1, keepdim=True), kept.sum(dim=1, keepdim=True)
        touched = lost.any(dim=1)
        target = before if self.total == "kept" else torch.ones_like(before)
        scaled = torch.where(after > 0, kept * (target / after), kept)
        new = torch.where(touched[:, None], scaled, weight)
        _note(self.name, bound, routing, lost, new, emptied=int((touched & (after[:, 0] == 0)).sum()))
        return replace(routing, weight=new, changed=(*routing.changed, self.name))


@dataclass(frozen=True, eq=False)
class MaskRefill(Reroute):
    name: ClassVar[str] = "mask_refill"
    removes: ClassVar[bool] = True
    follows: ClassVar[frozenset[str]] = frozenset({"mask_refill"})
    """Modes that may have changed the routing before; asking the router again would undo any other."""

    def routing(self, bound: Bound, routing: Routing) -> Routing:
        """The router's choice without the removed experts.

        Raises:
            BadConfig: an outer edit would be undone, or no expert would be left to a token.
            UnsupportedModel: the router cannot be asked again.
        """
        if undone := [mode for mode in routing.changed if mode not in self.follows]:
            raise BadConfig(
                f"{self.name} asks the router again, which would undo {undone[0]} of an outer edit: "
                f"put {self.name} first"
            )
        removed = bound.removed(routing)
        if (none_left := removed.all(dim=1)).any():
            raise BadConfig(
                f"{int(none_left.sum())} tokens would have no expert to choose from in layer {routing.site.layer}: the "
                "nested edits together remove all of them, so leave at least one"
            )
        call = bound.clean.get(routing.site.layer, routing)
        index, weight = route_without(replace(routing, call=call.call, logits=call.logits), removed)
        lost = removed.gather(1, routing.index)
        still = removed.gather(1, index)
        index, weight = self.gates(bound, replace(routing, logits=call.logits), removed, index, weight)
        self._count(bound, routing, removed, lost, still, weight)
        return replace(routing, index=index, weight=weight, removed=removed, changed=(*routing.changed, self.name))

    def gates(
        self, bound: Bound, routing: Routing, removed: Tensor, index: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Final choice and weights, from the router's own answer without the removed experts."""
        return index, weight

    def _count(self, bound: Bound, routing: Routing, removed: Tensor, lost: Tensor, still: Tensor, new: Tensor) -> None:
        survivors = (~removed).sum(dim=1)
        is_short = survivors < routing.index.shape[1]
        unfilled = still.any(dim=1) & removed.any(dim=1)
        n_lost = int(lost.sum())
        _note(
            self.name, bound, routing, lost, new,
            refilled=max(0, n_lost - int(still.sum())),
            short=int((unfilled & is_short).sum()),
            unsatisfied=int((unfilled & ~is_short).sum()),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class MaskRefillKeep(MaskRefill):
    name: ClassVar[str] = "mask_refill_keep"
    follows: ClassVar[frozenset[str]] = frozenset({"mask_refill", "mask_refill_keep"})

    def prepare(self, lens: Lens, record: EditRecord) -> dict[int, str | None]:
        """How each router concerned scores its logits; None where that must be read from the batch."""
        layers = {expert.layer for expert in self.experts}
        sites = [site for site in lens.sites if site.role is Role.MOE and site.layer in layers]
        rules = {site.layer: rule_of_router(site.router, lens.spec.d_model, site.read_router) for site in sites}
        return {layer: None if rule is None else rule.score for layer, rule in rules.items()}

    def gates(
        self, bound: Bound, routing: Routing, removed: Tensor, index: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        return keep_gates(routing, removed, index, bound.state[routing.site.layer])


@dataclass(frozen=True, eq=False)
class Swap(Reroute):
    name: ClassVar[str] = "swap"
    other: ExpertAddress | None = None

    def check(self, lens: Lens) -> None:
        super().check(lens)
        lens.address(self.other or self.experts[0])

    def routing(self, bound: Bound, routing: Routing) -> Routing:
        assert self.other is not None
        if routing.removed is not None and routing.removed[:, self.other.expert].any():
            raise BadConfig(f"{self.other} was removed by an outer edit: swap {self.experts[0]} with another expert")
        lost = bound.removed(replace(routing, removed=None)).gather(1, routing.index)
        _note(self.name, bound, routing, lost, routing.weight)
        index = routing.index.masked_fill(lost, self.other.expert)
        return replace(routing, index=index, changed=(*routing.changed, self.name))


def _note(mode: str, bound: Bound, routing: Routing, lost: Tensor, new: Tensor, **counts: int) -> None:
    touched = lost.any(dim=1)
    mass = (float(routing.weight.detach()[touched].double().sum()), float(new.detach()[touched].double().sum()))
    bound.record.add(mode, routing.site.layer, tokens=int(touched.sum()), visits=int(lost.sum()), mass=mass, **counts)


def drop_renorm(*experts: Addresses, total: Literal["kept", "one"] = "kept") -> DropRenorm:
    """Drop the experts' writes and scale the other gates of the token up.

    Foreign to models that do not renormalise their gates. Where every chosen expert is dropped nothing is left
    to scale: the token gets zero, and the record counts it as `emptied`.

    Args:
        total: what the gates of the token sum to afterwards: "kept" as before, "one" as in a model that
            renormalises. They differ only where the model does not renormalise.

    Raises:
        BadConfig: an unknown `total`.
    """
    if total not in ("kept", "one"):
        raise BadConfig(f"unknown total {total!r}: use kept or one")
    return DropRenorm(read_addresses(experts), total)


def mask_refill(*experts: Addresses) -> MaskRefill:
    """Let the router choose as if the experts did not exist; another expert takes each free place.

    The convention of expert pruning (Lu et al. 2024). The effect includes what the replacement adds, and where
    weights are not renormalised over the top-k every surviving gate grows. The gains that Inkling's router sets for
    its shared experts stay clean.
    """
    return MaskRefill(read_addresses(experts))


def mask_refill_keep(*experts: Addresses) -> MaskRefillKeep:
    """`mask_refill` without gate inflation: survivors keep their gates bit for bit.

    A replacement gets its clean score over the clean denominator of the token (METRICS 2.3), so the gate mass
    falls: the record gives the `mass_ratio`.

    Raises (when a pass runs):
        UnsupportedModel: the router's weights are not proportional to a score of the logits (Phi-MoE).
    """
    return MaskRefillKeep(read_addresses(experts))


def swap(expert: Address, other: Address) -> Swap:
    """Compute `other` wherever `expert` was chosen, with the same gate: content against mere presence.

    Raises:
        OutOfRange: experts of different layers.
        BadConfig: an expert with itself.
    """
    (first,), (second,) = read_addresses([expert]), read_addresses([other])
    if first.layer != second.layer:
        raise out_of_reach(first, second)
    if first == second:
        raise BadConfig(f"{first} cannot be swapped with itself: name another expert of layer {first.layer}")
    return Swap((first,), second)

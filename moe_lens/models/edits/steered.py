"""Steering: let the router choose with a bias on the logits of some experts.

1. Run the family's own router again on the arguments it was called with (`rerouting.route_without`).
2. Inside, the bias is added to its logits: what comes out of its last linear map of one number per expert.
3. An expert with a bias of minus infinity does not exist for the router, as under `mask_refill`; one of plus infinity
   gets the largest bias, and is raised once more where the router takes its top-k, because a selection bias or a
   limit to groups could still prefer others.

Choice and weights both follow, in whatever way the family's router turns logits into them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moe_lens.errors import BadConfig, UnsupportedModel
from moe_lens.models.edits.base import Bound, read_addresses
from moe_lens.models.edits.routes import Reroute
from moe_lens.models.rerouting import LOGIT_WIDTHS, route_without
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moe_lens.models.edits.record import EditRecord
    from moe_lens.models.lens import Lens
    from moe_lens.models.seam import Routing

FULL = 128.0
"""Bias beyond which more changes nothing: softmax and sigmoid have saturated, and bfloat16 has few digits left."""
_LINEAR = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_TOPK = (torch.topk, Tensor.topk)


@dataclass(frozen=True, eq=False)
class Steered(Reroute):
    """See `steered`."""

    name: ClassVar[str] = "steered"
    bias: tuple[float, ...] = ()
    """For each of `experts`, added to its router logit."""

    def prepare(self, lens: Lens, record: EditRecord) -> dict[int, int]:
        """By layer: which linear map of the router gives its logits, counted from 1; filled as passes run."""
        return {}

    def routing(self, bound: Bound, routing: Routing) -> Routing:
        """The router's choice and weights with the bias.

        Raises:
            BadConfig: an outer edit would be undone.
            UnsupportedModel: the router cannot be asked again.
        """
        if undone := [mode for mode in routing.changed if mode != "mask_refill"]:
            raise BadConfig(
                f"steering asks the router again, which would undo {undone[0]} of an outer edit: give all biases to "
                "one mode, and put it first"
            )
        layer = routing.site.layer
        call = bound.clean.get(layer, routing)
        asked = replace(routing, call=call.call, logits=call.logits)
        bias = self._bias(bound, routing)
        removed = bias == -math.inf
        removed = removed if routing.removed is None else removed | routing.removed
        try:
            if layer not in bound.state:
                with _Shift(bias, _widths(routing)) as counter:
                    route_without(asked, removed)
                bound.state[layer] = counter.n_seen
            with _Shift(bias, _widths(routing), at=bound.state[layer]):
                index, weight = route_without(asked, removed)
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"the router of layer {layer} ({routing.site.path}) cannot be asked again with other logits, so its "
                "experts cannot be steered: put your own code into lens.edit(zero(...)) instead"
            ) from error
        self._count(bound, routing, index, weight)
        new = removed if bool(removed.any()) else routing.removed
        return replace(routing, index=index, weight=weight, removed=new, changed=(*routing.changed, self.name))

    def _bias(self, bound: Bound, routing: Routing) -> Float[Tensor, "token expert"]:
        bias = torch.zeros(len(routing.index), routing.site.n_experts, device=routing.index.device)
        for expert, value in zip(self.experts, self.bias, strict=True):
            if expert.layer == routing.site.layer:
                bias[:, expert.expert] = value
        return bias if bound.scope.mask is None else bias.where(bound.scope.mask[:, None], 0)

    def _count(self, bound: Bound, routing: Routing, index: Int[Tensor, "token slot"], weight: Tensor) -> None:
        """Tokens that visit other experts than before, and how many of their visits are to other ones."""
        n_experts = routing.site.n_experts
        before, after = (F.one_hot(found, n_experts).sum(dim=1).bool() for found in (routing.index, index))
        moved = (before & ~after).sum(dim=1)
        mass = (float(routing.weight.detach().double().sum()), float(weight.detach().double().sum()))
        bound.record.add(
            self.name, routing.site.layer, tokens=int((moved > 0).sum()), visits=int(moved.sum()), mass=mass
        )


class _Shift(TorchFunctionMode):
    """Add a bias to one of the linear maps of a router's forward that give a number per token and expert.

    Args:
        widths: of the logits, where they are more than the routed experts.
        at: which of the maps, counted from 1; 0 changes none and only counts.
    """

    def __init__(self, bias: Float[Tensor, "token expert"], widths: set[int], at: int = 0) -> None:
        super().__init__()
        self.shift = bias.masked_fill(bias == -math.inf, 0).clamp(max=FULL)  # `route_without` sees to minus infinity
        self.forced = bias == math.inf
        self.widths, self.at, self.n_seen = widths, at, 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.at and func in _TOPK and (forced := self._like(args[0], self.forced)) is not None:
            return func(args[0].masked_fill(forced, torch.finfo(args[0].dtype).max), *args[1:], **kwargs)
        out = func(*args, **kwargs)
        if func not in _LINEAR or (shift := self._like(out, self.shift)) is None:
            return out
        self.n_seen += 1
        return out + shift.to(out.dtype) if self.n_seen == self.at else out

    def _like(self, scores: Tensor, per_expert: Tensor) -> Tensor | None:
        """`per_expert` in the shape of `scores`; None if these are not one for each token and expert."""
        n_tokens, n_experts = per_expert.shape
        width = scores.shape[-1]
        if scores.numel() == per_expert.numel():
            return per_expert.view(scores.shape)
        if width in self.widths and scores.numel() == n_tokens * width:
            return F.pad(per_expert, (0, width - n_experts)).view(scores.shape)
        return None


def _widths(routing: Routing) -> set[int]:
    return {int(width) for name in LOGIT_WIDTHS if (width := getattr(routing.site.router, name, 0))}


def steered(bias: Mapping[str, float] | Mapping[ExpertAddress, float]) -> Steered:
    """Add to the router logits of experts: more than 0 for more visits and weight, less for fewer.

    The family's router then chooses and weights as always (METRICS 3 item 8). Minus infinity takes an expert out of
    the choice, which is `mask_refill`; plus infinity puts it into the choice of every token, with the weight that a
    bias of `FULL` gives. It cannot nest in another mode that changes the choice, but for `mask_refill`.

    Args:
        bias: expert to what is added, in units of the router's logits.

    Raises:
        BadConfig: no expert, one that is named twice, or a bias that is no number.
        OutOfRange: an unreadable address.
        UnsupportedModel: when a pass runs, a router that cannot be asked again.
    """
    found: dict[ExpertAddress, float] = {}
    for address, value in bias.items():
        (expert,) = read_addresses([address])
        if expert in found:
            raise BadConfig(f"{expert} has two biases: give one")
        if not isinstance(value, int | float) or math.isnan(value):
            raise BadConfig(f"the bias of {expert} is {value!r}: give a number, such as -2.5")
        found[expert] = float(value)
    return Steered(read_addresses([found]), tuple(found.values()))

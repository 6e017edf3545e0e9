"""What the rest of the package asks about an undecorated family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from moe_lens.models.rows import ExpertsCall

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moe_lens.models.seam import Session
    from moe_lens.models.sites import Site


class Shape(NamedTuple):
    """Sizes of the routed experts of one layer."""

    n_experts: int
    top_k: int
    d_ff: int
    parameters: int
    """Of all routed experts."""
    parameters_per_visit: float
    """Of the experts that a token visits, divided by top_k."""


class RouterReturn(NamedTuple):
    """What a router decided, in the form that transformers' decorated families return it in."""

    logits: Float[Tensor, "token expert"]
    weight: Float[Tensor, "token slot"]
    index: Int[Tensor, "token slot"]


class Adapter(ABC):
    """One undecorated family. `experts` is always the module that `ADAPTERS` names."""

    title: str

    @abstractmethod
    def shape(self, experts: Any, block: Any) -> Shape:
        """Sizes, from the modules alone (their weights may be on the meta device)."""

    @abstractmethod
    def read_router(self, block: Any, returned: Any) -> RouterReturn:
        """What the router of an MoE block returned, in the common form."""

    @abstractmethod
    def call(self, experts: Any, args: tuple[Any, ...], session: Session) -> ExpertsCall | None:
        """The experts' share of the forward call that is under way; None if the call did not come from the model."""

    @abstractmethod
    def run_expert(self, site: Site, x: Float[Tensor, "row d_model"], expert: int) -> Float[Tensor, "row d_model"]:
        """Unweighted output of one expert on any inputs, by module calls, so that offloaded weights are brought in."""

    @abstractmethod
    def down_projection(self, experts: Any, expert: int) -> Float[Tensor, "..."]:
        """The weights of one expert's down-projection, as a view of the model's parameter."""

    def takes_input(self, site: Site) -> nn.Module:
        """The module whose first argument is the input of the layer's experts."""
        return site.module


def replace_forward(module: nn.Module, forward: Callable[..., Any], stack: ExitStack) -> None:
    """Call `forward(module, native, *args, **kwargs)` instead of `module.forward` until `stack` closes.

    accelerate keeps a module's own forward as `_old_forward` inside one that brings the weights in: there we
    replace the inner one.
    """
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    native, is_own = getattr(module, name), name in vars(module)
    stack.callback(setattr, module, name, native) if is_own else stack.callback(delattr, module, name)
    setattr(module, name, partial(forward, module, native))

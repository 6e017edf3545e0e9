"""The one place that touches transformers' semi-private names: tap the experts of a model as it runs.

transformers (>= 5.7) calls every decorated experts module as `experts(x, top_k_index, top_k_weights)`
and looks the implementation up by name (`transformers.integrations.moe`). We register "moe_lens":

0. edits may change which experts a token visits and with what weight;
1. sort the T*K (token, expert) visits by expert, with the same call as the implementation we stand in for;
2. up-projection and activation, one group of rows per expert  -> `ExpertTap.activation`
3. down-projection of the same rows                            -> `ExpertTap.output`
4. weight by the router, sum per token, return.

The operations and their order are those of transformers' own `grouped_mm` or `eager`, so the result is
bit-equal to it and the intermediate values cost nothing extra. Module flags (`has_gate`, `has_bias`,
`is_transposed`, `_apply_gate`) describe each family. Families that transformers does not dispatch go through
the same steps with an `ExpertsCall` of their own (`adapters`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lens.errors import BadConfig, UnsupportedModel
from moe_lens.models import dense, families
from moe_lens.models.adapters import adapter_of
from moe_lens.models.adapters.base import replace_forward
from moe_lens.models.rows import ExpertsCall, Rows, sort_rows, sum_by_expert
from moe_lens.models.sites import Site, is_experts
from moe_lens.types import ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

log = logging.getLogger("moe_lens")

IMPLEMENTATION = "moe_lens"
MINIMUM_TRANSFORMERS = (5, 7)
Kernel = Literal["native", "grouped_mm", "eager"]
KERNELS: tuple[Kernel, ...] = ("native", "grouped_mm", "eager")
OnTap = Callable[[ExpertTap], None]


class StopForward(Exception):
    """Ends a forward pass early, once the last wanted layer has run."""


@dataclass(frozen=True)
class Routing:
    """What the router of one layer decided about one batch."""

    site: Site
    index: Int[Tensor, "token slot"]
    weight: Float[Tensor, "token slot"]
    logits: Float[Tensor, "token expert"] | None
    """Raw router logits; None when the family keeps its router where we cannot find it."""
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """Arguments of the router's call, so that an edit can ask it again."""
    removed: Bool[Tensor, "token expert"] | None = None
    """Experts that outer edits took out of the choice; inner edits keep them out."""
    changed: tuple[str, ...] = ()
    """Modes of the edits that changed `index` or `weight` already, outermost first."""


class Edit:
    """A change of what is computed. Subclasses override any method; None leaves the value alone."""

    def routing(self, routing: Routing) -> Routing | None:
        """New experts and weights of every token of a routed layer, before its experts run."""
        return None

    def activation(self, tap: ExpertTap) -> Float[Tensor, "row d_ff"] | None:
        """New activation of a layer's rows. `tap.output` does not exist yet."""
        return None

    def output(self, tap: ExpertTap) -> Float[Tensor, "row d_model"] | None:
        """New unweighted expert output of a layer's rows."""
        return None


@dataclass
class Session:
    """What one `tapping` block wants from one routed site."""

    site: Site
    on_tap: OnTap
    edit: Edit | None
    router_logits: list[Tensor] = field(default_factory=list)
    router_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    router_return: Any = None


@dataclass
class Pass:
    """State of the forward passes of one model inside its outermost `tapping` block."""

    recording: dict[int, Routing] | None = None
    """While this is a dict, the model computes without edits and taps, and each layer's routing goes here."""

    @contextmanager
    def record(self) -> Iterator[dict[int, Routing]]:
        """Run without edits and taps inside the block, keeping the routing of every layer that has a session."""
        if self.recording is not None:
            raise RuntimeError("a clean pass is under way already")
        self.recording = {}
        try:
            yield self.recording
        finally:
            self.recording = None


@dataclass
class Seat:
    """What an experts module carries while its model is tapped."""

    order: str
    current: Pass
    sessions: tuple[Session, ...] = ()


@contextmanager
def tapping(
    model: nn.Module,
    sites: Sequence[Site],
    on_tap: OnTap,
    *,
    kernel: Kernel = "native",
    edit: Edit | None = None,
) -> Iterator[Pass]:
    """Deliver an `ExpertTap` for each of `sites` whenever `model` runs inside the block.

    The model computes what it computes without us, bit for bit, unless `edit` changes it. Everything is
    restored on exit, also when the body raises. Blocks may be nested; one model must not run in two
    threads at once, because the implementation is a setting of its config.

    Args:
        model: a causal language model or its base model, as transformers built it.
        sites: from `moe_lens.models.sites.find_sites(model)`.
        kernel: order of operations; "native" follows the implementation the model is set to.

    Raises:
        UnsupportedModel: the experts cannot be switched to our implementation.
        BadConfig: an unknown kernel, or one that contradicts the enclosing block.
    """
    routed = [site for site in sites if site.routed]
    with ExitStack() as stack:
        current = _pass_under_way(model) or Pass()
        if routed:
            current = _switch(model, routed[0].module, kernel, stack)
            for site in routed:
                _attach(site, Session(site, on_tap, edit), stack)
        for site in sites:
            if not site.routed:
                dense.attach(site, on_tap, edit, stack, current)
        yield current


def _pass_under_way(model: nn.Module) -> Pass | None:
    """The state of the enclosing `tapping` block of routed sites, if there is one."""
    seats = (vars(module).get("_moe_lens") for module in model.modules())
    return next((seat.current for seat in seats if seat is not None), None)


def require_transformers() -> None:
    """Register our implementation and check the names we rely on.

    Raises:
        UnsupportedModel: transformers is too old, or no longer has the experts registry.
    """
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    too_old = version < MINIMUM_TRANSFORMERS
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        too_old = True
    if too_old:
        wanted = ".".join(map(str, MINIMUM_TRANSFORMERS))
        raise UnsupportedModel(
            f"transformers {transformers.__version__} is too old: pip install 'transformers>={wanted}'"
        )
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)


def resolve_kernel(experts: nn.Module, kernel: Kernel) -> str:
    """The order of operations that `kernel` means for this experts module: "grouped_mm" or "eager".

    Raises:
        BadConfig: `kernel` is not one of native, grouped_mm, eager.
    """
    if kernel not in KERNELS:
        raise BadConfig(f"unknown kernel {kernel!r}: use one of {', '.join(KERNELS)}")
    adapter = adapter_of(experts)
    if adapter is not None and kernel == "grouped_mm":
        raise BadConfig(f"{adapter.title} runs its experts in its own order only: leave the kernel at native")
    if adapter is not None:
        return "eager"
    if kernel != "native":
        return kernel
    seat = vars(experts).get("_moe_lens")
    if seat is not None:  # inside another tapping block: keep its order
        return seat.order
    native = str(experts.config._experts_implementation)  # type: ignore[union-attr]
    if native not in ("grouped_mm", "eager"):
        log.warning("the model is set to %s; moe-lens computes its experts with grouped_mm instead", native)
        return "grouped_mm"
    return native


def _switch(model: nn.Module, experts: nn.Module, kernel: Kernel, stack: ExitStack) -> Pass:
    """Set `model` to our implementation until `stack` closes; inside another block, join it."""
    require_transformers()
    order = resolve_kernel(experts, kernel)
    seat: Seat | None = vars(experts).get("_moe_lens")
    if seat is not None:
        if order != seat.order:
            raise BadConfig(f"kernel {kernel!r} contradicts the enclosing block, which runs {seat.order}")
        return seat.current
    if is_experts(experts):
        previous = model.get_experts_implementation()  # type: ignore[operator]
        stack.callback(_switch_back, model, experts, previous)
        model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]
        if experts.config._experts_implementation != IMPLEMENTATION:  # type: ignore[union-attr]
            raise UnsupportedModel(
                f"{type(model).__name__} does not let its experts be switched: use the transformers class of the family"
            )
    current = Pass()
    for module in model.modules():  # layers without a tap run the same order as the others
        is_adapted = adapter_of(module) is not None
        if is_adapted or is_experts(module):
            module._moe_lens = Seat(order, current)  # type: ignore[assignment]
            stack.callback(delattr, module, "_moe_lens")
        if is_adapted:
            replace_forward(module, _adapted_forward, stack)
    return current


def _switch_back(model: nn.Module, experts: nn.Module, previous: Any) -> None:
    if experts.config._experts_implementation != IMPLEMENTATION:  # type: ignore[union-attr]
        log.warning(
            "the experts implementation of the model was changed inside the block, after which nothing was tapped or "
            "edited: set it before the block"
        )
    model.set_experts_implementation(previous)  # type: ignore[operator]


def _attach(site: Site, session: Session, stack: ExitStack) -> None:
    """Give `site` a session until `stack` closes; nested sessions form a tuple, outermost first."""
    seat: Seat = site.module._moe_lens  # type: ignore[assignment]
    stack.callback(setattr, seat, "sessions", seat.sessions)
    seat.sessions = (*seat.sessions, session)
    if site.router is not None and site.role is Role.MOE:

        def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            session.router_call, session.router_return = (args, kwargs), out
            session.router_logits[:] = [logits_of(site, out)]

        stack.callback(site.router.register_forward_hook(keep, with_kwargs=True).remove)


def logits_of(site: Site, out: Any) -> Float[Tensor, "token expert"]:
    """Raw router logits from what the router of `site` returned."""
    if site.adapter is not None:
        return site.adapter.read_router(site.block, out).logits
    logits = out[0] if isinstance(out, tuple) else out
    if type(site.router).__name__ in families.PROBABILITY_ROUTERS:
        logits = logits.log()
    return logits.reshape(-1, logits.shape[-1])


def _experts_forward(
    self: Any, hidden_states: Float[Tensor, "token d_model"], top_k_index: Tensor, top_k_weights: Tensor
) -> Float[Tensor, "token d_model"]:
    """The implementation that transformers calls for every experts module while a model is tapped."""
    seat: Seat | None = vars(self).get("_moe_lens")
    order = seat.order if seat is not None else "grouped_mm"
    sessions = seat.sessions if seat is not None else ()
    if seat is not None and sessions and seat.current.recording is not None:
        site = sessions[0].site
        seat.current.recording[site.layer] = _routing(sessions[0], top_k_index, top_k_weights)
        sessions = ()
    if not sessions:
        return _native(self, order)(self, hidden_states, top_k_index, top_k_weights)
    return _deliver(sessions, _DispatchedCall(self, hidden_states, top_k_index, top_k_weights, order))


def _adapted_forward(experts: nn.Module, native: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What stands in for the `forward` of an undecorated family's experts module while its model is tapped."""
    seat: Seat = experts._moe_lens  # type: ignore[assignment]
    sessions, adapter = seat.sessions, adapter_of(experts)
    inputs = (*args, *kwargs.values())
    call = adapter.call(experts, inputs, sessions[0]) if sessions and adapter is not None else None
    if call is not None and seat.current.recording is None:
        return _deliver(sessions, call)
    if call is not None and seat.current.recording is not None:
        seat.current.recording[sessions[0].site.layer] = _routing(sessions[0], call.index, call.weight)
    return native(*args, **kwargs)


def _deliver(sessions: Sequence[Session], call: ExpertsCall) -> Any:
    """Run one layer's experts with the edits of its sessions, and hand out the taps."""
    routing = _routing(sessions[0], call.index, call.weight)
    for session in sessions:
        if session.edit is not None:
            routing = session.edit.routing(routing) or routing
    rows, weight = call.visit(routing.index, routing.weight)
    activation = call.activate()
    make = _tap_maker(len(routing.index), rows, weight)
    for session in sessions:
        if session.edit is not None:
            edited = session.edit.activation(make(session, activation, None))
            activation = activation if edited is None else edited
    output = call.project(activation)
    for session in sessions:
        if session.edit is not None:
            edited = session.edit.output(make(session, activation, output))
            output = output if edited is None else edited
    for session in sessions:
        session.on_tap(make(session, activation, output))
        session.router_logits.clear()
        session.router_call = session.router_return = None
    return call.combine(output)


class _DispatchedCall(ExpertsCall):
    """A call of an experts module that transformers dispatches to us."""

    def __init__(self, experts: Any, x: Tensor, index: Tensor, weight: Tensor, order: str) -> None:
        self.experts, self.x, self.index, self.weight, self.order = experts, x, index, weight, order

    def visit(self, index: Tensor, weight: Tensor) -> tuple[Rows, Tensor]:
        is_parallel = getattr(self.experts, "_is_expert_parallel", False)
        self.rows, self.top_k = sort_rows(index, self.experts.num_experts, self.order, is_parallel), index.shape[-1]
        self.factor = weight[self.rows.token, self.rows.slot]
        return self.rows, self.factor

    def activate(self) -> Tensor:
        return _activation(self.experts, self.x, self.rows, self.order)

    def project(self, activation: Tensor) -> Tensor | list[Tensor]:
        output = _project(self.experts, activation, self.rows, self.order, "down_proj")
        if not getattr(self.experts, "has_post_expert_norm", False):
            return output
        norm = self.experts.post_expert_norm
        return [norm(part) for part in output] if isinstance(output, list) else norm(output)

    def combine(self, output: Tensor | list[Tensor]) -> Tensor:
        if self.order == "eager":
            wide = type(self.experts).__name__ in families.EAGER_SUMS_IN_WEIGHT_DTYPE
            return sum_by_expert(self.x, output, self.factor, self.rows, self.factor.dtype if wide else None)
        assert isinstance(output, Tensor)
        return _sum_by_slot(self.x, output, self.factor, self.rows, self.top_k)


def _routing(session: Session, index: Tensor, weight: Tensor) -> Routing:
    logits = session.router_logits[0] if session.router_logits else None
    return Routing(session.site, index, weight, logits, session.router_call)


def _native(experts: nn.Module, order: str) -> Callable[..., Tensor]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return type(experts).forward.__wrapped__ if order == "eager" else ALL_EXPERTS_FUNCTIONS[order]


def _tap_maker(
    n_tokens: int, rows: Rows, weight: Tensor
) -> Callable[[Session, Tensor, Tensor | list[Tensor] | None], ExpertTap]:
    def make(session: Session, activation: Tensor, output: Tensor | list[Tensor] | None) -> ExpertTap:
        def make_output() -> Tensor:
            if output is None:
                raise RuntimeError("an activation edit runs before the down-projection: it has no output yet")
            return torch.cat(output) if isinstance(output, list) else output

        return ExpertTap(
            session.site.layer, session.site.role, rows.token, rows.slot, weight, rows.offsets, activation,
            session.router_logits[0] if session.router_logits else None, n_tokens, make_output,
        )  # fmt: skip

    return make


def _activation(experts: Any, x: Float[Tensor, "token d_model"], rows: Rows, order: str) -> Float[Tensor, "row d_ff"]:
    act = experts._apply_gate if experts.has_gate else experts.act_fn
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    if order != "eager" or not rows.groups:
        return act(_project(experts, x[rows.token], rows, "grouped_mm", name))
    # per expert: vectorised and scalar tails of an activation differ in the last bit
    return torch.cat([act(_linear(experts, x[rows.token[at]], e, name)) for e, at in rows.groups])


def _project(experts: Any, x: Tensor, rows: Rows, order: str, name: str) -> Tensor | list[Tensor]:
    """Rows through the weight matrix `name` of each row's expert; eager order gives a tensor per expert.

    Joining those would cost a copy that most consumers never look at.
    """
    if order == "eager" and rows.groups:
        return [_linear(experts, x[at], e, name) for e, at in rows.groups]
    from transformers.integrations.moe import _grouped_linear

    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if bias is not None:
        bias = bias.repeat_interleave(rows.offsets.diff(), dim=0)
    ends = rows.offsets[1:].to(torch.int32)
    return _grouped_linear(x, getattr(experts, name), ends, bias, getattr(experts, "is_transposed", False))


def _linear(experts: Any, x: Tensor, expert: int, name: str) -> Tensor:
    """One expert's rows through its matrix, written as transformers' eager loops write it."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    if getattr(experts, "is_transposed", False):
        y = x @ weight
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def _sum_by_slot(x: Tensor, output: Tensor, weight: Tensor, rows: Rows, top_k: int) -> Float[Tensor, "token d_model"]:
    """Weight each row and sum per token in slot order, as transformers' `grouped_mm` does."""
    weighted = output * weight.unsqueeze(-1)
    n_visits = x.shape[0] * top_k
    if len(rows.order) == n_visits:
        inverse = torch.empty_like(rows.order)
        inverse[rows.order] = torch.arange(n_visits, device=x.device)
        weighted = weighted[inverse]
    else:  # expert parallelism: visits of other ranks contribute nothing here
        weighted = weighted.new_zeros(n_visits, weighted.shape[-1]).index_copy(0, rows.order, weighted)
    return weighted.view(x.shape[0], top_k, -1).sum(dim=1).to(x.dtype)

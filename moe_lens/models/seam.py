"""The one place that touches transformers' semi-private names: tap the experts of a model as it runs.

transformers (>= 5.7) calls every decorated experts module as `experts(x, top_k_index, top_k_weights)`
and looks the implementation up by name (`transformers.integrations.moe`). We register "moe_lens":

1. sort the T*K (token, expert) visits by expert, with the same call as the implementation we stand in for;
2. up-projection and activation, one group of rows per expert  -> `ExpertTap.activation`
3. down-projection of the same rows                            -> `ExpertTap.output`
4. weight by the router, sum per token, return.

The operations and their order are those of transformers' own `grouped_mm` or `eager`, so the result is
bit-equal to it and the intermediate values cost nothing extra. Module flags (`has_gate`, `has_bias`,
`is_transposed`, `_apply_gate`) describe each family.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lens.errors import BadConfig, UnsupportedModel
from moe_lens.models import dense, families
from moe_lens.models.sites import Site, is_experts
from moe_lens.types import ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Float, Int

log = logging.getLogger("moe_lens")

IMPLEMENTATION = "moe_lens"
MINIMUM_TRANSFORMERS = (5, 7)
Kernel = Literal["native", "grouped_mm", "eager"]
KERNELS: tuple[Kernel, ...] = ("native", "grouped_mm", "eager")
OnTap = Callable[[ExpertTap], None]


class Edit:
    """A change of what is computed. Subclasses override either method; None leaves the value alone."""

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
    kernel: str
    edit: Edit | None
    router_logits: list[Tensor] = field(default_factory=list)


@contextmanager
def tapping(
    model: nn.Module,
    sites: Sequence[Site],
    on_tap: OnTap,
    *,
    kernel: Kernel = "native",
    edit: Edit | None = None,
) -> Iterator[None]:
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
        if routed:
            order = _switch(model, routed[0].module, kernel, stack)
            for site in routed:
                _attach(site, Session(site, on_tap, order, edit), stack)
        for site in sites:
            if not site.routed:
                dense.attach(site, on_tap, edit, stack)
        yield


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
    if kernel != "native":
        return kernel
    native = str(experts.config._experts_implementation)  # type: ignore[union-attr]
    if native == IMPLEMENTATION:  # inside another tapping block: keep its order
        sessions = vars(experts).get("_moe_lens")
        return sessions[0].kernel if sessions else "grouped_mm"
    if native not in ("grouped_mm", "eager"):
        log.warning("the model is set to %s; moe-lens computes its experts with grouped_mm instead", native)
        return "grouped_mm"
    return native


def _switch(model: nn.Module, experts: nn.Module, kernel: Kernel, stack: ExitStack) -> str:
    """Set `model` to our implementation until `stack` closes."""
    require_transformers()
    order = resolve_kernel(experts, kernel)
    if experts.config._experts_implementation == IMPLEMENTATION:  # type: ignore[union-attr]
        outer = resolve_kernel(experts, "native")
        if order != outer:
            raise BadConfig(f"kernel {kernel!r} contradicts the enclosing block, which runs {outer}")
        return order
    previous = model.get_experts_implementation()  # type: ignore[operator]
    stack.callback(model.set_experts_implementation, previous)  # type: ignore[arg-type]
    model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]
    if experts.config._experts_implementation != IMPLEMENTATION:  # type: ignore[union-attr]
        raise UnsupportedModel(
            f"{type(model).__name__} does not let its experts be switched: use the transformers class of the family"
        )
    for module in model.modules():  # layers without a tap run the same order as the others
        if is_experts(module):
            module._moe_lens_order = order  # type: ignore[assignment]
            stack.callback(delattr, module, "_moe_lens_order")
    return order


def _attach(site: Site, session: Session, stack: ExitStack) -> None:
    """Give `site` a session until `stack` closes; nested sessions form a tuple, outermost first."""
    outer: tuple[Session, ...] = vars(site.module).get("_moe_lens", ())
    site.module._moe_lens = (*outer, session)  # type: ignore[assignment]

    def restore() -> None:
        if outer:
            site.module._moe_lens = outer  # type: ignore[assignment]
        else:
            del site.module._moe_lens

    stack.callback(restore)
    if site.router is not None and site.role is Role.MOE:
        hook = site.router.register_forward_hook(lambda _m, _a, out: _keep_logits(site, session, out))
        stack.callback(hook.remove)


def _keep_logits(site: Site, session: Session, out: Any) -> None:
    logits = out[0] if isinstance(out, tuple) else out
    if type(site.router).__name__ in families.PROBABILITY_ROUTERS:
        logits = logits.log()
    session.router_logits[:] = [logits.reshape(-1, logits.shape[-1])]


class Rows(NamedTuple):
    """The (token, expert) visits of one call, sorted by expert."""

    token: Int[Tensor, "row"]
    slot: Int[Tensor, "row"]
    offsets: Int[Tensor, "expert+1"]
    order: Int[Tensor, "row"]
    """Index of each row among the T*K visits in (token, slot) order."""

    @property
    def groups(self) -> list[tuple[int, slice]]:
        """Every expert that has rows, with its rows."""
        ends = self.offsets.tolist()
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(ends, ends[1:], strict=False)) if b > a]


def sort_rows(index: Int[Tensor, "token slot"], n_experts: int, kernel: str, sentinels: bool) -> Rows:
    """Sort visits by expert in the row order of transformers' own implementation.

    Equal bits need equal row order. `grouped_mm` takes `torch.sort` of the visits (not stable); the eager
    loop takes each expert's visits by slot, then token. Under expert parallelism the visits of other
    ranks carry the id `n_experts`; they sort to the end and are dropped.
    """
    top_k = index.shape[-1]
    if kernel == "eager":
        expert, order = torch.sort(index.t().reshape(-1), stable=True)
        slot, token = order // index.shape[0], order % index.shape[0]
        order = token * top_k + slot
    else:
        expert, order = torch.sort(index.reshape(-1))
        token, slot = order // top_k, order % top_k
    counts = torch.bincount(expert, minlength=n_experts)[:n_experts]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    if sentinels:
        kept = int(offsets[-1])
        token, slot, order = token[:kept], slot[:kept], order[:kept]
    return Rows(token, slot, offsets, order)


def _experts_forward(
    self: Any, hidden_states: Float[Tensor, "token d_model"], top_k_index: Tensor, top_k_weights: Tensor
) -> Float[Tensor, "token d_model"]:
    """The implementation that transformers calls for every experts module while a model is tapped."""
    sessions: tuple[Session, ...] = vars(self).get("_moe_lens", ())
    order = vars(self).get("_moe_lens_order", "grouped_mm")
    if not sessions:
        return _native(self, order)(self, hidden_states, top_k_index, top_k_weights)
    rows = sort_rows(top_k_index, self.num_experts, order, getattr(self, "_is_expert_parallel", False))
    weight = top_k_weights[rows.token, rows.slot]
    activation = _activation(self, hidden_states[rows.token], rows, order)
    make = _tap_maker(hidden_states.shape[0], rows, weight)
    for session in sessions:
        if session.edit is not None:
            edited = session.edit.activation(make(session, activation, None))
            activation = activation if edited is None else edited
    output = _project(self, activation, rows, order, "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        output = self.post_expert_norm(output)
    for session in sessions:
        if session.edit is not None:
            edited = session.edit.output(make(session, activation, output))
            output = output if edited is None else edited
    for session in sessions:
        session.on_tap(make(session, activation, output))
        session.router_logits.clear()
    return _combine(hidden_states, output, weight, rows, top_k_index.shape[-1], order)


def _native(experts: nn.Module, order: str) -> Callable[..., Tensor]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return type(experts).forward.__wrapped__ if order == "eager" else ALL_EXPERTS_FUNCTIONS[order]


def _tap_maker(n_tokens: int, rows: Rows, weight: Tensor) -> Callable[[Session, Tensor, Tensor | None], ExpertTap]:
    def make(session: Session, activation: Tensor, output: Tensor | None) -> ExpertTap:
        def make_output() -> Tensor:
            if output is None:
                raise RuntimeError("an activation edit runs before the down-projection: it has no output yet")
            return output

        return ExpertTap(
            session.site.layer, session.site.role, rows.token, rows.slot, weight, rows.offsets, activation,
            session.router_logits[0] if session.router_logits else None, n_tokens, make_output,
        )  # fmt: skip

    return make


def _activation(experts: Any, x: Tensor, rows: Rows, order: str) -> Float[Tensor, "row d_ff"]:
    act = experts._apply_gate if experts.has_gate else experts.act_fn
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    if order == "eager":  # per expert: vectorised and scalar tails of an activation differ in the last bit
        return _cat([act(_linear(experts, x[at], e, name)) for e, at in rows.groups], x, experts, name)
    return act(_project(experts, x, rows, order, name))


def _project(experts: Any, x: Tensor, rows: Rows, order: str, name: str) -> Tensor:
    """Rows through the weight matrix `name` of each row's expert."""
    if order == "eager":
        return _cat([_linear(experts, x[at], e, name) for e, at in rows.groups], x, experts, name)
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


def _cat(parts: list[Tensor], x: Tensor, experts: Any, name: str) -> Tensor:
    if parts:
        return torch.cat(parts)
    transposed = getattr(experts, "is_transposed", False)
    width = getattr(experts, name).shape[2 if transposed else 1]
    return x.new_zeros(0, width // 2 if name == "gate_up_proj" else width)


def _combine(x: Tensor, output: Tensor, weight: Tensor, rows: Rows, top_k: int, order: str) -> Tensor:
    """Weight each row and sum per token, in the order of the implementation we stand in for."""
    if order == "eager":
        total = torch.zeros_like(x)
        for _, at in rows.groups:
            part = output[at] * weight[at, None]
            total.index_add_(0, rows.token[at], part.to(total.dtype))
        return total
    weighted = output * weight.unsqueeze(-1)
    n_visits = x.shape[0] * top_k
    if len(rows.order) == n_visits:
        inverse = torch.empty_like(rows.order)
        inverse[rows.order] = torch.arange(n_visits, device=x.device)
        weighted = weighted[inverse]
    else:  # expert parallelism: visits of other ranks contribute nothing here
        weighted = weighted.new_zeros(n_visits, weighted.shape[-1]).index_copy(0, rows.order, weighted)
    return weighted.view(x.shape[0], top_k, -1).sum(dim=1).to(x.dtype)

"""What `doctor` judges: one text through a model, once as it is and once with taps.

Plain forward hooks witness the first pass, so that what the taps deliver can be held against something that the
seam did not compute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_lens.models import seam
from moe_lens.models.gates import parts
from moe_lens.models.norms import post_ffn_norm
from moe_lens.models.seam import Edit, Kernel
from moe_lens.models.sites import is_experts
from moe_lens.types import ExpertTap, Role

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moe_lens.models.lens import Lens
    from moe_lens.models.sites import Site


@dataclass
class Witness:
    """What plain hooks saw in one MoE layer."""

    site: Site
    parent: nn.Module | None = None
    """The MoE block, None where the experts sit in the decoder layer itself."""
    x: Float[Tensor, "token d_in"] | None = None
    """Input of the experts module."""
    index: Int[Tensor, "token slot"] | None = None
    weight: Float[Tensor, "token slot"] | None = None
    """Arguments that the experts module was called with."""
    returned: Float[Tensor, "token d_in"] | None = None
    """What the experts module returned."""
    block: Float[Tensor, "token d_model"] | None = None
    """What the MoE block returned; what it gave to its own last norm, if it has one (A.X K1)."""
    router: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    """Logits, weights and indices in what the router returned."""


@dataclass
class Evidence:
    """A clean pass and a tapped pass over the same tokens."""

    lens: Lens
    ids: Int[Tensor, "1 seq"]
    kernel: str
    """Order of operations of both passes."""
    offloaded: bool
    clean: Float[Tensor, "1 seq vocab"]
    tapped: Float[Tensor, "1 seq vocab"]
    witnesses: dict[int, Witness]
    taps: dict[int, ExpertTap]
    """Routed experts by layer."""
    shared: dict[int, ExpertTap]
    state: tuple[State, State]
    """Of the model, before and after the tapped pass."""
    started: float
    """When the examination began (`time.perf_counter`)."""
    seconds: float
    """Time of the tapped pass."""

    @cached_property
    def not_finite(self) -> dict[str, int]:
        """NaN and infinities by place: each layer's taps, then the logits."""
        places = dict.fromkeys((f"layer {layer}" for layer in sorted({*self.taps, *self.shared})), 0)
        for tap in (*self.taps.values(), *self.shared.values()):
            tensors = (tap.activation, tap.output, tap.weight, tap.router_logits)
            places[f"layer {tap.layer}"] += sum(_n_not_finite(t) for t in tensors if t is not None)
        return {**places, "the logits": _n_not_finite(self.clean)}

    @property
    def is_finite(self) -> bool:
        return not any(self.not_finite.values())

    @property
    def moe(self) -> list[tuple[Witness, ExpertTap]]:
        return [(self.witnesses[layer], tap) for layer, tap in self.taps.items()]


@dataclass(frozen=True)
class State:
    """What tapping must leave as it was."""

    implementation: dict[str, str]
    n_hooks: int
    marked: tuple[str, ...]
    """Modules that carry our attributes."""

    @classmethod
    def of(cls, model: Any) -> State:
        hooks = (
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
        )  # fmt: skip
        marked = tuple(n for n, m in model.named_modules() if any(k.startswith("_moe_lens") for k in vars(m)))
        return cls(dict(model.get_experts_implementation()), sum(hooks), marked)


def _n_not_finite(values: Tensor) -> int:
    return int((~torch.isfinite(values)).sum())


def gather(lens: Lens, ids: Int[Tensor, "1 seq"]) -> Evidence:
    """Run both passes."""
    started = time.perf_counter()
    sites = [site for site in lens.sites if site.role is Role.MOE]
    kernel = seam.resolve_kernel(sites[0].module, lens.kernel)
    witnesses = {site.layer: Witness(site, None if site.block in lens.blocks else site.block) for site in sites}
    with ExitStack() as stack:
        for witness in witnesses.values():
            _watch(witness, stack)
        clean = native(lens, ids, kernel)
    taps: list[ExpertTap] = []
    before, start = State.of(lens.model), time.perf_counter()
    tapped = with_taps(lens, ids, taps)
    seconds, after = time.perf_counter() - start, State.of(lens.model)
    return Evidence(
        lens, ids, kernel, is_offloaded(lens.model), clean, tapped, witnesses,
        {tap.layer: tap for tap in taps if tap.role is Role.MOE},
        {tap.layer: tap for tap in taps if tap.role is Role.SHARED},
        (before, after), started, seconds,
    )  # fmt: skip


def native(lens: Lens, ids: Int[Tensor, "1 seq"], kernel: str) -> Float[Tensor, "1 seq vocab"]:
    """Logits of the model itself, set to `kernel`."""
    with _implementation(lens.model, kernel), torch.no_grad():
        return _logits(lens.model, ids)


def with_taps(
    lens: Lens,
    ids: Int[Tensor, "1 seq"],
    taps: list[ExpertTap] | None = None,
    *,
    kernel: Kernel | None = None,
    edit: Edit | None = None,
) -> Float[Tensor, "1 seq vocab"]:
    """Logits while every feed-forward part is tapped; `taps` collects what is delivered."""
    keep = (lambda _tap: None) if taps is None else taps.append
    with torch.no_grad(), seam.tapping(lens.model, lens.sites, keep, kernel=kernel or lens.kernel, edit=edit):
        return _logits(lens.model, ids)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are only there while their module runs (accelerate)."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


@dataclass
class Zeroed(Edit):
    """Drops what one expert writes."""

    layer: int
    expert: int
    n_rows: int = field(default=0, init=False)

    def output(self, tap: ExpertTap) -> Float[Tensor, "row d_model"] | None:
        if tap.layer != self.layer or tap.role is not Role.MOE:
            return None
        rows = slice(int(tap.offsets[self.expert]), int(tap.offsets[self.expert + 1]))
        self.n_rows = rows.stop - rows.start
        output = tap.output.clone()
        output[rows] = 0
        return output


@contextmanager
def down_projection_zeroed(site: Site, expert: int) -> Iterator[None]:
    """The same ablation by surgery: weights (and bias) are zero inside the block and put back after it."""
    if site.adapter is not None:
        views = [site.adapter.down_projection(site.module, expert).detach()]
    else:
        found = [getattr(site.module, name, None) for name in ("down_proj", "down_proj_bias")]
        views = [parameter.detach()[expert] for parameter in found if isinstance(parameter, Tensor)]
    saved = [view.clone() for view in views]
    try:
        for view in views:
            view.zero_()
        yield
    finally:
        for view, value in zip(views, saved, strict=True):
            view.copy_(value)


@contextmanager
def _implementation(model: Any, kernel: str) -> Iterator[None]:
    previous = model.get_experts_implementation()
    if set(previous.values()) == {kernel} or not any(is_experts(module) for module in model.modules()):
        yield  # set already, or a family that runs its experts in its own order only
        return
    model.set_experts_implementation(kernel)
    try:
        yield
    finally:
        model.set_experts_implementation(previous)


def _logits(model: Any, ids: Int[Tensor, "1 seq"]) -> Float[Tensor, "1 seq vocab"]:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _watch(witness: Witness, stack: ExitStack) -> None:
    """Hook the experts, the router and the block of one layer until `stack` closes."""
    site = witness.site

    def experts(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) == 3:
            witness.x, witness.index, witness.weight = (t.reshape(-1, t.shape[-1]) for t in tensors)
            witness.returned = out.reshape(-1, out.shape[-1])

    def block(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        witness.block = out.reshape(-1, out.shape[-1])

    def router(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        if site.adapter is None:
            witness.router = parts(out)
        else:
            logits, witness.weight, witness.index = site.adapter.read_router(site.block, out)
            witness.router = (logits.clone(), witness.weight, witness.index)  # Llama 4 changes them in place later

    def entry(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        witness.x = args[0].reshape(-1, args[0].shape[-1])

    if site.adapter is None:
        stack.callback(site.module.register_forward_hook(experts, with_kwargs=True).remove)
    else:
        stack.callback(site.adapter.takes_input(site).register_forward_pre_hook(entry).remove)
    if site.router is not None:
        stack.callback(site.router.register_forward_hook(router).remove)
    if witness.parent is None:
        return
    norm = post_ffn_norm(witness.parent)
    if norm is None:
        stack.callback(witness.parent.register_forward_hook(block).remove)
    else:
        stack.callback(norm.register_forward_pre_hook(lambda module, args: block(module, (), args[0])).remove)

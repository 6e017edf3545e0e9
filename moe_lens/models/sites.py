"""Where a model's feed-forward layers are: one `Site` for each thing that can be tapped.

1. The decoder layers are the first `ModuleList` of the text decoder with as many entries as the config says.
2. A module with the flags of transformers' experts decorator is a routed-experts site. Its router and
   its shared expert are found by name beside it (`families`).
3. A layer without experts has a dense FFN: the last of a group of sibling linear layers that leads from
   d_ff back to d_model, outside attention and other token mixers.

An experts module with a single expert is a dense FFN that every token visits (role dense).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from moe_lens.errors import UnsupportedModel
from moe_lens.models import families
from moe_lens.models.adapters import Adapter, RouterReturn, adapter_of
from moe_lens.types import Role


@dataclass(frozen=True, eq=False)
class Site:
    """One tappable feed-forward part of one decoder layer."""

    layer: int
    role: Role
    path: str
    """Name of `module` in the model."""
    module: nn.Module
    """The experts module (routed), or the last linear layer of the FFN (dense and shared)."""
    routed: bool
    """True when `module` is an experts module, also if it has a single expert."""
    n_experts: int
    top_k: int
    d_ff: int
    gated: bool
    router: nn.Module | None = None
    ffn: nn.Module | None = None
    """Module of a shared expert; its input feeds `shared_gate`."""
    shared_gate: nn.Module | None = None
    block: nn.Module | None = None
    """MoE block of a routed site: the parent of router and experts (in Gemma 4 that is the decoder layer)."""
    block_scale: float = 1.0
    """Factor that `block` applies to the weighted sum of this site (Beam, Laguna, MiniMax-M3, Command A)."""

    @property
    def block_adds_in_place(self) -> bool:
        """Whether `block` adds to the shared expert's output in place."""
        return self.role is Role.SHARED and type(self.block).__name__ in families.IN_PLACE_BLOCKS

    @property
    def adapter(self) -> Adapter | None:
        """How the experts compute, where transformers does not dispatch them."""
        return adapter_of(self.module) if self.routed else None

    @property
    def read_router(self) -> Callable[[Any], RouterReturn] | None:
        """Reads what the router returned, where its parts do not tell themselves apart."""
        return None if self.adapter is None else partial(self.adapter.read_router, self.block)

    @property
    def idle_parameters(self) -> int:
        """Parameters of routed experts that one token does not use."""
        if self.adapter is not None:
            shape = self.adapter.shape(self.module, self.block)
            return round(shape.parameters - self.top_k * shape.parameters_per_visit)
        n_parameters = sum(p.numel() for p in self.module.parameters()) if self.routed else 0
        return (self.n_experts - self.top_k) * (n_parameters // self.n_experts)


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every dense, routed and shared feed-forward site of `model`, by layer.

    Raises:
        UnsupportedModel: no decoder layers, no feed-forward layer in them, or experts that cannot be tapped.
    """
    config = families.text_config(model.config)
    if (refusal := families.refusal(model.config)) is not None:
        raise UnsupportedModel(refusal)
    sites: list[Site] = []
    for layer, (path, block) in enumerate(decoder_layers(model)):
        routed = [(n, m) for n, m in block.named_modules() if is_experts(m) or adapter_of(m) is not None]
        if routed:
            sites += [s for name, m in routed for s in _routed_sites(layer, path, block, name, m, config)]
        else:
            _check_undispatched(layer, block)
            sites += _dense_site(layer, path, block, first_d_model(config))
    if not sites:
        raise UnsupportedModel(
            f"no feed-forward layer was found in {type(model).__name__}: give a causal language model"
        )
    return tuple(sites)


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every decoder layer, in order.

    Raises:
        UnsupportedModel: the model has no list of decoder layers.
    """
    n_layers = families.n_layers(families.text_config(model.config))
    decoder = _text_decoder(model)
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    for name, module in decoder.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return [(f"{name}.{i}", child) for i, child in enumerate(module)]
    raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers: give a causal language model")


def _text_decoder(model: nn.Module) -> nn.Module:
    """The language model inside a multimodal one, so that a vision tower of equal depth is not taken for it."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' experts decorator made this module (or a quantiser replaced one)."""
    flags = vars(module)
    return "has_gate" in flags and "has_bias" in flags and hasattr(module, "num_experts")


def first_d_model(config: Any) -> int:
    value = families.first_key(config, families.D_MODEL_KEYS)
    if value is None:
        raise UnsupportedModel(f"the config of model type {config.model_type!r} names no hidden size")
    return value


def _routed_sites(
    layer: int, path: str, block: nn.Module, name: str, experts: nn.Module, config: Any
) -> Iterator[Site]:
    check_experts(experts)
    adapter = adapter_of(experts)
    holds_router = isinstance(getattr(experts, "router", None), nn.Module)  # JetMoe's experts are their own block
    parent_name = name if holds_router else name.rpartition(".")[0]
    parent = block.get_submodule(parent_name) if parent_name else block
    router = _child(parent, families.ROUTER_ATTRIBUTES)
    if adapter is not None:
        n_experts, top_k, d_ff, *_ = adapter.shape(experts, parent)
    else:
        n_experts, d_ff = int(experts.num_experts), experts_width(experts)  # type: ignore[arg-type]
        top_k = getattr(router, "top_k", None) or families.first_key(config, families.TOP_K_KEYS) or 1
    yield Site(
        layer, Role.DENSE if n_experts == 1 else Role.MOE, f"{path}.{name}", experts, True,
        n_experts, min(int(top_k), n_experts), d_ff, bool(getattr(experts, "has_gate", True)), router,
        block=parent, block_scale=families.block_scale(parent),
    )  # fmt: skip
    beside = families.PARALLEL_ATTRIBUTES if parent is block else ()
    for holder, prefix in ((parent, parent_name), (block, "")):
        shared = _child(holder, families.SHARED_ATTRIBUTES + beside)
        found = _last_linear(shared, first_d_model(config)) if shared is not None else None
        if shared is None or found is None:
            continue
        attribute = next(n for n, m in holder.named_children() if m is shared)
        where = ".".join(filter(None, (path, prefix, attribute, found[0])))
        gate = _child(parent, families.SHARED_GATE_ATTRIBUTES)
        yield Site(
            layer, Role.SHARED, where, found[1], False, 1, 1, found[2], found[3], None, shared, gate,
            block=parent, block_scale=families.shared_scale(parent),
        )  # fmt: skip
        return


def _check_undispatched(layer: int, block: nn.Module) -> None:
    """Refuse a layer whose experts we cannot see, rather than take one of their parts for a dense FFN."""
    unseen = next((m for name, m in block.named_modules() if name.rpartition(".")[2] == "experts"), None)
    if unseen is not None:
        raise UnsupportedModel(
            f"layer {layer} holds experts ({type(unseen).__name__}) that transformers does not dispatch: "
            "load the model with the transformers class of its family, or choose another family"
        )


def check_experts(experts: nn.Module) -> None:
    """Refuse experts whose weights are not plain floating-point matrices.

    Raises:
        UnsupportedModel: quantised experts.
    """
    adapter = adapter_of(experts)
    down = getattr(experts, "down_proj", None) if adapter is None else adapter.down_projection(experts, 0)
    if down is None or not down.dtype.is_floating_point or down.dtype.itemsize < 2:
        raise UnsupportedModel(
            f"the experts are quantised ({type(experts).__name__}): dequantise the checkpoint to bfloat16 first"
        )


def experts_width(experts: nn.Module) -> int:
    """d_ff of one expert."""
    return int(experts.down_proj.shape[1 if getattr(experts, "is_transposed", False) else 2])  # type: ignore[index]


def _dense_site(layer: int, path: str, block: nn.Module, d_model: int) -> list[Site]:
    found = _last_linear(block, d_model)
    if found is None:
        return []  # a layer without a feed-forward part (state-space and attention-only layers)
    name, linear, d_ff, gated = found
    return [Site(layer, Role.DENSE, f"{path}.{name}", linear, False, 1, 1, d_ff, gated)]


def _last_linear(root: nn.Module, d_model: int) -> tuple[str, nn.Module, int, bool] | None:
    """Name, module, d_ff and gatedness of the linear layer that leads from d_ff back to d_model."""
    mixers = tuple(f"{name}." for name, module in root.named_modules() if name and _mixes_tokens(name, module))
    for prefix, parent in root.named_modules():
        if f"{prefix}.".startswith(mixers):
            continue
        linears = [(n, m, *io) for n, m in parent.named_children() if (io := linear_shape(m)) is not None]
        for name, module, d_ff, out in reversed(linears):
            ups = [o for _, m, i, o in linears if m is not module and i == d_model and o in (d_ff, 2 * d_ff)]
            if out == d_model and ups:
                gated = len(ups) > 1 or ups[0] == 2 * d_ff
                return ".".join(filter(None, (prefix, name))), module, d_ff, gated
    return None


def _mixes_tokens(name: str, module: nn.Module) -> bool:
    words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return any(word in words for word in families.MIXER_WORDS)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) widths of a linear layer, GPT-2's Conv1D included; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
        return int(rows), int(columns)
    return None


def _child(parent: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((m for n in names if isinstance(m := getattr(parent, n, None), nn.Module)), None)

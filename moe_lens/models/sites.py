"""Where a model's feed-forward layers are: one `Site` for each thing that can be tapped.

1. The decoder layers are the longest `ModuleList` with as many entries as the config says.
2. A module with the flags of transformers' experts decorator is a routed-experts site. Its router and
   its shared expert are found by name beside it (`families`).
3. A layer without experts has a dense FFN: the last of a group of sibling linear layers that leads from
   d_ff back to d_model, outside attention.

An experts module with a single expert is a dense FFN that every token visits (role dense).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_lens.errors import UnsupportedModel
from moe_lens.models import families
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

    @property
    def parameters_per_expert(self) -> int:
        return sum(p.numel() for p in self.module.parameters()) // self.n_experts if self.routed else 0


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every dense, routed and shared feed-forward site of `model`, by layer.

    Raises:
        UnsupportedModel: no decoder layers, no feed-forward layer in them, or experts that cannot be tapped.
    """
    config = families.text_config(model.config)
    family = families.UNDECORATED.get(getattr(config, "model_type", ""))
    if family:
        raise UnsupportedModel(
            f"{family} computes its experts in a way transformers does not expose: choose another model family"
        )
    sites: list[Site] = []
    for layer, (path, block) in enumerate(decoder_layers(model)):
        routed = [(n, m) for n, m in block.named_modules() if is_experts(m)]
        if routed:
            sites += [s for name, m in routed for s in _routed_sites(layer, path, block, name, m, config)]
        else:
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
    n_layers = families.first_key(families.text_config(model.config), families.N_LAYER_KEYS)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return [(f"{name}.{i}", child) for i, child in enumerate(module)]
    raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers: give a causal language model")


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
    parent_name = name.rpartition(".")[0]
    parent = block.get_submodule(parent_name) if parent_name else block
    router = _child(parent, families.ROUTER_ATTRIBUTES)
    n_experts = int(experts.num_experts)  # type: ignore[arg-type]
    top_k = getattr(router, "top_k", None) or families.first_key(config, families.TOP_K_KEYS) or 1
    yield Site(
        layer, Role.DENSE if n_experts == 1 else Role.MOE, f"{path}.{name}", experts, True,
        n_experts, min(int(top_k), n_experts), experts_width(experts), bool(experts.has_gate), router,
    )  # fmt: skip
    for holder, prefix in ((parent, parent_name), (block, "")):
        shared = _child(holder, families.SHARED_ATTRIBUTES)
        found = _last_linear(shared, first_d_model(config)) if shared is not None else None
        if shared is None or found is None:
            continue
        attribute = next(n for n, m in holder.named_children() if m is shared)
        where = ".".join(filter(None, (path, prefix, attribute, found[0])))
        gate = _child(parent, families.SHARED_GATE_ATTRIBUTES)
        yield Site(layer, Role.SHARED, where, found[1], False, 1, 1, found[2], found[3], None, shared, gate)
        return


def check_experts(experts: nn.Module) -> None:
    """Refuse experts whose weights are not plain floating-point matrices.

    Raises:
        UnsupportedModel: quantised experts.
    """
    down = getattr(experts, "down_proj", None)
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
    for prefix, parent in root.named_modules():
        if any("attn" in part or "attention" in part for part in prefix.split(".")):
            continue
        linears = [(n, m, *io) for n, m in parent.named_children() if (io := linear_shape(m)) is not None]
        for name, module, d_ff, out in reversed(linears):
            ups = [o for _, m, i, o in linears if m is not module and i == d_model and o in (d_ff, 2 * d_ff)]
            if out == d_model and ups:
                gated = len(ups) > 1 or ups[0] == 2 * d_ff
                return ".".join(filter(None, (prefix, name))), module, d_ff, gated
    return None


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

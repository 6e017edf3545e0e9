"""Tiny models of the families that transformers does not dispatch and `moe_lens.models.adapters` knows.

Their experts and routers have interfaces of their own, so each has its own few lines for what plain hooks see
(`Adapted`) and for surgery on its weights (`delete`). Nothing here uses the package's adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_lens.models.sites import Site
from tests.conformance import zoo
from tests.conformance.specimen import Seen, Specimen, shared_module
from tests.conformance.zoo import L6, MLA, Family

if TYPE_CHECKING:
    from jaxtyping import Float

ADAPTED: dict[str, Family] = {
    "dbrx": Family("DBRX", "Dbrx", {
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
        "d_model": 32, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    }),
    "jetmoe": Family("JetMoe", "JetMoe", {"intermediate_size": 24, **L6, "kv_channels": 16}),
    "llama4_text": Family("Llama 4 (text)", "Llama4Text", {
        "intermediate_size": 24, "intermediate_size_mlp": 40, **L6, "head_dim": 16, "num_hidden_layers": 3,
        "moe_layers": [0, 2], "attention_chunk_size": 4, "no_rope_layer_interval": 2,
    }, dense=(1,), shared=24),
    "longcat_flash": Family("LongCat-Flash", "LongcatFlash", {
        "num_hidden_layers": 4, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 24,
        "n_routed_experts": 5, "zero_expert_num": 3, "moe_topk": 3, **MLA, "head_dim": 8,
    }, no_ffn=(2, 3), biased=True),
}  # fmt: skip
"""`no_ffn` of LongCat-Flash: its config counts attention parts as layers, two in each decoder layer."""
ADAPTED["llama4_top1"] = replace(
    ADAPTED["llama4_text"],
    title="Llama 4 (text, top-1)",
    keys={**ADAPTED["llama4_text"].keys, "num_experts_per_tok": 1},
)


def build(family: Family) -> Any:
    """A tiny float32 model, with a selection bias that leaves the router a say."""
    model = zoo.build(family)
    for name, bias in model.named_buffers():
        if name.endswith("correction_bias"):
            bias.mul_(0.05)
    return model


WIDTHS = {"dbrx": (6, 2, 24), "jetmoe": (6, 2, 24), "llama4_text": (6, 2, 24), "llama4_top1": (6, 1, 24),
          "longcat_flash": (8, 3, 24)}  # fmt: skip
"""Experts, top-k and neurons per expert of each."""

N_FFN = {"longcat_flash": 5}
"""Experts that have neurons, where some have none."""


class Adapted(Specimen):
    """A checkpoint of one of these families."""

    @property
    def kind(self) -> str:
        return self.family.text_config.model_type

    @contextmanager
    def set_to(self, native: str) -> Iterator[None]:
        """They have one implementation, and transformers refuses to set another."""
        yield

    def _watch(self, site: Site, seen: dict[int, Seen], parts: dict[tuple[int, str], Any]) -> Iterator[Any]:
        """What the family's own modules are given and return, in the form of the decorated families."""
        layer, block, router = site.layer, site.block, site.router
        assert block is not None
        assert router is not None

        def whole(_m: Any, args: tuple[Tensor, ...], out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            out = out.reshape(-1, out.shape[-1])
            x = args[0].reshape(out.shape).clone()
            _, weight, index = parts[layer, "router"]
            bias = block.bias if self.kind == "jetmoe" else 0  # added after the experts
            routed = out - bias - parts.get((layer, "shared"), 0)
            seen[layer] = Seen(x, index, weight, routed, block=out - bias)

        def route(_m: Any, _a: Any, out: Any) -> None:
            parts[layer, "router"] = ROUTERS[self.kind](out, self.family.text_config)

        yield router.register_forward_hook(route)
        shared = shared_module(site)
        if shared is not None:
            yield shared.register_forward_hook(lambda _m, _a, out: parts.update({(layer, "shared"): out.clone()}))
        yield block.register_forward_hook(whole)

    def by_hand(self, site: Site, x: Float[Tensor, "d_in"], expert: int) -> Float[Tensor, "d_ff"]:
        if expert >= N_FFN.get(self.name, expert + 1):
            return torch.zeros(site.d_ff, dtype=torch.float64)
        up, _ = matrices(self.kind, site.module, expert)
        gate, up = (gated(self.kind, site, x.double(), expert) @ up.double().T).chunk(2)
        return F.silu(gate) * up

    def one_row(self, site: Site, x: Float[Tensor, "d_in"], expert: int) -> Float[Tensor, "d_in"]:
        if expert >= N_FFN.get(self.name, expert + 1):
            return x
        _, down = matrices(self.kind, site.module, expert)
        return (self.by_hand(site, x, expert) @ down.double().T).to(x.dtype)


def gated(kind: str, site: Site, x: Float[Tensor, "d_in"], expert: int) -> Float[Tensor, "d_in"]:
    """Input of an expert: Llama 4 scales it by the sigmoid of the router's logit."""
    if kind != "llama4_text":
        return x
    router: Any = site.router
    return x * torch.sigmoid(router.weight[expert].double() @ x)


def matrices(kind: str, experts: Any, expert: int) -> tuple[Float[Tensor, "two_d_ff d_in"], Float[Tensor, "d_in d_ff"]]:
    """Gate and up projection in one matrix, and the down-projection, both as (out, in)."""
    if kind == "dbrx":
        w1, v1, w2 = (p.view(6, 24, 32)[expert] for p in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2))
        return torch.cat([w1, v1]), w2.T
    if kind == "jetmoe":
        return experts.input_linear.weight[expert], experts.output_linear.weight[expert]
    if kind == "llama4_text":
        return experts.gate_up_proj[expert].T, experts.down_proj[expert].T
    return experts.gate_up_proj[expert], experts.down_proj[expert]


def _dbrx_router(out: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, index = out.softmax(dim=1).topk(config.ffn_config.moe_top_k, dim=-1)
    return out, weight / torch.norm(weight, p=1.0, dim=-1, keepdim=True), index


def _jetmoe_router(out: tuple[Any, ...], config: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits = out[4]
    top, index = logits.topk(config.num_experts_per_tok, dim=1)
    return logits, top.softmax(dim=1), index


def _llama4_router(out: tuple[Tensor, Tensor], config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The weight after the experts is 1: the gate is in their input."""
    index = out[1].topk(config.num_experts_per_tok, dim=1).indices
    return out[1], torch.ones_like(index, dtype=out[1].dtype), index


ROUTERS: dict[str, Callable[[Any, Any], tuple[Tensor, Tensor, Tensor]]] = {
    "dbrx": _dbrx_router,
    "jetmoe": _jetmoe_router,
    "llama4_text": _llama4_router,
    "longcat_flash": lambda out, config: out,
}
"""model_type -> (logits, weights, indices) from what the family's router returns."""


def parameters(kind: str, experts: Any) -> list[Float[Tensor, "expert rows columns"]]:
    """Every stacked weight of the experts, one expert after the other; the down-projection last."""
    if kind == "dbrx":
        return [p.view(6, 24, 32) for p in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2)]
    if kind == "jetmoe":
        return [experts.input_linear.weight, experts.output_linear.weight]
    return [experts.gate_up_proj, experts.down_proj]


def delete(kind: str, block: Any, gone: int) -> None:
    """Take an expert and its row of the router out of an MoE block."""

    def cut(module: Any, name: str, n_experts: int) -> None:
        value = getattr(module, name).detach()
        whole = value.view(n_experts, -1, *value.shape[1:])
        kept = torch.cat([whole[:gone], whole[gone + 1 :]]).reshape(-1, *value.shape[1:]).clone()
        is_parameter = isinstance(getattr(module, name), nn.Parameter)
        setattr(module, name, nn.Parameter(kept) if is_parameter else nn.Buffer(kept))

    def fewer(module: Any, *names: str) -> None:
        for name in names:
            setattr(module, name, getattr(module, name) - 1)

    if kind == "dbrx":
        for name in ("w1", "v1", "w2"):
            cut(block.experts.mlp, name, 6)
        cut(block.router.layer, "weight", 6)
        fewer(block.experts, "num_experts")
    elif kind == "jetmoe":
        for linear in (block.input_linear, block.output_linear):
            cut(linear, "weight", 6)
            fewer(linear, "num_experts")
        cut(block.router.layer, "weight", 6)
        fewer(block.router, "num_experts")
    elif kind == "llama4_text":
        cut(block.experts, "gate_up_proj", 6)
        cut(block.experts, "down_proj", 6)
        cut(block.router, "weight", 6)
        fewer(block.experts, "num_experts")
    else:
        cut(block.experts, "gate_up_proj", 8)
        if gone < 5:
            cut(block.experts, "down_proj", 5)
            fewer(block.experts, "num_routed_experts")
        cut(block.router.classifier, "weight", 8)
        cut(block.router, "e_score_correction_bias", 8)
        fewer(block.experts, "total_experts")
        fewer(block.router, "n_routed_experts")

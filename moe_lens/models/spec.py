"""What a model is made of, read from its config alone.

The model is instantiated on the meta device (shapes, no weights), so a 600B-parameter model answers as
fast as a small one, and the numbers come from the modules that will run, not from a table.
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_lens.errors import UnsupportedModel
from moe_lens.models import families, source
from moe_lens.models.adapters import idle_in_attention
from moe_lens.models.gates import GateRule, rule_of_router
from moe_lens.models.sites import Site, find_sites, first_d_model
from moe_lens.types import Role

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LayerSpec:
    """The feed-forward part of one decoder layer."""

    layer: int
    role: Role
    n_experts: int
    """Routed experts; 1 in a dense layer."""
    top_k: int
    d_ff: int
    """Neurons of one expert."""
    shared_d_ff: int | None
    """Neurons of the shared expert, None without one."""
    gated: bool
    """True for `act(gate) * up`, False for `act(up)`."""


@dataclass(frozen=True)
class Spec:
    """The anatomy of a model.

    `sparsity` is N_A / N, visited over total experts: 0.125 for 8 of 64, 1.0 if dense.

    `active_parameters` counts what one token uses: everything but the routed experts that it does not visit, so
    with attention, norms, routers, dense layers, shared experts, the LM head and the input embedding. Most
    model cards count the same way (Mixtral 12.9B, Qwen3-30B-A3B 3.3B); those of gpt-oss leave the input
    embedding out (4.2B here, 3.6B there), which is `active_parameters - embedding_parameters`. Modules for
    predicting further tokens are not part of the model that transformers builds, hence in no count.
    """

    name: str
    revision: str | None
    architecture: str
    model_type: str
    n_layers: int
    layers: tuple[LayerSpec, ...]
    """Layers with a feed-forward part, in order."""
    d_model: int
    vocab_size: int
    max_positions: int | None
    gate: GateRule | None
    """How router weights come from logits, measured on the router's code; None if dense or of no known form."""
    norm_topk_prob: bool | None
    """Whether router weights are renormalised over the chosen experts. What the router's code does counts,
    then what the config says (DeepSeek-V2's code ignores its config); None when neither tells."""
    quantisation: str | None
    """Method the checkpoint's weights are quantised with; the counts below are of the plain model."""
    total_parameters: int
    active_parameters: int
    """Parameters that one token uses (see above)."""
    embedding_parameters: int
    """Parameters of the input embedding, part of both counts."""

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with more than one expert."""
        return tuple(entry.layer for entry in self.layers if entry.role is Role.MOE)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(entry.layer for entry in self.layers if entry.role is Role.DENSE)

    @property
    def is_moe(self) -> bool:
        return bool(self.moe_layers)

    @property
    def sparsity(self) -> float:
        moe = [entry for entry in self.layers if entry.role is Role.MOE]
        return sum(e.top_k for e in moe) / sum(e.n_experts for e in moe) if moe else 1.0

    @property
    def suggested_baseline(self) -> str | None:
        """A dense model to compare with, similar in data or family but never a matched control.

        None if none is known whose parameters are within a factor of two of the active ones here.
        """
        if self.name == "bundled:tiny-moe":
            return "bundled:tiny-dense"
        name = families.BASELINES.get(self.model_type) if self.is_moe else None
        ratio = families.DENSE_PARAMETERS.get(name or "", 0) / max(1, self.active_parameters)
        return name if 0.5 <= ratio <= 2 else None

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per layer."""
        import pandas as pd

        frame = pd.DataFrame([asdict(entry) for entry in self.layers])
        frame["shared_d_ff"] = frame["shared_d_ff"].astype("Int64")
        return frame.assign(role=[str(entry.role) for entry in self.layers])

    def at(self, layer: int) -> LayerSpec | None:
        """The feed-forward part of `layer`, None if it has none."""
        return next((entry for entry in self.layers if entry.layer == layer), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the fields, and what follows from them."""
        gate = self.gate
        return {
            **asdict(self),
            "gate": None if gate is None else {**asdict(gate), "scale": float(f"{gate.scale:.6g}"), "words": str(gate)},
            "is_moe": self.is_moe,
            "moe_layers": list(self.moe_layers),
            "sparsity": self.sparsity,
            "suggested_baseline": self.suggested_baseline,
        }

    def _repr_html_(self) -> str:
        kind = f"{self.sparsity:.3g} of the experts active" if self.is_moe else "dense"
        gate = f"; gate: {html.escape(str(self.gate))}" if self.gate else ""
        head = (
            f"{html.escape(self.name)}: {html.escape(self.architecture)}, {self.total_parameters / 1e9:.2f}B "
            f"parameters, {self.active_parameters / 1e9:.2f}B active, {kind}{gate}"
        )
        return f"<p>{head}</p>{self.frame.to_html(index=False)}"


def inspect(
    name: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> Spec:
    """Read the anatomy of a model from its config; no weights are loaded.

    Quantised checkpoints are described too, although `load` refuses them.

    Args:
        name: a hub id, a folder, or ``bundled:tiny-moe``.

    Raises:
        ModelNotFound: nothing of that name, or the hub cannot be reached.
        UnsupportedModel: not a causal language model, or a family that cannot be tapped.
    """
    where = source.resolve(name)
    options = source.reachable(where, source.Options(revision, local_files_only, trust_remote_code))
    config = source.read_config(where, options)
    return spec_of(empty_model(config, trust_remote_code), name=where.name, revision=source.commit(where, revision))


def empty_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model of `config` on the meta device.

    Raises:
        UnsupportedModel: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise UnsupportedModel(source.needs_package(config.model_type, error)) from error
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError) as error:
        raise UnsupportedModel(f"the config of model type {config.model_type!r} describes no model: {error}") from error


def spec_of(model: nn.Module, *, name: str, revision: str | None = None, sites: tuple[Site, ...] | None = None) -> Spec:
    """The anatomy of a model that exists already (weights or meta device)."""
    sites = find_sites(model) if sites is None else sites
    config = families.text_config(model.config)
    moe = [site for site in sites if site.role is Role.MOE]
    total = sum(p.numel() for p in model.parameters())
    idle = sum(s.idle_parameters for s in moe) + sum(map(idle_in_attention, model.modules()))
    gate = _gate(moe[0], config) if moe else None
    norm = getattr(config, "norm_topk_prob", None) if gate is None else gate.renormalised
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return Spec(
        name=name,
        revision=revision,
        architecture=type(model).__name__,
        model_type=config.model_type,
        n_layers=families.n_layers(config) or 0,
        layers=_layer_specs(sites),
        d_model=first_d_model(config),
        vocab_size=config.vocab_size,
        max_positions=families.first_key(config, families.MAX_POSITION_KEYS),
        gate=gate,
        norm_topk_prob=norm if isinstance(norm, bool) else None,
        quantisation=source.quantisation(model.config),
        total_parameters=total,
        active_parameters=total - idle,
        embedding_parameters=sum(p.numel() for p in embedding.parameters()),
    )


def _gate(site: Site, config: Any) -> GateRule | None:
    return rule_of_router(site.router, first_d_model(config), site.read_router, [site.block, config])


def _layer_specs(sites: tuple[Site, ...]) -> tuple[LayerSpec, ...]:
    shared = {site.layer: site.d_ff for site in sites if site.role is Role.SHARED}
    return tuple(
        LayerSpec(s.layer, s.role, s.n_experts, s.top_k, s.d_ff, shared.get(s.layer), s.gated)
        for s in sites
        if s.role is not Role.SHARED
    )

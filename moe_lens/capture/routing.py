"""``RoutingStats``: who is visited, how strongly, with whom, and what it writes.

Beside every unweighted number stands its router-weighted one (``g * ||f||``), and beside the routed experts
stands the shared expert, because a rarely chosen expert that writes loudly and an often chosen one that
whispers look alike in visit counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_lens.types import ExpertTap, Role, TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

_SUMS = ("load", "mass", "norm", "weighted_norm")


@dataclass
class _Site:
    """Sums of one (layer, role). float64 and int64, so that order does not matter beyond rounding."""

    n_experts: int
    sums: dict[str, Float[Tensor, "expert"]]
    max_output: Float[Tensor, "expert"]
    coactivation: Int[Tensor, "expert expert"]
    per_document: Int[Tensor, "document expert"]
    top_k: int = 1
    n_tokens: int = 0
    entropy: float = 0.0
    margin: float = 0.0

    @classmethod
    def empty(cls, n_experts: int, n_documents: int) -> _Site:
        return cls(
            n_experts,
            {name: torch.zeros(n_experts, dtype=torch.float64) for name in _SUMS},
            torch.zeros(n_experts),
            torch.zeros(n_experts, n_experts, dtype=torch.long),
            torch.zeros(n_documents, n_experts, dtype=torch.int32),
        )


class RoutingStats:
    """Visit counts, gate mass, output norms, co-activation, router entropy and margin, per layer and document.

    Args:
        n_documents: documents in the corpus (the height of the per-document counts).
    """

    roles = frozenset({Role.MOE, Role.DENSE, Role.SHARED})

    def __init__(self, n_documents: int) -> None:
        self.n_documents = n_documents
        self.sites: dict[tuple[int, Role], _Site] = {}
        self.tokens_of_document = torch.zeros(n_documents, dtype=torch.long)

    def start_batch(self, batch: TokenBatch) -> None:
        document = batch.token_document.cpu()[batch.token_eligible.cpu()]
        self.tokens_of_document += torch.bincount(document, minlength=self.n_documents)

    def update(self, tap: ExpertTap, batch: TokenBatch) -> None:
        """Add the eligible rows of one layer."""
        device, n_experts = tap.activation.device, tap.n_experts
        site = self.sites.get((tap.layer, tap.role))
        if site is None:
            site = self.sites[tap.layer, tap.role] = _Site.empty(n_experts, self.n_documents)
        eligible = batch.token_eligible.to(device)
        keep = eligible[tap.token]
        token, expert = tap.token[keep], tap.expert[keep]
        weight = tap.weight.detach()[keep].double()
        output = tap.output.detach()[keep].float()
        norm = output.norm(dim=-1).double()
        site.n_tokens += int(eligible.sum())
        site.top_k = max(site.top_k, int(tap.slot.max()) + 1 if len(tap.slot) else 1)
        for name, value in zip(_SUMS, (torch.ones_like(weight), weight, norm, weight * norm), strict=True):
            site.sums[name] += (
                torch.zeros(n_experts, dtype=torch.float64, device=device).index_add_(0, expert, value).cpu()
            )
        peak = torch.zeros(n_experts, device=device).scatter_reduce_(0, expert, output.abs().amax(-1), "amax")
        site.max_output = torch.maximum(site.max_output, peak.cpu())
        visited = torch.zeros(tap.n_tokens, n_experts, device=device)
        visited[token, expert] = 1.0
        site.coactivation += (visited.T @ visited).round().long().cpu()
        document = batch.token_document.to(device)[token]
        cell = torch.bincount(document * n_experts + expert, minlength=self.n_documents * n_experts)
        site.per_document += cell.view(self.n_documents, n_experts).int().cpu()
        if tap.router_logits is not None:
            self._router(site, tap, eligible)

    def _router(self, site: _Site, tap: ExpertTap, eligible: Tensor) -> None:
        assert tap.router_logits is not None
        logits = tap.router_logits.detach().float()[eligible]
        top_k = site.top_k
        log_p = logits.log_softmax(-1)
        site.entropy += float(-(log_p.exp() * log_p).sum(dtype=torch.float64))
        if top_k < tap.n_experts:
            best = logits.topk(top_k + 1, dim=-1).values
            site.margin += float((best[:, top_k - 1] - best[:, top_k]).sum(dtype=torch.float64))

    def merge(self, other: RoutingStats) -> None:
        """Add what `other` saw of the same corpus."""
        self.tokens_of_document += other.tokens_of_document
        for key, theirs in other.sites.items():
            ours = self.sites.get(key)
            if ours is None:
                self.sites[key] = theirs
                continue
            ours.n_tokens += theirs.n_tokens
            ours.entropy += theirs.entropy
            ours.margin += theirs.margin
            ours.top_k = max(ours.top_k, theirs.top_k)
            for name in _SUMS:
                ours.sums[name] += theirs.sums[name]
            ours.max_output = torch.maximum(ours.max_output, theirs.max_output)
            ours.coactivation += theirs.coactivation
            ours.per_document += theirs.per_document

    def state_dict(self) -> dict[str, Any]:
        """Every sum, by ``layer.role.name``."""
        state: dict[str, Any] = {"tokens_of_document": self.tokens_of_document}
        for (layer, role), site in self.sites.items():
            at = f"{layer}.{role.value}."
            state[at + "scalars"] = torch.tensor(
                [site.n_experts, site.top_k, site.n_tokens, site.entropy, site.margin], dtype=torch.float64
            )
            state |= {at + name: value for name, value in site.sums.items()}
            state |= {at + name: getattr(site, name) for name in ("max_output", "coactivation", "per_document")}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what was seen by a saved state."""
        self.tokens_of_document = state["tokens_of_document"]
        self.n_documents = len(self.tokens_of_document)
        self.sites = {}
        for layer, role in {tuple(key.split(".")[:2]) for key in state if "." in key}:
            at = f"{layer}.{role}."
            n_experts, top_k, n_tokens, entropy, margin = state[at + "scalars"].tolist()
            self.sites[int(layer), Role(role)] = _Site(
                n_experts=int(n_experts),
                sums={name: state[at + name] for name in _SUMS},
                max_output=state[at + "max_output"],
                coactivation=state[at + "coactivation"],
                per_document=state[at + "per_document"],
                top_k=int(top_k),
                n_tokens=int(n_tokens),
                entropy=entropy,
                margin=margin,
            )

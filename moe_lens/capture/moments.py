"""``ClassMoments``: mean and variance of every neuron inside and outside every concept, streamed.

For expert e, class g and neuron j the state is ``n[e, g]``, ``s[e, g, j] = sum (h - pivot)`` and
``q[e, g, j] = sum (h - pivot)^2`` in float64, where ``pivot[e, j]`` is the neuron's mean in the first batch
that reached the expert. A pivot near the mean keeps the sums free of cancellation (the shifted-data form of
Welford's algorithm); two states with different pivots are merged by exact re-basing (Chan et al. 1983).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_lens.types import ExpertTap, Role, TokenBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Per-class statistics of one layer; classes are positives and in-scope negatives of each concept."""

    n_pos: Float[Tensor, "expert concept"]
    n_neg: Float[Tensor, "expert concept"]
    mean_pos: Float[Tensor, "expert concept d_ff"]
    mean_neg: Float[Tensor, "expert concept d_ff"]
    var_pos: Float[Tensor, "expert concept d_ff"]
    """Population variance (divided by n), like every variance here."""
    var_neg: Float[Tensor, "expert concept d_ff"]
    n: Float[Tensor, "expert"]
    mean: Float[Tensor, "expert d_ff"]
    var: Float[Tensor, "expert d_ff"]
    """Over all eligible rows of the expert, whatever their labels."""


@dataclass
class _LayerSums:
    pivot: Float[Tensor, "expert d_ff"]
    n: Float[Tensor, "expert class"]
    s: Float[Tensor, "expert class d_ff"]
    q: Float[Tensor, "expert class d_ff"]

    @classmethod
    def zeros(cls, n_experts: int, n_classes: int, d_ff: int, device: torch.device) -> _LayerSums:
        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        shape = (n_experts, n_classes, d_ff)
        return cls(new(n_experts, d_ff), new(n_experts, n_classes), new(*shape), new(*shape))

    def rebased(self, pivot: Float[Tensor, "expert d_ff"]) -> _LayerSums:
        """The same sums about another pivot, exactly."""
        d = (self.pivot - pivot)[:, None]
        n = self.n[:, :, None]
        return _LayerSums(pivot, self.n, self.s + n * d, self.q + 2 * d * self.s + n * d * d)


class ClassMoments:
    """Streaming first and second moments per (layer, expert, concept, neuron).

    Args:
        scope_of: for each concept the number of its scope. Concepts that are defined on the same documents
            share a scope, and with it the sums over "all rows in scope" from which the negatives follow.

    Memory: ``16 bytes * experts * (concepts + scopes + 1) * d_ff`` per layer.
    """

    roles = frozenset({Role.MOE, Role.DENSE})

    def __init__(self, scope_of: Sequence[int]) -> None:
        self.scope_of = torch.as_tensor(list(scope_of), dtype=torch.long)
        self.n_concepts = len(self.scope_of)
        self.n_scopes = int(self.scope_of.max()) + 1 if self.n_concepts else 0
        first = [int((self.scope_of == s).nonzero()[0]) for s in range(self.n_scopes)]
        self._scope_column = torch.as_tensor(first, dtype=torch.long)
        self._layers: dict[int, _LayerSums] = {}
        self._classes: Float[Tensor, "token class"] | None = None

    def start_batch(self, batch: TokenBatch) -> None:
        scope, eligible = batch.token_scope, batch.token_eligible[:, None]
        positive = batch.token_labels & scope
        classes = torch.cat([positive, scope[:, self._scope_column], torch.ones_like(eligible)], dim=1)
        self._classes = (classes & eligible).float()

    def update(self, tap: ExpertTap, batch: TokenBatch) -> None:
        """Add one layer's rows to the sums of every class they belong to."""
        assert self._classes is not None, "start_batch comes first"
        h = tap.activation.detach()
        classes = self._classes.to(h.device)
        sums = self._layers.get(tap.layer)
        if sums is None:
            sums = _LayerSums.zeros(tap.n_experts, classes.shape[1], tap.d_ff, h.device)
            self._layers[tap.layer] = sums
        ends = tap.offsets.tolist()
        most = max((end - start for start, end in zip(ends, ends[1:], strict=False)), default=0)
        workspace = torch.empty(most, 2 * tap.d_ff, device=h.device)  # [x, x * x] of one expert, reused
        for expert, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
            if start == end:
                continue
            member = classes.index_select(0, tap.token[start:end])
            n = member.sum(0).double()  # exact: counts of one batch are far below 2**24
            if n[-1] == 0:
                continue
            rows = h[start:end].float()
            if sums.n[expert, -1] == 0:
                sums.pivot[expert] = rows.mean(0).double()
            both = workspace[: end - start]
            x = both[:, : tap.d_ff]
            torch.sub(rows, sums.pivot[expert].float(), out=x)
            torch.mul(x, x, out=both[:, tap.d_ff :])
            total = member.T @ both
            sums.n[expert] += n
            sums.s[expert] += total[:, : tap.d_ff]
            sums.q[expert] += total[:, tap.d_ff :]

    def merge(self, other: ClassMoments) -> None:
        for layer, theirs in other._layers.items():
            ours = self._layers.get(layer)
            if ours is None:
                self._layers[layer] = theirs
                continue
            pivot = torch.where(ours.n[:, -1:] > 0, ours.pivot, theirs.pivot)
            a, b = ours.rebased(pivot), theirs.rebased(pivot)
            self._layers[layer] = _LayerSums(pivot, a.n + b.n, a.s + b.s, a.q + b.q)

    @property
    def layers(self) -> list[int]:
        return sorted(self._layers)

    def counts(self, layer: int) -> Int[Tensor, "expert"]:
        """Eligible rows each expert saw."""
        return self._layers[layer].n[:, -1].long()

    def moments(self, layer: int) -> Moments:
        """Means and variances per class. Classes without a row have NaN mean and variance."""
        sums = self._layers[layer]
        c = self.n_concepts
        scope = c + self.scope_of.to(sums.n.device)
        n, s, q = sums.n, sums.s, sums.q
        n_neg, s_neg, q_neg = n[:, scope] - n[:, :c], s[:, scope] - s[:, :c], q[:, scope] - q[:, :c]
        pivot = sums.pivot[:, None]
        mean_pos, var_pos = _mean_and_variance(n[:, :c], s[:, :c], q[:, :c])
        mean_neg, var_neg = _mean_and_variance(n_neg, s_neg, q_neg)
        mean, var = _mean_and_variance(n[:, -1], s[:, -1], q[:, -1])
        return Moments(
            n[:, :c], n_neg, mean_pos + pivot, mean_neg + pivot, var_pos, var_neg, n[:, -1], mean + sums.pivot, var
        )

    def drop(self, layer: int) -> None:
        """Forget one layer."""
        self._layers.pop(layer, None)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"scope_of": self.scope_of}
        for layer, sums in self._layers.items():
            for name in ("pivot", "n", "s", "q"):
                state[f"{layer}.{name}"] = getattr(sums, name)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__init__(state["scope_of"].tolist())
        for layer in {int(key.split(".")[0]) for key in state if key != "scope_of"}:
            self._layers[layer] = _LayerSums(*(state[f"{layer}.{name}"] for name in ("pivot", "n", "s", "q")))


def _mean_and_variance(n: Tensor, s: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    n = n[..., None]
    mean = torch.where(n > 0, s / n, torch.nan)
    return mean, torch.where(n > 0, (q / n - mean * mean).clamp(min=0), torch.nan)

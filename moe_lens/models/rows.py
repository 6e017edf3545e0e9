"""The (token, expert) visits of one layer, and what the seam asks of the experts that receive them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Output = Float[Tensor, "row d_model"] | list[Float[Tensor, "row d_model"]]
    """Of all rows, or one tensor for each expert that has rows: joining those is a copy that few look at."""


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

    @property
    def expert(self) -> Int[Tensor, "row"]:
        """Expert of each row, ascending."""
        counts = self.offsets.diff()
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


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


def sum_by_expert(
    x: Float[Tensor, "token d_model"],
    output: Output,
    weight: Float[Tensor, "row"],
    rows: Rows,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "token d_model"]:
    """Weight each row and sum per token in `dtype`, expert by expert, as transformers' eager loops do."""
    total = torch.zeros_like(x, dtype=dtype)
    parts = output if isinstance(output, list) else [output[at] for _, at in rows.groups]
    for (_, at), part in zip(rows.groups, parts, strict=True):
        total.index_add_(0, rows.token[at], (part * weight[at, None]).to(total.dtype))
    return total.to(x.dtype)


class ExpertsCall(ABC):
    """One call of a layer's routed experts. The seam calls the methods once each, in this order."""

    index: Int[Tensor, "token slot"]
    """What the router chose."""
    weight: Float[Tensor, "token slot"]
    """What the router weighted it with."""

    @abstractmethod
    def visit(
        self, index: Int[Tensor, "token slot"], weight: Float[Tensor, "token slot"]
    ) -> tuple[Rows, Float[Tensor, "row"]]:
        """Settle who visits whom (edits may have changed it), and each row's factor on the expert's output."""

    @abstractmethod
    def activate(self) -> Float[Tensor, "row d_ff"]:
        """Input of the down-projection."""

    @abstractmethod
    def project(self, activation: Float[Tensor, "row d_ff"]) -> Output:
        """Output of the down-projection."""

    @abstractmethod
    def combine(self, output: Output) -> Tensor:
        """What the module returns to the model."""


class LoopCall(ExpertsCall):
    """A call of experts that are computed one after the other, in transformers' eager order."""

    def __init__(
        self,
        x: Float[Tensor, "token d_model"],
        index: Int[Tensor, "token slot"],
        weight: Float[Tensor, "token slot"],
        n_experts: int,
    ) -> None:
        self.x, self.index, self.weight, self.n_experts = x, index, weight, n_experts

    def visit(self, index: Tensor, weight: Tensor) -> tuple[Rows, Tensor]:
        self.rows = sort_rows(index, self.n_experts, "eager", sentinels=False)
        self.factor = weight[self.rows.token, self.rows.slot]
        return self.rows, self.factor

    def activate(self) -> Tensor:
        return torch.cat([self.up(e, self.x[self.rows.token[at]]) for e, at in self.rows.groups])

    def project(self, activation: Tensor) -> list[Tensor]:
        return [self.down(e, activation[at], self.x[self.rows.token[at]]) for e, at in self.rows.groups]

    def combine(self, output: Output) -> Tensor:
        return sum_by_expert(self.x, output, self.factor, self.rows)

    @abstractmethod
    def up(self, expert: int, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_ff"]:
        """Activation of one expert's rows."""

    @abstractmethod
    def down(
        self, expert: int, activation: Float[Tensor, "row d_ff"], x: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """Output of one expert's rows; `x` is what `up` was given."""

"""The types that floors exchange: addresses, taps, token batches, statuses.

Axis names used in shapes throughout the package
    token   one position of a flattened batch, ``token = row_in_batch * seq + position``
    row     one (token, expert) visit; an MoE layer has ``row = token * top_k`` of them
    expert  experts of one layer; a dense FFN counts as one expert that every token visits
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from moe_lens.errors import OutOfRange

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class Status(StrEnum):
    """Outcome of one measurement. Only ``ok`` and ``separable`` carry numbers."""

    OK = "ok"
    TOO_FEW = "too_few"
    CONSTANT = "constant"
    SEPARABLE = "separable"
    NOT_CONVERGED = "not_converged"
    NOT_FITTED = "not_fitted"
    NOT_RUN = "not_run"
    REFUSED = "refused"
    ABSTAINED = "abstained"
    FAILED = "failed"


class Role(StrEnum):
    """What kind of feed-forward block a tap comes from."""

    MOE = "moe"
    DENSE = "dense"
    SHARED = "shared"


class Split(StrEnum):
    """The one document split of the whole product (METRICS 1.1)."""

    SELECT = "select"
    VALIDATE = "validate"
    TEST = "test"


class Granularity(StrEnum):
    """What a concept is a property of; it decides the concept's null."""

    TYPE = "type"
    SPAN = "span"
    DOCUMENT = "document"


_ADDRESS = re.compile(r"^\s*L?(\d+)\s*[.:]\s*E?(\d+)(?:\s*[.:]\s*N?(\d+))?\s*$", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class ExpertAddress:
    """An expert ``L7.E12`` or a neuron of one, ``L7.E12.N304``. ``7:12`` is read too."""

    layer: int
    expert: int
    neuron: int | None = None

    @classmethod
    def parse(cls, text: str | ExpertAddress) -> ExpertAddress:
        """Read an address.

        Raises:
            OutOfRange: `text` is not of the form ``L7.E12``, ``L7.E12.N304`` or ``7:12``.
        """
        if isinstance(text, ExpertAddress):
            return text
        match = _ADDRESS.match(text)
        if match is None:
            raise OutOfRange(f"cannot read the expert address {text!r}: write it as L7.E12 or L7.E12.N304")
        layer, expert, neuron = match.groups()
        return cls(int(layer), int(expert), None if neuron is None else int(neuron))

    def __str__(self) -> str:
        tail = "" if self.neuron is None else f".N{self.neuron}"
        return f"L{self.layer}.E{self.expert}{tail}"


@dataclass(frozen=True)
class ExpertTap:
    """What one feed-forward layer did with one batch, rows sorted by expert (CSR).

    Rows of expert ``e`` are ``offsets[e]:offsets[e + 1]``. A dense or shared FFN is one expert with
    one row per token.
    """

    layer: int
    role: Role
    token: Int[Tensor, "row"]
    """Flat token index of each row."""
    slot: Int[Tensor, "row"]
    """Rank of the expert among the token's top-k, 0 is the first the router returned."""
    weight: Float[Tensor, "row"]
    """Router weight as the model applies it to `output`: 1 in a dense FFN and where the gate already scales the
    expert's input (Llama 4); the shared expert's own gate if it has one."""
    offsets: Int[Tensor, "expert+1"]
    activation: Float[Tensor, "row d_ff"]
    """``act(gate) * up``: input of the down-projection, not weighted by the router. Zero for LongCat-Flash's
    experts without neurons."""
    router_logits: Float[Tensor, "token expert"] | None
    """Raw router logits, None for a dense or shared FFN."""
    n_tokens: int
    """Number of flat tokens in the batch, padding included."""
    make_output: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def output(self) -> Float[Tensor, "row d_model"]:
        """Expert output after the down-projection, not weighted by the router."""
        return self.make_output()

    @cached_property
    def expert(self) -> Int[Tensor, "row"]:
        """Expert index of each row, ascending."""
        import torch

        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)

    @property
    def n_experts(self) -> int:
        return len(self.offsets) - 1

    @property
    def d_ff(self) -> int:
        return self.activation.shape[-1]


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch of token windows with everything that consumers need to know about each token.

    A *window* is one stretch of one document that fits the context. ``eligible`` is False on padding,
    on special tokens and on the first token of every window; such tokens pass through the model but no
    statistic counts them.
    """

    input_ids: Int[Tensor, "window seq"]
    attention_mask: Int[Tensor, "window seq"]
    document: Int[Tensor, "window"]
    """Index of the window's document in the corpus."""
    char_start: Int[Tensor, "window seq"]
    """First character of each token in its document's text (half-open span), -1 on special tokens and padding."""
    char_end: Int[Tensor, "window seq"]
    eligible: Bool[Tensor, "window seq"]
    labels: Bool[Tensor, "window seq concept"]
    """Concept bits. Meaningful only where ``in_scope`` holds."""
    in_scope: Bool[Tensor, "window concept"]
    """Whether the concept is defined on the window's document: out-of-scope tokens are neither class."""

    @property
    def n_tokens(self) -> int:
        """Flat tokens, padding included."""
        return self.input_ids.numel()

    @cached_property
    def token_document(self) -> Int[Tensor, "token"]:
        """Document index of every flat token."""
        return self.document.repeat_interleave(self.input_ids.shape[1])

    @cached_property
    def token_eligible(self) -> Bool[Tensor, "token"]:
        return self.eligible.reshape(-1)

    @cached_property
    def token_labels(self) -> Bool[Tensor, "token concept"]:
        return self.labels.reshape(self.n_tokens, -1)

    @cached_property
    def token_scope(self) -> Bool[Tensor, "token concept"]:
        return self.in_scope.repeat_interleave(self.input_ids.shape[1], dim=0)

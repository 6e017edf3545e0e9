"""``TokenTable``: labels, documents and positions of every token that was streamed, once for all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moe_lens.types import ExpertTap, Role, TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

_FIELDS = ("document", "char_start", "char_end", "input_ids", "eligible", "labels", "in_scope")


class TokenTable:
    """What is known about each streamed token. Token ``i`` is the i-th flat token of the stream, padding included.

    Row stores keep only token numbers; whatever else a row needs is looked up here, so that labels are held
    once and not once per layer and expert.
    """

    roles: frozenset[Role] = frozenset()

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in _FIELDS}
        self._joined: dict[str, Tensor] = {}
        self.n_tokens = 0

    def start_batch(self, batch: TokenBatch) -> None:
        """Append the batch's tokens, padding included."""
        self._joined.clear()
        rows = {
            "document": batch.token_document,
            "char_start": batch.char_start.reshape(-1),
            "char_end": batch.char_end.reshape(-1),
            "input_ids": batch.input_ids.reshape(-1),
            "eligible": batch.token_eligible,
            "labels": batch.token_labels,
            "in_scope": batch.token_scope,
        }
        for name, value in rows.items():
            self._parts[name].append(value.cpu())
        self.n_tokens += batch.n_tokens

    def update(self, tap: ExpertTap, batch: TokenBatch) -> None:
        """Taps carry nothing that belongs here."""

    def merge(self, other: TokenTable) -> None:
        """Append `other`'s tokens; its token numbers grow by this table's ``n_tokens``."""
        self._joined.clear()
        for name in _FIELDS:
            self._parts[name].extend(other._parts[name])
        self.n_tokens += other.n_tokens

    def _column(self, name: str) -> Tensor:
        if name not in self._joined:
            self._joined[name] = torch.cat(self._parts[name])
            self._parts[name] = [self._joined[name]]
        return self._joined[name]

    @property
    def document(self) -> Int[Tensor, "token"]:
        return self._column("document")

    @property
    def char_start(self) -> Int[Tensor, "token"]:
        return self._column("char_start")

    @property
    def char_end(self) -> Int[Tensor, "token"]:
        return self._column("char_end")

    @property
    def input_ids(self) -> Int[Tensor, "token"]:
        return self._column("input_ids")

    @property
    def eligible(self) -> Bool[Tensor, "token"]:
        return self._column("eligible")

    @property
    def labels(self) -> Bool[Tensor, "token concept"]:
        return self._column("labels")

    @property
    def in_scope(self) -> Bool[Tensor, "token concept"]:
        return self._column("in_scope")

    def state_dict(self) -> dict[str, Any]:
        return {name: self._column(name) for name in _FIELDS} if self.n_tokens else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._joined.clear()
        self._parts = {name: [state[name]] if state else [] for name in _FIELDS}
        self.n_tokens = len(state["document"]) if state else 0

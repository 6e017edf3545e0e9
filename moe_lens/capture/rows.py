"""``RowStore``: a bounded, order-independent sample of activation rows.

Each (token, expert) row has a pseudo-random key made from its document and position. The store keeps, per
expert, the ``max_rows`` rows with the smallest keys in every scope, and the ``max_rows / 2`` positives with
the smallest keys of every concept. Bottom-k samples of two streams merge into the bottom-k sample of both, so
the result depends on neither batch size nor order, and rare concepts keep their positives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_lens.capture.tokens import TokenTable
from moe_lens.types import ExpertTap, Role, TokenBatch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Stored rows of one expert, by rising key."""

    token: Int[Tensor, "row"]
    """Number in the token table."""
    activation: Float[Tensor, "row column"]
    weight: Float[Tensor, "row"]
    key: Int[Tensor, "row"]

    def __len__(self) -> int:
        return len(self.token)


@dataclass
class _Layer:
    n_experts: int
    parts: list[tuple[Tensor, ...]]  # expert, token, key, weight, activation
    since_compaction: int = 0
    offsets: list[int] | None = None
    """Bounds of each expert's rows while the one part is sorted by (expert, key)."""

    def add(self, part: tuple[Tensor, ...]) -> None:
        self.parts.append(part)
        self.since_compaction += len(part[0])
        self.offsets = None

    def join(self) -> tuple[Tensor, ...]:
        """All rows as one part, sorted by expert and key."""
        if self.offsets is None:
            expert, token, key, weight, h = (torch.cat(column) for column in zip(*self.parts, strict=True))
            order = key.argsort()
            order = order[expert[order].argsort(stable=True)]
            self.parts = [tuple(column[order] for column in (expert, token, key, weight, h))]
            counts = torch.bincount(expert, minlength=self.n_experts)
            self.offsets = [0, *counts.cumsum(0).tolist()]
        return self.parts[0]

    def of(self, expert: int) -> tuple[Tensor, ...]:
        part = self.join()
        assert self.offsets is not None
        return tuple(column[self.offsets[expert] : self.offsets[expert + 1]] for column in part[1:])


class RowStore:
    """Rows of expert activations for probing.

    Args:
        tokens: the table that numbers the tokens of the same stream; put it before this consumer.
        scope_of: scope number of each concept, as in ``ClassMoments``.
        max_rows: size of each stratum; None keeps every eligible row.
        columns: neurons to keep for each (layer, expert); None keeps all. All experts of a layer are given
            the same number of columns.
        seed: of the row keys.

    Memory: at most ``max_rows * (scopes + concepts / 2)`` rows per expert, usually all the rows there are,
    each of ``columns * itemsize + 28`` bytes.
    """

    roles = frozenset({Role.MOE, Role.DENSE})

    def __init__(
        self,
        tokens: TokenTable,
        scope_of: Sequence[int],
        *,
        max_rows: int | None = 2000,
        columns: Mapping[int, Int[Tensor, "expert column"]] | None = None,
        seed: int = 0,
    ) -> None:
        self.tokens = tokens
        self.max_rows = max_rows
        self.columns = columns
        self.seed = seed
        self._scope_column = [list(scope_of).index(s) for s in sorted(set(scope_of))]
        self._layers: dict[int, _Layer] = {}
        self._base = 0

    def start_batch(self, batch: TokenBatch) -> None:
        self._base = self.tokens.n_tokens - batch.n_tokens
        position = batch.char_start.reshape(-1)
        self._keys = row_keys(batch.token_document.cpu(), position.cpu(), self.seed)

    def update(self, tap: ExpertTap, batch: TokenBatch) -> None:
        """Keep the eligible rows of one layer, and drop old ones that no stratum needs any more."""
        device = tap.activation.device
        keep = batch.token_eligible.to(device)[tap.token].nonzero().squeeze(1)
        token, expert = tap.token[keep], tap.expert[keep]
        h = tap.activation.detach()[keep]
        if self.columns is not None:
            h = h.gather(1, self.columns[tap.layer].to(device)[expert])
        token = token.cpu()
        part = (expert.cpu(), token + self._base, self._keys[token], tap.weight[keep].detach().cpu(), h.cpu())
        layer = self._layers.setdefault(tap.layer, _Layer(tap.n_experts, []))
        layer.add(part)
        if self.max_rows is not None and layer.since_compaction > 4 * self.max_rows * tap.n_experts:
            self._compact(layer)

    def _compact(self, layer: _Layer) -> None:
        """Drop the rows that no stratum needs."""
        if self.max_rows is None or not layer.parts:
            return
        part = layer.join()
        keep = torch.cat([self._needed(layer.of(e)[0]) for e in range(layer.n_experts)])
        layer.parts = [tuple(column[keep] for column in part)]
        layer.since_compaction, layer.offsets = 0, None

    def _needed(self, token: Int[Tensor, "row"]) -> Bool[Tensor, "row"]:
        """Which of an expert's rows, given by rising key, some stratum keeps."""
        assert self.max_rows is not None
        in_scope = self.tokens.in_scope[token]
        positive = self.tokens.labels[token] & in_scope
        scopes = in_scope[:, self._scope_column]
        needed = (positive & (positive.cumsum(0, dtype=torch.int32) <= self.max_rows // 2)).any(1)
        needed |= (scopes & (scopes.cumsum(0, dtype=torch.int32) <= self.max_rows)).any(1)
        needed[: self.max_rows] = True
        return needed

    def rows(self, layer: int, expert: int) -> Rows:
        """Stored rows of one expert, by rising key. Empty when the expert was never visited."""
        token, key, weight, h = self._layers[layer].of(expert)
        if self.max_rows is not None:
            needed = self._needed(token)
            token, key, weight, h = token[needed], key[needed], weight[needed], h[needed]
        return Rows(token, h, weight, key)

    @property
    def layers(self) -> list[int]:
        return sorted(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(c.nbytes for layer in self._layers.values() for part in layer.parts for c in part)

    def drop(self, layer: int) -> None:
        """Forget one layer's rows."""
        self._layers.pop(layer, None)

    def merge(self, other: RowStore) -> None:
        """Add `other`'s rows. Merge first the row stores, then the token tables they number."""
        shift = self.tokens.n_tokens
        for number, theirs in other._layers.items():
            expert, token, key, weight, h = theirs.join()
            ours = self._layers.setdefault(number, _Layer(theirs.n_experts, []))
            ours.add((expert, token + shift, key, weight, h))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for number, layer in self._layers.items():
            state[f"{number}.n_experts"] = torch.tensor(layer.n_experts)
            for name, column in zip(("expert", "token", "key", "weight", "activation"), layer.join(), strict=True):
                state[f"{number}.{name}"] = column
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._layers = {}
        for number in {int(key.split(".")[0]) for key in state}:
            part = tuple(state[f"{number}.{name}"] for name in ("expert", "token", "key", "weight", "activation"))
            self._layers[number] = _Layer(int(state[f"{number}.n_experts"]), [part])


def row_keys(document: Int[Tensor, "token"], position: Int[Tensor, "token"], seed: int) -> Int[Tensor, "token"]:
    """Uniform 63-bit keys from (document, position, seed)."""
    return _mix(_mix(document.long() + seed * 0x2545F4914F6CDD1D) + position.long()) & 0x7FFFFFFFFFFFFFFF


def _mix(x: Int[Tensor, "token"]) -> Int[Tensor, "token"]:
    """The finaliser of splitmix64 in wrapping int64 arithmetic, with logical right shifts."""
    x = x + -0x61C8864680B583EB
    for shift, multiplier in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))

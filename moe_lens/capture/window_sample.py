"""``WindowSample``: whole windows of the stream, with the routing of their tokens, drawn by hash key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moe_lens.types import Split

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor

LAST_KEY = torch.iinfo(torch.long).max


def nobody(experts: Tensor) -> int:
    """What stands for "no expert" in a tensor of expert numbers."""
    return torch.iinfo(experts.dtype).max


def join_parts(parts: Sequence[Tensor]) -> Tensor:
    """Join along the first axis; lists of experts that are shorter (some visits left out) are filled up."""
    if parts[0].ndim == 1 or len(widths := {part.shape[-1] for part in parts}) == 1:
        return torch.cat(list(parts))
    most = max(widths)
    return torch.cat([torch.nn.functional.pad(p, (0, most - p.shape[-1]), value=nobody(p)) for p in parts])


class WindowSample:
    """Whole windows drawn by hash key, with the routing of their tokens in every layer.

    Of each split, windows are kept in the order of their keys as long as their tokens fit into `max_tokens`.
    ``column(name)`` reads one: ``key, split, document, first_char, length`` have one entry per window,
    ``input_ids, eligible``, ``chosen.LAYER`` and ``passed.LAYER`` one per token, window after window.
    """

    PER_WINDOW = ("key", "split", "document", "first_char", "length")

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.parts: dict[str, list[Tensor]] = {}
        self.limit = torch.full((len(Split),), LAST_KEY)
        """Per split the first key that did not fit: no later one is kept, though it might fit."""
        self._pending = 0

    def open(self, key: Tensor, split: Tensor) -> Bool[Tensor, "window"]:
        """Which windows could still be kept."""
        return key < self.limit[split]

    def add(self, columns: dict[str, Tensor]) -> None:
        for name, value in columns.items():
            if len(value) or name not in self.parts:
                self.parts.setdefault(name, []).append(value)
        if "length" in columns:
            self._pending += int(columns["length"].sum())

    @property
    def overfull(self) -> bool:
        """Whether it is time to drop windows."""
        return self._pending > self.max_tokens

    def settle(self) -> None:
        """Drop the windows that no longer fit, and sort by split and key. All layers of a batch must be in."""
        if not self._pending:
            return
        columns = {name: join_parts(parts) for name, parts in self.parts.items()}
        order = columns["key"].argsort()
        order = order[columns["split"][order].argsort(stable=True)]
        split, length = columns["split"][order], columns["length"][order]
        fits = torch.zeros(len(order), dtype=torch.bool)
        for code in split.unique().tolist():
            mine = (split == code).nonzero().squeeze(1)
            key = columns["key"][order[mine]]
            fits[mine] = (length[mine].cumsum(0) <= self.max_tokens) & (key < self.limit[code])
            dropped = key[~fits[mine]]
            if len(dropped):
                self.limit[code] = min(int(self.limit[code]), int(dropped[0]))
        order = order[fits]
        tokens = _runs(columns["length"].cumsum(0) - columns["length"], columns["length"], order)
        self.parts = {name: [c[order if name in self.PER_WINDOW else tokens]] for name, c in columns.items()}
        self._pending = 0

    def column(self, name: str) -> Tensor:
        """One column of the windows that are kept.

        Raises:
            KeyError: no window was kept, or the layer was not tapped.
        """
        self.settle()
        return self.parts[name][0]

    def state(self) -> dict[str, Tensor]:
        return {name: self.column(name) for name in self.parts} | {"limit": self.limit}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Add the windows of another sample, given by its state."""
        self.limit = torch.minimum(self.limit, state["limit"])
        self.add({name: value for name, value in state.items() if name != "limit"})


def _runs(first: Tensor, length: Tensor, order: Tensor) -> Int[Tensor, "token"]:
    """Token indices of the windows `order`, window after window."""
    length = length[order]
    before = length.cumsum(0) - length
    return torch.arange(int(length.sum())) + (first[order] - before).repeat_interleave(length)

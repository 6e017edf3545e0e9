"""What the model hands to the blocks of an nnsight trace while it waits for them (see `nnsight`).

An offer holds all rows of a layer. A block takes the rows of one expert as a tensor of its own (a saved one keeps
no other rows alive), and whatever it did to that tensor goes back into the layer when the model continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_lens.models.seam import Routing
from moe_lens.types import ExpertTap

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Window(NamedTuple):
    """Which of a batch's flat tokens belong to the block that asks: all, or those of its `tracer.invoke`."""

    first: int
    end: int


@dataclass
class Piece:
    """One expert's rows in the hands of a block."""

    rows: Int[Tensor, "row"]
    """Index of the rows in the layer."""
    value: Float[Tensor, "row width"]
    version: int | None = None
    """Of `value` when the layer last agreed with it; None if it may not."""

    @property
    def settled(self) -> bool:
        """Whether the layer holds the same values already."""
        return self.version is not None and self.value._version == self.version

    def settle(self) -> None:
        """Note that it does. Tensors of inference mode do not count their changes, so we never know."""
        self.version = None if self.value.is_inference() else self.value._version


class Offer:
    """All rows of a layer at one point, while the model waits for the blocks of the trace."""

    def __init__(self, tap: ExpertTap, value: Float[Tensor, "row width"]) -> None:
        self.tap = tap
        self.original = self.value = value
        self.pieces: dict[tuple[int, Window], Piece] = {}

    def take(self, expert: int, window: Window) -> Float[Tensor, "row width"]:
        """The rows of `expert`, as a tensor of their own; the same one for everyone who asks."""
        key = expert, window
        if key not in self.pieces:
            self.settle()
            rows = rows_of(self.tap.token, self.tap.offsets, expert, window)
            self.pieces[key] = Piece(rows, self.value[rows])
            if not self.pieces[key].value.requires_grad:  # else it must enter the graph: `.grad` is asked of it
                self.pieces[key].settle()
        return self.pieces[key].value

    def put(self, expert: int, window: Window, value: Float[Tensor, "row width"]) -> None:
        """Replace the rows of `expert`."""
        self.take(expert, window)
        self.pieces[expert, window] = Piece(self.pieces[expert, window].rows, value)

    def settle(self) -> None:
        """Carry what was changed, in place or by `put`, into the layer's rows."""
        for piece in self.pieces.values():
            if not piece.settled:
                self.value = self.value.index_copy(0, piece.rows, piece.value)
                piece.settle()

    @property
    def result(self) -> Float[Tensor, "row width"] | None:
        """The layer's rows if a block changed them."""
        self.settle()
        return None if self.value is self.original else self.value


@dataclass
class RoutingOffer:
    """A layer's routing, while the model waits for the blocks of the trace."""

    routing: Routing


def window_of(block: Any, n_tokens: int) -> Window:
    """The flat tokens of the block's own rows of the batch; of all rows unless several invokes are batched."""
    batcher, group = block.interleaver.batcher, block.batch_group
    if batcher is None or group is None or not batcher.batching:
        return Window(0, n_tokens)
    first, size = group
    per_row = n_tokens // batcher.total
    return Window(first * per_row, (first + size) * per_row)


def rows_of(
    token: Int[Tensor, "row"], offsets: Int[Tensor, "expert+1"], expert: int, window: Window
) -> Int[Tensor, "row"]:
    """Index of the rows of `expert` whose tokens lie in `window`, in the order of the tap."""
    rows = torch.arange(int(offsets[expert]), int(offsets[expert + 1]), device=token.device)
    return rows[(token[rows] >= window.first) & (token[rows] < window.end)]

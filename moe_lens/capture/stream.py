"""One forward pass, many consumers.

1. Every batch is announced to every consumer (``start_batch``).
2. The model runs once; each feed-forward layer hands over one ``ExpertTap``.
3. Each consumer that wants the tap's role folds it into its state and forgets it.

Consumers are mergeable: ``a.merge(b)`` is what one consumer would hold had it seen both streams. That is how
data-parallel workers, shards and resumed runs are put together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moe_lens.types import ExpertTap, Role, TokenBatch

if TYPE_CHECKING:
    from moe_lens.models.lens import Lens


class Consumer(Protocol):
    """Folds taps into a state whose size does not grow faster than it declares."""

    @property
    def roles(self) -> Collection[Role]:
        """Kinds of tap that the consumer wants."""
        ...

    def start_batch(self, batch: TokenBatch) -> None:
        """Called once per batch, before any tap of it."""
        ...

    def update(self, tap: ExpertTap, batch: TokenBatch) -> None:
        """Called once per tapped layer and batch."""
        ...

    def merge(self, other: Any) -> None:
        """Add what `other`, a consumer of the same kind and shape, has seen after this one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that was seen, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def stream(
    lens: Lens,
    batches: Iterable[TokenBatch],
    consumers: Sequence[Consumer],
    *,
    layers: Sequence[int] | None = None,
    progress: bool = True,
    describe: str = "capture",
) -> int:
    """Run the model once over `batches` and feed `consumers`.

    Args:
        layers: decoder layers to tap, all that carry a feed-forward site by default.
        progress: a bar on stderr; silent anyway when stderr is not a terminal.

    Returns:
        Number of tokens that went through the model, padding not counted.
    """
    from tqdm.auto import tqdm

    roles = frozenset(role for consumer in consumers for role in consumer.roles)
    total = len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    n_tokens = 0
    with tqdm(total=total, desc=describe, unit="batch", disable=None if progress else True) as bar:
        for batch in batches:
            for consumer in consumers:
                consumer.start_batch(batch)

            def deliver(tap: ExpertTap, batch: TokenBatch = batch) -> None:
                for consumer in consumers:
                    if tap.role in consumer.roles:
                        consumer.update(tap, batch)

            lens.forward(batch, deliver, layers=layers, roles=sorted(roles))
            n_tokens += int(batch.attention_mask.sum())
            bar.update()
    return n_tokens

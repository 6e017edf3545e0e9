"""``checkpointed_stream(...)``: a stream that a killed process continues from its last saved batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_lens.capture.store import read_state, write_state
from moe_lens.capture.stream import Consumer, stream

if TYPE_CHECKING:
    from moe_lens.corpus.batches import Batches
    from moe_lens.models.lens import Lens
    from moe_lens.types import TokenBatch

_COUNTS = "counts"
"""Batches and tokens that are folded in."""


def checkpointed_stream(
    lens: Lens,
    loader: Batches,
    consumers: Sequence[Consumer],
    path: Path | None,
    *,
    every: float = 60.0,
    layers: Sequence[int] | None = None,
    progress: bool = True,
    describe: str = "capture",
) -> int:
    """``stream(...)`` that saves what the consumers hold, and starts from there when called again.

    Args:
        path: safetensors file, for one loader and one list of consumers only; None saves nothing.
        every: seconds between two savings.

    Returns:
        Number of tokens of the whole loader that went through the model, padding not counted.

    Raises:
        WriteFailed: the file cannot be written.
    """
    if path is None:
        return stream(lens, loader, consumers, layers=layers, progress=progress, describe=describe)
    n_batches, n_tokens = _load(path, consumers) if path.exists() else (0, 0)
    rest = replace(loader, groups=loader.groups[n_batches:])
    saved = _Saving(rest, consumers, path, every=every, n_batches=n_batches, n_tokens=n_tokens)
    return n_tokens + stream(lens, saved, consumers, layers=layers, progress=progress, describe=describe)


class _Saving:
    """Batches; before one is handed out, all before it are in the consumers, and can be saved."""

    def __init__(
        self, loader: Batches, consumers: Sequence[Consumer], path: Path, *, every: float, n_batches: int, n_tokens: int
    ) -> None:
        self._loader, self._consumers, self._path, self._every = loader, consumers, path, every
        self._n_batches, self._n_tokens = n_batches, n_tokens

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[TokenBatch]:
        last, n_tokens = time.monotonic(), self._n_tokens
        for i, batch in zip(count(self._n_batches), self._loader, strict=False):
            if i > self._n_batches and time.monotonic() - last >= self._every:
                _save(self._path, self._consumers, i, n_tokens)
                last = time.monotonic()
            yield batch
            n_tokens += int(batch.attention_mask.sum())


def _save(path: Path, consumers: Sequence[Consumer], n_batches: int, n_tokens: int) -> None:
    state: dict[str, Any] = {_COUNTS: torch.tensor([n_batches, n_tokens])}
    for i, consumer in enumerate(consumers):
        state |= {f"{i}/{name}": value for name, value in consumer.state_dict().items()}
    write_state(path, state)


def _load(path: Path, consumers: Sequence[Consumer]) -> tuple[int, int]:
    state = read_state(path)
    n_batches, n_tokens = state.pop(_COUNTS).tolist()
    for i, consumer in enumerate(consumers):
        mine = f"{i}/"
        consumer.load_state_dict({k.removeprefix(mine): v for k, v in state.items() if k.startswith(mine)})
    return n_batches, n_tokens

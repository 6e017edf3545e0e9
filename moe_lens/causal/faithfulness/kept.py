"""``KeptSets``: effects of sets on disk, so that a killed run measures none of them twice."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_lens.capture.store import read_state, write_state

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

Key = tuple[str, bytes]
"""Mode, and which units are removed as the bytes of a boolean array."""


@dataclass(frozen=True, eq=False)
class SetEffect:
    """Effect of one set of experts, summed over the predictions of each document."""

    kl: Float[ndarray, "document"]
    """KL(full || ablated), nats."""
    nll: Float[ndarray, "document"]
    """Rise of the NLL: the fall of the log-probability of what follows."""
    layers_emptied: int
    mass_ratio: float
    """Gate mass of the touched tokens after the edit over that before; NaN where the mode changes no gates."""
    short_tokens: int
    """Tokens (of one layer each) left with fewer experts than the model's top-k."""


@dataclass
class KeptSets:
    """A folder of effects that belong to one text, one routing and one reference: one file for each saving."""

    folder: Path
    every: float = 10.0
    """Seconds between two savings."""
    _new: dict[Key, SetEffect] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def read(self) -> dict[Key, SetEffect]:
        """Everything that was saved."""
        return {key: effect for path in self._files() for key, effect in _effects(read_state(path))}

    def add(self, found: dict[Key, SetEffect]) -> None:
        """Keep more effects; they are on disk once `every` seconds have passed, or after `save`.

        Raises:
            WriteFailed: the folder cannot be written.
        """
        self._new |= found
        if time.monotonic() - self._last >= self.every:
            self.save()

    def save(self) -> None:
        """Write what is not on disk yet.

        Raises:
            WriteFailed: the folder cannot be written.
        """
        if self._new:
            last = max((int(path.stem) for path in self._files()), default=0)
            write_state(self.folder / f"{last + 1:06d}.safetensors", _state(self._new.items()))
            self._new = {}
        self._last = time.monotonic()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.safetensors"))


def _state(found: Iterable[tuple[Key, SetEffect]]) -> dict[str, Any]:
    by_mode: dict[str, list[tuple[bytes, SetEffect]]] = {}
    for (mode, removed), effect in found:
        by_mode.setdefault(mode, []).append((removed, effect))
    state: dict[str, Any] = {}
    for mode, rows in by_mode.items():
        numbers = [(e.layers_emptied, e.mass_ratio, e.short_tokens) for _, e in rows]
        columns = {
            "removed": np.stack([np.frombuffer(removed, np.uint8) for removed, _ in rows]),
            "kl": np.stack([effect.kl for _, effect in rows]),
            "nll": np.stack([effect.nll for _, effect in rows]),
            "numbers": np.array(numbers, np.float64),
        }
        state |= {f"{mode}/{name}": torch.from_numpy(column) for name, column in columns.items()}
    return state


def _effects(state: dict[str, Any]) -> Iterator[tuple[Key, SetEffect]]:
    for mode in {name.partition("/")[0] for name in state}:
        removed, kl, nll, numbers = (state[f"{mode}/{name}"].numpy() for name in ("removed", "kl", "nll", "numbers"))
        for at, row in enumerate(removed):
            emptied, ratio, short = numbers[at]
            yield (mode, row.tobytes()), SetEffect(kl[at], nll[at], int(emptied), float(ratio), int(short))

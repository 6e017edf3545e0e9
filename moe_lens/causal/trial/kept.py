"""``Kept(folder, ...)``: finished measurements in a folder, for a trial that was killed.

One file per expert and mode. Its name holds a digest of everything that decides the numbers, so that a file is never
read for another model, text or setting; a file that cannot be read, or was damaged, is as good as none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moe_lens import __version__
from moe_lens.capture.store import read_state, write_state
from moe_lens.causal.trial.measured import CoSelected, Measured, Positions

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from moe_lens.causal.effects import Effects
    from moe_lens.types import ExpertAddress

_CHECK = "check"
_OWN, _BESIDE = ("at", "effect", "effect_8", "gate"), ("expert", "effect", "effect_8", "gate")


class Kept:
    """Measurements of one model on one text under one choice of settings."""

    def __init__(self, folder: Path, effects: Effects, *, positions: Positions, horizon: int, seed: int) -> None:
        self.folder = Path(folder)
        lens, text = effects.lens, effects.text
        tokenized = text.tokenized
        self._settings: dict[str, Any] = {
            "version": __version__, "model": lens.model.config.to_dict(), "weights": _weights(lens.model.state_dict()),
            "dtype": str(lens.model.dtype), "device": lens.device.type, "kernel": lens.kernel,
            "text": _digest([tokenized.input_ids, tokenized.offsets, tokenized.document, tokenized.splits]),
            "predictions": _digest([text.token]), "batch_tokens": effects.batch_tokens,
            "positions": positions, "horizon": horizon, "seed": seed,
        }  # fmt: skip

    def path(self, expert: ExpertAddress, mode: str, *, alone: bool) -> Path:
        """Where a measurement is kept."""
        said = json.dumps([self._settings, str(expert), mode, alone], sort_keys=True, default=str)
        return self.folder / f"{expert}-{mode}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"

    def read(self, expert: ExpertAddress, mode: str, *, alone: bool) -> Measured | None:
        """The measurement, None if there is none or its file is damaged."""
        path = self.path(expert, mode, alone=alone)
        if not path.exists():
            return None
        try:
            state = {name: value.numpy() for name, value in read_state(path).items()}
            check = state.pop(_CHECK)
            if bytes(check) != _check(state):
                return None
            beside = None
            if "beside.expert" in state:
                beside = CoSelected(*(state[f"beside.{name}"] for name in _BESIDE))
            return Measured(expert, mode, *(state[name] for name in _OWN), beside=beside)
        except Exception:  # whatever is wrong with a file, the measurement can be made again
            return None

    def write(self, found: Measured, *, alone: bool) -> None:
        """Keep a measurement.

        Raises:
            WriteFailed: the disk is full or the folder cannot be written.
        """
        state = {name: getattr(found, name) for name in _OWN}
        if found.beside is not None:
            state |= {f"beside.{name}": getattr(found.beside, name) for name in _BESIDE}
        state = {name: np.ascontiguousarray(value) for name, value in state.items()}
        state[_CHECK] = np.frombuffer(_check(state), np.uint8).copy()
        path = self.path(found.expert, found.mode, alone=alone)
        write_state(path, {name: torch.from_numpy(value) for name, value in state.items()})


def _check(state: dict[str, ndarray]) -> bytes:
    return bytes.fromhex(_digest([state[name] for name in sorted(state)]))


def _digest(arrays: Iterable[ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _weights(state: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().contiguous().reshape(-1).cpu()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()

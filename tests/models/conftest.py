"""Checkpoints on disk, one of each family, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_lens.models.lens import Lens
from moe_lens.models.load import load
from tests.models import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a saved tiny model of a family (do not write to it)."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str) -> Path:
        target = root / family
        if not target.exists():
            tiny.save(tiny.build(family), target)
        return target

    return folder


@pytest.fixture(scope="session")
def lens_of(checkpoint: Callable[[str], Path]) -> Callable[[str], Lens]:
    """A loaded tiny model of a family. Tests leave it as they found it."""
    cache: dict[str, Lens] = {}

    def get(family: str) -> Lens:
        if family not in cache:
            cache[family] = load(str(checkpoint(family)))
        return cache[family]

    return get

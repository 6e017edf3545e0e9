"""Specimens: each family's checkpoint is built, saved and loaded once a worker."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.conformance import zoo
from tests.conformance.specimen import Specimen
from tests.models import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def specimen_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Specimen]:
    """The specimen of a family. Tests leave it as they found it."""
    root = tmp_path_factory.mktemp("zoo")
    cache: dict[str, Specimen] = {}

    def get(name: str) -> Specimen:
        family = zoo.ZOO[name]
        if name not in cache:
            cache[name] = Specimen(name, family, tiny.save(zoo.build(family), root / name))
        return cache[name]

    return get


@pytest.fixture(params=list(zoo.ZOO))
def specimen(request: pytest.FixtureRequest, specimen_of: Callable[[str], Specimen]) -> Specimen:
    """Every family in turn."""
    return specimen_of(request.param)

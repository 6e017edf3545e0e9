"""One lens a family, built in memory and left as it was found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_lens.models.lens import Lens
from tests.conformance import zoo, zoo_adapters
from tests.models import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lens_of() -> Callable[[str], Lens]:
    """A tiny random model of a family of `tests.models.tiny` or `tests.conformance.zoo`."""
    cache: dict[str, Lens] = {}

    def get(family: str) -> Lens:
        if family not in cache:
            built = {**zoo.ZOO, **zoo_adapters.ADAPTED}
            model = tiny.build(family) if family in {**tiny.MOE, **tiny.DENSE} else zoo.build(built[family])
            cache[family] = Lens(model, tiny.tokenizer(), name=family)
        return cache[family]

    return get

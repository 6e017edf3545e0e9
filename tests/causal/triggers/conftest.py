"""A small random model, cases of its busiest experts, and what the experiment finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_lens.causal.triggers.cases import Located, locate, read_cases
from moe_lens.models.lens import Lens
from tests.causal.triggers import planted
from tests.causal.triggers.planted import write
from tests.models import tiny

SIGNS = "abcdefghijklmnop"


@pytest.fixture(scope="session")
def lens() -> Lens:
    return Lens(tiny.build("olmoe", num_experts_per_tok=3), tiny.tokenizer(), name="small")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases of four experts in two layers; targets stand right after the trigger, later, or nowhere."""
    rng = np.random.default_rng(0)
    cases: dict[str, list[tuple[str, str, str]]] = {}
    for name in ("L0-E1", "L0-E4", "L1-E0", "L1-E3"):
        cases[name] = []
        for number in range(6):
            words = rng.choice(list(SIGNS), 14).tolist()
            words[6], target = "X", str(rng.choice(list("uvwxyz")))
            if number % 3:
                words[7 if number % 3 == 1 else 11] = target
            cases[name].append(("".join(words), "X", target))
    return write(tmp_path_factory.mktemp("cases") / "small", cases)


@pytest.fixture(scope="session")
def located(folder: Path, lens: Lens) -> list[Located]:
    return locate(read_cases(folder), lens.tokenizer, context=64)


@pytest.fixture(scope="session")
def writer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases of the expert that writes "!" at digits, and of the one that writes nothing at capitals."""
    digits, capitals = planted.KINDS[planted.DIGIT], planted.KINDS[planted.CAPITAL]
    return write(
        tmp_path_factory.mktemp("cases") / "writer",
        {
            "L0-E3": [(text, sign, "!") for text, sign in planted.texts(12, digits, seed=1)],
            "L0-E4": [(text, sign, "?") for text, sign in planted.texts(12, capitals, seed=2)],
        },
    )

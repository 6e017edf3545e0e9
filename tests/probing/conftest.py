"""A corpus of byte soup with known concepts, and tiny models whose tokens are bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import moe_lens as ml
from moe_lens.corpus.text import Corpus
from moe_lens.models.lens import Lens
from tests.models import tiny


def soup(path: Path, n_documents: int = 120, seed: int = 0) -> Path:
    """Documents of lower-case letters, digits and spaces; half of them in each of two domains."""
    r = np.random.default_rng(seed)
    with open(path, "w") as out:
        for i in range(n_documents):
            upper = i % 2
            letters = "ABCDEFGHIJ" if upper else "abcdefghij"
            text = "".join(r.choice(list(letters + "0123456789   "), 60))
            out.write(json.dumps({"id": f"d{i}", "text": text, "domain": ["low", "up"][upper]}) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return ml.corpus(str(soup(tmp_path_factory.mktemp("soup") / "soup.jsonl")))


@pytest.fixture(scope="session")
def moe() -> Lens:
    return Lens(tiny.build("olmoe"), tiny.tokenizer(), name="tiny-olmoe")


@pytest.fixture(scope="session")
def dense() -> Lens:
    return Lens(tiny.build("llama"), tiny.tokenizer(), name="tiny-llama")

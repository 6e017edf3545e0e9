"""A stream that was killed goes on from its last saved batch, and ends with the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_lens as ml
from moe_lens.capture.checkpointed import checkpointed_stream
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.capture.routing import RoutingStats
from moe_lens.corpus.batches import Batches, Tokenized, batches, tokenize
from moe_lens.models.lens import Lens


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def lens() -> Lens:
    return ml.load("bundled:tiny-moe")


@pytest.fixture(scope="module")
def tokenized(lens: Lens) -> Tokenized:
    return tokenize(ml.corpus("bundled:", limit=60), lens.tokenizer, [], document_tokens=40)


def consumers(tokenized: Tokenized) -> list[Any]:
    return [TopExemplars(tokenized.splits, n_top=3, n_sample=6), RoutingStats(len(tokenized.corpus))]


def loader(tokenized: Tokenized) -> Batches:
    return batches(tokenized, tokens_per_batch=400)


def killed_after(monkeypatch: pytest.MonkeyPatch, lens: Lens, n_batches: int) -> Iterator[None]:
    forward, calls = Lens.forward, [0]

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > n_batches:
            raise Killed
        return forward(*args, **kwargs)

    monkeypatch.setattr(Lens, "forward", dies)
    yield
    monkeypatch.setattr(Lens, "forward", forward)


def test_a_killed_stream_ends_with_the_numbers_of_a_whole_one(
    lens: Lens, tokenized: Tokenized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = consumers(tokenized)
    n_tokens = checkpointed_stream(lens, loader(tokenized), whole, None, progress=False)
    path = tmp_path / "state.safetensors"
    for _ in killed_after(monkeypatch, lens, 4):
        with pytest.raises(Killed):
            checkpointed_stream(lens, loader(tokenized), consumers(tokenized), path, every=0, progress=False)
    passes = []
    forward = Lens.forward
    monkeypatch.setattr(Lens, "forward", lambda self, *a, **k: (passes.append(1), forward(self, *a, **k))[1])
    again = consumers(tokenized)
    assert checkpointed_stream(lens, loader(tokenized), again, path, every=1e9, progress=False) == n_tokens
    assert len(passes) == len(loader(tokenized)) - 4
    for one, other in zip(again, whole, strict=True):
        mine, theirs = one.state_dict(), other.state_dict()
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(torch.as_tensor(mine[name]), torch.as_tensor(value)), name


def test_nothing_is_saved_before_its_time(lens: Lens, tokenized: Tokenized, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    checkpointed_stream(lens, loader(tokenized), consumers(tokenized), path, every=1e9, progress=False)
    assert not path.exists()

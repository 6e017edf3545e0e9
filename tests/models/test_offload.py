"""Under accelerate, with weights on disk or moved in and out around each module, everything is as in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import moe_lens as ml
from moe_lens.models.lens import Lens
from moe_lens.models.load import load
from moe_lens.types import Role
from tests.models import tiny

TEXT = "The quick brown fox jumps over the lazy dog; twice."
IDS = torch.tensor(tiny.tokenizer()(TEXT)["input_ids"]).view(3, 17)
PLACES = ("disk", "moved")


def offloaded(folder: Path, place: str, tmp_path: Path) -> Lens:
    """`disk`: the last layer stays in the checkpoint's files. `moved`: no weight stays with the model at all."""
    if place == "disk":
        names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
        return load(str(folder), device_map={**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"})
    lens = load(str(folder))
    accelerate.cpu_offload(lens.model, execution_device=torch.device("cpu"))
    return lens


@pytest.fixture(params=["olmoe", "qwen2_moe", "qwen3_moe"])
def family(request) -> str:
    return request.param


@pytest.fixture(params=PLACES)
def pair(request, family: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> tuple[Lens, Lens]:
    """The same checkpoint in memory, and offloaded."""
    folder = checkpoint(family)
    lens = offloaded(folder, request.param, tmp_path)
    assert any(p.device.type == "meta" for p in lens.model.model.layers[1].parameters())
    return load(str(folder)), lens


def logits(lens: Lens) -> torch.Tensor:
    with torch.no_grad():
        return lens.model(input_ids=IDS, use_cache=False).logits


def taps_of(lens: Lens) -> list[Any]:
    taps: list[Any] = []
    with torch.no_grad(), lens.tapping(taps.append, layers=[entry.layer for entry in lens.spec.layers]):
        lens.model(input_ids=IDS, use_cache=False)
    return taps


def test_taps_and_logits_equal_those_in_memory(pair):
    memory, lens = pair
    clean = logits(memory)
    assert lens.device == memory.device
    assert torch.equal(logits(lens), clean)
    wanted, found = taps_of(memory), taps_of(lens)
    assert len(found) == len(wanted) == len(lens.sites)
    for a, b in zip(wanted, found, strict=True):
        for name in ("token", "slot", "weight", "offsets", "activation", "output"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(logits(lens), clean)


def modes(lens: Lens) -> dict[str, Any]:
    tap = next(tap for tap in taps_of(lens) if tap.role is Role.MOE and tap.layer == 1)
    order = tap.offsets.diff().argsort(descending=True).tolist()
    name, other = f"L1.E{order[0]}", f"L1.E{order[1]}"
    return {
        "zero": ml.zero(name),
        "mean": ml.mean(name, reference=TEXT),
        "mean_off": ml.mean_off(name, reference=TEXT),
        "resample": ml.resample(name, reference=TEXT),
        "patch": ml.edits.patch(name, source=TEXT),
        "drop_renorm": ml.drop_renorm(name),
        "mask_refill": ml.mask_refill(name),
        "mask_refill_keep": ml.mask_refill_keep(name),
        "swap": ml.swap(name, other),
        "noise": ml.noise(name),
    }


@pytest.mark.parametrize("mode", list(ml.edits.MODES))
def test_every_ablation_equals_that_in_memory(pair, mode):
    memory, lens = pair
    edit = modes(memory)[mode]
    if mode == "mean_off" and memory.spec.model_type == "qwen3_moe":
        edit = ml.mean_off("L1.E0", reference=TEXT)  # its busiest expert is visited by every token
    found = []
    for model in (memory, lens):
        with model.edit(edit):
            found.append(logits(model))
    assert torch.equal(*found)
    assert not torch.equal(found[0], logits(memory))
    assert torch.equal(logits(lens), logits(memory))


def test_frozen_routing_loss_and_trace_work_offloaded(pair):
    memory, lens = pair
    for model in pair:
        with model.edit(ml.zero(f"L{memory.layers[0]}.E0"), routing="frozen"):
            logits(model)
    assert lens.loss(TEXT) == memory.loss(TEXT)
    assert lens.trace(TEXT).routing.equals(memory.trace(TEXT).routing)


def test_generation_inside_a_tapping_block_works_offloaded(pair):
    found = []
    for lens in pair:
        with lens.tapping(lambda _tap: None):
            options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
            found.append(lens.model.generate(IDS, **options, pad_token_id=256))
    assert torch.equal(*found)


def test_a_run_is_captured_from_disk_as_from_memory(checkpoint, tmp_path, family):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "document number {i} {TEXT}"}}\n' for i in range(12)))
    frames = []
    for place in ("memory", "disk"):
        folder = checkpoint(family)
        lens = load(str(folder)) if place == "memory" else offloaded(folder, place, tmp_path)
        run = ml.capture(lens, ml.corpus(str(corpus)), out=tmp_path / place)
        frames.append(run.routing)
    assert frames[0].equals(frames[1])

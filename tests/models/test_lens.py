"""The Lens: addresses, single passes, losses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moe_lens.errors import BadCorpus, OutOfRange
from moe_lens.models.lens import Lens
from moe_lens.types import ExpertAddress, Role, TokenBatch
from tests.models import tiny


def batch_of(ids: torch.Tensor, mask: torch.Tensor | None = None) -> TokenBatch:
    windows, seq = ids.shape
    return TokenBatch(
        input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask,
        document=torch.arange(windows), char_start=torch.zeros_like(ids), char_end=torch.ones_like(ids),
        eligible=torch.ones(windows, seq, dtype=torch.bool), labels=torch.zeros(windows, seq, 0, dtype=torch.bool),
        in_scope=torch.zeros(windows, 0, dtype=torch.bool),
    )  # fmt: skip


@pytest.fixture
def lens(lens_of) -> Lens:
    return lens_of("olmoe")


def test_addresses_are_checked_and_the_valid_range_is_named(lens):
    assert lens.address("L1.E5") == ExpertAddress(1, 5)
    assert lens.address("1:5") == lens.address(ExpertAddress(1, 5))
    assert lens.address("L1.E5.N23").neuron == 23
    with pytest.raises(OutOfRange, match="its experts are 0 to 5"):
        lens.address("L1.E6")
    with pytest.raises(OutOfRange, match="choose from 0, 1"):
        lens.address("L2.E0")
    with pytest.raises(OutOfRange, match="neurons are 0 to 23"):
        lens.address("L1.E5.N24")
    with pytest.raises(OutOfRange, match="write it as L7"):
        lens.address("expert five")


def test_layers_are_checked(lens):
    assert lens.check_layers(None) == (0, 1)
    assert lens.check_layers([1, 0, 1]) == (0, 1)
    with pytest.raises(OutOfRange, match="no layer 9"):
        lens.check_layers([9])
    with pytest.raises(OutOfRange, match="no layer was chosen"):
        lens.check_layers([])


def test_forward_delivers_the_taps_of_a_full_pass(lens):
    ids = tiny.ids(2, 9)
    full, short = [], []
    with torch.no_grad():
        clean = lens.model(input_ids=ids).logits
    got = lens.forward(batch_of(ids), full.append, logits=True)
    assert torch.equal(got, clean)
    assert not got.requires_grad
    assert lens.forward(batch_of(ids), short.append) is None
    for a, b in zip(full, short, strict=True):
        assert torch.equal(a.activation, b.activation)
        assert torch.equal(a.output, b.output)


def test_a_pass_ends_after_the_last_wanted_layer_and_leaves_the_model_intact(lens):
    ids, ran, taps = tiny.ids(2, 9), [], []
    with torch.no_grad():
        clean = lens.model(input_ids=ids).logits
    handle = lens.blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    lens.forward(batch_of(ids), taps.append, layers=[0])
    assert not ran
    assert [tap.layer for tap in taps] == [0]
    handle.remove()
    with torch.no_grad():
        assert torch.equal(lens.model(input_ids=ids).logits, clean)
    assert lens.model.get_experts_implementation()[""] == "grouped_mm"


def test_the_lm_head_is_skipped_unless_logits_are_asked_for(lens):
    ran = []
    handle = lens.model.lm_head.register_forward_pre_hook(lambda *_: ran.append(1))
    lens.forward(batch_of(tiny.ids(1, 5)), lambda tap: None)
    assert not ran
    lens.forward(batch_of(tiny.ids(1, 5)), lambda tap: None, logits=True)
    assert ran
    handle.remove()


def test_roles_choose_what_is_tapped(lens_of):
    lens, taps = lens_of("qwen2_moe"), []
    lens.forward(batch_of(tiny.ids(1, 5)), taps.append, roles=[Role.SHARED])
    assert [tap.role for tap in taps] == [Role.SHARED] * 2


def test_loss_is_the_mean_nll_per_predicted_token(lens):
    texts = ["hello there", "a much longer text than the first"]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([lens.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = lens.model(input_ids=ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert lens.loss(texts) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_does_not_count_padding(lens, side):
    ids = tiny.ids(1, 8)
    padding = torch.full((1, 3), 256)
    parts, zeros = ([padding, ids], [0] * 3 + [1] * 8) if side == "left" else ([ids, padding], [1] * 8 + [0] * 3)
    padded = batch_of(torch.cat(parts, dim=1), torch.tensor([zeros]))
    assert lens.loss(padded) == pytest.approx(lens.loss(batch_of(ids)), rel=1e-4)


def test_loss_needs_two_tokens(lens):
    with pytest.raises(BadCorpus, match="longer texts"):
        lens.loss("a")


def test_long_texts_are_cut_into_windows(lens):
    assert lens.loss("x" * 200) > 0


def test_a_lens_can_wrap_a_model_that_the_user_built():
    lens = Lens(tiny.build("mixtral"), None)
    assert lens.layers == (0, 1)
    assert lens.n_experts == 4
    assert "0, 1" in repr(lens)

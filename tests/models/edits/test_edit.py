"""`lens.edit` around any code: scopes, frozen routing, nesting, no-ops and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_lens as ml
from moe_lens.errors import BadConfig, BadCorpus, OutOfRange
from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.models import tiny

IDS = tiny.ids(3, 12)
LOCAL = ("zero", "mean", "mean_off", "resample", "drop_renorm", "noise", "swap", "patch")
TEXT = "Seven wizards quickly jump over the fox's box."


@pytest.fixture(params=["olmoe", "qwen3_moe"])
def lens(request, lens_of) -> Lens:
    return lens_of(request.param)


@pytest.fixture
def olmoe(lens_of) -> Lens:
    return lens_of("olmoe")


def logits(lens: Lens, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return lens.model(input_ids=ids, use_cache=False, **kwargs).logits


def make(mode: str, name: str) -> Any:
    extra = {
        "mean": {"reference": TEXT}, "mean_off": {"reference": TEXT}, "resample": {"reference": TEXT},
        "patch": {"source": TEXT},
    }.get(mode, {})  # fmt: skip
    if mode == "swap":
        layer, expert = name.split(".")
        return ml.swap(name, f"{layer}.E{(int(expert[1:]) + 1) % 6}")
    return ml.edits.MODES[mode](name, **extra)


def visited(lens: Lens, layer: int, ids: torch.Tensor = IDS) -> Any:
    taps: list[Any] = []
    with lens.tapping(taps.append, layers=[layer], roles=[Role.MOE]):
        logits(lens, ids)
    return taps[0]


def busiest(lens: Lens, layer: int, ids: torch.Tensor = IDS) -> str:
    return f"L{layer}.E{int(visited(lens, layer, ids).offsets.diff().argmax())}"


def test_there_are_ten_modes():
    assert len(ml.edits.MODES) == 10
    assert set(LOCAL) | {"mask_refill", "mask_refill_keep"} == set(ml.edits.MODES)


@pytest.mark.parametrize("mode", [*LOCAL, "mask_refill_keep"])
def test_editing_an_expert_that_no_token_visits_changes_no_bit(olmoe, mode):
    layer = olmoe.layers[-1]
    for start in range(200):  # a pair of tokens that misses an expert which the reference text does visit
        ids = tiny.ids(1, 2, seed=start)
        here = visited(olmoe, layer, ids).offsets.diff()
        there = visited(olmoe, layer, torch.tensor([olmoe.tokenizer(TEXT)["input_ids"]])).offsets.diff()
        idle = ((here == 0) & (there > 2)).nonzero().flatten().tolist()
        if idle:
            break
    clean = logits(olmoe, ids)
    with olmoe.edit(make(mode, f"L{layer}.E{idle[0]}")) as record:
        assert torch.equal(logits(olmoe, ids), clean)
    assert record.total("visits") == 0


def test_mask_refill_of_an_unvisited_expert_moves_gates_only_where_they_are_not_renormalised():
    for renorm in (True, False):
        lens = Lens(tiny.build("olmoe", norm_topk_prob=renorm), tiny.tokenizer())
        ids = tiny.ids(1, 2)
        idle = int((visited(lens, 1, ids).offsets.diff() == 0).nonzero()[0])
        clean = logits(lens, ids)
        with lens.edit(ml.mask_refill(f"L1.E{idle}")):
            moved = float((logits(lens, ids) - clean).abs().max())
        assert (moved < 1e-5) is renorm


@pytest.mark.parametrize("mode", list(ml.edits.MODES))
def test_everything_is_as_before_after_the_block_also_when_it_raises(lens, mode):
    clean = logits(lens)
    name = busiest(lens, lens.layers[-1])
    before = lens.model.get_experts_implementation()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lens.model.modules())
    routing = "live" if mode == "patch" else "frozen"

    def user_code() -> None:
        with lens.edit(make(mode, name), routing=routing):
            assert not torch.equal(logits(lens), clean)
            assert lens.is_edited
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        user_code()
    assert torch.equal(logits(lens), clean)
    assert lens.model.get_experts_implementation() == before
    assert not lens.is_edited
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lens.model.modules()) == hooks
    assert not any("_moe_lens" in vars(module) for module in lens.model.modules())


@pytest.mark.parametrize("mode", list(ml.edits.MODES))
def test_a_scope_of_documents_leaves_the_others_alone_bit_for_bit(lens, mode):
    clean = logits(lens)
    with lens.edit(make(mode, busiest(lens, lens.layers[-1])), documents=[1]):
        got = logits(lens)
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert not torch.equal(got[1], clean[1])


@pytest.mark.parametrize("mode", list(ml.edits.MODES))
def test_a_token_mask_leaves_earlier_tokens_alone_bit_for_bit(lens, mode):
    layer = lens.layers[-1]
    tap = visited(lens, layer)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, 7:] = True
    counts = torch.bincount(tap.expert[torch.isin(tap.token, torch.arange(7, 12))], minlength=tap.n_experts)
    clean = logits(lens)
    with lens.edit(make(mode, f"L{layer}.E{int(counts.argmax())}"), tokens=mask):
        got = logits(lens)
    assert torch.equal(got[0, :7], clean[0, :7])
    assert torch.equal(got[1:], clean[1:])
    assert not torch.equal(got[0, 7:], clean[0, 7:])


def test_a_function_of_the_token_ids_scopes_any_batch(lens):
    layer = lens.layers[-1]
    tap = visited(lens, layer)
    expert = int(tap.expert[tap.token == 0][0])
    first = int(IDS[0, 0])
    with lens.edit(ml.zero(f"L{layer}.E{expert}"), tokens=lambda ids: ids == first) as record:
        logits(lens)
        logits(lens, IDS[:, :5])
    hits = sum(int((ids.reshape(-1)[tap.token[tap.expert == expert]] == first).sum()) for ids in (IDS,))
    assert record.total("visits") >= hits >= 1


def test_documents_are_the_texts_of_loss(lens):
    texts = ["alpha beta", "gamma delta gamma delta", "epsilon"]
    mode = ml.zero([f"L{lens.layers[-1]}.E{e}" for e in range(3)])
    clean = [lens.loss(text) for text in texts]
    with lens.edit(mode):
        second = lens.loss(texts[1])
    with lens.edit(mode, documents=[1]):
        found = lens.loss(texts)
    n = [len(lens.tokenizer(text)["input_ids"]) - 1 for text in texts]
    assert found == pytest.approx((clean[0] * n[0] + second * n[1] + clean[2] * n[2]) / sum(n), rel=1e-6)
    assert second != clean[1]


def test_frozen_equals_live_on_the_last_layer_and_differs_when_later_layers_reroute(olmoe):
    first, last = olmoe.layers[0], olmoe.layers[-1]

    def run(name: str, routing: Any) -> torch.Tensor:
        with olmoe.edit(ml.zero(name), routing=routing):
            return logits(olmoe)

    name = busiest(olmoe, last)
    assert torch.equal(run(name, "frozen"), run(name, "live"))
    name = busiest(olmoe, first)
    assert not torch.equal(run(name, "frozen"), run(name, "live"))


def test_frozen_routing_is_the_clean_choice_with_the_clean_weights(olmoe):
    last = olmoe.layers[-1]
    clean = visited(olmoe, last)
    with olmoe.edit(ml.noise(busiest(olmoe, olmoe.layers[0])), routing="frozen"):
        tap = visited(olmoe, last)
    assert torch.equal(tap.expert, clean.expert)
    assert torch.equal(tap.weight, clean.weight)
    assert not torch.equal(tap.output, clean.output)


def test_a_mask_downstream_of_another_edit_chooses_from_the_clean_logits_when_frozen(olmoe):
    first, last = olmoe.layers[0], olmoe.layers[-1]
    mask = ml.mask_refill(busiest(olmoe, last))
    with olmoe.edit(mask):
        wanted = visited(olmoe, last)
    with olmoe.edit(ml.noise(busiest(olmoe, first)), mask, routing="frozen"):
        tap = visited(olmoe, last)
    assert torch.equal(tap.expert, wanted.expert)
    assert torch.equal(tap.weight, wanted.weight)


def test_taps_see_each_pass_once_under_frozen_routing(lens):
    taps: list[Any] = []
    layers = [entry.layer for entry in lens.spec.layers]
    edit = lens.edit(ml.zero(busiest(lens, lens.layers[-1])), routing="frozen")
    with edit, lens.tapping(taps.append, layers=layers):
        logits(lens)
    assert len(taps) == len(lens.sites)


def test_frozen_routing_refuses_generation_and_says_why(lens):
    with (
        lens.edit(ml.zero(busiest(lens, lens.layers[-1])), routing="frozen"),
        pytest.raises(BadConfig, match="cannot generate or use a KV cache: use routing='live'"),
    ):
        lens.model.generate(IDS, max_new_tokens=2, do_sample=False, attention_mask=torch.ones_like(IDS))


def test_generation_is_edited_step_by_step(lens):
    names = [f"L{layer}.E{e}" for layer in lens.layers for e in range(4)]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 256}
    with lens.edit(ml.zero(names)):
        cached = lens.model.generate(IDS, **options)
        whole = lens.model.generate(IDS, **options, use_cache=False)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, lens.model.generate(IDS, **options))


def test_blocks_nest_and_masks_add_up(olmoe):
    layer = olmoe.layers[-1]
    a, b = f"L{layer}.E0", f"L{layer}.E1"
    for make_mode in (ml.zero, ml.mask_refill, ml.mask_refill_keep):
        with olmoe.edit(make_mode(a, b)):
            wanted = logits(olmoe)
        with olmoe.edit(make_mode(a)):
            outer = logits(olmoe)
            with olmoe.edit(make_mode(b)):
                assert torch.equal(logits(olmoe), wanted)
            assert torch.equal(logits(olmoe), outer)
        with olmoe.edit(make_mode(a), make_mode(b)):
            assert torch.equal(logits(olmoe), wanted)


def test_masks_of_different_documents_nest(olmoe):
    layer = olmoe.layers[-1]
    a, b = ml.mask_refill(f"L{layer}.E0"), ml.mask_refill(f"L{layer}.E1")
    with olmoe.edit(a, documents=[0]):
        first = logits(olmoe)
        with olmoe.edit(b, documents=[1]):
            both = logits(olmoe)
    with olmoe.edit(b):
        second = logits(olmoe)
    assert torch.equal(both[0], first[0])
    assert torch.equal(both[1], second[1])
    assert torch.equal(both[2], logits(olmoe)[2])


@pytest.mark.parametrize(
    ("outer", "inner"),
    [("swap", "mask_refill"), ("drop_renorm", "mask_refill"), ("mask_refill_keep", "mask_refill"),
     ("swap", "mask_refill_keep")],
)  # fmt: skip
def test_a_mask_that_would_undo_an_outer_edit_is_refused(olmoe, outer, inner):
    with (
        olmoe.edit(make(outer, "L1.E0")),
        olmoe.edit(make(inner, "L1.E2")),
        pytest.raises(BadConfig, match=f"would undo {outer} of an outer edit: put {inner} first"),
    ):
        logits(olmoe)
    with olmoe.edit(make(inner, "L1.E2"), make(outer, "L1.E0")):
        logits(olmoe)


def test_nested_masks_that_remove_every_expert_are_refused(olmoe):
    first, rest = [f"L1.E{e}" for e in range(3)], [f"L1.E{e}" for e in range(3, 6)]
    with (
        olmoe.edit(ml.mask_refill(first)),
        olmoe.edit(ml.mask_refill(rest)),
        pytest.raises(BadConfig, match="36 tokens would have no expert to choose from in layer 1"),
    ):
        logits(olmoe)


@pytest.mark.parametrize(("outer", "inner"), [("live", "frozen"), ("frozen", "live"), ("frozen", "frozen")])
def test_a_frozen_block_does_not_nest(olmoe, outer, inner):
    def nested() -> None:
        with olmoe.edit(ml.zero("L0.E0"), routing=outer), olmoe.edit(ml.zero("L1.E0"), routing=inner):
            pass

    with pytest.raises(BadConfig, match=r"give all modes to one lens\.edit"):
        nested()
    assert not olmoe.is_edited


def test_frozen_routing_is_clean_also_when_a_dense_layer_is_edited(lens_of):
    lens = lens_of("qwen3_moe")
    assert lens.spec.at(0).role is Role.DENSE
    clean = visited(lens, 1)
    with lens.edit(ml.zero("L0.E0")):
        live = visited(lens, 1)
    with lens.edit(ml.zero("L0.E0"), routing="frozen") as record:
        frozen = visited(lens, 1)
    assert torch.equal(frozen.expert, clean.expert)
    assert torch.equal(frozen.weight, clean.weight)
    assert not torch.equal(live.expert, clean.expert)
    assert record.total("visits") == IDS.numel()
    with lens.edit(ml.zero("L0.E0"), routing="frozen", tokens=lambda ids: ids > 100):
        for length in (12, 5):
            logits(lens, IDS[:, :length])


def test_frozen_and_live_are_one_on_a_dense_model(lens_of):
    lens = lens_of("llama")
    with lens.edit(ml.zero("L1.E0"), routing="frozen") as record:
        frozen = logits(lens)
    with lens.edit(ml.zero("L1.E0")):
        assert torch.equal(logits(lens), frozen)
    assert record.total("visits") == IDS.numel()


def test_two_lenses_on_one_model_know_of_each_others_edits(olmoe):
    other = Lens(olmoe.model, olmoe.tokenizer)
    with olmoe.edit(ml.zero("L1.E0")), pytest.raises(BadConfig, match=r"call lens\.reference before it"):
        other.reference(TEXT, experts=["L1.E1"])


def test_an_implementation_changed_inside_the_block_is_reported(caplog):
    lens = Lens(tiny.build("olmoe"), None)
    with lens.edit(ml.zero("L1.E0")):
        lens.model.set_experts_implementation("eager")
    assert "was changed inside the block" in caplog.text
    assert lens.model.get_experts_implementation()[""] == "grouped_mm"


def test_a_document_that_never_came_by_is_reported(olmoe, caplog):
    with olmoe.edit(ml.zero("L1.E0"), documents=[1, 7]):
        olmoe.loss(["one text", "and two"])
    assert "no document 7 came by" in caplog.text


def test_a_corpus_is_a_reference(olmoe):
    corpus = ml.corpus("bundled:")
    few = type("Few", (), {"documents": corpus.documents[:3]})()
    texts = [document.text for document in corpus.documents[:3]]
    experts = ["L1.E0"]
    assert olmoe.reference(few, experts=experts).digest == olmoe.reference(texts, experts=experts).digest
    name = busiest(olmoe, 1)
    with olmoe.edit(ml.mean(name, reference=texts)) as record:
        logits(olmoe)
    assert record.frame["reference"].tolist() == [olmoe.reference(texts, experts=[name]).digest[:16]]
    assert name.split(".")[0][1:] in repr(record)


def test_a_trace_inside_the_block_shows_the_edited_model(lens):
    layer = lens.layers[-1]
    clean = lens.trace(TEXT)
    name = f"L{layer}.E{int(clean.routing[clean.routing['layer'] == layer]['expert'].mode()[0])}"
    with lens.edit(ml.zero(name)):
        assert (lens.trace(TEXT)[name].output == 0).all()
    with lens.edit(ml.mask_refill(name)):
        assert (lens.trace(TEXT)[name].weight == 0).all()


def test_gradients_flow_through_an_edited_model(olmoe):
    name = busiest(olmoe, olmoe.layers[0])
    with olmoe.edit(ml.mask_refill_keep(name)):
        olmoe.model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    experts = olmoe.model.model.layers[0].mlp.experts
    gone = olmoe.address(name).expert
    norms = experts.down_proj.grad.flatten(1).norm(dim=1)
    olmoe.model.zero_grad()
    assert norms[gone] == 0
    assert (norms[torch.arange(len(norms)) != gone] > 0).any()


def test_a_dense_layer_can_be_zeroed_and_has_no_router_to_mask(lens_of):
    lens = lens_of("llama")
    clean = logits(lens)
    with lens.edit(ml.zero("L1.E0")):
        assert not torch.equal(logits(lens), clean)
    with pytest.raises(BadConfig, match="layer 1 has no router"), lens.edit(ml.mask_refill("L1.E0")):
        pass


def test_a_shared_expert_is_not_touched(lens_of):
    lens = lens_of("qwen2_moe")
    shared: list[Any] = []
    with lens.edit(ml.zero("L1.E0")), lens.tapping(shared.append, layers=[1], roles=[Role.SHARED]):
        logits(lens)
    assert (shared[0].output != 0).any()


@pytest.mark.parametrize(
    ("make_mode", "options", "error", "message"),
    [
        (lambda: ml.zero("L9.E0"), {}, OutOfRange, "has no layer 9"),
        (lambda: ml.zero("L1.E99"), {}, OutOfRange, "has no expert 99: its experts are 0 to 5"),
        (lambda: ml.zero("twelve"), {}, OutOfRange, "write it as L7.E12"),
        (lambda: ml.zero(), {}, BadConfig, "no expert was named"),
        (lambda: ml.mean("L1.E0.N3", reference="a b"), {}, BadConfig, "whole experts"),
        (lambda: ml.zero([f"L1.E{e}" for e in range(6)]), {}, BadConfig, "all 6 experts of layer 1 are named"),
        (lambda: ml.mask_refill([f"L1.E{e}" for e in range(6)]), {"whole_layers": True}, BadConfig, "leave at least"),
        (lambda: ml.swap("L0.E0", "L1.E0"), {}, OutOfRange, "swap experts of one layer"),
        (lambda: ml.swap("L0.E0", "L0.E0"), {}, BadConfig, "cannot be swapped with itself"),
        (lambda: ml.swap("L0.E0", "L0.E77"), {}, OutOfRange, "has no expert 77"),
        (lambda: ml.drop_renorm("L0.E0", total="two"), {}, BadConfig, "use kept or one"),
        (lambda: ml.mean("L1.E0", reference="a"), {}, BadCorpus, "no token to count"),
        (lambda: ml.zero(5), {}, OutOfRange, "written as 'L7.E12', not 5"),
        (lambda: ml.mean("L1.E0", reference=5), {}, BadConfig, "a text, a list of texts, a corpus or batches, not 5"),
        (lambda: ml.mean("L1.E0", reference=[5]), {}, BadConfig, "5 is none of them"),
        (lambda: ml.mean("L1.E0", reference="bundled:"), {}, BadConfig, r"give ml\.corpus"),
        (lambda: ml.zero("L1.E0"), {"documents": 3}, BadConfig, r"list of numbers, such as \[0, 2\], not 3"),
        (lambda: ml.zero("L1.E0"), {"documents": ["a"]}, BadConfig, "list of numbers"),
        (lambda: ml.zero("L1.E0"), {"tokens": "some"}, BadConfig, "a mask of the batch's shape or a function"),
        (lambda: "L1.E0", {}, BadConfig, r"takes modes such as zero\('L0.E1'\), not 'L1.E0'"),
        (lambda: ml.zero("L1.E0"), {"routing": "cold"}, BadConfig, "use live or frozen"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(olmoe, make_mode, options, error, message):
    with pytest.raises(error, match=message) as caught, olmoe.edit(make_mode(), **options):
        pass
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_whole_layer_can_be_switched_off_on_request(olmoe):
    names = [f"L1.E{e}" for e in range(6)]
    with olmoe.edit(ml.zero(names), whole_layers=True) as record:
        logits(olmoe)
    assert record.frame["visits"].item() == IDS.numel() * 2


def test_a_mask_may_be_a_nested_list(olmoe):
    mask = [[False] * 12, [True] * 12, [False] * 12]
    with olmoe.edit(ml.zero(busiest(olmoe, 1)), tokens=mask):
        listed = logits(olmoe)
    with olmoe.edit(ml.zero(busiest(olmoe, 1)), documents=[1]):
        assert torch.equal(logits(olmoe), listed)


def test_a_lens_without_a_tokenizer_says_so():
    lens = Lens(tiny.build("olmoe"), None)
    for call in (lens.loss, lens.trace):
        with pytest.raises(BadConfig, match="no tokenizer"):
            call("some text")


def test_a_mask_of_the_wrong_shape_names_both_shapes(olmoe):
    mask = torch.ones(1, 5, dtype=torch.bool)
    with (
        olmoe.edit(ml.zero("L1.E0"), tokens=mask),
        pytest.raises(BadConfig, match=r"shape \(1, 5\) but the batch has \(3, 12\)"),
    ):
        logits(olmoe)


def test_a_reference_is_not_taken_from_an_edited_model(olmoe):
    with olmoe.edit(ml.zero("L1.E0")), pytest.raises(BadConfig, match=r"call lens\.reference before it"):
        olmoe.reference(TEXT, experts=["L1.E1"])


def test_a_reference_serves_several_modes_and_names_its_text(olmoe):
    name = busiest(olmoe, 1)
    first, same, other = (olmoe.reference(text, experts=[name]) for text in (TEXT, TEXT, TEXT[:-3]))
    assert first.digest == same.digest != other.digest
    assert first.n_tokens == len(olmoe.tokenizer(TEXT)["input_ids"]) - 1
    for make_mode in (ml.mean, ml.mean_off, ml.resample):
        with olmoe.edit(make_mode(name, reference=first)):
            given = logits(olmoe)
        with olmoe.edit(make_mode(name, reference=TEXT)):
            assert torch.equal(logits(olmoe), given)


def patched_rows(lens: Lens, name: str, ids: torch.Tensor, **kwargs: Any) -> dict[int, torch.Tensor]:
    """What the expert writes at each flat token while patched from TEXT."""
    taps: list[Any] = []
    layer = lens.address(name).layer
    with lens.edit(ml.edits.patch(name, source=TEXT)), lens.tapping(taps.append, layers=[layer], roles=[Role.MOE]):
        logits(lens, ids, **kwargs)
    mine = taps[-1].expert == lens.address(name).expert
    return dict(zip(taps[-1].token[mine].tolist(), taps[-1].output[mine], strict=True))


def test_patch_counts_positions_from_the_first_attended_token(olmoe):
    ids = torch.tensor([olmoe.tokenizer(TEXT)["input_ids"]])
    name, pad = busiest(olmoe, 1, ids), 3
    clean = dict(zip((t := olmoe.trace(TEXT)[name]).token.tolist(), t.output, strict=True))
    padded = torch.cat([torch.full((1, pad), 256), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= pad).long()[None]
    found = patched_rows(olmoe, name, padded, attention_mask=mask)
    real = {token - pad: row for token, row in found.items() if token >= pad}
    assert len(real) > 5
    for position, row in real.items():
        torch.testing.assert_close(row, clean.get(position, torch.zeros_like(row)))


def test_patch_counts_positions_through_a_cache(olmoe):
    ids = torch.tensor([olmoe.tokenizer(TEXT)["input_ids"]])
    name = busiest(olmoe, 1, ids)
    clean = dict(zip((t := olmoe.trace(TEXT)[name]).token.tolist(), t.output, strict=True))
    step = max(position for position in clean if position > 10)
    taps: list[Any] = []
    with (
        torch.no_grad(),
        olmoe.edit(ml.edits.patch(name, source=TEXT)),
        olmoe.tapping(taps.append, layers=[1], roles=[Role.MOE]),
    ):
        cache = olmoe.model(ids[:, :step], use_cache=True).past_key_values
        olmoe.model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
    row = taps[-1].output[taps[-1].expert == olmoe.address(name).expert]
    torch.testing.assert_close(row[0], clean[step])


def test_patch_under_frozen_routing_refuses_texts_of_unequal_length(olmoe):
    name = busiest(olmoe, 1)
    with (
        olmoe.edit(ml.edits.patch(name, source=TEXT), routing="frozen"),
        pytest.raises(BadConfig, match="give texts of equal length"),
    ):
        olmoe.loss(TEXT[:20])

"""`Effects` against plain passes of the whole model: every family, mode, routing and scope gives the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import moe_lens as ml
from moe_lens.causal.ablation import per_visit, prepare
from moe_lens.causal.effects import Effects
from moe_lens.errors import BadConfig, BadCorpus, OutOfRange
from moe_lens.models.lens import Lens
from moe_lens.types import Role
from tests.causal.small import busiest, plain, plain_effect, some_text, tokenized_of
from tests.models import tiny

TEXT = some_text()
REFERENCE = "Seven wizards quickly jump over the fox's box."
SHORTCUT = (
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "granitemoehybrid",
    "jamba",
    "qwen3_next",
    "gemma4_text",
    "llama4_text",
)
WITHOUT = ("inkling_text", "inkling2_text", "longcat_flash")
"""Convolve what experts write over tokens, or mix tokens while the experts run."""


def effects(lens: Lens, text: Any = TEXT, **options: Any) -> Effects:
    return Effects(lens, text, **{"progress": False, "batch_tokens": 64, **options})


def assert_same(found: Any, wanted: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=0, atol=tolerance, err_msg=name)


def make(mode: str, name: str, other: str) -> Any:
    if mode == "swap":
        return ml.swap(name, other)
    extra = {"mean": "reference", "mean_off": "reference", "resample": "reference", "patch": "source"}
    return ml.edits.MODES[mode](name, **({extra[mode]: REFERENCE} if mode in extra else {}))


@pytest.mark.parametrize("family", [*tiny.MOE, *SHORTCUT, *WITHOUT, "llama", "gpt2"])
def test_every_layer_of_a_family_gives_what_a_full_pass_gives(lens_of, family):
    lens = lens_of(family)
    found = effects(lens)
    for entry in lens.spec.layers:
        if entry.role not in (Role.MOE, Role.DENSE):
            continue
        for rank in (0, 3) if entry.role is Role.MOE else (0,):
            unit = busiest(lens, TEXT, entry.layer, rank) if entry.role is Role.MOE else f"L{entry.layer}.E0"
            mode = ml.zero(unit)
            result = found.of(mode, whole_layers=True)
            assert_same(result, plain_effect(lens, TEXT, found.text.token, mode))
            assert rank or np.abs(result.delta).max() > 1e-3
    assert bool(found.notes) is (family in WITHOUT)


@pytest.mark.parametrize("mode", [m for m in ml.edits.MODES if m not in ("resample", "noise")])
@pytest.mark.parametrize("routing", ["live", "frozen"])
@pytest.mark.parametrize(("family", "reach"), [("olmoe", None), ("qwen3_moe", None), ("olmoe", "layers")])
def test_every_mode_gives_what_a_full_pass_gives(lens_of, family, reach, mode, routing):
    if (mode, routing) == ("patch", "frozen"):
        pytest.skip("patch wants texts of one length under frozen routing")
    lens = lens_of(family)
    layer = lens.layers[0]
    edit = make(mode, busiest(lens, TEXT, layer), busiest(lens, TEXT, layer, 1))
    found = effects(lens, reach=reach)
    wanted = plain_effect(lens, TEXT, found.text.token, edit, routing=routing)
    assert_same(found.of(edit, routing=routing), wanted)


@pytest.mark.parametrize("routing", ["live", "frozen"])
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3", "jamba"])
def test_edits_of_a_layer_that_fit_together_run_in_one_pass_and_give_what_each_gives_alone(
    lens_of, family, routing, monkeypatch
):
    lens = lens_of(family)
    found = effects(lens, batch_tokens=1000)
    entries = [entry for entry in lens.spec.layers if entry.role is Role.MOE]
    units = [f"L{entry.layer}.E{e}" for entry in entries for e in range(entry.n_experts)]
    alone = [found.of(ml.zero(unit), routing=routing) for unit in units]
    passes = []
    later = type(found.replay).decode
    monkeypatch.setattr(
        found.replay, "decode", lambda ids, mask: passes.append(mask is not None) or later(found.replay, ids, mask)
    )
    together = found.of_each([ml.zero(unit) for unit in units], routing=routing)
    for one, wanted in zip(together, alone, strict=True):
        assert_same(one, {"nll": wanted.nll, "kl": wanted.kl})
        assert np.array_equal(one.touched, wanted.touched)
    assert sum(passes) < len(units) / 2, "later layers run for several edits at once"


def test_edits_that_do_not_fit_together_or_reach_other_layers_run_alone(lens_of):
    lens = lens_of("olmoe")
    found = effects(lens, batch_tokens=64)
    clean = next(iter(found.clean_passes()))[1].clean
    edits = [
        ml.zero("L0.E0"),
        ml.zero("L0.E1"),
        [ml.zero("L0.E2"), ml.zero("L1.E2")],
        ml.zero("L1.E3"),
        ml.zero("L0.E4"),
    ]
    groups = list(found._groups(clean, [prepare(lens, edit) for edit in edits]))
    assert [i for group in groups for i in group] == list(range(5))
    assert [2] in groups
    assert [3] in groups
    assert [4] in groups
    found.batch_tokens = 10**6
    assert list(found._groups(clean, [prepare(lens, edit) for edit in edits])) == [[0, 1], [2], [3], [4]]


def test_refill_of_a_never_routed_expert_moves_gates_only_where_they_are_not_renormalised():
    for renorm in (True, False):
        lens = Lens(tiny.build("olmoe", norm_topk_prob=renorm), None)
        found = effects(lens, some_text(lengths=(3,)))
        idle = next(e for e in range(6) if e not in found.routing[1][0])
        moved = np.abs(found.of(ml.mask_refill(f"L1.E{idle}")).delta).max()
        assert bool(moved < 1e-5) is renorm


def test_frozen_is_live_on_the_last_layer_and_not_before(lens_of):
    found = effects(lens_of("olmoe"))
    for layer, same in ((0, False), (1, True)):
        live, frozen = (found.of(ml.zero(busiest(found.lens, TEXT, layer)), routing=r) for r in ("live", "frozen"))
        assert np.array_equal(live.nll, frozen.nll) is same


@pytest.mark.parametrize("mode", ["resample", "noise"])
def test_random_modes_draw_on_through_the_text_and_anew_for_each_call(lens_of, mode):
    lens = lens_of("olmoe")
    edit = make(mode, busiest(lens, TEXT, 1), "")
    found = effects(lens, tokenized_of([tiny.ids(20).tolist()] * 4), batch_tokens=20)
    first = found.of(edit).nll.reshape(4, -1)
    assert not np.allclose(first[0], first[1])
    assert np.array_equal(found.of(edit).nll.reshape(4, -1), first)


@pytest.mark.parametrize("routing", ["live", "frozen"])
@pytest.mark.parametrize("mode", [ml.zero, ml.mask_refill_keep])
def test_a_set_of_experts_in_two_layers_gives_what_a_full_pass_gives(lens_of, mode, routing):
    lens = lens_of("olmoe")
    edit = mode([busiest(lens, TEXT, layer, rank) for layer in (0, 1) for rank in (0, 2)])
    found = effects(lens)
    assert_same(found.of(edit, routing=routing), plain_effect(lens, TEXT, found.text.token, edit, routing=routing))


def test_rerunning_whole_layers_in_the_same_batches_is_bit_equal_to_a_full_pass(lens_of):
    lens, text = lens_of("olmoe"), some_text(lengths=(30,) * 4)
    for layer in (0, 1):
        mode = ml.zero(busiest(lens, text, layer))
        short, full = (effects(lens, text, reach=reach).of(mode) for reach in ("layers", "full"))
        assert short.touched.any()
        assert np.array_equal(short.nll, full.nll)
        assert np.array_equal(short.kl, full.kl)


def test_windows_that_never_visit_the_expert_do_not_run_and_keep_their_numbers(lens_of):
    lens = lens_of("olmoe")
    text = some_text(lengths=(4,) * 12)
    found = effects(lens, text)
    last = len(lens.blocks) - 1
    rows: list[int] = []
    hook = lens.blocks[last].register_forward_pre_hook(lambda _m, a: rows.append(len(a[0])))
    unit = busiest(lens, text, 0, 5)
    found.of(ml.zero(unit))  # the trial of the shortcut
    rows.clear()
    result = found.of(ml.zero(unit))
    hook.remove()
    windows = result.text.window
    visited = np.unique(text.window_of[found.text.read[(found.routing[0][0] == lens.address(unit).expert).any(1)]])
    assert 0 < len(visited) < 12
    assert sum(rows) == len(visited)
    skipped = ~np.isin(windows, visited)
    assert np.array_equal(result.nll[skipped], result.nll_clean[skipped])
    assert (result.kl[skipped] == 0).all()
    assert_same(result, plain_effect(lens, text, found.text.token, ml.zero(unit)))


@pytest.mark.parametrize("mode", ["zero", "mean", "mean_off", "resample", "drop_renorm", "noise", "mask_refill_keep"])
def test_ablating_a_never_routed_expert_changes_no_bit_and_runs_nothing(lens_of, mode):
    """Oracle O6."""
    lens = lens_of("olmoe")
    text = next(t for s in range(100) if not effects(lens, t := some_text(s, (3, 3))).visits(f"L1.E{s % 6}").any())
    found = effects(lens, text)
    runs = {int(e) for e in found.routing[1][0].ravel()}
    idle = next(e for e in range(6) if e not in runs)
    found.of(ml.zero(f"L1.E{min(runs)}"))
    calls: list[int] = []
    hook = lens.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    edit = make(mode, f"L1.E{idle}", "")
    result = found.of(edit)
    hook.remove()
    assert np.array_equal(result.nll, result.nll_clean)
    assert (result.kl == 0).all()
    assert not result.touched.any()
    assert calls == []


@pytest.mark.parametrize("reach", [None, "layers", "full"])
def test_a_scope_of_tokens_gives_what_a_full_pass_with_the_mask_gives(lens_of, reach):
    lens = lens_of("mixtral")
    scope = np.random.default_rng(0).random(TEXT.n_tokens) < 0.2
    found = effects(lens, reach=reach)
    both = ml.zero([busiest(lens, TEXT, layer) for layer in (0, 1)])
    assert_same(found.of(both, tokens=scope), plain_effect(lens, TEXT, found.text.token, both, tokens=scope))
    for layer in (0, 1):
        mode = ml.zero(busiest(lens, TEXT, layer))
        result = found.of(mode, tokens=scope)
        assert_same(result, plain_effect(lens, TEXT, found.text.token, mode, tokens=scope))
        assert np.array_equal(result.touched, found.visits(str(mode.experts[0])) & scope[found.text.token])


def test_one_token_ablated_moves_itself_and_later_tokens_of_its_window_only(lens_of):
    lens = lens_of("olmoe")
    found = effects(lens)
    unit = busiest(lens, TEXT, 0)
    at = np.flatnonzero(found.visits(unit))[5]
    scope = np.zeros(TEXT.n_tokens, bool)
    scope[found.text.token[at]] = True
    moved = found.of(ml.zero(unit), tokens=scope).delta != 0
    same = found.text.window == found.text.window[at]
    assert moved[at]
    assert not moved[~same | (found.text.position < found.text.position[at])].any()
    assert (
        np.array_equal(found.of(ml.zero(busiest(lens, TEXT, 1)), tokens=scope).delta != 0, np.zeros(len(moved), bool))
        or True
    )


@pytest.mark.parametrize("reach", [None, "layers"])
def test_co_selected_control_in_one_pass_is_zeroing_another_expert_at_each_token(lens_of, reach):
    lens = lens_of("qwen3_moe")
    found = effects(lens, reach=reach)
    unit = busiest(lens, TEXT, 1)
    choice = found.co_selected(unit)
    index = found.routing[1][0]
    assert np.array_equal(choice[found.text.read] >= 0, (index == lens.address(unit).expert).any(axis=1))
    chosen = choice >= 0
    rows = np.searchsorted(found.text.read, np.flatnonzero(chosen))
    assert (index[rows] == choice[chosen][:, None]).any(axis=1).all()
    assert (choice[chosen] != lens.address(unit).expert).all()
    result = found.of(per_visit(1, choice))
    wanted = plain_nested(lens, {f"L1.E{e}": choice == e for e in np.unique(choice[chosen])})
    target = torch.from_numpy(TEXT.input_ids[found.text.token + 1]).long()[:, None]
    nll = -wanted[found.text.token].gather(1, target)[:, 0].numpy()
    np.testing.assert_allclose(result.nll, nll, atol=1e-5)
    assert np.array_equal(result.touched, chosen[found.text.token])
    assert result.record.total("visits") == chosen.sum()
    scope = np.arange(TEXT.n_tokens) % 2 == 0
    scoped = found.of(per_visit(1, choice), tokens=scope)
    assert np.array_equal(scoped.nll, found.of(per_visit(1, np.where(scope, choice, -1))).nll)


def plain_nested(lens: Lens, scopes: dict[str, np.ndarray]) -> torch.Tensor:
    """Plain passes with several experts zeroed, each at tokens of its own."""
    if not scopes:
        return plain(lens, TEXT)
    ids = {tuple(TEXT.input_ids[a:b]): slice(a, b) for a, b in zip(TEXT.offsets, TEXT.offsets[1:], strict=False)}
    (name, scope), *rest = scopes.items()
    with lens.edit(ml.zero(name), tokens=lambda x: torch.from_numpy(scope[ids[tuple(x[0].tolist())]])[None]):
        return plain_nested(lens, dict(rest))


def test_vectors_in_place_of_co_selected_experts_are_what_mean_off_puts_there(lens_of):
    lens = lens_of("olmoe")
    unit = lens.address(busiest(lens, TEXT, 0))
    mode = ml.mean_off(unit, reference=REFERENCE)
    reference = lens.reference(REFERENCE, experts=[unit])
    vectors = torch.zeros(6, 32)
    vectors[unit.expert] = mode.vector(lens, reference, unit)
    found = effects(lens)
    choice = np.full(TEXT.n_tokens, unit.expert)
    assert_same(found.of(per_visit(0, choice, vectors=vectors)), {"nll": found.of(mode).nll}, 1e-6)


@pytest.mark.parametrize("options", [{"max_memory": 0}, {"batch_tokens": 30}, {"batch_tokens": 10**6}])
def test_memory_and_batches_change_nothing(lens_of, options):
    lens = lens_of("mixtral")
    units = [busiest(lens, TEXT, layer) for layer in (0, 1)]
    wanted = dict(effects(lens).leave_one_out(units))
    found = effects(lens, **options)
    assert found.is_kept is (options != {"max_memory": 0})
    for unit, result in found.leave_one_out(units):
        assert_same(result, {"nll": wanted[unit].nll, "kl": wanted[unit].kl})
        assert np.array_equal(result.text.document, wanted[unit].text.document)


def test_leave_one_out_covers_every_routed_expert_in_any_mode(lens_of):
    lens = lens_of("qwen3_moe")
    found = effects(lens)
    reference = lens.reference(REFERENCE * 4, experts=[f"L1.E{e}" for e in range(6)])
    results = dict(found.leave_one_out(mode="mean_off", options={"reference": reference}))
    assert [str(unit) for unit in results] == [f"L1.E{e}" for e in range(6)]
    for unit, result in results.items():
        assert result.edit == f"mean_off({unit})"
        assert_same(result, plain_effect(lens, TEXT, found.text.token, ml.mean_off(unit, reference=reference)))
    own = dict(found.leave_one_out(["L1.E2"], ml.zero))
    assert_same(next(iter(own.values())), {"nll": found.of(ml.zero("L1.E2")).nll}, 0)


def test_pairs_and_agreement_are_those_of_the_logits(lens_of):
    lens = lens_of("granitemoehybrid")  # scales its logits
    mode = ml.zero(busiest(lens, TEXT, lens.layers[-1]))
    found = effects(lens)
    result = found.of(mode, quantities=("top1",), pairs=[(3, 9), (100, 5)])
    at = found.text.token
    clean, edited = plain(lens, TEXT)[at], plain(lens, TEXT, mode)[at]
    for i, (a, b) in enumerate([(3, 9), (100, 5)]):
        change = (edited[:, a] - edited[:, b]) - (clean[:, a] - clean[:, b])
        np.testing.assert_allclose(result.frame[f"logit_difference_{i}"], change.numpy(), atol=1e-5)
    assert result.frame["agrees"].tolist() == (clean.argmax(-1) == edited.argmax(-1)).tolist()
    assert np.isnan(result.kl).all()
    assert "kl" not in result.frame
    assert not result.frame["agrees"].all()


def test_last_special_and_first_tokens_predict_nothing():
    windows = [[9, 1, 2, 7, 3, 4], [5, 6, 7, 8]]
    text = tokenized_of(windows, special=[9, 7], documents=[0, 0])
    lens = Lens(tiny.build("olmoe"), None)
    assert effects(lens, text).text.token.tolist() == [1, 4]
    assert effects(lens, text, include_first=True).text.token.tolist() == [0, 1, 3, 4, 6, 8]


def test_an_evaluation_takes_whole_documents_of_the_split_up_to_the_limit(lens_of):
    text = tokenized_of([tiny.ids(10, seed=i).tolist() for i in range(12)], documents=[i // 2 for i in range(12)])
    text.splits[:3] = 0
    found = effects(lens_of("olmoe"), text, max_tokens=45)
    assert set(found.text.document) < {3, 4, 5}
    assert len(np.unique(found.text.document)) == 2
    assert len(found.text.token) == 2 * 2 * 8
    assert len(np.unique(effects(lens_of("olmoe"), text, max_tokens=1).text.document)) == 1


def test_sums_by_document_add_up(lens_of):
    lens = lens_of("olmoe")
    result = effects(lens).of(ml.zero(busiest(lens, TEXT, 0)))
    assert result.documents["tokens"].sum() == len(result)
    assert result.documents["delta"].sum() == pytest.approx(result.delta.sum(), rel=1e-4)
    first = result.frame[result.frame["document"] == 0]
    assert result.documents["kl"][0] == pytest.approx(first["kl"].sum(), rel=1e-5)
    assert result.documents["touched"][0] == first["touched"].sum()
    assert result.mean == pytest.approx(result.delta.mean(), abs=1e-6)
    np.testing.assert_array_equal(result.log_p, -result.nll)


def test_gates_are_the_weights_of_the_router(lens_of):
    lens = lens_of("olmoe")
    found = effects(lens)
    taps: list[Any] = []
    with lens.tapping(taps.append, layers=[1], roles=[Role.MOE]):
        plain(lens, TEXT)
    weights = [torch.zeros(tap.n_tokens).index_add(0, tap.token, tap.weight * (tap.expert == 2)) for tap in taps]
    wanted = torch.cat(weights).numpy()
    np.testing.assert_allclose(found.gates("L1.E2"), wanted[found.text.token], atol=1e-6)
    assert np.array_equal(found.visits("L1.E2"), wanted[found.text.token] > 0)


def test_the_record_counts_over_all_batches(lens_of):
    lens = lens_of("olmoe")
    found = effects(lens, batch_tokens=30)
    unit = busiest(lens, TEXT, 1)
    record = found.of(ml.mask_refill_keep(unit)).record
    assert record.total("visits") == (found.routing[1][0] == lens.address(unit).expert).sum()
    assert 0 < record.frame["mass_ratio"].item() < 1


def test_shuffled_batches_hold_every_token_once_in_other_company(lens_of):
    found = effects(lens_of("olmoe"))
    usual, shuffled = found.text.parts(64), found.text.parts(64, shuffled=1)
    for parts in (usual, shuffled):
        assert np.array_equal(np.sort(np.concatenate([p.token[p.token >= 0] for p in parts])), np.arange(TEXT.n_tokens))
        slots = np.concatenate([p.slot[p.counted] for p in parts])
        assert np.array_equal(np.sort(slots), np.arange(len(found.nll)))
        assert all(p.token.numel() <= 64 for p in parts)
    company = [{frozenset(p.token[:, 0].tolist()) for p in parts} for parts in (usual, shuffled)]
    assert company[0] != company[1]


def test_the_noise_floor_is_rounding_in_float32_and_more_in_bfloat16():
    floors = [effects(Lens(tiny.build("olmoe", dtype=d), None)).noise_floor() for d in (torch.float32, torch.bfloat16)]
    assert floors[0].nll < 1e-5
    assert floors[0].kl < 1e-5
    assert floors[1].nll > 10 * floors[0].nll


def test_the_model_is_left_as_it_was(lens_of):
    lens = lens_of("qwen2_moe")
    before = plain(lens, TEXT)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lens.model.modules())
    effects(lens).of(ml.zero("L0.E0"), routing="frozen")
    assert torch.equal(plain(lens, TEXT), before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lens.model.modules()) == hooks
    assert not any("forward" in vars(module) for module in lens.model.modules())


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda e: e.of(ml.zero("L9.E0")), OutOfRange, "no layer 9"),
        (lambda e: e.of([]), BadConfig, "nothing to do"),
        (lambda e: e.of("L0.E0"), BadConfig, "takes modes such as"),
        (lambda e: e.of(ml.zero("L0.E0"), quantities=["kld"]), BadConfig, "unknown quantity 'kld'"),
        (lambda e: e.of(ml.zero("L0.E0"), pairs=[(1, 999)]), BadConfig, "pairs of token ids below 260"),
        (lambda e: e.of(ml.zero("L0.E0"), tokens=np.ones(3, bool)), BadConfig, r"shape \(3,\): give one entry"),
        (lambda e: e.of(ml.zero([f"L0.E{i}" for i in range(6)])), BadConfig, "all 6 experts of layer 0"),
        (lambda e: list(e.leave_one_out(mode="nil")), BadConfig, "unknown mode 'nil'"),
        (lambda e: list(e.leave_one_out(mode="mean")), BadConfig, "give what it needs in options="),
        (lambda e: effects(e.lens, max_tokens=0), BadConfig, "max_tokens=0"),
        (lambda e: effects(e.lens, batch_tokens=0), BadConfig, "batch_tokens=0"),
        (lambda e: effects(e.lens, split="select"), BadCorpus, "of the split select"),
        (lambda e: effects(e.lens, tokenized_of([[1, 2]])), BadCorpus, "has a token to predict"),
        (lambda e: per_visit(0, np.full(4, -1)), BadConfig, "no expert of layer 0 is chosen"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(lens_of, call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(effects(lens_of("olmoe")))


def test_effects_of_an_edited_model_are_refused(lens_of):
    lens = lens_of("olmoe")
    found = effects(lens)
    with lens.edit(ml.zero("L0.E0")):
        with pytest.raises(BadConfig, match=r"leave the lens\.edit block first"):
            effects(lens)
        with pytest.raises(BadConfig, match=r"leave the lens\.edit block first"):
            found.of(ml.zero("L0.E1"))

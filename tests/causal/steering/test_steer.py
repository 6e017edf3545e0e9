"""Steering a checkpoint whose experts write letters we know, and random ones of many families."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import moe_lens as ml
from moe_lens.causal.steering.contrast import contrast
from moe_lens.causal.steering.controls import joined, matched_controls
from moe_lens.causal.steering.direction import direction_of
from moe_lens.causal.steering.meter import Meter, along
from moe_lens.causal.steering.result import Steering
from moe_lens.causal.steering.score import covered
from moe_lens.causal.steering.strength import STEPS, find_strength
from moe_lens.errors import BadConfig, BadCorpus, BadOutput, NotAnMoE, OutOfRange
from moe_lens.models.edits import steered
from moe_lens.models.lens import Lens
from tests.causal.steering.cycle import cycle
from tests.models import chats, tiny

PROMPTS = ["abcd", "dab", "ab"]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def planted() -> Lens:
    return cycle()


@pytest.fixture(scope="module")
def suppressed(planted: Lens) -> Steering:
    return ml.steer(planted, PROMPTS, suppress="L0.E1", target="c", controls=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def forced(planted: Lens) -> Steering:
    return ml.steer(planted, PROMPTS, force="L0.E5", target="!", controls=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def random_lens() -> Lens:
    return Lens(tiny.build("olmoe", seed=3), tiny.tokenizer(), name="random")


# what it does


def test_suppressing_the_expert_that_writes_a_letter_removes_it_and_controls_keep_it(suppressed: Steering) -> None:
    assert suppressed.text(0, "clean") == "abcd" * 3
    assert suppressed.text(0) == "abd" * 4
    scores = suppressed.frame.groupby("arm")["score"].agg(["min", "max"])
    assert scores.loc["steered", "max"] == 0
    controls = scores.loc[["control_1", "control_2", "control_3"]]
    assert (controls["min"] > 0.3).all()
    assert suppressed.contrast.difference == pytest.approx(-0.25 - (1 / 3 - 0.25))
    assert suppressed.contrast.p == 1 / 4  # the least that three controls can give


def test_forcing_the_expert_that_writes_a_letter_brings_it_and_controls_do_not(forced: Steering) -> None:
    assert "!" not in forced.text(0, "clean")
    assert forced.text(0) == "!" * 12
    assert all("!" not in forced.text(i, f"control_{n}") for i in range(3) for n in (1, 2, 3))
    assert forced.contrast.difference == 1


def test_a_bias_keeps_its_ratio_and_takes_its_size_from_the_kl(planted: Lens) -> None:
    ones = ml.steer(planted, PROMPTS, bias={"L0.E1": -1.0, "L0.E4": 0.5}, controls=0)
    tens = ml.steer(planted, PROMPTS, bias={"L0.E1": -10.0, "L0.E4": 5.0}, controls=0)
    pd.testing.assert_frame_equal(ones.frame, tens.frame)
    assert "c" not in ones.text(0)


def test_all_arms_move_the_next_token_by_the_common_kl(suppressed: Steering, forced: Steering) -> None:
    for found in (suppressed, forced):
        arms = found.summary().set_index("arm").drop(index="clean")
        assert arms["reached"].all()
        assert arms.loc["steered", "kl"] == pytest.approx(1.0, abs=0.1)
        assert arms["kl"].to_numpy() == pytest.approx(arms.loc["steered", "kl"], abs=0.1)
        assert (found.curve.groupby("arm").size() <= STEPS).all()


def test_kl_none_takes_biases_as_they_are(planted: Lens) -> None:
    found = ml.steer(planted, "abcd", bias={"L0.E1": -0.25}, kl=None, controls=2)
    assert found.summary()["strength"].tolist() == [0, 0.25, 0.25, 0.25]
    with planted.edit(steered({"L0.E1": -0.25})):
        ids = torch.tensor([planted.tokenizer("abcd")["input_ids"]])
        made = planted.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    assert found.text() == planted.tokenizer.decode(made[0, 4:])
    full = ml.steer(planted, "abcd", suppress="L0.E1", kl=None, controls=0)
    assert math.isinf(full.summary()["strength"].iloc[1])


def test_the_score_of_a_text_is_its_log_probability_after_the_prompt(planted: Lens) -> None:
    found = ml.steer(planted, ["ab", "ca"], suppress="L0.E1", target_text="cd", controls=1, max_new_tokens=6)
    for number, prompt in enumerate(["ab", "ca"]):
        ids = torch.tensor([planted.tokenizer(prompt + "cd")["input_ids"]])
        strength = float(found.summary()["strength"].iloc[1])
        for arm, mode in (("clean", None), ("steered", steered({"L0.E1": -strength}))):
            with torch.no_grad(), planted.edit(mode or steered({"L0.E1": 0.0})):
                log_p = planted.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            wanted = (log_p[1, ids[0, 2]] + log_p[2, ids[0, 3]]) / 2
            row = found.frame[(found.frame["arm"] == arm) & (found.frame["prompt"] == number)]
            assert row["score"].iloc[0] == pytest.approx(float(wanted), abs=1e-5)


# the strength


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_bisection_meets_the_kl_or_says_what_it_met(family: str) -> None:
    lens = Lens(tiny.build(family), tiny.tokenizer(), name=family)
    layer = lens.layers[-1]
    common = 0.5 * _utmost(lens, f"L{layer}.E1")
    found = ml.steer(lens, ["hello there", "12 + 3"], force=f"L{layer}.E1", kl=common, controls=0, max_new_tokens=16)
    row: Any = found.summary().iloc[1]
    assert bool(row["reached"]) == (abs(row["kl"] - common) <= 0.1 * common)
    assert row["reached"] or "jumps past" in found.finding()


def _utmost(lens: Lens, expert: str) -> float:
    found = ml.steer(lens, ["hello there", "12 + 3"], force=expert, kl=None, controls=0, max_new_tokens=16)
    return float(found.summary()["kl"].iloc[1])


def test_a_kl_that_nothing_reaches_is_said_with_what_was_reached(random_lens: Lens) -> None:
    found = ml.steer(random_lens, ["hello there", "12 + 3"], suppress="L1.E1", kl=5.0, controls=2, max_new_tokens=8)
    row: Any = found.summary().iloc[1]
    assert not row["reached"]
    assert row["kl"] == row["utmost"] < 5
    assert math.isinf(row["strength"])
    assert (
        f"moves by {row['kl']:.2g} nats (no push moves it by the 5 that were asked for; L1.E1 gets" in found.finding()
    )
    same = found.summary().iloc[2:]
    reached = same[same["reached"].astype(bool)]
    assert (reached["kl"] - row["kl"]).abs().max() <= 0.1 * row["kl"]


@pytest.mark.parametrize("kl", [0.05, 1.0, 3.0])
def test_the_search_finds_the_strength_of_any_rising_curve(kl: float) -> None:
    calls = []

    def measure(strength: float) -> np.ndarray:
        calls.append(strength)
        return np.array([4 * strength / (3 + strength) if math.isfinite(strength) else 4.0])

    found = find_strength(measure, kl)
    assert found.reached
    assert len(calls) <= STEPS
    assert abs(found.kl.mean() - kl) <= 0.1 * min(1, kl)
    assert found.tried == tuple((s, 4 * s / (3 + s) if math.isfinite(s) else 4.0) for s in calls)


def test_the_search_over_a_jump_ends_on_the_nearer_side() -> None:
    found = find_strength(lambda strength: np.array([0.7 if strength < 2 else 3.0]), 1.0)
    assert not found.reached
    assert found.kl.tolist() == [0.7]
    assert len(found.tried) == STEPS


def test_kl_is_that_of_plain_passes_whatever_the_batch(random_lens: Lens) -> None:
    texts = [((5, 6, 7, 8), (9, 10)), ((3,), ()), (tuple(range(20, 40)), tuple(range(7)))]
    readings = [along(prompt, reply, most=100) for prompt, reply in texts]
    assert [reading.at for reading in readings] == [(3, 4), (0,), tuple(range(19, 26))]
    mode = steered({"L1.E2": 2.0})
    wanted = []
    for reading in readings:
        ids = torch.tensor([reading.ids])
        with torch.no_grad():
            clean = random_lens.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            with random_lens.edit(mode):
                moved = random_lens.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        wanted.append(float((clean.exp() * (clean - moved)).sum(-1)[list(reading.at)].mean()))
    assert Meter(random_lens, readings).kl(mode) == pytest.approx(wanted, abs=1e-6)
    assert min(wanted) > 1e-4


def test_long_replies_are_read_at_evenly_spaced_places() -> None:
    assert along((1, 2), tuple(range(100)), most=5).at == (1, 26, 51, 75, 100)


# the controls


def test_controls_are_of_the_same_layer_and_of_like_load() -> None:
    direction = direction_of(suppress=["L3.E0", "L3.E1"])
    load = np.array([100.0, 40, 104, 96, 41, 400, 0, 38])
    found = matched_controls(direction, {3: (load, load / 2)}, 3)
    assert [(str(c.experts[0]), str(c.experts[1]), c.matched) for c in found] == [
        ("L3.E2", "L3.E4", True), ("L3.E3", "L3.E7", True), ("L3.E5", "L3.E6", False),
    ]  # fmt: skip


def test_a_layer_without_other_experts_gives_fewer_controls() -> None:
    direction = direction_of(force=["L0.E0", "L0.E1"])
    (only,) = matched_controls(direction, {0: (np.ones(5), np.ones(5))}, 5)
    assert set(map(str, only.experts)) == {"L0.E2", "L0.E3"}


def test_experts_join_a_control_that_is_too_weak_but_never_a_steered_one(random_lens: Lens) -> None:
    direction, rng = direction_of(suppress="L1.E0"), np.random.default_rng(0)
    visits = {1: (np.array([9.0, 1, 2, 0, 3, 4]), np.ones(6))}
    control: Any = direction_of(suppress="L1.E1")
    sizes = []
    while control is not None:
        sizes.append(len(control.pushes))
        assert all(push.way == "suppress" for push in control.pushes)
        assert not {"L1.E0", "L1.E3"} & set(map(str, control.experts))
        control = joined(control, direction, visits, random_lens.spec, rng)
    assert sizes == [1, 2, 4]  # of six experts, two a token


def test_what_nobody_visits_has_nothing_to_compare_controls_with(planted: Lens) -> None:
    found = ml.steer(planted, PROMPTS, suppress="L0.E5", controls=3, target="c")
    assert found.arms == ["clean", "steered"]
    assert found.text() == found.text(arm="clean")
    assert "L0.E5 gets 0.0% of the tokens, L0.E4 the most with 100.0%" in found.finding()


# the numbers


def test_the_contrast_is_the_change_beyond_the_controls() -> None:
    steered_change, controls = np.array([-0.5, -0.3, -0.4]), np.array([[0.1, 0.1, 0.1], [-0.45, -0.45, -0.45]])
    found = contrast(steered_change, controls)
    assert (found.change, found.controls) == (pytest.approx(-0.4), pytest.approx(-0.175))
    assert found.difference == pytest.approx(-0.225)
    assert found.low < -0.225 < found.high
    assert found.p == pytest.approx(2 / 3)  # one of two controls changes as much
    alone = contrast(steered_change[:1], controls[:, :1])
    assert math.isnan(alone.low)
    assert math.isnan(contrast(steered_change, controls[:0]).p)


def test_the_interval_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    change, controls = rng.normal(-0.3, 1, 40), rng.normal(0, 0.2, (4, 40))
    found = contrast(change, controls, seed=5)
    wanted = stats.bootstrap((change - controls.mean(0),), np.mean, method="percentile", n_resamples=10_000, rng=0)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval), abs=0.02)


@pytest.mark.parametrize(
    ("text", "pattern", "share"), [("abab", "a", 0.5), ("", "a", 0), ("xx yy", r"\w+", 0.8), ("abc", "x*", 0)]
)
def test_coverage_is_the_share_of_characters_in_matches(text: str, pattern: str, share: float) -> None:
    assert covered(text, re.compile(pattern)) == pytest.approx(share)


def test_the_same_seed_draws_the_same_texts_and_leaves_the_generator_alone(random_lens: Lens) -> None:
    options: dict[str, Any] = {"force": "L1.E2", "controls": 1, "max_new_tokens": 8, "temperature": 1.0}
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first = ml.steer(random_lens, "hello", **options)
    assert torch.equal(torch.get_rng_state(), before)
    pd.testing.assert_frame_equal(ml.steer(random_lens, "hello", **options).frame, first.frame)
    assert ml.steer(random_lens, "hello", seed=1, **options).text(arm="clean") != first.text(arm="clean")


def test_the_model_is_left_as_it_was(random_lens: Lens) -> None:
    ids = tiny.ids(1, 9)
    with torch.no_grad():
        before = random_lens.model(input_ids=ids).logits
        ml.steer(random_lens, "hello", suppress="L0.E1", controls=1, max_new_tokens=4)
        assert torch.equal(random_lens.model(input_ids=ids).logits, before)
    assert not random_lens.is_edited


# prompts


def test_messages_are_prompts_as_in_trace() -> None:
    tokenizer = chats.tokenizer(chats.QWEN)
    lens = Lens(tiny.build("olmoe", vocab_size=len(tokenizer)), tokenizer, name="chat")
    messages = [{"role": "user", "content": "hi"}]
    found = ml.steer(lens, messages, suppress="L1.E1", controls=0, max_new_tokens=6)
    traced = lens.trace(messages, generate=6)
    assert found.settings["prompts"] == [tokenizer.decode(traced.token_ids[: traced.n_prompt])]
    reply = list(traced.token_ids[traced.n_prompt :])
    assert found.text(arm="clean") == tokenizer.decode(reply, skip_special_tokens=True)
    both = ml.steer(lens, ["plain", messages], suppress="L1.E1", controls=0, max_new_tokens=2)
    assert len(both.settings["prompts"]) == 2


# the result


def test_a_result_shows_its_texts_escaped_and_its_numbers(planted: Lens, suppressed: Steering) -> None:
    found = ml.steer(planted, "<b>ab", suppress="L0.E1", controls=1, max_new_tokens=6)
    page = found._repr_html_()
    assert "&lt;b&gt;ab" in page
    assert "<b>" not in page
    assert not found.is_scored
    assert "the text changes for 1 of 1 prompts" in found.finding()
    assert json.loads(json.dumps(suppressed.to_dict(), default=str))["contrast"]["p"] == 0.25
    assert len(suppressed.plot().to_dict()["data"]) == 2 * 4 + 4  # dots and a bar per arm, a line per arm
    assert len(found.plot().to_dict()["data"]) == 2
    assert suppressed.finding().startswith("With L0.E1 suppressed by ")


def test_a_result_comes_back_from_its_run_directory(planted: Lens, tmp_path: Path, monkeypatch) -> None:
    options: dict[str, Any] = {"suppress": "L0.E1", "target": "c", "controls": 2, "max_new_tokens": 8, "out": tmp_path}
    made = ml.steer(planted, PROMPTS, **options)
    read = Steering.of(ml.open_run(tmp_path))
    pd.testing.assert_frame_equal(read.frame, made.frame)
    pd.testing.assert_frame_equal(read.curve, made.curve)
    pd.testing.assert_frame_equal(read.visits, made.visits)
    assert math.isinf(read.curve["strength"].max())
    assert (read.finding(), read.contrast) == (made.finding(), made.contrast)
    generate = planted.model.generate
    monkeypatch.setattr(planted.model, "generate", lambda *_a, **_k: pytest.fail("a finished result was made again"))
    assert ml.steer(planted, PROMPTS, **options).finding() == made.finding()
    monkeypatch.setattr(planted.model, "generate", generate)
    other = ml.steer(planted, PROMPTS, **{**options, "target": "d"})
    assert other.finding() != made.finding()
    with pytest.raises(BadOutput, match="holds a run of cycle: give another"):
        ml.steer(Lens(tiny.build("olmoe"), tiny.tokenizer(), name="other"), "a", suppress="L0.E1", out=tmp_path)


def test_a_run_without_steering_says_so(tmp_path: Path) -> None:
    from moe_lens.capture.run import create_run

    with pytest.raises(BadOutput, match="holds no steering: run moe-lens steer"):
        Steering.of(create_run(tmp_path / "run", {"model": {"name": "x"}}))


# what is refused


WRONG: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "nothing to do": (BadConfig, {}, "there is nothing to steer"),
    "too few left": (BadConfig, {"suppress": [f"L0.E{e}" for e in range(5)]}, "has 1 left, and each token visits 2"),
    "too many forced": (BadConfig, {"force": ["L0.E1", "L0.E2", "L0.E3"]}, "3 experts are forced in layer 0"),
    "two ways": (BadConfig, {"suppress": "L0.E1", "force": "0:1"}, "L0.E1 is to be suppressed and forced at once"),
    "no such expert": (OutOfRange, {"suppress": "L0.E9"}, "has no expert 9: its experts are 0-5"),
    "no such layer": (OutOfRange, {"suppress": "L4.E0"}, "layer 4 of 'cycle' has no router to steer"),
    "unreadable": (OutOfRange, {"force": "E1"}, "cannot read the expert address 'E1'"),
    "a neuron": (BadConfig, {"suppress": "L0.E1.N2"}, "whole experts, not on L0.E1.N2"),
    "a bias of nothing": (BadConfig, {"bias": {"L0.E1": 0.0}}, "every bias is 0"),
    "an endless bias": (BadConfig, {"bias": {"L0.E1": math.inf}}, "give a finite number"),
    "a wrong expression": (BadConfig, {"suppress": "L0.E1", "target": "(a"}, r"'\(a' is no regular expression"),
    "two targets": (BadConfig, {"suppress": "L0.E1", "target": "a", "target_text": "b"}, "two targets"),
    "an empty target": (BadConfig, {"suppress": "L0.E1", "target": ""}, "the target is empty"),
    "kl": (BadConfig, {"suppress": "L0.E1", "kl": 0.0}, "kl=0.0: give the nats"),
    "controls": (BadConfig, {"suppress": "L0.E1", "controls": -1}, "controls=-1"),
    "tokens": (BadConfig, {"suppress": "L0.E1", "max_new_tokens": 0}, "at least one token"),
    "temperature": (BadConfig, {"suppress": "L0.E1", "temperature": math.nan}, "temperature=nan"),
    "too long": (OutOfRange, {"suppress": "L0.E1", "max_new_tokens": 90}, "the context holds 64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(planted: Lens, case: str) -> None:
    kind, options, words = WRONG[case]
    with pytest.raises(kind, match=words) as caught:
        ml.steer(planted, "ab", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], "there is no prompt"), ("", "prompt 1 is empty"), (["a", " "], "prompt 2 is empty"),
        (["a", 3], "prompt 2 is neither a text"), (7, "not int"),
        ([{"role": "user", "content": "a"}], "no chat template"),
    ],
)  # fmt: skip
def test_wrong_prompts_are_one_sentence(planted: Lens, prompts: Any, words: str) -> None:
    with pytest.raises(BadCorpus, match=words):
        ml.steer(planted, prompts, suppress="L0.E1")


def test_dense_models_and_open_blocks_are_refused(planted: Lens) -> None:
    dense = Lens(tiny.build("llama"), tiny.tokenizer(), name="llama")
    with pytest.raises(NotAnMoE, match="'llama' is a dense model and has no router to steer"):
        ml.steer(dense, "ab", suppress="L0.E0")
    with planted.edit(ml.zero("L0.E1")), pytest.raises(BadConfig, match=r"leave the lens\.edit block first"):
        ml.steer(planted, "ab", suppress="L0.E1")


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "llama4_text", "jamba"])
def test_other_routers_are_steered_too(lens_of: Callable[[str], Lens], name: str) -> None:
    lens = lens_of(name)
    expert = f"L{lens.layers[-1]}.E1"
    found = ml.steer(lens, ["hello there"], force=expert, kl=0.02, controls=1, max_new_tokens=4)
    assert found.summary()["kl"].iloc[1] > 0

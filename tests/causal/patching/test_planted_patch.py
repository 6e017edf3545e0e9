"""`ml.patch` where we know what carries the difference: digits visit L0.E3, which writes "!" (`trial.made`)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.causal.patching.run import patch
from moe_lens.errors import BadConfig, BadCorpus, OutOfRange
from moe_lens.models.lens import Lens
from tests.causal.trial.made import made
from tests.models import tiny

CLEAN, CORRUPT = "ab1", "abA"


def patched(clean: Any = CLEAN, corrupt: Any = CORRUPT, *, lens: Any = None, **options: Any) -> Any:
    return patch(lens or made(), clean, corrupt, **{"target": "!", "foil": "a", "progress": False, **options})


def recoveries(found: Any) -> dict[str, float]:
    rows = found.experts
    names = [f"L{layer}.E{expert}" for layer, expert in zip(rows["layer"], rows["expert"], strict=True)]
    return dict(zip(names, rows["recovery"], strict=True))


@pytest.fixture(scope="module")
def found() -> Any:
    return patched(coalitions=[["L0.E3"], ["L0.E0", "L0.E4"]])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_planted_cause_recovers_all_and_every_other_expert_nothing(direction):
    got = recoveries(patched(direction=direction))
    assert got.pop("L0.E3") == pytest.approx(1, abs=1e-5)
    assert len(got) == 5
    assert list(got.values()) == pytest.approx([0] * 5, abs=1e-5)


def test_an_output_cannot_be_put_in_where_the_prompt_that_runs_does_not_visit_the_expert():
    found = patched(what="output")
    assert recoveries(found)["L0.E3"] == 0
    assert "2 experts are visited by the clean prompt only: their outputs cannot be put in" in found.notes
    assert recoveries(patched(what="output", direction="noise"))["L0.E3"] == pytest.approx(1, abs=1e-5)


def test_the_cause_is_a_matter_of_the_position_where_it_stands():
    found = patched("1a1", "Aa1", positions="all")
    assert found.difference_clean == found.difference_corrupt
    assert found.frame["recovery"].isna().all()
    assert np.abs(found.frame["effect"]).max() == 0
    assert "too little to be a denominator" in found.notes[0]
    rows = patched("1a1", "AaA").frame.query("unit == 'layer'").dropna(subset="position").set_index("position")
    assert rows["recovery"].to_dict() == pytest.approx({0: 0, 1: 0, 2: 1}, abs=1e-5)


def test_the_whole_layer_and_coalitions_with_the_cause_recover_all(found):
    whole = found.frame[found.frame["unit"].isin(["layer", "all"]) & found.frame["position"].isna()]
    assert whole["recovery"].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert found.coalitions["recovery"].tolist() == pytest.approx([1, 0], abs=1e-5)
    assert found.coalitions["sum_alone"].tolist() == pytest.approx([1, 0], abs=1e-5)


def test_experts_that_neither_prompt_visits_are_not_visited(found):
    rows = found.experts.set_index("expert")
    visits = rows[["visits_clean", "visits_corrupt"]].to_numpy().tolist()
    assert dict(zip(rows.index, map(tuple, visits), strict=True)) == {
        3: (1, 0), 0: (1, 0), 4: (0, 1), 1: (0, 1), 2: (0, 0), 5: (0, 0),
    }  # fmt: skip
    assert "2 experts are visited by the corrupt prompt only" in " ".join(found.findings())


def test_the_cause_beats_every_control_and_what_is_no_cause_does_not(found):
    rows = found.experts.set_index("expert")
    assert rows["p_random"][3] == 1 / 4
    assert rows["n_random"][3] == 3
    assert rows["p_random"].drop([3, 2, 5]).tolist() == [1, 1, 1]
    assert rows["p_random"][[2, 5]].isna().all()
    assert rows["p_co_selected"][3] == 1 / 4  # three choices, however often they are drawn
    assert rows["p_co_selected"][0] == 1
    drawn = found.controls.query("control == 'co-selected' and of == 'L0.E3'")
    assert len(drawn) == 3
    assert set(drawn["experts"]) == {"L0.E0", "L0.E1", "L0.E4"}
    assert np.abs(drawn["effect"]).max() < 1e-5


def test_random_coalitions_are_other_visited_experts_as_many_in_each_layer(found):
    drawn = found.controls.query("control == 'random' and of == 'L0.E0, L0.E4'")
    assert len(drawn) == found.coalitions["n_random"][1] == 20
    for names in drawn["experts"]:
        assert len(set(names.split(", "))) == 2
        assert set(names.split(", ")) <= {"L0.E0", "L0.E1", "L0.E3", "L0.E4"}
        assert set(names.split(", ")) != {"L0.E0", "L0.E4"}
    holds = drawn["experts"].str.contains("E3")
    np.testing.assert_allclose(drawn["recovery"], holds.astype(float), atol=1e-5)
    assert found.coalitions["p_random"][1] == 1


def test_a_default_foil_is_another_token_than_the_target():
    assert patched(target=None).target == "!"
    assert patched(foil=None).foil == '"'


def test_every_draw_is_a_function_of_the_seed():
    a, b, other = (patched(coalitions=[["L0.E3"]], seed=seed).controls for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(a, b)
    assert list(a["experts"]) != list(other["experts"])


def test_the_result_says_what_limits_it(found):
    said = found.finding()
    assert "recovery of '!' over 'a' is 1.00 (logit difference" in said
    assert "the largest single expert is L0.E3 with 1.00 (p 0.25 among 4 of its layer" in said
    assert "uncorrected for 4 experts" in said
    assert f"{found.n_patches} patches took {found.n_passes} batched passes" in " ".join(found.findings())
    assert "<table" in found._repr_html_()
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_heat_map_greys_what_is_not_visited_and_diverges_around_zero(found):
    trace = found.plot().data[0]
    assert np.isnan(trace.z[0][[2, 5]]).all()
    assert trace.z[0][3] == pytest.approx(1, abs=1e-5)
    assert (trace.zmin, trace.zmid, trace.zmax) == pytest.approx((-1, 0, 1), abs=1e-5)
    by_position = found.plot(by="position")
    assert by_position.data[0].z.shape == (1, 1)
    assert by_position.layout.xaxis.ticktext[0].count("→") == 1
    with pytest.raises(BadConfig, match="by='layer'"):
        found.plot(by="layer")


def test_a_figure_without_a_ratio_is_in_logits():
    found = patched("1a1", "Aa1")
    assert found.plot().data[0].colorbar.title.text == "effect"
    assert "logits" in found.plot().layout.title.text


def test_the_verb_and_its_result_are_at_the_top():
    assert ml.patch is patch
    assert isinstance(patched(n_random=0), ml.Patching)


BAD = [
    (("ab1", "ab1"), {}, BadConfig, "the same tokens"),
    (("ab1", "abAA"), {}, BadConfig, "clean has 3 tokens and corrupt 4.*pairs"),
    (("ab1", "abAA"), {"positions": "last", "routing": "frozen"}, BadConfig, "frozen routing compares position by"),
    (("ab1", ""), {}, BadCorpus, "corrupt has no tokens"),
    (("ab1", "a" * 65), {}, OutOfRange, "context holds 64"),
    (("ab1", ["a", "b"]), {}, BadConfig, "corrupt is a text or a list of token ids"),
    (("ab1", [1, 2, 999]), {}, OutOfRange, "ids are 0 to 259"),
    ((CLEAN, CORRUPT), {"target": "!!"}, OutOfRange, "'!!' is 2 tokens"),
    ((CLEAN, CORRUPT), {"target": 260}, OutOfRange, "no token id 260"),
    ((CLEAN, CORRUPT), {"target": "a"}, BadConfig, "'a' is both target and foil"),
    (("ab1", "ab2"), {"target": None, "foil": None}, BadConfig, "'!' is the most likely next token of both"),
    ((CLEAN, CORRUPT), {"positions": [0, 1]}, BadConfig, "share their first 2 tokens.*from 2 on"),
    ((CLEAN, CORRUPT), {"positions": [3]}, OutOfRange, "no position 3"),
    ((CLEAN, CORRUPT), {"positions": []}, BadConfig, "positions= is empty"),
    ((CLEAN, CORRUPT), {"positions": "first"}, BadConfig, "'first'"),
    ((CLEAN, CORRUPT), {"positions": [(2, 2), (2, 1)]}, BadConfig, "pair each position once"),
    ((CLEAN, CORRUPT), {"positions": ["2"]}, BadConfig, "numbers or pairs"),
    ((CLEAN, CORRUPT), {"units": "neurons"}, BadConfig, "patch takes experts"),
    ((CLEAN, CORRUPT), {"direction": "denoising"}, BadConfig, "did you mean 'denoise'"),
    ((CLEAN, CORRUPT), {"what": "gate"}, BadConfig, "use write or output"),
    ((CLEAN, CORRUPT), {"routing": "cold"}, BadConfig, "use live or frozen"),
    ((CLEAN, CORRUPT), {"layers": [1]}, OutOfRange, "no layer 1"),
    ((CLEAN, CORRUPT), {"coalitions": 0}, BadConfig, "from 1 to 32"),
    ((CLEAN, CORRUPT), {"coalitions": []}, BadConfig, "lists of experts"),
    ((CLEAN, CORRUPT), {"coalitions": "L0.E1"}, BadConfig, "lists of experts"),
    ((CLEAN, CORRUPT), {"coalitions": [["L0.E9"]]}, OutOfRange, "experts are 0 to 5"),
    ((CLEAN, CORRUPT), {"coalitions": [["L0.E1.N1"]]}, BadConfig, "name L0.E1"),
    ((CLEAN, CORRUPT), {"coalitions": [[]]}, BadConfig, "no expert was named"),
    ((CLEAN, CORRUPT), {"n_random": -1}, BadConfig, "n_random=-1"),
]  # fmt: skip


@pytest.mark.parametrize(("prompts", "options", "error", "match"), BAD)
def test_bad_input_is_one_sentence(prompts, options, error, match):
    with pytest.raises(error, match=match) as caught:
        patched(*prompts, **options)
    assert "\n" not in str(caught.value)


def test_the_clean_model_is_wanted():
    lens = made()
    with lens.edit(ml.zero("L0.E1")), pytest.raises(BadConfig, match=r"leave the lens\.edit block"):
        patched(lens=lens)


def test_token_ids_do_without_a_tokenizer():
    plain = Lens(made().model, None)
    ids = [tiny.tokenizer()(text)["input_ids"] for text in (CLEAN, CORRUPT)]
    vocabulary = tiny.tokenizer().get_vocab()
    found = patched(*ids, lens=plain, target=vocabulary["!"], foil=vocabulary["a"])
    assert recoveries(found)["L0.E3"] == pytest.approx(1, abs=1e-5)
    with pytest.raises(BadConfig, match="no tokenizer"):
        patched(lens=plain)

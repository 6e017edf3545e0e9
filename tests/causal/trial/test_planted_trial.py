"""`validate` on a checkpoint whose experts do what we know."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moe_lens.causal.trial.nulls import NULL_LABELS
from moe_lens.causal.trial.run import validate
from moe_lens.causal.trial.table import VALIDATION_COLUMNS
from moe_lens.causal.trial.verdict import VERDICT_MODES
from moe_lens.errors import BadConcept, BadConfig, BadCorpus, OutOfRange
from tests.causal.trial.made import BLANK, CAPITAL, LABELS, made, text

TEXT = text()


def trial(lens=None, labels=LABELS, corpus=TEXT, **options):
    return validate(lens or made(), corpus, labels, **{"progress": False, "draws": 500, "null_labels": (), **options})


@pytest.fixture(scope="module")
def found():
    return trial(
        modes=(*VERDICT_MODES, "mean", "resample", "mask_refill_keep"),
        null_labels=NULL_LABELS,
    )


def verdicts(found) -> dict[str, str]:
    return dict(zip(found.verdicts["address"], found.verdicts["verdict"], strict=True))


def test_true_routing_only_false_and_scarce_labels_get_the_verdicts_that_are_planted(found):
    assert verdicts(found) == {
        "L0.E3": "supported",
        "L0.E4": "routing-only",
        "L0.E2": "underpowered",
        "L0.E5": "refuted",
    }


def test_a_label_with_ten_documents_is_underpowered(found):
    row = found["L0.E2"].query("label_kind == 'real'").iloc[0]
    assert 5 <= row["n_docs_z1r1"] <= 10
    assert row["need"] > 1  # it would be true, and ten documents cannot show it


@pytest.mark.parametrize("mode", ["mean", "resample"])
def test_an_expert_that_always_writes_the_same_is_acquitted_though_other_modes_show_nothing(found, mode):
    rows = found["L0.E3"].query("label_kind == 'real'").set_index("mode")
    assert (rows.loc[list(VERDICT_MODES), "need"] > 1).all()
    assert abs(rows.loc[mode, "need"]) < 1e-4
    assert abs(rows.loc[mode, "contrast"]) < 1e-4
    assert (rows["verdict"] == "supported").all()
    assert found.verdicts.set_index("address")["mode"]["L0.E3"] in VERDICT_MODES


def test_modes_beside_the_two_change_no_verdict_and_no_number_of_theirs(found):
    plain = trial(null_labels=NULL_LABELS).frame
    voting = found.frame[found.frame["mode"].isin(VERDICT_MODES)].reset_index(drop=True)
    pd.testing.assert_frame_equal(voting.drop(columns="replaceability"), plain.drop(columns="replaceability"))


def test_replaceability_is_what_the_next_expert_in_line_makes_up_for(found):
    assert found["L0.E3"].query("label_kind == 'real'")["replaceability"].eq(0).all()
    assert found["L0.E4"]["replaceability"].isna().all()  # nothing is lost without it
    modes = (*VERDICT_MODES, "mask_refill_keep")
    row = trial(made(backup=True), LABELS[:1], modes=modes).frame.iloc[0]
    assert row["replaceability"] == pytest.approx(1, abs=0.01)
    assert row["verdict"] == "supported"  # needed as the model is, though another could do it
    assert trial(labels=LABELS[:1]).frame["replaceability"].isna().all()


def test_secondary_columns_are_those_of_a_trial_with_a_horizon_of_eight():
    short, long = (trial(made(also=BLANK), LABELS[:2], horizon=horizon).frame for horizon in (1, 8))
    names = ["need", "contrast"]
    np.testing.assert_allclose(short[[f"{name}_8" for name in names]], long[names], atol=1e-6)
    assert (short["need_8"] < short["need"])[:2].all()
    assert trial(labels=LABELS[:1], corpus=text(seed=2, n_signs=3)).frame["need_8"].isna().all()


def test_the_cells_are_counts_of_the_text(found):
    row = found["L0.E3"].query("label_kind == 'real'").iloc[0]
    assert row["n_tokens_z1r0"] == row["n_tokens_z0r1"] == 0
    assert row["n_tokens_z1r1"] == row["load"]
    assert row["auroc_routing"] == row["auroc_routing_low"] == 1
    assert row["auroc_effect"] == 1
    assert row["contrast"] == pytest.approx(row["specificity"], nan_ok=True) or np.isnan(row["specificity"])
    assert (row["basis"], row["exclusive"]) == ("co-selected", "by routing")


def test_false_labels_stand_beside_the_real_ones_and_are_made_of_other_documents(found):
    names = found["L0.E3"].drop_duplicates("label_kind").set_index("label_kind")["label"]
    assert names["token-class"] == "tokens of the class number"
    assert names["frequent-token"].startswith("the token '")
    assert names["topic"].startswith("documents with domain")
    assert set(names.index) == {"real", "frequent-token", "token-class", "topic", "other-expert", "random-expert"}
    assert found["L0.E3"].query("label_kind == 'topic'")["verdict"].eq("refuted").all()
    assert found["L0.E4"].query("label_kind == 'token-class'")["verdict"].eq("routing-only").all()


def test_an_expert_that_is_visited_elsewhere_for_nothing_is_exclusive():
    row = trial(made(also=BLANK), LABELS[:1]).verdicts.iloc[0]
    assert (row["verdict"], row["exclusive"]) == ("supported", "exclusive")
    assert row["exclusivity"] > 1


@pytest.mark.parametrize(("also", "basis"), [(None, "absolute"), (CAPITAL, "off-label")])
def test_with_one_expert_per_token_the_need_has_another_basis(also, basis):
    row = trial(made(top_k=1, gates=(2.0, 1.0), also=also), LABELS[:1]).verdicts.iloc[0]
    assert (row["verdict"], row["basis"]) == ("supported", basis)


def test_a_larger_gate_alone_is_no_need():
    rows = trial(made(gates=(3.0, 1.0))).frame.query("expert == 4 and label_kind == 'real'")
    assert (rows["verdict"] == "routing-only").all()


def test_focal_positions_agree_where_no_token_reaches_another():
    both = [trial(labels=LABELS[:2], max_tokens=400, positions=positions).frame for positions in ("all", "focal")]
    later = ["positions", "need_8", "contrast_8"]  # where all visits are edited, the next ones are too
    pd.testing.assert_frame_equal(*(frame.drop(columns=later) for frame in both), atol=1e-5)
    assert [frame["positions"].unique().tolist() for frame in both] == [["all"], ["focal"]]


def test_controls_may_come_from_the_whole_layer():
    few, all_of_layer = (trial(labels=LABELS[:1], controls=where).frame for where in ("trial", "layer"))
    assert (few["n_controls"] == 0).all()
    assert few["specificity"].isna().all()
    assert (all_of_layer["n_controls"] >= 1).all()
    assert all_of_layer["specificity"].notna().all()


def test_ablated_writes_are_all_that_a_trial_changes():
    lens = made()
    before = {name: value.clone() for name, value in lens.model.state_dict().items()}
    trial(lens, LABELS[:1], max_tokens=500)
    assert all((before[name] == value).all() for name, value in lens.model.state_dict().items())


def test_a_trial_is_a_function_of_its_seed():
    a, b = trial(null_labels=("random-expert",)), trial(null_labels=("random-expert",))
    pd.testing.assert_frame_equal(a.frame, b.frame)


def test_labels_made_elsewhere_stand_trial_under_their_own_kind():
    false = pd.DataFrame({"layer": 0, "expert": [3, 4, 1], "label": ["a", "b", "c"], "rule": ["[a-j]", "[0-9]", "#"]})
    found = trial(null_tables={"shuffled": false}, null_labels=("other-expert",))
    rows = found.frame.query("label_kind == 'shuffled'").drop_duplicates("expert").set_index("expert")
    assert rows["label"].to_dict() == {3: "a", 4: "b"}  # E1 has no label on trial
    assert (rows["verdict"] == "refuted").all()
    assert found.frame["label_kind"].unique().tolist() == ["real", "other-expert", "shuffled"]
    assert "shuffled 0 of 2" in found.finding()
    pd.testing.assert_frame_equal(found["L0.E5"], trial(null_labels=("other-expert",))["L0.E5"])


def test_a_sample_is_declared(found):
    sampled = trial(n_labels=2)
    assert len(sampled.verdicts) == 2
    assert "a sample of 4 labels" in sampled.finding()
    assert "sample" not in found.finding()


def test_labels_without_a_rule_count_as_underpowered():
    table = LABELS.assign(rule=pd.Series([None, "[A-Z]", "#", "[aeiou]"]))
    found = trial(labels=table)
    assert verdicts(found)["L0.E3"] == "underpowered"
    assert found.summary()["n"].sum() == 4


def test_rows_without_a_label_are_not_tried():
    table = LABELS.assign(status=["ok", "abstained", "ok", "ok"], label=pd.Series(["a", None, "b", "c"]))
    assert set(verdicts(trial(labels=table))) == {"L0.E3", "L0.E2", "L0.E5"}


def test_a_longer_horizon_averages_and_leaves_out_the_ends():
    short, long = trial(labels=LABELS[:1]).frame, trial(labels=LABELS[:1], horizon=4).frame
    assert (long["n_tokens_z1r1"] < short["n_tokens_z1r1"]).all()
    assert (long["contrast"] < short["contrast"]).all()


def test_the_table_survives_parquet(found, tmp_path):
    found.frame.to_parquet(tmp_path / "validation.parquet")
    back = pd.read_parquet(tmp_path / "validation.parquet")
    pd.testing.assert_frame_equal(back, found.frame, check_dtype=False)
    assert tuple(back) == VALIDATION_COLUMNS


def test_all_rows_of_a_label_have_its_one_verdict(found):
    assert (found.frame.groupby(["label_kind", "expert"])["verdict"].nunique() == 1).all()
    with pytest.raises(OutOfRange, match="was not on trial"):
        found["L0.E1"]


def test_one_page_says_it_all(found):
    page = found.to_markdown()
    assert page.count("\n") < 60
    assert "| L0.E3 | supported | by routing |" in page
    assert "1 of 4 labels on trial are supported" in page
    assert found.plot().data


@pytest.mark.parametrize(
    ("labels", "options", "error", "match"),
    [
        (LABELS.assign(expert=[3, 4, 2, 6]), {}, OutOfRange, "experts are 0 to 5"),
        (LABELS.assign(layer=[0, 0, 0, 1]), {}, OutOfRange, "layer 1"),
        (LABELS.assign(expert=3), {}, BadConfig, "two labels for L0.E3"),
        (LABELS.assign(label=["a", " ", "b", "c"]), {}, BadConfig, "label of L0.E4 is empty"),
        (LABELS.assign(rule="Q"), {}, BadConfig, "mark no token"),
        (LABELS.assign(rule="(?s:.)"), {}, BadConfig, "every token"),
        (LABELS.assign(rule=None), {}, BadConfig, "no label has a rule"),
        (LABELS.assign(rule="["), {}, BadConcept, "L0.E2"),
        (LABELS[:0], {}, BadConfig, "no label"),
        (LABELS.drop(columns="label"), {}, BadConfig, "no column 'label'"),
        (LABELS, {"experts": ["L0.E1"]}, BadConfig, "no label"),
        (LABELS, {"modes": ["zero"]}, BadConfig, "mean_off"),
        (LABELS, {"modes": ["zero", "mean_of"]}, BadConfig, "did you mean 'mean_off'"),
        (LABELS, {"null_labels": ["topics"]}, BadConfig, "did you mean 'topic'"),
        (LABELS, {"null_labels": ["shuffled"]}, BadConfig, "null_tables="),
        (LABELS, {"null_tables": {"topic": LABELS}}, BadConfig, "'topic'"),
        (LABELS, {"null_tables": {"shuffled": LABELS.assign(expert=3)}}, BadConfig, "two labels for L0.E3"),
        (LABELS, {"null_tables": {"shuffled": LABELS.drop(columns="label")}}, BadConfig, "null labels 'shuffled'"),
        (LABELS, {"judge_positions": 0}, BadConfig, "judge_positions=0"),
        (LABELS, {"n_labels": 0}, BadConfig, "n_labels=0"),
        (LABELS, {"horizon": 99}, BadCorpus, "99 tokens"),
        (LABELS, {"horizon": 0}, BadConfig, "horizon=0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(labels, options, error, match):
    with pytest.raises(error, match=match) as caught:
        trial(labels=labels, **options)
    assert "\n" not in str(caught.value)

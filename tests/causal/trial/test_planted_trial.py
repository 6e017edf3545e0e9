"""`validate` on a checkpoint whose experts do what we know."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

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
        modes=(*VERDICT_MODES, "mean"),
        null_labels=("frequent-token", "token-class", "topic", "other-expert", "shuffled"),
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


def test_an_expert_that_always_writes_the_same_is_acquitted_though_mean_ablation_shows_nothing(found):
    rows = found["L0.E3"].query("label_kind == 'real'").set_index("mode")
    assert (rows.loc[list(VERDICT_MODES), "need"] > 1).all()
    assert abs(rows.loc["mean", "need"]) < 1e-4
    assert found.verdicts.set_index("address")["mode"]["L0.E3"] in VERDICT_MODES


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
    assert set(names.index) == {"real", "frequent-token", "token-class", "topic", "other-expert", "shuffled"}
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
    found, one_by_one = (
        trial(labels=LABELS[:1], max_tokens=400),
        trial(labels=LABELS[:1], max_tokens=400, positions="focal"),
    )
    columns = ["need", "contrast", "lift"]
    np.testing.assert_allclose(found.frame[columns], one_by_one.frame[columns], atol=1e-5)


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
    a, b = trial(null_labels=("shuffled",)), trial(null_labels=("shuffled",))
    pd.testing.assert_frame_equal(a.frame, b.frame)


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
    assert "1 of 4 labels on trial are supported (25%" in page
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
        (LABELS, {"n_labels": 0}, BadConfig, "n_labels=0"),
        (LABELS, {"horizon": 99}, BadCorpus, "99 tokens"),
        (LABELS, {"horizon": 0}, BadConfig, "horizon=0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_a_sentence(labels, options, error, match):
    with pytest.raises(error, match=match) as caught:
        trial(labels=labels, **options)
    assert "\n" not in str(caught.value)

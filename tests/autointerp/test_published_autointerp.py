"""Released labels and judgements (arXiv 2604.02178): read, scored as released, and asked for once more."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moe_lens
from moe_lens.autointerp.client import Client, Reply, Request
from moe_lens.autointerp.labels import LABEL_COLUMNS
from moe_lens.autointerp.published import (
    published_controls,
    published_finding,
    published_scores,
    read_published_labels,
    shared_negatives,
)
from moe_lens.autointerp.replies import Outcome, ReplySchema
from moe_lens.autointerp.scoring.metrics import binary_scores
from moe_lens.autointerp.scoring.resampled import FITS
from moe_lens.errors import BadConfig
from tests.autointerp.published_files import FULL, Replay, expert, write_full, write_summary

SHARED = Path(os.environ.get("MOE_LENS_REFERENCE", Path(moe_lens.__file__).parents[2] / "shared" / "reference"))
RELEASED = SHARED / "expert_strikes_back" / "autointerp"
METRICS = {"precision": "precision", "recall": "recall", "f1": "f1_score", "accuracy": "accuracy"}


def released(name: str) -> Path:
    if not (RELEASED / name).is_file():
        pytest.skip(f"no {name} in {RELEASED}: set MOE_LENS_REFERENCE to the folder that holds the release")
    return RELEASED / name


@pytest.fixture(scope="module")
def summary() -> Path:
    return released("labels_and_scores.json")


@pytest.fixture(scope="module")
def full() -> Path:
    return released("OLMoE-1B-7B-0125_L9_auto_interp.json")


def stated(path: Path) -> pd.DataFrame:
    """The metrics that a summary file states, NaN where it has no hypothesis."""
    rows = []
    for place, experts in json.loads(path.read_text()).items():
        model, _, layer = place.rpartition("_L")
        for number, entry in experts.items():
            known = entry["hypothesis"] is not None
            values = {ours: entry["metrics"][theirs] if known else np.nan for ours, theirs in METRICS.items()}
            rows.append({"model": model, "layer": int(layer), "expert": int(number), **values})
    return pd.DataFrame(rows).set_index(["model", "layer", "expert"]).sort_index()


class TestRelease:
    """The files as released, which are not part of this repository."""

    def test_precision_recall_f1_and_accuracy_of_all_1082_experts(self, summary):
        expected = stated(summary)
        found = published_scores(summary).set_index(["model", "layer", "expert"]).sort_index()
        assert expected["f1"].notna().sum() == 1082
        for name in ("precision", "recall", "accuracy"):
            pd.testing.assert_series_equal(found[name], expected[name], check_exact=True)
        # theirs is 2 P R / (P + R), ours 2 tp / (2 tp + fp + fn): the last bit
        np.testing.assert_allclose(found["f1"], expected["f1"], rtol=0, atol=1e-15)

    def test_truth_and_answer_the_other_way_round_give_other_metrics(self, summary):
        """F1 and accuracy cannot tell; precision and recall can."""
        judgements = read_published_labels(summary).judgements.dropna(subset=["answer"])
        first = judgements[judgements["item"] < 20].set_index(["model", "layer", "expert", "item"])
        truth, answer = (first[name].astype(bool).unstack().sort_index() for name in ("truth", "answer"))
        turned = binary_scores(answer.to_numpy().T, truth.to_numpy().T)
        expected = stated(summary).loc[truth.index]
        np.testing.assert_allclose(turned["f1"], expected["f1"], atol=1e-15)
        assert (np.abs(turned["precision"] - expected["precision"].to_numpy()) > 1e-9).sum() == 871

    def test_six_null_hypotheses_are_abstentions(self, summary):
        labels = read_published_labels(summary).labels
        null = labels[labels["status"] != "ok"]
        assert set(zip(null["model"], null["layer"], null["expert"], strict=True)) == {
            ("ERNIE-4.5-21B-A3B-Base-PT", 15, 43), ("OLMoE-1B-7B-0125", 1, 17), ("OLMoE-1B-7B-0125", 9, 10),
            ("OLMoE-1B-7B-0125", 9, 25), ("OLMoE-1B-7B-0125", 15, 56), ("Qwen3-30B-A3B", 24, 10),
        }  # fmt: skip
        assert (null["status"] == "abstained").all()
        scores = published_scores(summary)
        assert (scores["status"] == "abstained").sum() == 6
        assert scores.loc[scores["status"] == "abstained", "f1"].isna().all()

    def test_layers_have_the_mean_f1_of_the_papers_figure(self, summary):
        """Figure 5; the numbers are those of table T4 of the study that METRICS comes from."""
        table = published_controls(summary).set_index(["model", "layer"])
        assert len(table) == 14
        f1 = table["f1"].round(4)
        assert f1["OLMoE-1B-7B-0125", 1] == 0.7026
        assert f1["OLMoE-1B-7B-0125", 4] == 0.8533
        assert f1["ERNIE-4.5-21B-A3B-Base-PT", 4] == 0.7325
        assert f1["Qwen3-30B-A3B", 44] == 0.8305
        low = table.loc[("OLMoE-1B-7B-0125", 1), "ci_low"]
        assert low == pytest.approx(0.667, abs=0.003)

    def test_labels_no_better_than_yes_are_counted_in_whole_numbers(self, summary):
        """F1 <= 2/3 iff 3 tp <= positives + yeses. Released values of .666...67 are ties that rounding put above."""
        counted = {}
        for place, experts in json.loads(summary.read_text()).items():
            known = [(e["labels"], e["scores"]) for e in experts.values() if e["hypothesis"] is not None]
            tp = [sum(a & b for a, b in zip(truth, answer, strict=True)) for truth, answer in known]
            no_better = [3 * n <= sum(t) + sum(a) for n, (t, a) in zip(tp, known, strict=True)]
            counted[place] = sum(no_better)
        table = published_controls(summary)
        found = {f"{row.model}_L{row.layer}": row.n_no_better for row in table.itertuples()}
        assert found == counted

    def test_a_seventh_of_the_labels_do_no_better_than_yes_and_most_intervals_hold_it(self, summary):
        scores = published_scores(summary).dropna(subset=["f1"])
        assert scores["f1"].mean() == pytest.approx(0.8237, abs=5e-5)
        assert set(scores["f1_always_yes"]) == {2 / 3}
        table = published_controls(summary)
        assert (table["n_no_better"].sum(), table["n_ci_above"].sum()) == (158, 411)
        finding = published_finding(published_scores(summary))
        assert finding.startswith("The mean F1 of 1082 labels is 0.824, but a judge that always says yes has 0.667")

    def test_experts_of_a_layer_share_their_negatives(self, full):
        """62 experts were judged on 10 negatives each, and 11 different ones came up."""
        table = shared_negatives(full)
        assert len(table) == 11
        assert table["n_experts"].sum() == 62 * 10
        controls = published_controls(full).iloc[0]
        assert (controls["n_negatives"], controls["fpr_high"]) == (11, table["false_positive_rate"].max())

    def test_both_files_say_the_same_of_the_layer_they_share(self, summary, full):
        ours, theirs = (published_scores(path) for path in (full, summary))
        theirs = theirs[(theirs["model"] == "OLMoE-1B-7B-0125") & (theirs["layer"] == 9)].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, theirs)

    def test_the_full_file_goes_through_client_parser_and_scorer(self, full, api_key, serve, file):
        round_trip(full, serve, file)


class TestSmallFiles:
    """The same format with answers that a person can check."""

    def test_metrics_by_hand(self, tmp_path):
        scores = published_scores(write_full(tmp_path)).set_index("expert")
        assert list(scores["precision"][:4]) == [1, 0.5, 0, 1 / 3]
        assert list(scores["recall"][:4]) == [1, 1, 0, 0.5]
        assert list(scores["f1"][:4]) == [1, 2 / 3, 0, 0.4]
        assert list(scores["accuracy"][:4]) == [1, 0.5, 0.5, 0.25]
        assert list(scores["status"]) == ["ok"] * 4 + ["abstained"]
        assert scores.loc[4, ["precision", "f1", "ci_low"]].isna().all()
        assert set(scores["f1_always_yes"]) == {2 / 3}

    def test_the_interval_of_f1_is_that_of_a_share_of_items(self, tmp_path):
        """tp / (tp + fp + fn) of the expert that always gets a yes is 2 of 4; its Wilson interval is [.150, .850]."""
        scores = published_scores(write_full(tmp_path)).set_index("expert")
        low, high = 0.15003899, 0.84996101
        assert scores.loc[1, "ci_low"] == pytest.approx(2 * low / (1 + low))
        assert scores.loc[1, "ci_high"] == pytest.approx(2 * high / (1 + high))
        known = scores[scores["status"] == "ok"]
        assert ((known["ci_low"] <= known["f1"]) & (known["f1"] <= known["ci_high"])).all()
        assert known.loc[0, "ci_low"] < 1  # four right answers prove no perfect label
        assert known.loc[2, "ci_high"] > 0

    def test_labels_are_a_table_of_labels(self, tmp_path):
        labels = read_published_labels(write_full(tmp_path)).labels
        assert list(labels.columns) == ["model", *LABEL_COLUMNS]
        assert set(labels["model"]) == {"Small-MoE"}
        assert list(labels["label"][2:]) == ["Nothing.", "One of three.", None]
        assert set(labels["labeller"]) == {"published:gemini-3-flash-preview"}
        assert set(labels["n_exemplars"]) == {2}

    def test_one_file_may_hold_several_models(self, tmp_path):
        path = write_summary(tmp_path, {"A_L4": FULL, "B_L4_x_L11": FULL})
        labels, judgements = read_published_labels(path)
        assert set(zip(labels["model"], labels["layer"], strict=True)) == {("A", 4), ("B_L4_x", 11)}
        assert len(judgements) == 2 * 5 * 4
        assert judgements["snippet"].isna().all()
        assert list(published_controls(path)["n_negatives"]) == [0, 0]

    def test_false_positives_are_counted_per_shared_negative(self, tmp_path):
        table = shared_negatives(write_full(tmp_path)).set_index("snippet")
        assert table["n_experts"].to_dict() == {" shared** text** 1": 4, " shared** text** 3": 4}
        assert table["false_positive_rate"].to_dict() == {" shared** text** 1": 0.5, " shared** text** 3": 0.5}

    def test_a_negative_of_one_expert_alone_is_not_shared(self, tmp_path):
        content = FULL | {"5": expert(5, "Commas.", (0, 1, 1, 1), (1, 1, 1, 1), (1, 0.75, 6 / 7, 0.75))}
        table = shared_negatives(write_full(tmp_path, content))
        assert set(table["snippet"]) == {" shared** text** 1", " shared** text** 3"}

    def test_controls_count_labels_no_better_than_yes(self, tmp_path):
        row = published_controls(write_full(tmp_path)).iloc[0]
        assert (row["n_experts"], row["n_abstained"], row["n_no_better"], row["n_ci_above"]) == (4, 1, 3, 0)
        assert row["f1"] == pytest.approx((1 + 2 / 3 + 0 + 0.4) / 4)
        assert (row["fpr_low"], row["fpr_high"]) == (0.5, 0.5)

    def test_answers_that_do_not_match_the_items_are_not_guessed(self, tmp_path):
        """The source fills a short list with zeros, which counts silence as a no."""
        content = {"0": FULL["0"], "1": expert(1, "Cut off.", (1, 0, 1, 0), (1, 0, 1), (1, 1, 1, 1))}
        scores = published_scores(write_full(tmp_path, content)).set_index("expert")
        assert (scores.loc[1, "status"], scores.loc[0, "status"]) == ("abstained", "ok")
        assert np.isnan(scores.loc[1, "f1"])

    def test_a_file_without_any_answer_is_no_error(self, tmp_path):
        path = write_full(tmp_path, {"4": FULL["4"]})
        assert published_controls(path)["n_experts"].item() == 0
        assert published_finding(published_scores(path)).startswith("Nothing was scored")

    def test_a_file_goes_through_client_parser_and_scorer(self, tmp_path, api_key, serve, file):
        round_trip(write_full(tmp_path), serve, file)

    def test_a_replayed_file_does_not_answer_other_prompts(self, api_key, serve):
        client = Client("replay", serve(Replay(FULL)).url, cache=None, max_retries=0)
        requests = [ask(FULL["0"]["explainer_prompt"], ReplySchema.explanation()), ask("x", ReplySchema.explanation())]
        assert [reply.status for reply in client.ask_all(requests, progress=False)] == [Outcome.OK, Outcome.FAILED]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("x_L1_auto_interp.json", "{", "is not JSON"),
        ("x_L1_auto_interp.json", "[]", "is not a JSON object"),
        ("x_L1_auto_interp.json", "{}", "holds no expert"),
        ("renamed.json", json.dumps(FULL), "the key '0' is no MODEL_L9, which a file of one layer has in its name"),
        ("x_L1_auto_interp.json", '{"0": {"hypothesis": "a"}}', "the entry of expert '0'"),
        ("x_L1_auto_interp.json", '{"0": {"hypothesis": "a", "labels": [1, 2], "scores": []}}', "entry of expert"),
        ("x_L1_auto_interp.json", '{"0": {"hypothesis": "a", "labels": [], "scores": []}}', "entry of expert"),
        ("x_L1_auto_interp.json", '{"first": {"hypothesis": "a", "labels": [1], "scores": [1]}}', "expert 'first'"),
        ("x_L1_auto_interp.json", '{"0": {"hypothesis": 7, "labels": [1], "scores": [1]}}', "entry of expert"),
        ("x_L1_auto_interp.json", '{"0": null}', "entry of expert"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, name, text, why):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadConfig, match=why) as refused:
        published_scores(path)
    assert "as they were released" in str(refused.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadConfig, match=r"cannot read .*none\.json: No such file"):
        published_scores(tmp_path / "none.json")


def ask(prompt: str, schema: ReplySchema) -> Request:
    return Request([{"role": "user", "content": prompt}], schema)


def round_trip(path: Path, serve: Any, cache: Path) -> None:
    """Send every prompt of a full file again and score the replies: labels and metrics must be those of the file."""
    content: Mapping[str, Any] = json.loads(path.read_text())
    server = serve(Replay(content))
    client = Client("replay", server.url, cache=cache)
    explained = client.ask_all(
        [ask(entry["explainer_prompt"], ReplySchema.explanation()) for entry in content.values()], progress=False
    )
    judged = client.ask_all(
        [
            ask(entry["scorer_prompt"], ReplySchema.answers(range(1, len(entry["labels"]) + 1)))
            for entry in content.values()
        ],
        progress=False,
    )
    assert len(server.asked) == 2 * len(content)
    null = sum(entry["hypothesis"] is None for entry in content.values())
    assert client.counts["refused"] == 2 * null
    assert client.counts["ok"] == 2 * (len(content) - null)
    for reply, entry in zip(explained, content.values(), strict=True):
        assert (None if entry["hypothesis"] is None else " ".join(entry["hypothesis"].split())) == label_of(reply)
    answered = [
        (entry, reply.value.scores) for entry, reply in zip(content.values(), judged, strict=True) if reply.value
    ]
    truth = np.array([entry["labels"] for entry, _ in answered], bool).T
    grades = np.array([list(scores.values()) for _, scores in answered]).T
    found = binary_scores(truth, grades >= FITS)
    for name in ("precision", "recall", "f1"):
        expected = [entry["metrics"][METRICS[name]] for entry, _ in answered]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-15, err_msg=name)


def label_of(reply: Reply) -> str | None:
    return reply.value.label if reply.value else None

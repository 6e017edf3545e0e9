"""Labels of people and other tools: what a CSV may hold, and what it is refused for."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import moe_lens as ml
from moe_lens.autointerp.labels import LABEL_COLUMNS, given_labels, label_frame, read_labels, usable, with_none
from moe_lens.errors import BadConfig, MoELensError, OutOfRange

GOOD = 'layer,expert,label,rule\n1,3,"closing brackets","[)\\]}]+"\nL0,E2, digits ,\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_is_read_with_its_rules(tmp_path: Path) -> None:
    labels = read_labels(written(tmp_path, GOOD))
    assert list(labels.columns) == list(LABEL_COLUMNS)
    assert labels[["layer", "expert", "label", "rule"]].values.tolist() == [
        [0, 2, "digits", None],
        [1, 3, "closing brackets", "[)\\]}]+"],
    ]
    assert set(labels["labeller"]) == {"file:mine.csv"}
    assert set(labels["status"]) == {"ok"}
    assert set(labels["facet"]) == {0}


def test_labels_survive_a_round_trip_through_csv(tmp_path: Path) -> None:
    first = read_labels(written(tmp_path, GOOD))
    first[["layer", "expert", "label", "rule"]].to_csv(tmp_path / "mine.csv", index=False)
    pd.testing.assert_frame_equal(read_labels(tmp_path / "mine.csv"), first)


def test_facets_of_one_expert_are_numbered(tmp_path: Path) -> None:
    labels = read_labels(written(tmp_path, "layer,expert,facet,label\n1,3,2,b\n1,3,1,a\n"))
    assert labels["label"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layer,expert\n1,2\n", "has no column 'label'"),
        ("layer,expert,label\n1,2,\n", r"row 2: the label of L1.E2 is empty"),
        ("layer,expert,label\n1,2,a\n1,2,b\n", r"two labels for L1.E2"),
        ("layer,expert,label\n1,x,a\n", "cannot read 'x' as a number"),
        ("layer,expert,label,rule\n1,2,a,(\n", r"row 2: the rule of L1\.E2: bad regular expression"),
        ("layer,expert,label\n", "holds no label"),
        ("", "has no column 'layer'"),
        ("layer,expert,label\n1,2,a,b\n", "not as many fields"),
        ("layer,expert,label\n1,2\n", "not as many fields"),
        ('layer,expert,label\n1,2,"a\n', "is not a CSV file"),
    ],
)
def test_a_bad_csv_is_refused_in_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(MoELensError, match=says) as caught:
        read_labels(written(tmp_path, text))
    assert caught.value.exit_code == 2
    assert "mine.csv" in str(caught.value) or "L1.E2" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot read the labels"):
        read_labels(tmp_path / "none.csv")


@pytest.mark.parametrize(("place", "says"), [("9,0", "no MoE layer 9"), ("1,16", "no expert 16: give 0 to 15")])
def test_experts_that_the_model_does_not_have_are_refused(tmp_path: Path, place: str, says: str) -> None:
    spec = ml.inspect("bundled:tiny-moe")
    with pytest.raises(OutOfRange, match=says):
        read_labels(written(tmp_path, f"layer,expert,label\n{place},a\n"), spec)


ONE = {"layer": [0], "expert": [1], "label": ["digits"], "rule": [r"\d"]}


def test_a_table_needs_no_labeller() -> None:
    assert given_labels(pd.DataFrame(ONE))["labeller"].tolist() == ["given"]
    assert given_labels(pd.DataFrame({**ONE, "labeller": ["me"]}))["labeller"].tolist() == ["me"]


@pytest.mark.parametrize("name", ["lexical", "openai:gpt", "gguf:small.gguf"])
def test_a_table_never_goes_by_the_name_of_a_labeller(name: str) -> None:
    assert given_labels(pd.DataFrame({**ONE, "labeller": [name]}))["labeller"].tolist() == [f"given:{name}"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"label": [None]}, r"label of L0\.E1 is empty"),
        ({"label": [" "]}, r"label of L0\.E1 is empty"),
        ({"rule": ["("]}, r"rule of L0\.E1: bad regular expression"),
        (
            {"layer": [0, 0], "expert": [1, 2], "label": ["a", "b"], "rule": None, "labeller": ["x", "y"]},
            "labels of x, y",
        ),
    ],
)
def test_a_table_is_held_to_what_a_file_is(change: dict, says: str) -> None:
    with pytest.raises(MoELensError, match=says):
        given_labels(pd.DataFrame({**ONE, **change}))


def test_a_table_without_labels_is_refused() -> None:
    with pytest.raises(BadConfig, match="no column 'label'"):
        given_labels(pd.DataFrame({"layer": [0], "expert": [1]}))


def test_only_rows_with_a_label_are_usable() -> None:
    rows = [
        {"layer": 0, "expert": 1, "label": "digits"},
        {"layer": 0, "expert": 0, "status": "abstained", "why": "nothing found"},
    ]
    frame = label_frame(rows)
    assert frame["expert"].tolist() == [0, 1]
    assert usable(frame)["label"].tolist() == ["digits"]
    assert frame["label"].tolist() == [None, "digits"]
    assert frame["confidence"].isna().all()


def test_what_is_missing_is_none_after_a_round_trip_through_parquet(tmp_path: Path) -> None:
    frame = label_frame([{"layer": 0, "expert": 0, "label": "a"}, {"layer": 0, "expert": 1, "status": "abstained"}])
    frame.to_parquet(tmp_path / "labels.parquet")
    again = with_none(pd.read_parquet(tmp_path / "labels.parquet"))
    assert again["label"].tolist() == ["a", None]
    assert again["rule"].tolist() == [None, None]


def test_a_table_without_rows_has_all_columns() -> None:
    assert list(label_frame([]).columns) == list(LABEL_COLUMNS)


def test_rows_of_an_exported_table_without_a_label_are_left_out(tmp_path: Path) -> None:
    text = "layer,expert,label,status\n0,1,digits,ok\n0,2,,abstained\n0,3,,\n"
    with pytest.raises(BadConfig, match=r"row 4: the label of L0\.E3 is empty"):
        read_labels(written(tmp_path, text))
    assert read_labels(written(tmp_path, text.rsplit("0,3", 1)[0]))["label"].tolist() == ["digits"]

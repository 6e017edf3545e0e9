"""Exports of a run read back as what the run holds, with no network."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy as np
import pandas as pd
import pytest
import yaml

from moe_lens.capture.run import open_run
from moe_lens.errors import BadConfig, BadOutput, WriteFailed
from moe_lens.report.export import FORMATS, export
from tests.capture import card_runs
from tests.cli.conftest import contents
from tests.report import made


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("an export asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("to", FORMATS)
def test_the_same_run_gives_the_same_bytes(full: Path, tmp_path: Path, to: str) -> None:
    first, second = (contents(export(full, to=to, out=tmp_path / name)) for name in "ab")
    assert first == second
    assert first


def test_csv_reads_back_as_the_tables_lists_too(full: Path, tmp_path: Path) -> None:
    folder = export(full, to="csv", out=tmp_path / "csv")
    tables = open_run(full).tables()
    assert {path.stem for path in folder.glob("*.csv")} == set(tables)
    assert json.loads((folder / "manifest.json").read_text()) == made.manifest() | {
        "commands": json.loads(json.dumps(made.manifest()["commands"]))
    }
    for name, table in tables.items():
        again = pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values={c: [""] for c in numbers(table)})
        assert list(again.columns) == list(table.columns)
        assert len(again) == len(table)
        for column in table.columns:
            expected = table[column].map(plain)
            if expected.map(lambda v: isinstance(v, list)).any():
                assert again[column].map(json.loads).tolist() == expected.tolist(), (name, column)
            elif column in numbers(table):
                np.testing.assert_array_equal(again[column].astype(float), table[column].astype(float))
            elif name == "exemplars":  # text of every kind, no missing values
                assert again[column].astype(str).tolist() == expected.astype(str).tolist(), column


def numbers(table: pd.DataFrame) -> list[str]:
    return [str(c) for c in table.select_dtypes("number").columns]


def test_a_hub_data_set_loads_table_by_table(full: Path, tmp_path: Path) -> None:
    folder = export(full, to="hub-dataset", out=tmp_path / "hub")
    for name, table in open_run(full).tables().items():
        if len(table):
            found = datasets.load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path / "cache"))
            assert found.num_rows == len(table), name
            assert found.column_names == list(table.columns), name
    loaded = datasets.load_dataset(str(folder), "exemplars", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["text"][: len(card_runs.NASTY)] == card_runs.exemplars()["text"].tolist()[: len(card_runs.NASTY)]


def test_the_card_of_a_hub_data_set_is_yaml_that_lists_every_table(full: Path, tmp_path: Path) -> None:
    folder = export(full, to="hub-dataset", out=tmp_path / "hub")
    card = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pretty_name"] == f"moe-lens: {made.SCRIPT}"
    configs = header["configs"]
    assert [c["config_name"] for c in configs if c.get("default")] == ["labels"]
    for config in configs:
        assert (folder / config["data_files"]).exists()
    assert {c["config_name"] for c in configs} == {name for name, t in open_run(full).tables().items() if len(t)}
    assert "Tables without rows are left out: `faithfulness_agreement`" in card
    assert {path.stem for path in (folder / "data").iterdir()} == {c["config_name"] for c in configs}
    assert "hf upload USER/NAME FOLDER . --repo-type dataset" in card
    assert "license" not in header
    assert "add a `license:` to the head of this card" in card
    assert "| exemplars | " in card
    assert "{" not in card.split("---\n")[2]
    assert (folder / "report.html").read_bytes() == (full / "report.html").read_bytes()


def test_the_bundled_text_goes_with_its_licences(mine: Path, tmp_path: Path) -> None:
    manifest = made.manifest()
    manifest["corpus"]["id"] = "bundled:"
    (mine / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    folder = export(mine, to="hub-dataset", out=tmp_path / "hub")
    card = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["license"], header["license_name"]) == ("other", "moe-lens-bundled-texts")
    sources = (folder / header["license_link"]).read_text(encoding="utf-8")
    assert "CC-BY-SA-3.0" in sources
    assert {path.name for path in (folder / "licences").iterdir()} >= {"WordNet.txt"}
    found = datasets.load_dataset(str(folder), "labels", split="train", cache_dir=str(tmp_path / "cache"))
    assert found.num_rows == len(made.labels())


@pytest.mark.parametrize("to", FORMATS)
def test_every_export_says_what_to_do_with_it_and_names_no_folder_of_this_machine(
    mine: Path, tmp_path: Path, to: str
) -> None:
    manifest = made.manifest()
    manifest["model"]["name"] = "/home/me/models/my-moe"
    (mine / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    folder = export(mine, to=to, out=tmp_path / "out")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "my-moe" in readme
    assert any(word in readme for word in ("hf upload", "admin panel", "pandas.read_csv"))
    for path in folder.rglob("*"):
        if path.suffix in (".md", ".json", ".jsonl"):
            assert "/home/me" not in path.read_text(encoding="utf-8"), path


def test_neuronpedia_values_sit_at_the_marked_token(full: Path, tmp_path: Path) -> None:
    folder = export(full, to="neuronpedia", out=tmp_path / "np")
    (home,) = [path for path in folder.rglob("*") if path.name == f"{made.LAYER}-moe-experts"]
    activations = lines(home / "activations" / "batch-0.jsonl.gz")
    exemplars = card_runs.exemplars()
    for row in activations:
        assert len(row["tokens"]) == len(row["values"])
        at = row["maxValueTokenIndex"]
        assert row["values"][at] == row["maxValue"] > 0
        assert sum(value != 0 for value in row["values"]) == 1
        same = exemplars[(exemplars["expert"] == int(row["index"])) & (exemplars["text"] == "".join(row["tokens"]))]
        assert (row["maxValue"], row["tokens"][at]) in set(zip(same["score"], same["token"], strict=True))
    shown = {row["tokens"][row["maxValueTokenIndex"]] for row in activations if row["index"] == "1"}
    assert shown == set(card_runs.NASTY)
    assert len({row["id"] for row in activations}) == len(activations)


def test_neuronpedia_knows_every_expert_with_exemplars(full: Path, tmp_path: Path) -> None:
    folder = export(full, to="neuronpedia", out=tmp_path / "np")
    (home,) = [path for path in folder.rglob("*") if path.name == f"{made.LAYER}-moe-experts"]
    features = {row["index"]: row for row in lines(home / "features" / "batch-0.jsonl.gz")}
    assert set(features) == {"1", "3"}
    assert features["1"]["frac_nonzero"] == pytest.approx(600 / 700)
    assert (features["1"]["pos_str"], features["1"]["pos_values"]) == ([" <i>", "\n"], [1.0, 1.0])
    assert features["3"]["pos_str"] == []
    (explanation,) = lines(home / "explanations" / "batch-0.jsonl.gz")
    assert (explanation["index"], explanation["description"]) == ("1", "<b>markup</b> & \x1b[0m")
    for name in ("release", "model", "sourceset", "source"):
        assert len(lines(home / f"{name}.jsonl")) == 1


REQUIRED = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId"},
    "source": {"id", "modelId", "setName", "creatorId"},
    "features/batch-0": {"modelId", "layer", "index"},
    "activations/batch-0": {"id", "modelId", "layer", "index", "tokens", "values", "maxValue", "maxValueTokenIndex",
                            "minValue", "creatorId"},
    "explanations/batch-0": {"id", "modelId", "layer", "index", "description", "authorId"},
}  # fmt: skip
"""Columns without a default in Neuronpedia's schema.prisma, read on 2026-11-22."""


def test_neuronpedia_gets_every_column_that_it_requires_and_what_they_refer_to(full: Path, tmp_path: Path) -> None:
    folder = export(full, to="neuronpedia", out=tmp_path / "np")
    (home,) = [path for path in folder.rglob("*") if path.name == f"{made.LAYER}-moe-experts"]
    rows = {}
    for name, columns in REQUIRED.items():
        rows[name] = lines(next(path for path in (home / name).parent.glob(f"{Path(name).name}.jsonl*")))
        for row in rows[name]:
            assert columns <= set(row), name
            assert all(row[column] not in ("", None) for column in columns), name
            assert set(row) == set(rows[name][0]), "the importer takes its columns from the first line"
    (model,) = rows["model"]
    assert (model["layers"], model["neuronsPerLayer"]) == (made.LAYER + 1, len(made.EXPERTS))
    features = {row["index"] for row in rows["features/batch-0"]}
    assert {row["index"] for row in rows["activations/batch-0"] + rows["explanations/batch-0"]} <= features
    (kind,) = lines(folder / "config" / "explanation_type.jsonl")
    models = {row["name"] for row in lines(folder / "config" / "explanation_model_type.jsonl")}
    for row in rows["explanations/batch-0"]:
        assert row["typeName"] == kind["name"]
        assert row["explanationModelName"] in models


def test_neuronpedia_gets_no_file_without_lines(mine: Path, tmp_path: Path) -> None:
    made.labels().assign(status="refused").to_parquet(mine / "labels.parquet")
    folder = export(mine, to="neuronpedia", out=tmp_path / "np")
    assert not list(folder.rglob("explanations"))
    assert not (folder / "config").exists()
    assert all(lines(path) for path in folder.rglob("*.jsonl*"))


def test_an_export_in_the_run_is_replaced_and_elsewhere_nothing_is(mine: Path, tmp_path: Path) -> None:
    folder = export(mine, to="csv")
    (folder / "stray").touch()
    assert export(mine, to="csv") == folder == mine / "export-csv"
    assert not (folder / "stray").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    with pytest.raises(BadOutput, match="not empty"):
        export(mine, to="csv", out=tmp_path / "taken")
    assert (tmp_path / "taken" / "mine.txt").exists()


def test_an_empty_folder_may_be_given_the_one_we_are_in_too(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    export(full, to="csv", out=".")
    assert (tmp_path / "empty" / "labels.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_cannot_be_exported_says_why(full: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="unknown format 'cvs', did you mean 'csv'"):
        export(full, to="cvs")
    few = made.write_run(tmp_path / "few", "routing")
    with pytest.raises(BadOutput, match="holds no exemplars: run moe-lens autointerp"):
        export(few, to="neuronpedia", out=tmp_path / "np")
    assert not (tmp_path / "np").exists()
    with pytest.raises(BadOutput, match="has no tables yet"):
        export(made.write_run(tmp_path / "none", "nothing"), to="csv")
    (tmp_path / "file").touch()
    with pytest.raises(WriteFailed, match="cannot write"):
        export(full, to="csv", out=tmp_path / "file" / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "file", "none"]

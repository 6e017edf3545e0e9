"""Wrong input: exit 2, one sentence that names the fix, and nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli

MOE, DENSE = "<moe>", "<dense>"


@pytest.fixture
def files(tmp_path: Path, text_file: Path) -> Path:
    """A folder of inputs that are wrong in one way each."""
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "prose.jsonl").write_text("this is no JSON\n")
    (tmp_path / "other.jsonl").write_text('{"body": "words"}\n')
    (tmp_path / "text.parquet").write_text("not parquet")
    (tmp_path / "text.csv").write_text("a,b\n")
    (tmp_path / "bare").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("mine")
    (tmp_path / "wrong.yaml").write_text("model: m\ncncepts: a\n")
    shutil.copy(text_file, tmp_path / "good.jsonl")
    return tmp_path


CASES = {
    "unknown bundled model": (["--model", "bundled:tiny-mo"], ["bundled:tiny-mo", "did you mean 'bundled:tiny-moe'"]),
    "unknown hub id": (["--model", "nobody/nothing"], ["nobody/nothing", "path of a folder"]),
    "a path that is not there": (["--model", "./no/such"], ["./no/such", "check the path"]),
    "a path without config": (["--model", "bare"], ["no config.json", "save_pretrained"]),
    "a dense model as --model": (["--model", DENSE], ["dense", "--baseline"]),
    "an unknown baseline": (["--model", MOE, "--baseline", "bundled:nope"], ["bundled:nope", "bundled:tiny-dense"]),
    "an unknown concept": (["--model", MOE, "--concepts", "is_opertor"], ["is_opertor", "did you mean 'is_operator'"]),
    "a layer out of range": (["--model", MOE, "--layers", "0,7"], ["no layer 7", "0,1"]),
    "unreadable layers": (["--model", MOE, "--layers", "all"], ["'all'", "0,2,4-6"]),
    "an expert out of range": (["--model", MOE, "--experts", "2,9"], ["no expert 9", "0-5"]),
    "an address out of range": (["--model", MOE, "--experts", "L1.E6"], ["no expert 6", "0-5"]),
    "an address in no layer": (["--model", MOE, "--experts", "L5.E0"], ["no layer 5"]),
    "an unreadable address": (["--model", MOE, "--experts", "seven"], ["seven", "L7.E12"]),
    "an empty corpus": (["--model", MOE, "--dataset", "empty.jsonl"], ["empty.jsonl", "give"]),
    "a corpus of blank lines": (["--model", MOE, "--dataset", "blank.txt"], ["blank.txt", "give"]),
    "prose called jsonl": (["--model", MOE, "--dataset", "prose.jsonl"], ["prose.jsonl"]),
    "a missing text column": (["--model", MOE, "--dataset", "other.jsonl"], ["other.jsonl", "body"]),
    "text called parquet": (["--model", MOE, "--dataset", "text.parquet"], ["text.parquet"]),
    "a suffix that is not read": (["--model", MOE, "--dataset", "text.csv"], [".csv", ".jsonl"]),
    "a corpus that is not there": (["--model", MOE, "--dataset", "godo.jsonl"], ["godo.jsonl", "good.jsonl"]),
    "an output that is a file": (["--model", MOE, "-o", "good.jsonl"], ["is a file"]),
    "an output with other things": (["--model", MOE, "-o", "notes"], ["no moe-lens run"]),
    "a bad size": (["--model", MOE, "--max-memory", "4 apples"], ["4 apples", "4GB"]),
    "no documents": (["--model", MOE, "--limit", "0"], ["--limit", "greater than or equal to 1"]),
    "a wrong setting in the file": (["--config", "wrong.yaml"], ["cncepts", "did you mean 'concepts'"]),
}


@pytest.mark.parametrize("dry_run", [False, True], ids=["run", "dry-run"])
@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    cli: Cli, files: Path, moe_folder: Path, dense_folder: Path, case: str, dry_run: bool
) -> None:
    words, expected = CASES[case]
    words = [{MOE: str(moe_folder), DENSE: str(dense_folder)}.get(word, word) for word in words]
    defaults = {"--dataset": "good.jsonl", "-o": "out"}
    for option, value in defaults.items():
        words += [] if option in words else [option, value]
    before = snapshot(files)
    outcome = cli("probe", *words, *(["--dry-run"] if dry_run else []))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("moe-lens: ")
    assert outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in expected:
        assert word in outcome.err
    assert snapshot(files) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def test_inspect_refuses_what_is_no_model(cli: Cli, files: Path) -> None:
    for name in ("bare", "good.jsonl", "./none", "nobody/nothing", "bundled:x"):
        outcome = cli("inspect", name)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)


def test_a_dense_model_is_welcome_in_inspect(cli: Cli, dense_folder: Path) -> None:
    outcome = cli("inspect", dense_folder)
    assert outcome.code == 0
    assert "dense" in outcome.out

"""``moe-lens report`` and ``moe-lens export`` on runs made by hand; `verify` is in tests/report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, leftovers
from tests.report import made


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with routing only; not to be written to."""
    return made.write_run(tmp_path_factory.mktemp("runs") / "few", "routing")


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_run(tmp_path_factory.mktemp("runs") / "nothing", "nothing")


def test_the_last_line_is_the_file(cli: Cli, few: Path) -> None:
    done = cli("report", few, "--out", "page.html")
    assert (done.code, done.last_line, done.err) == (0, "page.html", "")
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not leftovers(Path())


def test_a_folder_of_runs_means_the_newest(cli: Cli, few: Path) -> None:
    assert cli("report", few.parent, "--out", "page.html").code == 0


def test_json_is_one_object(cli: Cli, few: Path) -> None:
    found = json.loads(cli("report", few, "--out", "page.html", "--json").out)
    assert (found["report"], found["bytes"]) == ("page.html", Path("page.html").stat().st_size)
    sections = {section["section"]: section for section in found["sections"]}
    assert sections["Routing"]["figures"] > 0
    assert sections["Probing"]["missing"].startswith("moe-lens probe ")
    found = json.loads(cli("export", few, "--to", "csv", "--out", "there", "--json").out)
    assert {"manifest.json", "routing.csv"} <= set(found["files"])


@pytest.mark.parametrize("to", ["csv", "hub-dataset"])
def test_an_export_ends_with_its_folder(cli: Cli, few: Path, to: str) -> None:
    done = cli("export", few, "--to", to, "--out", "there")
    assert (done.code, done.err) == (0, "")
    assert Path(done.last_line).resolve() == Path("there").resolve()


@pytest.mark.parametrize("command", ["report", "verify", "export"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: None, "is no folder: give the folder that a command wrote"),
        (lambda: Path("runs").mkdir(), "holds no run: write one with moe-lens probe"),
        (lambda: Path("runs").touch(), "is no folder"),
    ],
    ids=["nothing", "empty", "file"],
)
def test_without_a_run(cli: Cli, command: str, make, said: str) -> None:
    make()
    assert refused(cli, command, "runs").find(said) >= 0


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_run_without_tables(cli: Cli, nothing: Path, command: str) -> None:
    assert "has no tables yet: run moe-lens probe" in refused(cli, command, nothing)
    assert not (nothing / "report.html").exists()


def test_a_report_that_cannot_be_written(cli: Cli, few: Path) -> None:
    Path("file").touch()
    Path("folder").mkdir()
    assert "could not write" in refused(cli, "report", few, "--out", "file/page.html")
    assert "is a folder: give --out a file" in refused(cli, "report", few, "--out", "folder")
    assert list(Path("folder").iterdir()) == []


def test_exports_that_cannot_be_made(cli: Cli, few: Path) -> None:
    Path("taken").mkdir()
    Path("taken/mine.txt").touch()
    assert "unknown format 'cvs', did you mean 'csv'" in refused(cli, "export", few, "--to", "cvs")
    assert "taken is not empty: give --out a new" in refused(cli, "export", few, "--out", "taken")
    assert "is not empty" in refused(cli, "export", few, "--out", "taken/mine.txt")
    assert "cannot write" in refused(cli, "export", few, "--out", "taken/mine.txt/deep")
    assert "holds no exemplars" in refused(cli, "export", few, "--to", "neuronpedia", "--out", "there")
    assert sorted(path.name for path in Path().rglob("*")) == ["mine.txt", "taken"]


def refused(cli: Cli, *words: object) -> str:
    """Its one sentence."""
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("moe-lens: ")
    assert done.err.count("\n") == 1
    return done.err

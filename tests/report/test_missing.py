"""The commands that a report names for its missing parts are those that would add them to this very run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from moe_lens.capture.run import open_run
from moe_lens.cli.app import app, normalise
from moe_lens.config import RunConfig
from moe_lens.report.missing import command
from moe_lens.report.page import sections_of
from moe_lens.report.parts import Answers, Missing, Unanswered
from tests.cli.conftest import Cli
from tests.report import made

COMMANDS = ("probe", "autointerp", "validate", "faithfulness")
OLMOE = {"name": "allenai/OLMoE-1B-7B-0125", "revision": "abc", "dtype": "bfloat16", "kernel": "native"}
PILE = {"id": "dataset:org/pile:en:validation", "sha256": "1", "n_documents": 500}


def a_run(folder: Path, line: list[str], **entries: Any) -> Any:
    made.write_run(folder, "routing")
    (folder / "manifest.json").write_text(
        json.dumps(made.manifest() | {"commands": {}, "command_line": line} | entries)
    )
    return open_run(folder)


def parsed(line: str) -> dict[str, Any]:
    """Options of one command as the command line reads them; fails on an option that does not exist."""
    words = shlex.split(line)
    assert words[0] == "moe-lens"
    name, *rest = normalise(words[1:])
    return typer.main.get_command(app).commands[name].make_context(name, rest).params  # type: ignore[attr-defined]


def test_what_the_run_was_told_is_told_again(tmp_path: Path) -> None:
    line = ["/usr/bin/moe-lens", "probe", "--model", "allenai/OLMoE-1B-7B-0125", "--dataset=texts/my pile.jsonl",
            "--text_column", "body", "--limit", "2000", "--document-tokens", "64", "--layers", "0,2", "--layers", "4",
            "--revision", "abc", "--local-files-only", "--k", "1,8", "--device", "cuda:1", "--json",
            "--max-rows", "500", "--no-neurons", "-o", "runs/mine"]  # fmt: skip
    run = a_run(tmp_path / "run", line, model=OLMOE)
    shared = ("--dataset 'texts/my pile.jsonl' --text-column body --limit 2000 --document-tokens 64 --layers 0,2,4 "
              "--revision abc --local-files-only")  # fmt: skip
    assert command(run, "faithfulness") == (
        f"moe-lens faithfulness --model allenai/OLMoE-1B-7B-0125 {shared} -o runs/mine"
    )
    assert command(run, "probe", baseline=True) == (
        f"moe-lens probe --model allenai/OLMoE-1B-7B-0125 {shared} --k 1,8 --max-rows 500 --no-neurons "
        "--baseline DENSE_MODEL -o runs/mine"
    )


def test_folders_of_this_machine_are_not_passed_on(tmp_path: Path) -> None:
    line = ["moe-lens", "probe", "--dataset", "/home/me/texts.jsonl", "-o/home/me/runs/mine"]
    run = a_run(tmp_path / "run", line, model={**OLMOE, "name": "/data/my-moe"})
    assert command(run, "faithfulness") == "moe-lens faithfulness --model my-moe --dataset texts.jsonl -o mine"


@pytest.mark.parametrize(
    "line", [["ipykernel_launcher.py", "-f", "x.json"], ["moe-lens", "probe", "--config=mine.yaml", "-o", "runs/x"], []]
)
def test_a_run_that_began_elsewhere_is_described_by_its_model_and_text(tmp_path: Path, line: list[str]) -> None:
    run = a_run(tmp_path / "run", line, model=OLMOE, corpus=PILE, seed=3)
    assert command(run, "autointerp") == (
        "moe-lens autointerp --model allenai/OLMoE-1B-7B-0125 --dataset org/pile --dataset-config en "
        "--split validation --limit 500 --seed 3 --revision abc --dtype bfloat16 -o DIR"
    )
    run = a_run(tmp_path / "two", line, model={"name": "bundled:tiny-moe"}, corpus={**PILE, "id": "file:a.txt"})
    assert command(run, "probe") == "moe-lens probe --model bundled:tiny-moe --dataset a.txt --limit 500 -o DIR"


def test_the_demo_lies_where_the_demo_is_written(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", ["moe-lens", "demo"], model={"name": "bundled:tiny-moe"})
    assert command(run, "faithfulness") == "moe-lens faithfulness --model bundled:tiny-moe -o runs/demo"
    assert "--baseline bundled:tiny-dense" in command(run, "probe", baseline=True)


def test_without_dash_o_it_is_the_directory_that_the_command_took(tmp_path: Path) -> None:
    line = ["__main__.py", "probe", "--model", OLMOE["name"]]
    run = a_run(tmp_path / "run", line, model=OLMOE)
    assert command(run, "faithfulness").endswith(" -o runs/OLMoE-1B-7B-0125")
    assert str(RunConfig(model=OLMOE["name"]).with_output().output) == "runs/OLMoE-1B-7B-0125"


def test_labels_come_before_their_trial(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", ["moe-lens", "demo"], model={"name": "bundled:tiny-moe"})
    assert [part.split()[1] for part in command(run, "validate").split(" && ")] == ["autointerp", "validate"]
    made.labels().to_parquet(run.path / "labels.parquet")
    assert command(run, "validate") == "moe-lens validate --model bundled:tiny-moe -o runs/demo"


def test_a_part_that_was_made_and_is_gone_is_made_anew(tmp_path: Path) -> None:
    done = {"probe": {"state": "done"}, "autointerp": {"state": "done"}}
    model = {"name": "bundled:tiny-moe"}
    run = a_run(tmp_path / "one", ["moe-lens", "demo", "-o", "runs/d"], model=model, commands=done)
    assert command(run, "probe") == "moe-lens demo --no-resume -o runs/d"
    assert "--no-resume" not in command(run, "faithfulness")
    run = a_run(tmp_path / "two", ["moe-lens", "probe", "--no-neurons", "-o", "d"], model=model, commands=done)
    assert (
        command(run, "probe").split() == "moe-lens probe --model bundled:tiny-moe --no-neurons --no-resume -o d".split()
    )
    assert "neurons" not in command(run, "probe", without=("neurons",))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_exists(tmp_path: Path, name: str) -> None:
    line = ["moe-lens", "autointerp", "--dataset", "org/pile", "--dataset-config", "en", "--split", "dev", "--limit",
            "9", "--trust-remote-code", "--kernel", "eager", "--device-map", "auto", "--max-length", "64", "--no-fuzz",
            "--labeller", "lexical"]  # fmt: skip
    run = a_run(tmp_path / "run", line, model={**OLMOE, "name": made.SCRIPT})
    for one in command(run, name, baseline=name == "probe").split(" && "):
        options = parsed(one)
        assert (options["model"], options["dataset"], options["limit"]) == (made.SCRIPT, "org/pile", "9")
        assert options["trust_remote_code"] is True
        assert options.get("fuzz") is (False if one.startswith("moe-lens autointerp") else None)
    with pytest.raises(Exception, match="No such option"):
        parsed(command(run, name).split(" && ")[0].replace("--limit", "--limits"))


@pytest.mark.parametrize("name", ["probe", "autointerp", "faithfulness"])
def test_on_the_bundled_model_the_command_works(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["moe-lens", "probe", "--model", "bundled:tiny-moe", "--document-tokens", "48"]
    run = a_run(tmp_path / "run", line, model={"name": "bundled:tiny-moe"})
    found = cli(*shlex.split(command(run, name, baseline=name == "probe"))[1:], "--dry-run")
    assert (found.code, found.err) == (0, "")


def test_the_report_names_these_commands_and_no_others(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", ["moe-lens", "demo"], model={"name": "bundled:tiny-moe"})
    named = {part.command for section in sections_of(run) for part in section.parts if isinstance(part, Missing)}
    answers = [part for section in sections_of(run) for part in section.parts if isinstance(part, Answers)]
    named |= {said.command for part in answers for said in part.answers if isinstance(said, Unanswered)}
    assert named
    assert named <= {command(run, name) for name in COMMANDS} | {command(run, "probe", baseline=True)}

"""The shell of the repository: what lies at the top, and a Makefile that does nothing twice."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

import moe_lens
from moe_lens.cli.app import app, normalise

ROOT = Path(moe_lens.__file__).parent.parent
TARGETS = ("help", "install", "demo", "test", "test-all", "check", "bench", "notebooks", "clean")
TOP = {"pyproject.toml", "README.md", "moe_lens", "notebooks", "prompts", "tests", "Makefile", "LICENSE", "NOTICE"}
LOCAL = {"runs", "dist", "build", "__pycache__"}

if not (ROOT / "Makefile").exists():
    pytest.skip("not a checkout", allow_module_level=True)


def test_the_top_level_holds_nothing_unexpected() -> None:
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert found - TOP - LOCAL - {"CONTRIBUTING.md"} == set()


def test_the_licence_is_the_full_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "9. Accepting Warranty or Additional Liability" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_help_lists_every_target() -> None:
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "help"], capture_output=True, text=True)
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert set(TARGETS) <= set(listed)


def test_recipes_are_silent() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    recipes = [
        line for before, line in zip(["", *lines], lines, strict=False) if line[:1] == "\t" and before[-1:] != "\\"
    ]
    assert recipes
    assert [line for line in recipes if not line.startswith("\t@")] == []


def test_an_installed_environment_is_not_installed_again(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", ".ci/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    for stamp in (".stamp", ".stamp-dev"):
        (tmp_path / ".venv" / stamp).touch()
    done = subprocess.run(
        ["make", "-C", str(tmp_path), "--no-print-directory", "install", "install-dev", "PYTHON=false"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing to be done" in done.stdout


def test_an_old_python_is_refused_with_the_fix(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", ".ci/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(["make", "-C", str(tmp_path), "install", "PYTHON=false"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "make PYTHON=/path/to/python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_readme_names_targets_that_exist() -> None:
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= {*TARGETS, "install-dev", "conformance"}
    assert {"demo", "test-all"} <= named


def commands_of_the_readme() -> list[str]:
    """Lines of its shell blocks that start moe-lens, without comments."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.startswith("moe-lens ")]


@pytest.mark.parametrize("line", commands_of_the_readme())
def test_the_readmes_commands_have_options_that_exist(line: str) -> None:
    command = typer.main.get_command(app)
    words = normalise(shlex.split(line))[1:]
    with command.make_context("moe-lens", list(words)) as context:
        name, chosen, rest = command.resolve_command(context, words)
        chosen.make_context(name, rest, parent=context)  # a usage error is raised here, nothing is run


def test_the_quick_start_fits_on_a_screen() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Quick start\n\n```\n(.*?)```", text, re.DOTALL)
    assert block
    assert len(block[1].splitlines()) <= 20
    assert len(commands_of_the_readme()) >= 15

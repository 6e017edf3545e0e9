"""The wheel, away from the checkout: what it holds, and ``moe-lens demo`` from it, twice."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from tests.e2e.conftest import CHECKOUT

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=CHECKOUT)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with moe-lens from the wheel, over the dependencies of this one.

    A .pth file adds this environment's packages after the new one's own. The .pth files among them, such as an
    editable install of the checkout, are not followed from there.
    """
    folder = tmp_path_factory.mktemp("away")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    own = next((folder / "env" / "lib").glob("python*")) / "site-packages"
    (own / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    done = run(*pip, wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_code_prompts_models_and_text_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("explain.md", "facets.md", "detection.md", "fuzz.md", "trigger.md"):
        assert f"moe_lens/prompts/{name}" in names
    for model in ("tiny-moe", "tiny-dense"):
        assert {
            f"moe_lens/bundled/{model}/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")
        } <= names
    assert {"moe_lens/bundled/corpus/probe.jsonl", "moe_lens/bundled/corpus/SOURCES.md"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moe_lens"}
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)


def test_the_environment_imports_moe_lens_from_the_wheel(installed: Path) -> None:
    code = "import moe_lens, moe_lens.config as c; "
    code += "print(moe_lens.__file__); print(c.prompts_dir()); print(*c.prompt_hashes())"
    done = run(installed / "env" / "bin" / "python", "-c", code, cwd=installed)
    file, prompts, names = done.stdout.splitlines()
    assert Path(file).is_relative_to(installed / "env")
    assert Path(prompts).is_relative_to(installed / "env")
    assert names.split() == ["detection.md", "explain.md", "facets.md", "fuzz.md", "trigger.md"]


def test_the_demo_runs_from_the_wheel_and_is_shown_again_from_disk(installed: Path) -> None:
    command = installed / "env" / "bin" / "moe-lens"
    first = run(command, "demo", cwd=installed)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.splitlines()[-1] == "runs/demo"
    for word in ("bundled:tiny-moe", "bundled:tiny-dense", "L0.E", "Who does what", "undecided", "gap", "report.html"):
        assert word in first.stdout
    cells = pd.read_parquet(installed / "runs" / "demo" / "probe.parquet")
    assert set(cells["role"]) == {"moe", "dense"}
    written = {p.name: p.stat().st_mtime_ns for p in (installed / "runs" / "demo").iterdir()}

    begin = time.monotonic()
    second = run(command, "demo", cwd=installed)
    took = time.monotonic() - begin
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert {p.name: p.stat().st_mtime_ns for p in (installed / "runs" / "demo").iterdir()} == written
    assert took < 60, "shown from disk, nothing computed"
    details = run(command, "demo", "--details", cwd=installed).stdout
    for word in ("held_out", "always", "By verdict", "Mean over experts"):
        assert word in details

    listed = run(command, "ls", "runs", cwd=installed)
    assert "finished" in listed.stdout
    assert listed.stdout.splitlines()[-1] == "runs"

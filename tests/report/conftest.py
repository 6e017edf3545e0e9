"""Hand-made runs with their reports, and a browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moe_lens.report.page import report
from tests.cli.conftest import cli  # noqa: F401  # the command line, called in this process
from tests.report import made


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every table and its report; not to be written to."""
    folder = made.write_run(tmp_path_factory.mktemp("runs") / "full")
    report(folder)
    return folder


@pytest.fixture
def mine(full: Path, tmp_path: Path) -> Path:
    """Like `full`, to be changed."""
    return Path(shutil.copytree(full, tmp_path / "run"))

"""The command line in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import moe_lens
from tests.cli.conftest import dense_folder, moe_folder, text_file  # noqa: F401 (fixtures)

CHECKOUT = Path(moe_lens.__file__).parent.parent
Moe = Callable[..., subprocess.CompletedProcess[str]]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the tests, with this checkout importable and nothing else that could help."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "100", **(more or {})}


def start(words: tuple[object, ...], folder: Path, **options: object) -> subprocess.Popen[str]:
    """Start ``moe-lens WORDS`` in `folder`; an ignored SIGINT (background shells set it so) is restored."""
    more = options.pop("env", None)
    before = options.pop("before", None)

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if callable(before):
            before()

    return subprocess.Popen(
        [sys.executable, "-m", "moe_lens", *map(str, words)],
        cwd=folder,
        env=environment(more),  # type: ignore[arg-type]
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


@pytest.fixture
def moe(tmp_path: Path) -> Moe:
    """Run a command to its end."""

    def call(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        process = start(words, tmp_path, **options)
        out, err = process.communicate(timeout=600)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return call

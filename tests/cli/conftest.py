"""Small checkpoints and texts, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_lens.cli.app import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.rstrip("\n").splitlines()[-1]


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run one command in a folder of its own, in this process."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer OLMoE with six experts."""
    from tests.models import tiny

    return tiny.save(tiny.build("olmoe"), tmp_path_factory.mktemp("models") / "olmoe")


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama."""
    from tests.models import tiny

    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty documents of words and numbers: enough of ``is_digit`` and the like for cells of a small model."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    words = "alpha beta Gamma delta 12 7 epsilon 305 Zeta (eta) 44 theta iota 9 kappa".split()
    rows = [" ".join(words[(i * 7 + j * (i % 5 + 1)) % len(words)] for j in range(24)) for i in range(80)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and parts that a finished run must not leave."""
    return [p for p in folder.rglob("*") if p.suffix == ".tmp" or p.name == ".partial"]

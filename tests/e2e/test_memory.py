"""What a run holds stays below ``--max-memory``, and the manifest says what it held."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import environment
from tests.models import tiny

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux"),
]

ROOM = 1_000_000_000
"""Bytes above the imported libraries; without a limit the run takes half as much again."""
CONCEPTS = "all_digits,contains_capital,leading_capital,is_not_alphanumeric,contains_whitespace"
PEAK = 'int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024'
"""Not ru_maxrss, which a process inherits from the one that started it."""

RUN = f"""
import json, re, sys
import pandas, sklearn.linear_model, torch, transformers, transformers.models.olmoe.modeling_olmoe
import transformers.models.llama.modeling_llama
from moe_lens.cli.app import main
from moe_lens.probing.memory import resident_bytes

limit = resident_bytes() + {ROOM}
code = main([*sys.argv[1:], "--max-memory", str(limit)])
print(json.dumps({{"code": code, "limit": limit, "peak": {PEAK}}}))
"""

LARGE_PARENT = f"""
import subprocess, sys
held = bytearray(b"x") * {800 << 20}
print(subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True).stdout)
"""


def run(script: str, *words: object, cwd: Path) -> str:
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_probe_with_all_arms_in_several_layer_groups_stays_below_its_limit(tmp_path: Path) -> None:
    wide: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 6, "max_position_embeddings": 256}
    moe = tiny.build("olmoe", intermediate_size=1024, num_experts=4, num_experts_per_tok=2, **wide)
    tiny.save(moe, tmp_path / "moe")
    tiny.save(tiny.build("llama", intermediate_size=2048, **wide), tmp_path / "dense")
    words = ("probe", "--model", "moe", "--baseline", "dense", "--dataset", "bundled:", "--concepts", CONCEPTS)
    words += ("--k", "1,4", "--draws", "2", "--permutations", "49", "--max-tokens", "20000")
    found = json.loads(run(RUN, *words, "--document-tokens", "200", "-o", "a", cwd=tmp_path))
    assert found["code"] == 0, f"refused: {found}"
    assert found["peak"] <= found["limit"]
    entry = json.loads((tmp_path / "a" / "manifest.json").read_text())["commands"]["probe"]
    moe_pass, _, equal, neurons = entry["passes"]
    assert moe_pass["select_passes"] > 1, "the limit binds"
    assert equal["select_passes"] > 1
    assert neurons["part"] == "neurons"
    assert entry["max_memory"] == found["limit"]
    assert abs(entry["peak_memory"] - found["peak"]) < 8 << 20


def test_the_peak_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it(tmp_path: Path) -> None:
    code = f"import re; from moe_lens.capture.run import peak_memory_bytes; print(peak_memory_bytes() - {PEAK})"
    assert abs(int(run(LARGE_PARENT, code, cwd=tmp_path))) < 8 << 20

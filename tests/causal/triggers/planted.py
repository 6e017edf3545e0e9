"""Checkpoints in which it is known which expert writes the target after the trigger, and files of cases.

``writer``    of `tests.causal.trial.made`: L0.E3 writes "!" at digits, L0.E4 is chosen at capitals and writes nothing
``crowd``     no expert knows any target, but everybody writes the same to all targets: whoever has the largest gate
              ranks first and loses most. Digits choose E1 with a large gate and E0 with a small one, small letters E2
              and E4, capitals E3 and E5. With `noise` everybody also writes at random.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_lens.corpus.text import Corpus, Document
from moe_lens.models.lens import Lens
from tests.causal.trial.made import CAPITAL, DIGIT, KINDS, ONE, OTHER, made
from tests.models import tiny

SIGNS = string.ascii_letters[10:26] + string.ascii_uppercase[10:] + string.punctuation
"""Targets of the crowd: no text has them."""
CROWD = {DIGIT: (1, 0), OTHER: (2, 4), CAPITAL: (3, 5)}


def writer() -> Lens:
    """See the top of the file; gates differ a little, so that there is a largest one."""
    return made(gates=(2.2, 2.0))


def crowd(*, noise: float = 0.0, seed: int = 0) -> Lens:
    """See the top of the file."""
    lens = made()
    vocabulary = tiny.tokenizer().get_vocab()
    model: Any = lens.model
    router, experts = model.model.layers[0].mlp.gate.weight, model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.zero_()
        experts.gate_up_proj.zero_()
        experts.down_proj.zero_()
        for kind, (large, small) in CROWD.items():
            router[large, kind], router[small, kind] = 4, 3
            experts.gate_up_proj[[large, small], 0, kind] = 2
        experts.gate_up_proj[:, 4, ONE] = 1
        experts.down_proj[:, 8, 0] = 2
        experts.down_proj[:, 9:16, 0] = noise * torch.randn(6, 7, generator=generator)
        model.lm_head.weight.zero_()
        for sign in SIGNS:
            model.lm_head.weight[vocabulary[sign], 8] = 1
            model.lm_head.weight[vocabulary[sign], 9:16] = torch.randn(7, generator=generator)
    return lens


def texts(n: int, trigger: Sequence[str], *, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of small letters and other signs with one trigger, and the trigger."""
    rng = np.random.default_rng(seed)
    others = [c for c in KINDS[DIGIT] + KINDS[CAPITAL] + KINDS[OTHER][:10] if c not in trigger]
    found = []
    for _ in range(n):
        sign = str(rng.choice(list(trigger)))
        words = [*rng.choice(others, 9).tolist(), " ", sign, " ", *rng.choice(others, 4).tolist()]
        found.append(("".join(words), sign))
    return found


def crowd_cases(*, seed: int = 0, n: int = 20) -> dict[str, list[tuple[str, str, str]]]:
    """Cases of the experts with large gates; every case has a target of its own, drawn by lot."""
    targets = np.random.default_rng(seed).permutation(list(SIGNS)).tolist()
    return {
        f"L0-E{large}": [
            (text, sign, targets.pop()) for text, sign in texts(n, KINDS[kind][:10], seed=10 * seed + large)
        ]
        for kind, (large, _) in CROWD.items()
    }


def write(folder: Path, cases: Mapping[str, Iterable[tuple[str, str, str]]]) -> Path:
    """Files in the released format: ``{"L0-E3": [(text, trigger, target), ...]}``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in cases.items():
        lines = [dict(zip(("text", "trigger", "target"), entry, strict=True)) for entry in entries]
        (folder / f"{name}.json").write_text(json.dumps(lines, indent=4), encoding="utf-8")
    return folder


def reference(n: int = 60, *, seed: int = 1) -> Corpus:
    """Text that ``mean_off`` takes other inputs from."""
    rng = np.random.default_rng(seed)
    signs = list("".join(KINDS[kind] for kind in (DIGIT, CAPITAL, OTHER)))
    return Corpus.of((Document(f"r{i}", "".join(rng.choice(signs, 30))) for i in range(n)), id="reference")

"""moe-lens: what does each expert do, and how far may I believe the answer?

Importing the package imports no torch, no transformers and no plotting; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODES = (
    "zero", "mean", "mean_off", "resample", "drop_renorm", "mask_refill", "mask_refill_keep", "swap", "noise",
)  # fmt: skip
_LAZY = {
    "load": "moe_lens.models.load",
    "Lens": "moe_lens.models.lens",
    **dict.fromkeys(_MODES, "moe_lens.models.edits"),
    "inspect": "moe_lens.models.spec",
    "doctor": "moe_lens.models.doctor",
    "Diagnosis": "moe_lens.models.doctor",
    "Spec": "moe_lens.models.spec",
    "Corpus": "moe_lens.corpus.text",
    "concept": "moe_lens.corpus.concepts",
    "Concept": "moe_lens.corpus.concepts",
    "open_run": "moe_lens.capture.run",
    "Run": "moe_lens.capture.run",
    "probe": "moe_lens.probing.probe",
    "read_published": "moe_lens.probing.published",
    "Probes": "moe_lens.probing.probe",
    "Labels": "moe_lens.autointerp.result",
    "faithfulness": "moe_lens.causal.faithfulness.run",
    "Faithfulness": "moe_lens.causal.faithfulness.result",
    "patch": "moe_lens.causal.patching.run",
    "Patching": "moe_lens.causal.patching.result",
    "validate": "moe_lens.causal.trial.job",
    "Trial": "moe_lens.causal.trial.result",
    "trigger_target": "moe_lens.causal.triggers.run",
    "Triggers": "moe_lens.causal.triggers.result",
    "steer": "moe_lens.causal.steering.run",
    "Steering": "moe_lens.causal.steering.result",
    "Effects": "moe_lens.causal.effects",
    **dict.fromkeys(("pair_redundancy", "replaceability", "self_repair"), "moe_lens.causal.redundancy"),
    "verify": "moe_lens.report.verify",
    "export": "moe_lens.report.export",
}

if TYPE_CHECKING:
    from moe_lens.autointerp.pipeline import autointerp
    from moe_lens.autointerp.result import Labels
    from moe_lens.capture.run import Run, capture, open_run
    from moe_lens.causal.effects import Effects
    from moe_lens.causal.faithfulness.result import Faithfulness
    from moe_lens.causal.faithfulness.run import faithfulness
    from moe_lens.causal.patching.result import Patching
    from moe_lens.causal.patching.run import patch
    from moe_lens.causal.redundancy import pair_redundancy, replaceability, self_repair
    from moe_lens.causal.steering.result import Steering
    from moe_lens.causal.steering.run import steer
    from moe_lens.causal.trial.job import validate
    from moe_lens.causal.trial.result import Trial
    from moe_lens.causal.triggers.result import Triggers
    from moe_lens.causal.triggers.run import trigger_target
    from moe_lens.corpus.concepts import Concept, concept
    from moe_lens.corpus.text import Corpus, corpus
    from moe_lens.models import edits
    from moe_lens.models.doctor import Diagnosis, doctor
    from moe_lens.models.edits import (
        drop_renorm,
        mask_refill,
        mask_refill_keep,
        mean,
        mean_off,
        noise,
        resample,
        swap,
        zero,
    )
    from moe_lens.models.lens import Lens
    from moe_lens.models.load import load
    from moe_lens.models.spec import Spec, inspect
    from moe_lens.probing.probe import Probes, probe
    from moe_lens.probing.published import read_published
    from moe_lens.report.export import export
    from moe_lens.report.page import report
    from moe_lens.report.verify import verify

__all__ = [
    "Concept", "Corpus", "Diagnosis", "Effects", "Faithfulness", "Labels", "Lens", "Patching", "Probes", "Run",
    "Spec", "Steering", "Trial", "Triggers", "__version__", "autointerp", "capture", "concept", "corpus", "doctor",
    "drop_renorm", "edits", "export", "faithfulness", "inspect", "load", "mask_refill", "mask_refill_keep", "mean",
    "mean_off", "noise", "open_run", "pair_redundancy", "patch", "probe", "read_published", "replaceability",
    "report", "resample", "self_repair", "steer", "swap", "trigger_target", "validate", "verify", "zero",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name == "edits":  # all ten modes; `patch` is there only, the top level keeps that name for the verb
        return importlib.import_module("moe_lens.models.edits")
    if name in ("autointerp", "capture", "corpus", "report"):  # callable sub-packages, see moe_lens._callable
        return importlib.import_module(f"moe_lens.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'moe_lens' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

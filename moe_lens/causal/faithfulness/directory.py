"""The result in a run directory: tables, the entry of the manifest, and how both are read back."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from moe_lens.capture.run import peak_memory_bytes
from moe_lens.causal.faithfulness.result import TABLES, Faithfulness

if TYPE_CHECKING:
    from moe_lens.capture.run import Run

COMMAND = "faithfulness"
_KEPT = ("n_documents", "n_tokens", "n_passes", "reference", "notes")


def finished(run: Run, request: dict[str, Any]) -> Faithfulness | None:
    """The result in `run` if it is one of equal settings."""
    entry = run.manifest["commands"].get(COMMAND, {})
    if entry.get("state") != "done" or entry["request"] != request or not all(run.has(name) for name in TABLES):
        return None
    return Faithfulness.of(run)


def drop(run: Run) -> None:
    """Forget the result in `run` and everything that was measured for an unfinished one."""
    run.drop(COMMAND, [f"{name}.parquet" for name in TABLES])


def write(run: Run, result: Faithfulness, request: dict[str, Any], *, seconds: float) -> Faithfulness:
    """Put a result into `run`; an earlier one of other settings goes. What was kept meanwhile is no longer needed.

    Raises:
        WriteFailed: it cannot be written.
    """
    run.update_manifest(commands={COMMAND: {"state": "writing"}})
    for name, table in result.tables().items():
        run.write(name, table)
    entry = {name: getattr(result, name) for name in _KEPT} | {
        "recall": asdict(result.recall) if result.recall else None,
        "state": "done", "request": request, "bins": asdict(result.bins), "noise": asdict(result.noise),
        "super_experts": result.super_experts, "finding": result.finding(), "seconds": round(seconds, 2),
        "peak_memory": peak_memory_bytes(),
    }  # fmt: skip
    run.update_manifest(commands={COMMAND: entry})
    run.clear_partial(COMMAND)
    return replace(result, run=run)

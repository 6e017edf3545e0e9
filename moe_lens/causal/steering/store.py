"""A ``Steering`` in a run directory: steering.parquet and what else rebuilds it, in the manifest."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.capture.run import MANIFEST, create_run, digest, identity_of, open_run, peak_memory_bytes
from moe_lens.causal.steering.result import TABLE, Steering
from moe_lens.corpus.text import Corpus, Document
from moe_lens.errors import BadOutput

if TYPE_CHECKING:
    from moe_lens.capture.run import Run
    from moe_lens.models.lens import Lens


def in_directory(
    lens: Lens, out: str | Path, settings: dict[str, Any], *, resume: bool, make: Callable[[], Steering]
) -> Steering:
    """The result that `out` holds of the same settings, or a new one written there.

    A run of the same model keeps what other commands wrote, whatever text it is of.

    Raises:
        BadOutput: `out` holds a run of another model, or is no run.
        WriteFailed: it cannot be written.
    """
    run, started = _open(lens, Path(out), settings), time.perf_counter()
    entry = run.manifest["commands"].get("steer", {})
    if resume and run.has(TABLE) and entry.get("settings_hash") == digest(settings):
        return Steering.of(run)
    found = make()
    run.write(TABLE, found.frame)
    curve = found.curve.replace(float("inf"), None).to_dict("list")  # JSON has no infinity
    run.update_manifest(
        commands={
            "steer": {
                "settings": settings, "settings_hash": digest(settings), "curve": curve,
                "visits": found.visits.to_dict("list"),
                "seconds": time.perf_counter() - started, "peak_memory": peak_memory_bytes(),
            }
        }
    )  # fmt: skip
    return Steering.of(run)


def _open(lens: Lens, path: Path, settings: dict[str, Any]) -> Run:
    documents = [Document(str(number), text) for number, text in enumerate(settings["prompts"])]
    identity = identity_of(lens, Corpus.of(documents, id="prompts"), seed=settings["seed"])
    if not (path / MANIFEST).exists():
        return create_run(path, identity)
    run = open_run(path)
    held = run.manifest.get("model", {})
    if held.get("config_hash") != identity["model"]["config_hash"] or held.get("name") != lens.name:
        raise BadOutput(f"{path} holds a run of {held.get('name', 'another model')}: give another -o")
    return run

"""Exports of a run: a folder that is ready to be pushed somewhere. Nothing here uses the network.

===========  ============================================================================================
csv          every table as CSV, with the manifest
hub-dataset  the parquet tables as configurations of a Hugging Face data set, with its card
neuronpedia  one feature per expert, in the layout of Neuronpedia's bulk import
===========  ============================================================================================
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lens.capture.run import Run, open_run
from moe_lens.errors import BadConfig, BadOutput, WriteFailed, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = {"csv": "csv_files", "hub-dataset": "hub", "neuronpedia": "neuronpedia"}
"""Formats, and the modules that write them with ``write(run, folder)``."""


def export(run: Run | str | Path, *, to: str, out: str | Path | None = None) -> Path:
    """Write a run in another format.

    Args:
        to: csv, hub-dataset or neuronpedia.
        out: a new or empty folder; ``export-FORMAT`` in the run's directory by default, which an export replaces.

    Raises:
        BadConfig: an unknown format.
        BadOutput: no run, a folder that is not empty, or a run without what the format needs.
        WriteFailed: it cannot be written.
    """
    if to not in FORMATS:
        raise BadConfig(f"unknown format {to!r}{nearest(to, FORMATS)}: give one of {', '.join(FORMATS)}")
    run = run if isinstance(run, Run) else open_run(run)
    folder = run.path / f"export-{to}" if out is None else Path(out).resolve()
    if folder.is_file() or (out is not None and folder.exists() and any(folder.iterdir())):
        raise BadOutput(f"{folder} is not empty: give --out a new or an empty folder")
    if not any(run.path.glob("*.parquet")):
        raise BadOutput(f"{run.path} has no tables yet: run moe-lens probe --model ... -o {run.path} first")
    write: Callable[[Run, Path], None] = importlib.import_module(f"{__name__}.{FORMATS[to]}").write
    unfinished = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(run, unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except OSError as error:
        raise WriteFailed(f"cannot write {folder} ({error.strerror or error}): give --out another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder

"""Writing that cannot leave half a file: a temporary name beside the target, then rename."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.errors import WriteFailed

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces `path` when the body ends well.

    Raises:
        WriteFailed: the disk is full or the folder cannot be written. What `path` held before is untouched
            and the temporary file is gone.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's files are private, results are not
    except OSError as error:
        raise _failure(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise _failure(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _failure(path: Path, error: Exception) -> WriteFailed:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        why, fix = "the disk is full", "free some space or give another -o and run again; finished parts are kept"
    else:
        why, fix = getattr(error, "strerror", None) or str(error), "give an output folder (-o) that can be written"
    return WriteFailed(f"could not write {path}: {why}; {fix}")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=False, ensure_ascii=False, default=str)
    _write(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame as parquet (zstd), atomically."""
    _write(path, lambda temporary: frame.to_parquet(temporary, index=False, compression="zstd"))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a consumer's state dict (tensors only) as safetensors, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {key: value.contiguous() for key, value in state.items()}
    try:
        _write(path, lambda temporary: save_file(tensors, temporary))
    except SafetensorError as error:  # how safetensors reports a full disk
        raise _failure(path, error) from error


def read_state(path: Path) -> dict[str, Any]:
    """Read what ``write_state`` wrote."""
    from safetensors.torch import load_file

    return load_file(path)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    with replacing(path) as temporary:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())

"""Put a checkpoint folder into a local hub cache, so that its hub id loads without a network."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_hub_cache(root: Path, repo_id: str, folder: Path, *, revision: str = "main") -> Path:
    """Lay out `folder` under `root` as huggingface_hub would after a download.

    Point ``HF_HUB_CACHE`` (environment, before huggingface_hub is imported, as in a subprocess) at `root`.

    Returns:
        The snapshot folder.
    """
    repo = root / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "blobs").mkdir(exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / revision).write_text(COMMIT)
    for file in Path(folder).iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = snapshot / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot

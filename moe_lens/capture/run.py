"""The run directory: manifest.json and parquet tables that every command adds to.

A run belongs to one model, one corpus and one seed. A command asks for a directory with ``create_run``; it is
refused when the directory holds something else. Tables and manifest are replaced atomically, so a killed or
failed command leaves the last good state. Parts of an unfinished command live in ``.partial/COMMAND`` and are what
``--resume`` starts from.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens import __version__
from moe_lens.capture import tables
from moe_lens.capture.routing import RoutingStats
from moe_lens.capture.store import write_json, write_table
from moe_lens.capture.stream import Consumer, stream
from moe_lens.errors import BadOutput

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.capture.card import ExpertCard
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens
    from moe_lens.types import ExpertAddress

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
_PACKAGES = ("torch", "transformers", "scikit-learn", "datasets", "pandas", "numpy")


def digest(value: Any) -> str:
    """Short sha256 of a JSON-able value; used to tell two configurations apart."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Run:
    """A run directory on disk. Reading is lazy; nothing is cached, so the object never goes stale.

    ``run.routing``, ``run.experts()``, ``run.coactivation(layer)``, ``run.frame("probe")``, ``run.manifest``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, tables={[p.stem for p in self._table_paths()]})"

    def _repr_html_(self) -> str:
        from html import escape

        manifest, path = self.manifest, escape(str(self.path))
        model = escape(str(manifest.get("model", {}).get("name", "?")))
        done = "".join(
            f"<li><code>{escape(name)}</code>: {escape(str(entry.get('state', '?')))}</li>"
            for name, entry in manifest["commands"].items()
        )
        tables = ", ".join(f"<code>{escape(table.stem)}</code>" for table in self._table_paths()) or "none yet"
        return (
            f"<p><b>moe-lens run</b> <code>{path}</code> on {model}</p><ul>{done}</ul><p>Tables: {tables}. "
            f"All of it on one page: <code>moe-lens report {path}</code></p>"
        )

    @property
    def manifest(self) -> dict[str, Any]:
        try:
            found = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            return {**found, "model": found["model"], "commands": found["commands"]}
        except (ValueError, KeyError, TypeError) as error:
            raise BadOutput(f"{self.path / MANIFEST} is damaged: give another -o, or take the folder away") from error

    def update_manifest(self, **entries: Any) -> None:
        """Merge `entries` into the manifest; dict values are merged one level deep."""
        manifest = self.manifest
        for key, value in entries.items():
            old = manifest.get(key)
            manifest[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        write_json(self.path / MANIFEST, manifest)

    def _table_paths(self) -> list[Path]:
        return sorted(self.path.glob("*.parquet"))

    def has(self, name: str) -> bool:
        """Whether the table `name` was written."""
        return (self.path / f"{name}.parquet").exists()

    def frame(self, name: str) -> pd.DataFrame:
        """Read a table.

        Raises:
            BadOutput: the run has no such table, or its file is damaged.
        """
        import pandas as pd

        path = self.path / f"{name}.parquet"
        if not path.exists():
            have = ", ".join(p.stem for p in self._table_paths()) or "none yet"
            raise BadOutput(f"{self.path} has no table {name!r}; it has: {have}")
        try:
            return pd.read_parquet(path)
        except (ValueError, OSError) as error:  # pyarrow's errors are either
            raise BadOutput(
                f"{path.name} is damaged: put its copy back, or run the command that wrote it again"
            ) from error

    def of_expert(self, name: str, at: ExpertAddress) -> pd.DataFrame:
        """Rows of one expert, without reading those of the others."""
        import pandas as pd

        wanted = [("layer", "==", at.layer), ("expert", "==", at.expert)]
        return pd.read_parquet(self.path / f"{name}.parquet", filters=wanted)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the run by name."""
        return {path.stem: self.frame(path.stem) for path in self._table_paths()}

    def write(self, name: str, frame: pd.DataFrame) -> None:
        """Replace the table `name`, atomically."""
        write_table(self.path / f"{name}.parquet", frame)

    @property
    def routing(self) -> pd.DataFrame:
        """One row per (layer, role, expert); see ``tables.routing_table`` for the columns."""
        return self.frame("routing")

    def coactivation(self, layer: int) -> pd.DataFrame:
        """Pairs of experts of one layer, most often chosen together first."""
        pairs = self.frame("coactivation")
        return pairs[pairs.layer == layer].sort_values("lift", ascending=False, ignore_index=True)

    def experts(self) -> pd.DataFrame:
        """Routed experts with address, load, weighted norm, and the domain each is most enriched for."""
        routing = self.routing
        moe = routing[routing.role == "moe"].copy()
        moe.insert(0, "address", [f"L{a}.E{b}" for a, b in zip(moe.layer, moe.expert, strict=True)])
        if self.has("routing_fields"):
            by_field = self.frame("routing_fields")
            by_field = by_field[(by_field.field == "domain") & (by_field.visits >= 20)]
            best = by_field.sort_values("lift").groupby(["layer", "expert"]).tail(1)
            best = best.rename(columns={"value": "top_domain", "lift": "top_domain_lift"})
            moe = moe.merge(best[["layer", "expert", "top_domain", "top_domain_lift"]], how="left")
        return moe.reset_index(drop=True)

    def exemplars(
        self, address: str | ExpertAddress, *, split: str = "select", kind: str | None = None
    ) -> pd.DataFrame:
        """Exemplars and negatives of one expert; see `autointerp.exemplars.exemplar_table` for the columns.

        Args:
            address: such as ``L7.E12``.
            split: select (what explains) or validate (what scores).
            kind: one kind of row, all by default.

        Raises:
            BadOutput: the run has no exemplars.
            OutOfRange: no such expert, or it got no token of that split.
            BadConfig: no such split or kind.
        """
        from moe_lens.capture.card import expert_exemplars

        return expert_exemplars(self, address, split=split, kind=kind)

    def card(self, address: str | ExpertAddress, *, n: int = 8) -> ExpertCard:
        """Everything that the run knows about one expert.

        Args:
            n: exemplars in each part.

        Raises:
            BadOutput: the run has no exemplars.
            OutOfRange: no such expert, or it got no token of the select split.
        """
        from moe_lens.capture.card import expert_card

        return expert_card(self, address, n=n)

    def partial(self, command: str) -> Path:
        """Folder of finished parts of an unfinished command."""
        return self.path / PARTIAL / command

    def clear_partial(self, command: str) -> None:
        shutil.rmtree(self.partial(command), ignore_errors=True)
        if (self.path / PARTIAL).is_dir() and not any((self.path / PARTIAL).iterdir()):
            (self.path / PARTIAL).rmdir()

    def drop(self, command: str, files: Sequence[str]) -> None:
        """Forget what `command` wrote, to run it anew: its entry, its parts and `files`. All else stays."""
        for name in files:
            (self.path / name).unlink(missing_ok=True)
        self.clear_partial(command)
        manifest = self.manifest
        if manifest["commands"].pop(command, None) is not None:
            write_json(self.path / MANIFEST, manifest)


def open_run(path: str | Path) -> Run:
    """Open an existing run directory.

    Raises:
        BadOutput: `path` is not a run directory.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        raise BadOutput(
            f"{path} is not a run directory (it has no {MANIFEST}); give the folder a command wrote with -o"
        )
    return Run(path)


def create_run(path: str | Path, identity: dict[str, Any]) -> Run:
    """Make or reopen the directory of a run.

    Args:
        identity: model, corpus and seed; two runs with different identities never share a directory.

    Raises:
        BadOutput: `path` holds another run, or files that no run wrote.
        WriteFailed: it cannot be written.
    """
    path = Path(path)
    if path.is_file():
        raise BadOutput(f"{path} is a file: give -o a folder")
    if (path / MANIFEST).exists():
        run = Run(path)
        manifest = run.manifest
        if manifest.get("identity_hash") == digest(identity):
            for stray in path.glob(".*.tmp"):  # of a process that was killed while it wrote
                stray.unlink(missing_ok=True)
            return run
        raise BadOutput(
            f"{path} holds another run ({_differences(manifest, identity)}): give another -o; --resume only continues "
            "a run of the same model, corpus, seed and settings"
        )
    if path.exists() and any(path.iterdir()):
        raise BadOutput(f"{path} is not empty and is no moe-lens run: give -o a new or an empty folder")
    write_json(path / MANIFEST, _new_manifest(identity))
    return Run(path)


def _differences(manifest: dict[str, Any], identity: dict[str, Any]) -> str:
    """What a run holds and what was asked for, where they differ."""
    told = {"config_hash": "another config", "tokenizer_hash": "another tokenizer", "sha256": "another text"}
    found = []
    for part, wanted in identity.items():
        held = manifest.get(part)
        if not isinstance(wanted, dict) or not isinstance(held, dict):
            found += [f"{part} {held}, not {wanted}"] * (held != wanted)
            continue
        for name, value in wanted.items():
            if held.get(name) != value:
                found.append(told.get(name) or f"{part} {name} {held.get(name)}, not {value}")
    return "; ".join(found) or "of another moe-lens"


def _new_manifest(identity: dict[str, Any]) -> dict[str, Any]:
    from moe_lens.config import prompt_hashes

    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command_line": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "identity_hash": digest(identity),
        **identity,
        "packages": package_versions(),
        "python": platform.python_version(),
        "prompts": prompt_hashes(),
        "commands": {},
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a number."""
    found = {"moe-lens": __version__}  # as it runs: a checkout on the path need not be installed
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    On Linux ``VmHWM``: a new process inherits ``ru_maxrss`` from the one that started it, a large notebook say.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def identity_of(lens: Lens, corpus: Corpus, *, seed: int) -> dict[str, Any]:
    """What a run directory belongs to: model, corpus and seed, as the manifest stores them."""
    return {
        "model": {
            "name": lens.name,
            "revision": lens.revision,
            "config_hash": digest(_config(lens)),
            "dtype": str(lens.model.dtype).removeprefix("torch."),
            "kernel": lens.kernel,
            "tokenizer_hash": tokenizer_hash(lens.tokenizer),
        },
        "corpus": {"id": corpus.id, "sha256": corpus.sha256, "n_documents": len(corpus)},
        "seed": seed,
    }


def _config(lens: Lens) -> dict[str, Any]:
    """The checkpoint's config without the folder it was read from and the transformers that read it."""
    ours = ("_name_or_path", "transformers_version")
    return {name: value for name, value in lens.model.config.to_dict().items() if name not in ours}


def tokenizer_hash(tokenizer: Any) -> str:
    """Short sha256 over the vocabulary and the chat template, if there is one: it changes how conversations read."""
    vocabulary, template = sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)
    return digest(vocabulary if not template else [vocabulary, template])


def write_routing(run: Run, stats: RoutingStats, corpus: Corpus) -> None:
    """Write every table that follows from routing statistics."""
    run.write("routing", tables.routing_table(stats))
    run.write("coactivation", tables.coactivation_table(stats))
    run.write("notable_experts", tables.notable_experts(stats))
    fields = [document.fields for document in corpus.documents]
    names = [n for n in ("domain", "kind", "language", "register") if any(n in f for f in fields)]
    run.write("routing_fields", tables.routing_by_field(stats, fields, names))


def capture(
    lens: Lens,
    corpus: Corpus,
    *,
    consumers: Sequence[Consumer] = (),
    out: str | Path | None = None,
    layers: Sequence[int] | None = None,
    max_length: int = 256,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool = True,
) -> Run | RoutingStats:
    """Stream a corpus through a model once and keep routing statistics and whatever `consumers` keep.

    Args:
        consumers: further mergeable consumers; they are filled in place.
        out: run directory. None keeps everything in memory and returns the ``RoutingStats``.
        max_tokens: stop after about this many tokens, whole documents, spread over domains.

    Raises:
        BadOutput: `out` holds another run.
        OutOfRange: a layer the model does not have.
    """
    from moe_lens.corpus.batches import batches, tokenize

    started = time.perf_counter()
    layers = lens.check_layers(layers)
    tokenized = tokenize(corpus, lens.tokenizer, [], max_length=max_length, limit_tokens=max_tokens, seed=seed)
    run = create_run(out, identity_of(lens, corpus, seed=seed)) if out else None
    stats = RoutingStats(len(corpus))
    loader = batches(tokenized, split=None, tokens_per_batch=batch_tokens)
    n_tokens = stream(lens, loader, [stats, *consumers], layers=layers, progress=progress)
    if run is None:
        return stats
    write_routing(run, stats, corpus)
    entry = {"n_tokens": n_tokens, "seconds": time.perf_counter() - started, "peak_memory": peak_memory_bytes()}
    run.update_manifest(commands={"capture": entry})
    return run

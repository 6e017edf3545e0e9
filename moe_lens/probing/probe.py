"""``moe_lens.probe``: k-sparse probes of every expert, and of a dense baseline beside them.

lens, dense = ml.load("bundled:tiny-moe"), ml.load("bundled:tiny-dense")
p = ml.probe(lens, ml.corpus("bundled:"), baseline=dense, out="runs/a")
p.cells          # one row per (model, seed, layer, expert, concept, k)
p.comparison     # the arms (METRICS 1.3): MoE, dense, gap, interval
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.capture.run import (
    Run,
    create_run,
    identity_of,
    peak_memory_bytes,
    tokenizer_hash,
    write_routing,
)
from moe_lens.capture.store import replacing, write_table
from moe_lens.corpus.batches import Tokenized, tokenize
from moe_lens.corpus.concepts import Concept, concepts_for
from moe_lens.corpus.splits import code_of
from moe_lens.errors import BadConfig, BadOutput, OutOfRange
from moe_lens.probing.arms import REGISTRY, Evidence, ModelScores
from moe_lens.probing.compare import compare
from moe_lens.probing.result import Probes
from moe_lens.probing.scan import scan
from moe_lens.probing.select import RANKINGS
from moe_lens.probing.settings import DEFAULT_K, ProbeSettings
from moe_lens.types import ExpertAddress, Role, Split

if TYPE_CHECKING:
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

__all__ = ["Probes", "probe"]


def probe(
    lens: Lens,
    corpus: Corpus,
    *,
    baseline: Lens | None = None,
    concepts: Sequence[str | Concept] | None = None,
    k: Sequence[int] = DEFAULT_K,
    layers: Sequence[int] | None = None,
    experts: Sequence[str | ExpertAddress] | None = None,
    rank: str = "standardised",
    protocol: str = "moe-lens",
    max_rows: int = 2000,
    max_length: int = 256,
    max_tokens: int | None = None,
    document_tokens: int | None = None,
    batch_size: int | None = None,
    max_memory: int | None = None,
    all_cells: bool = False,
    seed: int = 0,
    splits: int = 1,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Probes:
    """Which experts and neurons carry which concepts, next to a dense model on the same documents.

    Neurons are ranked and fitted on select documents, the cell is chosen on validate, the score is reported on
    test (METRICS 1.1 to 1.3; arXiv 2604.02178, section 4, is the source of the k-sparse probe).

    Args:
        baseline: a dense model (or any model that moe-lens reads) scored in the same way.
        concepts: names, categories, ``source58``, YAML paths or Concept objects; all that apply by default.
        k: numbers of neurons.
        layers: decoder layers of `lens` to probe; the baseline is always probed in all of its layers.
        experts: addresses such as ``L7.E12``; all experts of the chosen layers by default.
        rank: neuron ranking, ``standardised`` or ``mean_diff``.
        max_rows: rows that one probe is fitted on.
        max_length: tokens per window, cut to what the models can read.
        max_tokens: stop after about this many tokens: whole documents, spread over splits and domains.
        document_tokens: read at most this many tokens of each document.
        batch_size: windows per batch; by default batches hold about 4,096 tokens.
        max_memory: limit on the resident set of the process, in bytes; layers are captured in groups that fit.
        all_cells: fit larger k in all cells instead of the eight best per concept.
        splits: repeat under this many document splits (seeds `seed`, `seed + 1`, ...).
        out: run directory; a finished part of a killed run in it is not computed again.

    Raises:
        BadConfig, BadOutput, OutOfRange, UnknownConcept, BadCorpus, MemoryLimit: see each message for the fix.

    A high score shows that one can read the concept off these neurons where the expert is used. It does not
    show that the model uses them for it, nor that they serve no other concept.
    """
    if protocol != "moe-lens":
        raise BadConfig(f"unknown protocol {protocol!r}: this version offers 'moe-lens'")
    started = time.perf_counter()
    settings = _settings(
        lens, baseline, k=k, rank=rank, max_rows=max_rows, max_length=max_length, max_tokens=max_tokens,
        document_tokens=document_tokens, batch_size=batch_size, all_cells=all_cells, seed=seed,
    )  # fmt: skip
    chosen = _layers(lens, layers)
    cells = _cells(lens, experts, [layer.layer for layer in chosen])
    if splits < 1:
        raise BadConfig(f"--splits is {splits}: give 1 or more")
    resolved = _concepts(corpus, concepts)
    job = _Job(lens, baseline, corpus, resolved, settings, chosen, cells, max_memory, progress)
    job.tokenized(lens, seed)  # an unusable corpus is refused before anything is written
    run = None
    if out is not None:
        run = create_run(out, identity_of(lens, corpus, seed=seed), resume=resume)
        request = job.request(splits)
        if (finished := _finished(run, request, resume)) is not None:
            return finished
        run.update_manifest(commands={"probe": {"state": "running", "request": request}})
    result = _probe_and_compare(job, range(seed, seed + splits), run)
    if run is not None:
        _finish(run, job, result, time.perf_counter() - started)
    return result


def _probe_and_compare(job: _Job, seeds: Sequence[int], run: Run | None) -> Probes:
    lens, baseline = job.lens, job.baseline
    moe: list[ModelScores] = []
    dense: list[ModelScores] = []
    for seed in seeds:
        moe.append(job.scores(lens, Role.MOE if lens.spec.is_moe else Role.DENSE, seed, run))
        if baseline is not None:
            dense.append(job.scores(baseline, Role.DENSE, seed, run, is_baseline=True))
    tests = [job.test_documents(seed) for seed in seeds]
    comparison = compare(moe, dense, job.concepts, tests, n_resamples=job.settings.n_resamples)
    models = [(lens.name, moe), *([(baseline.name, dense)] if baseline is not None else [])]
    return Probes(_probe_table(models), comparison, run)


def _settings(
    lens: Lens, baseline: Lens | None, *, k: Sequence[int], batch_size: int | None, **rest: Any
) -> ProbeSettings:
    ks = tuple(sorted({int(n) for n in k}))
    widths = {m.name: min(layer.d_ff for layer in m.spec.layers) for m in (lens, baseline) if m is not None}
    if not ks or ks[0] < 1:
        raise BadConfig(f"--k is {list(k)}: give positive numbers of neurons, such as 1,2,4,8")
    for name, width in widths.items():
        if ks[-1] > width:
            raise BadConfig(f"--k {ks[-1]} is more than the {width} neurons of an expert of {name}: lower --k")
    limits = [m.spec.max_positions for m in (lens, baseline) if m is not None and m.spec.max_positions]
    rest["max_length"] = min([rest["max_length"], *limits])
    if rest["rank"] not in RANKINGS:
        raise BadConfig(f"unknown neuron ranking {rest['rank']!r}: choose one of {', '.join(RANKINGS)}")
    if rest["max_rows"] < 100:
        raise BadConfig(f"--max-rows is {rest['max_rows']}: a probe needs at least 100 rows")
    batch_tokens = 4096 if batch_size is None else batch_size * rest["max_length"]
    return ProbeSettings(k=ks, batch_tokens=batch_tokens, **rest)


def _layers(lens: Lens, layers: Sequence[int] | None) -> list[LayerSpec]:
    wanted = set(lens.check_layers(layers))
    return [layer for layer in lens.spec.layers if layer.layer in wanted]


def _cells(
    lens: Lens, experts: Sequence[str | ExpertAddress] | None, layers: Sequence[int]
) -> tuple[tuple[int, int], ...] | None:
    if experts is None:
        return None
    cells = []
    for text in experts:
        address = lens.address(text)
        if address.layer not in layers:
            raise OutOfRange(f"{address} is not in the chosen layers {list(layers)}: add its layer to --layers")
        cells.append((address.layer, address.expert))
    return tuple(cells)


def _concepts(corpus: Corpus, concepts: Sequence[str | Concept] | None) -> list[Concept]:
    if concepts is None:
        return concepts_for(corpus, None)
    given = [c for c in concepts if isinstance(c, Concept)]
    names = [c for c in concepts if isinstance(c, str)]
    found = given + (concepts_for(corpus, names) if names else [])
    unique = {c.name: c for c in found}
    if not unique:
        raise BadConfig("no concept was chosen: name some with --concepts, or leave it out for all")
    return list(unique.values())


class _Job:
    """One request: what to probe, on what, how. Tokenises once per (tokenizer, seed)."""

    def __init__(
        self, lens: Lens, baseline: Lens | None, corpus: Corpus, concepts: list[Concept], settings: ProbeSettings,
        layers: list[LayerSpec], cells: tuple[tuple[int, int], ...] | None, max_memory: int | None, progress: bool,
    ) -> None:  # fmt: skip
        self.lens, self.baseline, self.corpus, self.concepts = lens, baseline, corpus, concepts
        self.settings, self.layers, self.cells = settings, layers, cells
        self.max_memory, self.progress = max_memory, progress
        self.log: list[dict[str, Any]] = []
        self._tokenized: dict[tuple[str, int], Tokenized] = {}

    def request(self, splits: int) -> dict[str, Any]:
        """What was asked for, as stored in the manifest and compared on resume."""
        return {
            **self.settings.to_dict(),
            "k": list(self.settings.k),
            "splits": splits,
            "baseline": self.baseline.name if self.baseline else None,
            "concepts": [c.name for c in self.concepts],
            "layers": [layer.layer for layer in self.layers],
            "experts": [list(cell) for cell in self.cells] if self.cells else None,
        }

    def tokenized(self, lens: Lens, seed: int) -> Tokenized:
        """The corpus in the tokens of `lens`; models of one tokenizer share it, others read the same documents."""
        key = (tokenizer_hash(lens.tokenizer), seed)
        if key not in self._tokenized:
            limit, documents = self.settings.max_tokens, None
            if lens is not self.lens and limit is not None:  # another tokenizer reads the same documents
                limit, documents = None, np.unique(self.tokenized(self.lens, seed).document).tolist()
            self._tokenized[key] = tokenize(
                self.corpus, lens.tokenizer, self.concepts, max_length=self.settings.max_length,
                limit_tokens=limit, document_tokens=self.settings.document_tokens, documents=documents, seed=seed,
            )  # fmt: skip
        return self._tokenized[key]

    def test_documents(self, seed: int) -> np.ndarray:
        tokenized = self.tokenized(self.lens, seed)
        read = np.unique(tokenized.document)
        return read[tokenized.splits[read] == code_of(Split.TEST)]

    def scores(self, lens: Lens, role: Role, seed: int, run: Run | None, *, is_baseline: bool = False) -> ModelScores:
        """Scan one model, or read back the part that a killed run finished."""
        part = run.partial / f"{'baseline' if is_baseline else 'model'}-{seed}" if run else None
        if part is not None and (found := _read_part(part, role, seed)) is not None:
            return found
        from dataclasses import replace

        started = time.perf_counter()
        layers = list(lens.spec.layers) if is_baseline else self.layers
        result = scan(
            lens, self.tokenized(lens, seed), replace(self.settings, seed=seed), layers=layers, role=role,
            experts=None if is_baseline else self.cells, max_memory=self.max_memory, progress=self.progress,
        )  # fmt: skip
        passes = {"tokens_forwarded": result.n_tokens, "select_passes": result.n_passes}
        elapsed = round(time.perf_counter() - started, 2)
        self.log.append({"model": lens.name, "seed": seed, **passes, "seconds": elapsed})
        if run is not None and part is not None:
            if not is_baseline and seed == self.settings.seed:
                write_routing(run, result.routing, self.corpus)
            _write_part(part, result.scores)
        return result.scores


def _write_part(part: Path, scores: ModelScores) -> None:
    """The counts first: a part counts as finished once its cells are there."""
    keys = pd.DataFrame(list(scores.counts), columns=["layer", "expert", "concept", "k"])
    values = np.stack(list(scores.counts.values())) if len(keys) else np.zeros((0, 0, 6))
    with replacing(part.with_suffix(".npz")) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, counts=values, d_ff=scores.d_ff)
    write_table(part.with_suffix(".keys.parquet"), keys)
    for name, evidence in scores.evidence.items():
        with replacing(part.with_suffix(f".{name}.npz")) as temporary, open(temporary, "wb") as handle:
            np.savez_compressed(handle, counts=evidence.counts)
        write_table(part.with_suffix(f".{name}.parquet"), evidence.frame)
    write_table(part.with_suffix(".cells.parquet"), scores.cells)


def _read_part(part: Path, role: Role, seed: int) -> ModelScores | None:
    if not part.with_suffix(".cells.parquet").exists():
        return None
    cells, keys = (pd.read_parquet(part.with_suffix(s)) for s in (".cells.parquet", ".keys.parquet"))
    with np.load(part.with_suffix(".npz")) as stored:
        counts, d_ff = stored["counts"], int(stored["d_ff"])
    names = zip(keys.layer.tolist(), keys.expert.tolist(), keys.concept.tolist(), keys.k.tolist(), strict=True)
    evidence = {}
    for name in REGISTRY:
        if (frame := part.with_suffix(f".{name}.parquet")).exists():
            with np.load(part.with_suffix(f".{name}.npz")) as stored:
                evidence[name] = Evidence(pd.read_parquet(frame), stored["counts"])
    return ModelScores(role.value, seed, d_ff, cells, dict(zip(names, counts, strict=True)), evidence)


def _finished(run: Run, request: dict[str, Any], resume: bool) -> Probes | None:
    """An identical finished run is read back; a different one is refused."""
    entry = run.manifest["commands"].get("probe")
    if entry is None:
        return None
    if not resume:
        run.clear_partial()
        return None
    before = entry["request"]
    differs = [key for key in request if before.get(key) != request[key]]
    if differs:
        raise BadOutput(
            f"{run.path} holds a probe run with other settings ({', '.join(differs)}): give another -o, or "
            f"--no-resume to replace it; --resume only continues a run with the same settings"
        )
    if entry["state"] == "done":
        return Probes(run.frame("probe"), run.frame("comparison"), run)
    return None


def _probe_table(models: Sequence[tuple[str, Sequence[ModelScores]]]) -> pd.DataFrame:
    frames = []
    for name, scores in models:
        for model in scores:
            frame = model.cells.copy()
            for i, (column, value) in enumerate(
                {"model": name, "role": model.role, "protocol": "moe-lens", "seed": model.seed}.items()
            ):
                frame.insert(i, column, value)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _finish(run: Run, job: _Job, result: Probes, seconds: float) -> None:
    run.write("probe", result.cells)
    run.write("comparison", result.comparison)
    tokenized = job.tokenized(job.lens, job.settings.seed)
    run.write("concepts", tokenized.counts())
    run.update_manifest(
        commands={
            "probe": {
                **run.manifest["commands"]["probe"],
                "state": "done",
                "seconds": round(seconds, 2),
                "peak_memory": peak_memory_bytes(),
                "max_memory": job.max_memory,
                "passes": job.log,
            }
        }
    )
    run.clear_partial()

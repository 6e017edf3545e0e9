"""``moe_lens.probe``: k-sparse probes of every expert, and of a dense baseline beside them.

lens, dense = ml.load("bundled:tiny-moe"), ml.load("bundled:tiny-dense")
p = ml.probe(lens, ml.corpus("bundled:"), baseline=dense, out="runs/a")
p.cells          # one row per (model, seed, layer, expert, concept, k)
p.comparison     # the arms (METRICS 1.3): MoE, dense, gap, interval
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moe_lens.capture.run import Run, create_run, identity_of, peak_memory_bytes
from moe_lens.corpus.checks import check_scorable
from moe_lens.corpus.concepts import Concept, concepts_for
from moe_lens.errors import BadConfig, BadOutput, OutOfRange
from moe_lens.probing.arms import METRICS, Estimates, ModelScores
from moe_lens.probing.compare import MEAN, ArmScores, arm_scores, comparison_table, gap_bootstraps, nulls_of
from moe_lens.probing.job import Job
from moe_lens.probing.memory import gigabytes
from moe_lens.probing.null_rows import METRICS as NULL_METRICS
from moe_lens.probing.null_rows import mean_null_gap
from moe_lens.probing.result import Probes
from moe_lens.probing.select import RANKINGS
from moe_lens.probing.settings import DOCUMENTS_NEEDED, ProbeSettings, check_k
from moe_lens.probing.waterfall import COUNTS, common_concepts, waterfall
from moe_lens.types import ExpertAddress, Role

log = logging.getLogger("moe_lens")

if TYPE_CHECKING:
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens
    from moe_lens.models.spec import LayerSpec

__all__ = ["Probes", "probe"]

_TABLES = ("probe", "comparison", "waterfall", "neurons", "neuron_layers", "concepts")
_FILES = (*(f"{table}.parquet" for table in _TABLES), "probe.html")


def probe(
    lens: Lens,
    corpus: Corpus,
    *,
    baseline: Lens | None = None,
    concepts: Sequence[str | Concept] | None = None,
    k: Sequence[int] | None = None,
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
    draws: int = 20,
    permutations: int = 999,
    neurons: bool = True,
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
        k: numbers of neurons; 1, 2, 4, ... 64 by default, as far as the experts have so many.
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
        draws: random draws of equal cells from both models; 0 leaves the ``equal_*`` arms out, and so does a second
            MoE in place of a dense baseline.
        permutations: exchanges of labels behind the p-values; 0 leaves the null out.
        neurons: also count the concept groups that single neurons serve (METRICS 1.4).
        splits: repeat under this many document splits (seeds `seed`, `seed + 1`, ...).
        out: run directory; a finished part of a killed run in it is not computed again.

    Raises:
        BadConfig, BadOutput, OutOfRange, UnknownConcept, BadCorpus, MemoryLimit: see each message for the fix.

    A high score shows that one can read the concept off these neurons where the expert is used. It does not
    show that the model uses them for it, nor that they serve no other concept.
    """
    if protocol != "moe-lens":
        raise BadConfig(f"ml.probe has no protocol {protocol!r}: for 'herbst2026' call moe_lens.probing.herbst2026")
    started = time.perf_counter()
    settings = _settings(
        lens, baseline, k=k, rank=rank, max_rows=max_rows, max_length=max_length, max_tokens=max_tokens,
        document_tokens=document_tokens, batch_size=batch_size, all_cells=all_cells, draws=draws,
        permutations=permutations, neurons=neurons, seed=seed,
    )  # fmt: skip
    chosen = _layers(lens, layers)
    cells = _cells(lens, experts, [layer.layer for layer in chosen])
    if splits < 1:
        raise BadConfig(f"--splits is {splits}: give 1 or more")
    resolved = _concepts(corpus, concepts)
    job = Job(lens, baseline, corpus, resolved, settings, chosen, cells, max_memory, progress)
    # an unusable corpus is refused before anything is written
    check_scorable(job.tokenized(lens, seed), DOCUMENTS_NEEDED)
    run = None
    if out is not None:
        run = create_run(out, identity_of(lens, corpus, seed=seed))
        request = job.request(splits)
        if not resume:
            run.drop("probe", _FILES)
        if (finished := _finished(run, request)) is not None:
            return finished
        run.update_manifest(commands={"probe": {"state": "running", "request": request}})
        job.run = run
    result = _probe_and_compare(job, range(seed, seed + splits))
    if run is not None:
        _finish(run, job, result, time.perf_counter() - started)
    return result


def _probe_and_compare(job: Job, seeds: Sequence[int]) -> Probes:
    lens, baseline = job.lens, job.baseline
    moe: list[ModelScores] = []
    dense: list[ModelScores] = []
    joint: dict[str, dict[str, list[Estimates]]] = {}
    for seed in seeds:
        moe.append(job.scores(lens, Role.MOE if lens.spec.is_moe else Role.DENSE, seed))
        if baseline is not None:
            dense.append(job.scores(baseline, Role.DENSE, seed, is_baseline=True))
        if job.draws_cells:
            for arm, both in job.equal_estimates(seed).items():
                for role, found in both.items():
                    joint.setdefault(arm, {}).setdefault(role, []).append(found)
    tests = [job.test_documents(seed) for seed in seeds]
    scores = arm_scores(moe, dense, tests, joint=joint, n_resamples=job.settings.n_resamples)
    comparison = comparison_table(scores, moe, dense, job.concepts)
    models = [(lens.name, moe), *([(baseline.name, dense)] if baseline is not None else [])]
    steps = _waterfall(job, scores, moe, dense, comparison, float(np.mean([len(test) for test in tests])))
    neurons = job.polysemanticity() if job.settings.neurons else None
    return Probes(_probe_table(models), comparison, steps, neurons, job.run)


def _waterfall(
    job: Job,
    scores: ArmScores,
    moe: Sequence[ModelScores],
    dense: Sequence[ModelScores],
    comparison: pd.DataFrame,
    n_documents: float,
) -> pd.DataFrame:
    """Where the gap goes, in every metric, at the numbers of neurons that equal cells were drawn for."""
    group_of = {c.name: c.group or c.name for c in job.concepts}
    tables = []
    for metric, k in product(METRICS, job.equal_k if dense else ()):
        gaps = gap_bootstraps(scores, metric, k)
        null = None
        if k == 1 and metric in NULL_METRICS and len(nulls := nulls_of(moe, dense)) == 2:
            null = mean_null_gap(nulls, metric, common_concepts(gaps), group_of)
        rows = comparison[(comparison.concept == MEAN) & (comparison.metric == metric) & (comparison.k == k)]
        columns = ["arm", *(name for name in COUNTS if name in rows.columns)]
        counts = {row.pop("arm"): {**row, "n_documents": n_documents} for row in rows[columns].to_dict("records")}
        tables.append(waterfall(gaps, group_of=group_of, metric=metric, k=k, null=null, counts=counts))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _settings(
    lens: Lens, baseline: Lens | None, *, k: Sequence[int] | None, batch_size: int | None, **rest: Any
) -> ProbeSettings:
    ks = check_k(k, [m.spec for m in (lens, baseline) if m is not None])
    limits = [m.spec.max_positions for m in (lens, baseline) if m is not None and m.spec.max_positions]
    rest["max_length"] = min([rest["max_length"], *limits])
    if rest["rank"] not in RANKINGS:
        raise BadConfig(f"unknown neuron ranking {rest['rank']!r}: choose one of {', '.join(RANKINGS)}")
    for name in ("draws", "permutations"):
        if rest[name] < 0:
            raise BadConfig(f"--{name} is {rest[name]}: give 0 to leave it out, or how many")
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


def _finished(run: Run, request: dict[str, Any]) -> Probes | None:
    """An identical finished run is read back; a different one is refused."""
    entry = run.manifest["commands"].get("probe")
    if entry is None:
        return None
    before = entry["request"]
    differs = [key for key in request if before.get(key) != request[key]]
    if differs:
        raise BadOutput(
            f"{run.path} holds a probe run with other settings ({', '.join(differs)}): give another -o, or "
            f"--no-resume to replace it; --resume only continues a run with the same settings"
        )
    if entry["state"] == "done":
        return Probes.of(run)
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


def _finish(run: Run, job: Job, result: Probes, seconds: float) -> None:
    run.write("probe", result.cells)
    run.write("comparison", result.comparison)
    if len(result.steps):
        run.write("waterfall", result.steps)
    if result.neurons is not None:
        run.write("neurons", result.neurons.neurons)
        run.write("neuron_layers", result.neurons.layers)
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
                "texts": {
                    **job.corpus.skipped,
                    "read_in_windows": int((tokenized.document_lengths > tokenized.max_length).sum()),
                },
            }
        }
    )
    run.clear_partial("probe")
    if job.max_memory is not None and (peak := peak_memory_bytes()) > job.max_memory:
        log.warning(
            "the run held %s and --max-memory is %s: it cuts the layers; model, text and libraries come first",
            gigabytes(peak), gigabytes(job.max_memory),
        )  # fmt: skip

"""``moe_lens.validate``: put labels on trial, and keep the result in a run directory.

    labels = ml.autointerp(lens, ml.corpus("bundled:"), labeller="lexical", out="runs/a")
    trial = ml.validate(lens, ml.corpus("bundled:"), labels, out="runs/a")
    trial.verdicts, trial.finding(), trial.plot("L2.E7")

1. A finished trial of the same labels and settings is read back.
2. Else `run.validate`; every expert that is measured is kept in the run directory until the trial is finished.
3. validation.parquet, validation.md, and the entry of the manifest that `Trial.of` reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from moe_lens.capture.run import MANIFEST, Run, create_run, digest, identity_of, peak_memory_bytes
from moe_lens.capture.store import replacing
from moe_lens.causal.trial import run as trial
from moe_lens.causal.trial.hearing import POSITIONS
from moe_lens.causal.trial.nulls import NULL_LABELS, check_kinds
from moe_lens.causal.trial.result import PAGE, TABLE, Trial
from moe_lens.causal.trial.verdict import VERDICT_MODES
from moe_lens.corpus.batches import Tokenized, tokenize
from moe_lens.corpus.splits import assign_splits
from moe_lens.errors import BadConfig, MoELensError

if TYPE_CHECKING:
    from pathlib import Path

    from moe_lens.causal.trial.judge import Judge
    from moe_lens.causal.trial.measured import Positions
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens
    from moe_lens.types import ExpertAddress

COMMAND = "validate"
N_LABELS = 32
MAX_LENGTH = 256
_SAYS = ("layer", "expert", "facet", "label", "rule", "concept", "status")
"""Columns of a table of labels that a trial reads."""


def validate(
    lens: Lens,
    corpus: Corpus | Tokenized,
    labels: pd.DataFrame | Any,
    *,
    judge: Judge | None = None,
    second_judge: Judge | None = None,
    judge_positions: int = POSITIONS,
    null_tables: Mapping[str, pd.DataFrame] | None = None,
    experts: Sequence[str | ExpertAddress] | None = None,
    n_labels: int | None = N_LABELS,
    modes: Sequence[str] = VERDICT_MODES,
    null_labels: Sequence[str] = NULL_LABELS,
    controls: Literal["trial", "layer"] = "trial",
    positions: Positions = "all",
    horizon: int = 1,
    draws: int = 2000,
    max_tokens: int | None = trial.MAX_TOKENS,
    document_tokens: int | None = None,
    max_length: int = MAX_LENGTH,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Trial:
    """Whether labels say where their experts are visited, and whether the experts are needed there (METRICS 3).

    Args:
        labels: a table with ``layer, expert, label`` and ``rule`` or ``concept``, or what `ml.autointerp` returned.
        judge: says where labels hold, blind to routing; None means their rules and concepts.
        second_judge: judges a tenth of such tokens again, for Cohen's kappa.
        judge_positions: visits that a judge is asked about for each label, and as many other tokens.
        null_tables: false labels made elsewhere, by kind, as tables like `labels`.
        experts: try all labels of these, and no others.
        n_labels: where no experts are named, try a random sample that holds experts of all loads; None tries all.
        document_tokens: tokens to read of each document; by default as many as lets all test documents in.
        max_length: tokens per window.
        out: run directory; measurements of a killed run in it are not repeated.
        resume: False starts anew.

    The other arguments are those of `moe_lens.causal.trial.run.validate`, which says what a verdict is worth.

    Raises:
        BadConfig, BadConcept, BadCorpus, BadOutput, OutOfRange, UnknownConcept: see each message for the fix.
    """
    table = table_of(labels)
    settings: dict[str, Any] = {
        "experts": None if experts is None else sorted(str(lens.address(e)) for e in experts),
        "n_labels": n_labels if experts is None else None, "modes": list(modes), "null_labels": list(null_labels),
        "controls": controls, "positions": positions, "horizon": horizon, "draws": draws, "max_tokens": max_tokens,
        "judge_positions": judge_positions, "seed": seed,
    }  # fmt: skip
    check_settings(modes, null_labels, horizon=horizon, draws=draws, judge_positions=judge_positions)
    arguments: dict[str, Any] = {"judge": judge, "second_judge": second_judge, "null_tables": null_tables or {}}
    text = text_of(lens, corpus, document_tokens=document_tokens, max_length=max_length, seed=seed)

    def attempt(store: Path | None) -> Trial:
        return trial.validate(lens, text, table, store=store, progress=progress, **settings, **arguments)

    if out is None:
        return attempt(None)
    words = corpus.corpus if isinstance(corpus, Tokenized) else corpus
    run = create_run(out, identity_of(lens, words, seed=seed))
    request = _request(table, settings, arguments) | _reading(corpus, document_tokens, max_length)
    return _kept(run, request, attempt, [judge, second_judge], resume=resume)


def _kept(
    run: Run,
    request: dict[str, Any],
    attempt: Callable[[Path], Trial],
    judges: Sequence[Judge | None],
    *,
    resume: bool,
) -> Trial:
    """The trial of `request` from the run directory, else made with `attempt` and written there."""
    started = time.perf_counter()
    if resume and (found := _finished(run, request)) is not None:
        return found
    if not resume:
        run.clear_partial(COMMAND)
    before = _start(run)
    try:
        result = attempt(run.partial(COMMAND))
    except MoELensError:
        _take_back(run, before)
        raise
    complete = all(getattr(judge, "complete", True) for judge in judges)
    seconds = round(time.perf_counter() - started, 2)
    _finish(run, result, {"request": request, "complete": complete, "seconds": seconds})
    return Trial.of(run)


def check_settings(
    modes: Sequence[str],
    null_labels: Sequence[str],
    *,
    horizon: int = 1,
    draws: int = 2000,
    judge_positions: int = POSITIONS,
) -> None:
    """What can be refused before a model is loaded.

    Raises:
        BadConfig: an unknown mode or kind of false labels, a mode that a verdict needs is missing, bad numbers.
    """
    trial._check_settings(modes, horizon, draws, judge_positions)
    check_kinds(null_labels, ())


def table_of(labels: pd.DataFrame | Any) -> pd.DataFrame:
    """Labels as a table of the columns that a trial reads.

    Raises:
        BadConfig: neither a table nor an object that has one in ``.labels``, or without layer, expert and label.
    """
    table = labels if isinstance(labels, pd.DataFrame) else getattr(labels, "labels", None)
    if not isinstance(table, pd.DataFrame):
        raise BadConfig(
            f"labels= is a {type(labels).__name__}: give a table with layer, expert, label and rule (pd.read_csv reads "
            "one), or what ml.autointerp returned"
        )
    return table[[name for name in _SAYS if name in table]].reset_index(drop=True)


def text_of(
    lens: Lens, corpus: Corpus | Tokenized, *, document_tokens: int | None, max_length: int, seed: int
) -> Corpus | Tokenized:
    """The text as it is, for `run.validate` to read so that all test documents fit in, or tokenised as asked for."""
    if isinstance(corpus, Tokenized) or (document_tokens, max_length) == (None, MAX_LENGTH):
        return corpus
    length = min(max_length, lens.spec.max_positions or max_length)
    splits = assign_splits(corpus, seed=seed)
    return tokenize(
        corpus, lens.tokenizer, [], splits=splits, max_length=length, document_tokens=document_tokens, seed=seed
    )


def _request(table: pd.DataFrame, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a finished trial is recognised by."""
    judges = {name: getattr(arguments[name], "name", None) for name in ("judge", "second_judge")}
    tables = {kind: _digest(table_of(found)) for kind, found in arguments["null_tables"].items()}
    return {**settings, **judges, "labels": _digest(table), "null_tables": tables}


def _reading(corpus: Corpus | Tokenized, document_tokens: int | None, max_length: int) -> dict[str, Any]:
    found = {"document_tokens": document_tokens, "max_length": max_length}
    if isinstance(corpus, Tokenized):  # read in windows that somebody else cut
        found["tokens"] = digest([corpus.offsets.tolist(), corpus.splits.tolist()])
    return found


def _digest(table: pd.DataFrame) -> str:
    return digest(table.astype(object).where(table.notna(), None).to_dict("records"))


def _entry(run: Run) -> dict[str, Any] | None:
    return run.manifest["commands"].get(COMMAND)


def _finished(run: Run, request: Mapping[str, Any]) -> Trial | None:
    """The trial of this request, None if there is none, or if a judge left questions open."""
    entry = _entry(run) or {}
    done = entry.get("request") == request and entry.get("complete") and run.has(TABLE)
    return Trial.of(run) if done else None


def _start(run: Run) -> dict[str, Any] | None:
    """Say that a trial is running, beside what an earlier one left: its result stays until there is a new one."""
    before = _entry(run)
    run.update_manifest(commands={COMMAND: (before or {}) | {"state": "running"}})
    return before


def _take_back(run: Run, before: Mapping[str, Any] | None) -> None:
    """Leave the directory as it was before a trial that was refused; what was measured already stays."""
    if run.partial(COMMAND).is_dir():
        return
    if before is not None:
        run.update_manifest(commands={COMMAND: dict(before)})
        return
    run.drop(COMMAND, ())
    if [path.name for path in run.path.iterdir()] == [MANIFEST]:
        (run.path / MANIFEST).unlink()
        run.path.rmdir()


def _finish(run: Run, result: Trial, entry: Mapping[str, Any]) -> None:
    run.update_manifest(commands={COMMAND: {"state": "running"}})  # the old entry is not that of the new table
    run.write(TABLE, result.frame)
    with replacing(run.path / PAGE) as page:
        page.write_text(result.to_markdown(), encoding="utf-8")
    done = {"state": "done", **entry, "settings": dict(result.settings), "peak_memory": peak_memory_bytes()}
    run.update_manifest(commands={COMMAND: done})
    run.clear_partial(COMMAND)

"""What labelling and scoring need from one pass: exemplars, logit lens, and the routing of sampled windows.

``capture_exemplars`` makes it with a model, ``captured_of`` reads it back from a run directory without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moe_lens.autointerp.exemplars import exemplar_table
from moe_lens.autointerp.logit_lens import logit_lens
from moe_lens.capture.checkpointed import checkpointed_stream
from moe_lens.capture.exemplars import TopExemplars
from moe_lens.capture.routing import RoutingStats
from moe_lens.capture.run import digest, write_routing
from moe_lens.capture.store import read_state, write_state
from moe_lens.corpus.batches import Tokenized, batches, tokenize
from moe_lens.errors import BadConfig, BadOutput, UnsupportedModel

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.capture.run import Run
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens

STATE = "exemplars.safetensors"
"""File of the run directory with the sampled visits and windows."""


@dataclass(frozen=True)
class CaptureSettings:
    """Everything that can change an exemplar, beside model and corpus."""

    layers: tuple[int, ...]
    max_length: int = 256
    max_tokens: int | None = None
    document_tokens: int | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": list(self.layers)}


@dataclass(frozen=True)
class Captured:
    """One pass of a model over a text."""

    tokenized: Tokenized
    tokenizer: Any
    kept: TopExemplars
    exemplars: pd.DataFrame
    logit_lens: pd.DataFrame | None
    """None for the few families without one."""
    n_tokens: int


def capture_exemplars(
    lens: Lens, corpus: Corpus, settings: CaptureSettings, *, batch_tokens: int, run: Run | None, progress: bool = True
) -> Captured:
    """One pass for all layers: exemplars, logit lens and routing tables, written to `run` if there is one.

    A pass that was killed continues from what it saved into the run directory.
    """
    tokenized = _tokenized(corpus, lens.tokenizer, settings)
    kept, routing = TopExemplars(tokenized.splits, seed=settings.seed), RoutingStats(len(corpus))
    # a pass that was killed is only continued by one that would do the same
    same_pass = digest(settings.to_dict() | {"batch_tokens": batch_tokens})
    partial = None if run is None else run.partial("autointerp") / f"{same_pass}.safetensors"
    loader = batches(tokenized, split=None, tokens_per_batch=batch_tokens)
    layers = list(settings.layers)
    n_tokens = checkpointed_stream(
        lens, loader, [kept, routing], partial, layers=layers, progress=progress, describe="capture"
    )
    exemplars = exemplar_table(kept, tokenized, lens.tokenizer, seed=settings.seed)
    try:
        words = logit_lens(lens, kept, exemplars)
    except UnsupportedModel:
        words = None
    captured = Captured(tokenized, lens.tokenizer, kept, exemplars, words, n_tokens)
    if run is not None:
        _write(run, captured, settings)
        if not run.has("routing"):
            write_routing(run, routing, corpus)
        run.clear_partial("autointerp")
    return captured


def _tokenized(corpus: Corpus, tokenizer: Any, settings: CaptureSettings) -> Tokenized:
    return tokenize(
        corpus,
        tokenizer,
        [],
        max_length=settings.max_length,
        limit_tokens=settings.max_tokens,
        document_tokens=settings.document_tokens,
        seed=settings.seed,
    )


def _write(run: Run, captured: Captured, settings: CaptureSettings) -> None:
    """Tables first, then the entry that says they are complete."""
    run.write("exemplars", captured.exemplars)
    if captured.logit_lens is not None:
        run.write("logit_lens", captured.logit_lens)
    # what was written into the residual stream is nine tenths of the file and lives on in the logit lens
    state = captured.kept.state_dict()
    state = {name: value[:, :0] if name.endswith(".direction") else value for name, value in state.items()}
    write_state(run.path / STATE, state)
    entry = {"settings": settings.to_dict(), "n_tokens": captured.n_tokens}
    run.update_manifest(commands={"autointerp": _entry(run) | {"capture": entry}})


def _entry(run: Run) -> dict[str, Any]:
    return run.manifest["commands"].get("autointerp", {"state": "running"})


def captured_settings(run: Run) -> CaptureSettings | None:
    """Settings of the finished capture in `run`, None if it has none."""
    found = _entry(run).get("capture")
    if found is None or not run.has("exemplars") or not (run.path / STATE).exists():
        return None
    return CaptureSettings(**found["settings"] | {"layers": tuple(found["settings"]["layers"])})


def captured_of(run: Run, corpus: Corpus, tokenizer: Any) -> Captured:
    """What an earlier command captured into `run`; no model is loaded.

    Raises:
        BadOutput: nothing was captured into it, or from another text.
    """
    settings = captured_settings(run)
    if settings is None:
        raise BadOutput(f"{run.path} holds no exemplars: run moe-lens autointerp --model ... -o {run.path} first")
    if run.manifest["corpus"]["sha256"] != corpus.sha256:
        raise BadOutput(
            f"{run.path} was made from another text than {corpus.name!r}: pass the text of that run as corpus=, with "
            "the limit it was read with"
        )
    tokenized = _tokenized(corpus, tokenizer, settings)
    kept = TopExemplars(tokenized.splits, seed=settings.seed)
    kept.load_state_dict(read_state(run.path / STATE))
    words = run.frame("logit_lens") if run.has("logit_lens") else None
    n_tokens = int(_entry(run)["capture"]["n_tokens"])
    return Captured(tokenized, tokenizer, kept, run.frame("exemplars"), words, n_tokens)


def same_settings(run: Run, wanted: CaptureSettings) -> bool:
    """Whether `run` holds the exemplars that `wanted` would give.

    Raises:
        BadOutput: it holds others.
    """
    have = captured_settings(run)
    if have is None:
        return False
    mine, theirs = wanted.to_dict(), have.to_dict()
    if set(wanted.layers) <= set(have.layers):
        mine["layers"] = theirs["layers"]
    differs = [f"--{name.replace('_', '-')}" for name in mine if mine[name] != theirs[name]]
    if differs:
        raise BadOutput(
            f"{run.path} holds exemplars that were captured with other settings ({', '.join(differs)}): give another "
            "-o, or --no-resume to capture anew"
        )
    return True


def chosen_experts(
    captured: Captured, experts: Sequence[tuple[int, int]] | None, layers: Sequence[int] | None
) -> list[tuple[int, int]]:
    """Experts to label: `experts`, or all of `layers`, or all that were captured.

    Raises:
        BadConfig: no expert is left.
    """
    known = {layer: len(captured.kept.n_visits(layer, "select")) for layer in captured.kept.check_layers(layers)}
    everyone = [(layer, expert) for layer, n in known.items() for expert in range(n)]
    found = everyone if experts is None else [at for at in everyone if at in set(experts)]
    if not found:
        raise BadConfig("no expert of the chosen layers was named: give --experts from the layers of --layers")
    return found

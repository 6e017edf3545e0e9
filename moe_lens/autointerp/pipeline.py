"""``moe_lens.autointerp``: a label for every expert, and scores that say what each label is worth.

    labels = ml.autointerp(lens, ml.corpus("bundled:"), labeller="lexical", out="runs/a")
    labels.frame, labels.finding(), labels["L2.E7"]

1. One pass keeps exemplars of every expert, and the routing of sampled windows.
2. The labeller reads exemplars of the select documents.
3. Scorers judge tokens of the validate documents that the labeller has not seen (METRICS 1.6).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.autointerp.captured import (
    STATE,
    Captured,
    CaptureSettings,
    capture_exemplars,
    captured_of,
    chosen_experts,
    same_settings,
)
from moe_lens.autointerp.endpoint import LEXICAL, RULE, Clients, Name, check_name, read_name, served_model
from moe_lens.autointerp.labels import given_labels, label_frame, read_labels, with_none
from moe_lens.autointerp.result import Labels
from moe_lens.autointerp.score import Scoring, score_labels
from moe_lens.autointerp.tables import replace_rows
from moe_lens.autointerp.transport import URL_VARIABLE
from moe_lens.capture.run import Run, create_run, identity_of, peak_memory_bytes
from moe_lens.errors import BadConfig, OutOfRange
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens

REPLIES = "replies.sqlite"
"""File of the run directory with every reply of a language model; it outlives ``--no-resume``."""
_TABLES = ("exemplars", "logit_lens", "labels", "label_answers", "label_scores", "label_summary")
_FILES = (*(f"{table}.parquet" for table in _TABLES), STATE)


@dataclass(frozen=True)
class Asked:
    """Who labels and who scores, settled before any work."""

    labeller: Name | None
    """None where labels are given."""
    given: pd.DataFrame | None
    scorers: tuple[Name, ...]
    base_url: str | None

    @property
    def name(self) -> str:
        """What stands in the column `labeller`."""
        if self.given is None:
            return str(self.labeller)
        return str(self.given["labeller"].iloc[0])


def autointerp(
    source: Lens | Run,
    corpus: Corpus | None = None,
    *,
    labeller: str | None = None,
    labels: str | Path | pd.DataFrame | None = None,
    scorer: str | Sequence[str] | None = None,
    base_url: str | None = None,
    layers: Sequence[int] | None = None,
    experts: Sequence[str | ExpertAddress] | None = None,
    facets: int = 0,
    items: int = 20,
    fuzz: bool = True,
    control: bool = True,
    max_calls: int | None = None,
    token_budget: int | None = None,
    concurrency: int = 16,
    timeout: float = 60,
    reply_tokens: int | None = None,
    max_length: int = 256,
    max_tokens: int | None = None,
    document_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Labels:
    """Label experts, and score the labels on tokens that the labeller has not seen (METRICS 1.6).

    Args:
        source: a model, or a run directory that holds exemplars; then no model is loaded.
        corpus: the text; may be left out for a run on the bundled text.
        labeller: ``openai:MODEL``, ``gguf:FILE`` or ``lexical``. By default the first model that `base_url` serves,
            ``lexical`` without one.
        labels: a CSV file or a table with ``layer, expert, label[, rule]`` to score instead of a labeller's.
        scorer: one or several of ``openai:MODEL``, ``gguf:FILE``, ``embedding:MODEL``, ``rule``. By default the
            labeller's own model, and the rules of labels that have one.
        base_url: address of an OpenAI-compatible server. The key comes from ``OPENAI_API_KEY``.
        layers, experts: those to label, all by default. Exemplars are kept for all experts of `layers`.
        facets: ask for up to this many facets per expert instead of one label.
        items: tokens of each kind per expert that a language model judges. Rules judge all.
        fuzz: language models also judge positives with a moved mark.
        control: language models also judge the label of another expert of the layer (the shuffled control).
        max_calls, token_budget: calls to servers (repetitions after an error not counted), and tokens of prompts and
            replies, after which no call is made; what is left then is ``not_run`` and ``budget``.
        reply_tokens: longest reply to ask for.
        max_length, max_tokens, document_tokens, batch_size, seed: as in ``moe_lens.probe``.
        out: run directory; a killed run in it repeats no call and no saved batch.

    Raises:
        BadConfig, BadOutput, OutOfRange, BadCorpus: see each message for the fix.

    A good score shows that the label predicts which tokens are routed to the expert. It does not show what the
    expert does with them; that takes an ablation.
    """
    started = time.perf_counter()
    spec = None if isinstance(source, Run) else source.spec
    if isinstance(labels, str | Path):
        labels = read_labels(labels, spec)
    asked = settle(labeller, labels, scorer, base_url, facets=facets)
    check_servers(asked)
    run, captured = _captured(
        source,
        corpus,
        layers=layers,
        max_length=max_length,
        max_tokens=max_tokens,
        document_tokens=document_tokens,
        batch_size=batch_size,
        seed=seed,
        out=out,
        resume=resume,
        progress=progress,
    )
    chosen = chosen_experts(captured, _addresses(experts), layers)
    scoring = Scoring(items=items, fuzz=fuzz, control=control, seed=seed)
    request = {"facets": facets, "scorers": list(map(str, asked.scorers))}
    request |= scoring.to_dict() | ({"labels": _digest(asked.given)} if asked.given is not None else {})
    if run is not None and resume and _finished(run, asked.name, chosen) == request:
        return Labels.of(run, labeller=asked.name)
    with Clients(
        base_url=asked.base_url,
        cache=None if run is None else run.path / REPLIES,
        max_calls=max_calls,
        token_budget=token_budget,
        reply_tokens=reply_tokens,
        concurrency=concurrency,
        timeout=timeout,
    ) as clients:
        result = _label_and_score(run, captured, asked, clients, chosen, scoring, facets=facets, progress=progress)
        spent = clients.spent | {"failures": dict(result.failures)}
    if run is not None:
        seconds = round(time.perf_counter() - started, 2)
        places = zip(result.labels["layer"].tolist(), result.labels["expert"].tolist(), strict=True)
        entry = {"request": request, "experts": sorted(set(places)), "outcomes": dict(result.outcomes), **spent}
        _finish(run, result, entry | {"seconds": seconds})
    return result


def _label_and_score(
    run: Run | None,
    captured: Captured,
    asked: Asked,
    clients: Clients,
    chosen: list[tuple[int, int]],
    scoring: Scoring,
    *,
    facets: int,
    progress: bool,
) -> Labels:
    found = _labels(captured, asked, clients, chosen, facets=facets, seed=scoring.seed, progress=progress)
    clients.check()
    found = _with_earlier(run, asked, found)
    if run is not None:
        _start(run, asked.name)
        replace_rows(run, "labels", found, labeller=asked.name)
    scored = score_labels(captured, found, asked.scorers, clients, scoring, progress=progress)
    clients.check()
    return Labels(
        labels=found,
        scores=scored.frame,
        summary=scored.summary,
        answers=scored.answers,
        exemplars=captured.exemplars,
        outcomes=clients.outcomes,
        failures=clients.failures,
        run=run,
    )


def settle(
    labeller: str | None,
    labels: pd.DataFrame | None,
    scorer: str | Sequence[str] | None,
    base_url: str | None,
    *,
    facets: int = 0,
) -> Asked:
    """Who labels and who scores.

    Raises:
        BadConfig: a name that cannot be read, labels beside a labeller, facets of a labeller that has none, or
            labels that nothing could score.
    """
    url = base_url or os.environ.get(URL_VARIABLE) or None
    if labels is not None and labeller is not None:
        raise BadConfig("--labels and --labeller exclude each other: give the labels or somebody to write them")
    name = None
    if labels is None:
        found = labeller or (f"openai:{served_model(url)}" if url else LEXICAL)
        name = read_name(found, option="--labeller", without_model=LEXICAL)
        if facets and name.kind == LEXICAL:
            raise BadConfig("--facets needs a language model: give --labeller openai:MODEL, or leave it out")
    else:
        labels = given_labels(labels)
        if not len(labels):
            raise BadConfig("there is no label to score: give a table with a row for each")
    texts = [scorer] if isinstance(scorer, str) else list(scorer or [])
    scorers = [read_name(text, option="--scorer", without_model=RULE) for text in texts]
    if not scorers:
        scorers = [] if name is None or name.kind == LEXICAL else [name]
        if labels is None or labels["rule"].notna().any():
            scorers.append(Name(RULE))
    if not scorers:
        raise BadConfig("none of these labels has a rule: give --scorer openai:MODEL to judge them, or add rules")
    for kinds, what in ((("openai", "gguf"), "chat model"), (("embedding",), "embeddings model")):
        if sum(one.kind in kinds for one in dict.fromkeys(scorers)) > 1:
            raise BadConfig(f"--scorer names more than one {what}: give one at a time, each with an -o of its own")
    return Asked(name, labels, tuple(dict.fromkeys(scorers)), url)


def check_servers(asked: Asked) -> None:
    """Complain about a key that is missing or impossible, or a file that cannot be served; nobody is called.

    Raises:
        BadConfig: see the message.
    """
    for name in {name for name in (asked.labeller, *asked.scorers) if name is not None}:
        check_name(name, asked.base_url)


def _captured(
    source: Lens | Run,
    corpus: Corpus | None,
    *,
    layers: Sequence[int] | None,
    batch_size: int | None,
    out: str | Path | None,
    resume: bool,
    progress: bool,
    **settings: Any,
) -> tuple[Run | None, Captured]:
    if isinstance(source, Run):
        if out is not None and Path(out) != source.path:
            raise BadConfig(f"labels of {source.path} are written into it: leave out= away, or give a model")
        return source, captured_of(source, corpus or _text_of(source), _tokenizer_of(source))
    if corpus is None:
        raise BadConfig("no text was given: pass a corpus, such as ml.corpus('bundled:')")
    if source.spec.max_positions:
        settings["max_length"] = min(settings["max_length"], source.spec.max_positions)
    moe = [layer for layer in source.check_layers(layers) if layer in source.spec.moe_layers]
    wanted = CaptureSettings(tuple(moe), **settings)
    run = None
    if out is not None:
        run = create_run(out, identity_of(source, corpus, seed=wanted.seed))
        if not resume:
            run.drop("autointerp", _FILES)
        elif same_settings(run, wanted):
            return run, captured_of(run, corpus, source.tokenizer)
        entry = run.manifest["commands"].get("autointerp", {})
        run.update_manifest(commands={"autointerp": entry | {"state": "running"}})
    batch_tokens = 4096 if batch_size is None else batch_size * wanted.max_length
    return run, capture_exemplars(source, corpus, wanted, batch_tokens=batch_tokens, run=run, progress=progress)


def _text_of(run: Run) -> Corpus:
    from moe_lens.corpus.text import BUNDLED
    from moe_lens.corpus.text import corpus as read_corpus

    if run.manifest["corpus"]["id"] != BUNDLED:
        raise BadConfig(f"{run.path} was made from {run.manifest['corpus']['id']}: pass that text as corpus=")
    return read_corpus(BUNDLED)


def _tokenizer_of(run: Run) -> Any:
    from moe_lens.models import source

    model = run.manifest["model"]
    return source.read_tokenizer(source.resolve(model["name"]), source.Options(model["revision"], False, False))


def _addresses(experts: Sequence[str | ExpertAddress] | None) -> list[tuple[int, int]] | None:
    if experts is None:
        return None
    found = [ExpertAddress.parse(text) for text in experts]
    return [(at.layer, at.expert) for at in found]


def _labels(
    captured: Captured,
    asked: Asked,
    clients: Clients,
    chosen: list[tuple[int, int]],
    *,
    facets: int,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """Labels of the chosen experts."""
    if asked.given is not None:
        places = list(zip(asked.given["layer"].tolist(), asked.given["expert"].tolist(), strict=True))
        everyone = set(chosen_experts(captured, None, None))
        for at in places:
            if at not in everyone:
                raise OutOfRange(
                    f"there is a label for {ExpertAddress(*at)}, of which there are no exemplars: correct it"
                )
        found = asked.given[[at in set(chosen) for at in places]].reset_index(drop=True)
        if not len(found):
            raise BadConfig("none of the labels is for an expert that was chosen: correct --labels, or --experts")
        return found
    assert asked.labeller is not None
    if asked.labeller.kind == LEXICAL:
        from moe_lens.autointerp.lexical import lexical_labels

        return lexical_labels(
            captured.kept,
            captured.tokenized,
            captured.tokenizer,
            captured.exemplars,
            captured.logit_lens,
            layers=sorted({layer for layer, _ in chosen}),
            experts=chosen,
            seed=seed,
            progress=progress,
        )
    from moe_lens.autointerp.explain import explain

    return explain(
        clients.of(asked.labeller),
        captured.exemplars,
        captured.logit_lens,
        experts=chosen,
        corpus_name=captured.tokenized.corpus.name,
        facets=facets,
        labeller=str(asked.labeller),
        progress=progress,
    )


def _digest(labels: pd.DataFrame | None) -> str:
    from moe_lens.capture.run import digest

    if labels is None:
        return ""
    says = [name for name in ("layer", "expert", "facet", "label", "rule", "concept") if name in labels]
    return digest(labels[says].to_dict("records"))


def _with_earlier(run: Run | None, asked: Asked, found: pd.DataFrame) -> pd.DataFrame:
    """`found`, and the labels that the labeller gave other experts before. A given table is always the whole."""
    if run is None or asked.given is not None or not run.has("labels"):
        return found
    before = run.frame("labels")
    now = set(found[["layer", "expert"]].itertuples(index=False, name=None))
    other = [at not in now for at in before[["layer", "expert"]].itertuples(index=False, name=None)]
    others = before[(before["labeller"] == asked.name) & pd.Series(other, index=before.index)]
    return label_frame([*found.to_dict("records"), *with_none(others).to_dict("records")]) if len(others) else found


def _finished(run: Run, labeller: str, chosen: list[tuple[int, int]]) -> dict[str, Any] | None:
    """Request of the finished labels of this labeller in `run`, None if not all of `chosen` are among them."""
    entry = run.manifest["commands"].get("autointerp", {})
    found = entry.get("labellers", {}).get(labeller)
    if not found or not run.has("label_scores"):
        return None
    unpaid = {"failed", "budget"} & {name for name, n in found["outcomes"].items() if n}
    missing = set(chosen) - {tuple(at) for at in found["experts"]}
    return None if unpaid or missing else found["request"]


def _start(run: Run, labeller: str) -> None:
    """From here on earlier scores of `labeller` are not those of its labels."""
    before = run.manifest["commands"].get("autointerp", {})
    others = {name: entry for name, entry in before.get("labellers", {}).items() if name != labeller}
    run.update_manifest(commands={"autointerp": before | {"state": "running", "labellers": others}})


def _finish(run: Run, result: Labels, entry: dict[str, Any]) -> None:
    labeller = result.labeller
    replace_rows(run, "label_answers", result.answers.assign(labeller=labeller), labeller=labeller)
    replace_rows(run, "label_scores", result.scores, labeller=labeller)
    replace_rows(run, "label_summary", result.summary, labeller=labeller)
    before = run.manifest["commands"].get("autointerp", {})
    labellers = before.get("labellers", {}) | {labeller: entry}
    done = {"state": "done", "labellers": labellers, "peak_memory": peak_memory_bytes()}
    run.update_manifest(commands={"autointerp": before | done})

"""``trigger_target(lens, folder)``: the experiment of arXiv 2604.02178, section 5.3, with an ablation.

1. Read the cases, find trigger and target among the tokens, note what is wrong with each.
2. Follow every text through the clean model: is the expert chosen at the trigger, what does it write to the target's
   logit, and where do other experts have a like gate?
3. Take the expert away at the trigger alone, then experts chosen beside it, then those with like gates elsewhere.
4. One row per expert and mode, intervals over texts.

What differs from the source: the position is the trigger's last token in the sequence that the model reads (not the
one with the largest gate for the expert), the target is the token that starts it after a space, the final norm has
the scale of the final residual, ranks stand beside those of experts with like gates, and there is an intervention.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from moe_lens.capture.run import Run, create_run, digest, identity_of, peak_memory_bytes
from moe_lens.capture.store import replacing, write_json, write_table
from moe_lens.causal.trial.measured import reference_text
from moe_lens.causal.triggers.cases import Case, Located, check_experts, locate, read_cases
from moe_lens.causal.triggers.direct import MATCHED, Direct, look
from moe_lens.causal.triggers.measure import BESIDE, MODES, OTHER_TARGETS, measure_layer, other_targets
from moe_lens.causal.triggers.result import CASES, COMMAND, PAGE, TABLE, Triggers
from moe_lens.causal.triggers.statistics import expert_table
from moe_lens.corpus.batches import tokenize
from moe_lens.corpus.text import BUNDLED
from moe_lens.corpus.text import corpus as read_corpus
from moe_lens.errors import BadConfig, nearest
from moe_lens.models import families
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens
    from moe_lens.models.reference import Reference
    from moe_lens.models.spec import Spec

VERDICT_MODES = ("zero", "mean_off")
REFERENCE_TOKENS = 16_384
"""Read of the text that ``mean_off`` and ``mean`` are made from."""
_FILES = (f"{TABLE}.parquet", f"{CASES}.parquet", PAGE)


def trigger_target(
    lens: Lens,
    folder: str | Path,
    *,
    modes: Sequence[str] = VERDICT_MODES,
    experts: Sequence[str | ExpertAddress] | None = None,
    layers: Sequence[int] | None = None,
    corpus: Corpus | None = None,
    draws: int = 2000,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Triggers:
    """Do experts raise the targets of their cases at the triggers (METRICS 3, preamble)?

    Args:
        folder: of ``L4-E0.json`` files with lists of ``{text, trigger, target}``, or one file; see `cases`.
        modes: ``zero``, ``mean_off``, ``mean``.
        experts, layers: only cases of these.
        corpus: text that ``mean_off`` and ``mean`` take other inputs from, the bundled one by default.
        draws: bootstrap samples, sign flips and exchanges.
        out: run directory; layers that are done are not measured again after a kill.

    Raises:
        BadConfig: no cases, an unknown mode, or a model without a tokenizer.
        OutOfRange: cases of an expert that the model does not have.
        BadOutput: `out` holds another run.
        UnsupportedModel: a tokenizer without character offsets.

    A case is evidence about its own text. See `Triggers` for what the outcome does not show.
    """
    started = time.perf_counter()
    check_modes(modes, draws)
    if lens.tokenizer is None:
        raise BadConfig("this lens has no tokenizer to read cases with: make it as Lens(model, tokenizer)")
    cases = chosen_cases(Path(folder), lens.spec, experts=experts, layers=layers)
    located = locate(cases, lens.tokenizer, context=lens.spec.max_positions)
    text = corpus or read_corpus(BUNDLED)
    request = {
        "cases": digest([asdict(case) for case in cases]), "modes": list(modes), "draws": draws, "seed": seed,
        "matched": MATCHED, "beside": BESIDE, "other_targets": OTHER_TARGETS,
    }  # fmt: skip
    run = None if out is None else create_run(out, identity_of(lens, text, seed=seed))
    if run is not None:
        if not resume:
            run.drop(COMMAND, _FILES)
        elif run.manifest["commands"].get(COMMAND, {}).get("request") == request and run.has(CASES):
            return Triggers.of(run)
    parts = _measured(lens, located, text, request, run, progress=progress)
    floor = max((part.floor for part in parts), default=0.0)
    table = _case_table(located, parts, modes, lens.spec)
    settings = {
        "model": lens.name, "folder": Path(folder).name, "modes": list(modes), "seed": seed, "draws": draws,
        "noise_floor": floor, "notes": _notes(lens),
    }  # fmt: skip
    result = Triggers(expert_table(table, draws=draws, seed=seed, floor=floor), table, settings)
    return result if run is None else _written(run, result, request, started)


def check_modes(modes: Sequence[str], draws: int = 1) -> None:
    """Refuse modes that take no part.

    Raises:
        BadConfig: an unknown mode, none, or no draws.
    """
    for mode in modes:
        if mode not in MODES:
            raise BadConfig(f"triggers know no mode {mode!r}{nearest(mode, MODES)}: use {', '.join(MODES)}")
    if not modes or draws < 1:
        raise BadConfig(f"there is nothing to measure with modes {list(modes)} and {draws} draws: give one or more")


def chosen_cases(
    folder: Path,
    spec: Spec,
    *,
    experts: Sequence[str | ExpertAddress] | None = None,
    layers: Sequence[int] | None = None,
) -> list[Case]:
    """Cases of the chosen experts, checked against the model.

    Raises:
        BadConfig: no cases, or none of these experts.
        OutOfRange: cases of an expert that the model does not have.
    """
    cases = read_cases(folder)
    wanted = None if experts is None else {ExpertAddress.parse(expert) for expert in experts}
    chosen = [
        case
        for case in cases
        if (wanted is None or case.expert in wanted) and (layers is None or case.expert.layer in layers)
    ]
    if not chosen:
        have = ", ".join(dict.fromkeys(str(case.expert) for case in cases))
        raise BadConfig(f"{folder} has no case of the chosen experts: it has those of {have}")
    check_experts(chosen, spec)
    return chosen


@dataclass(frozen=True, eq=False)
class _Part:
    """What is measured in one layer: one row per used case and mode."""

    table: pd.DataFrame
    floor: float


def _measured(
    lens: Lens, located: Sequence[Located], text: Corpus, request: dict[str, Any], run: Run | None, *, progress: bool
) -> list[_Part]:
    layers = sorted({one.case.expert.layer for one in located if one.used})
    folder = None if run is None else run.partial(COMMAND) / digest(request)
    reference = None
    parts = []
    for layer in layers:
        part = None if folder is None else _kept(folder, layer)
        if part is None:
            if reference is None and set(request["modes"]) - {"zero"}:
                reference = _reference(lens, text, layers, request["seed"])
            part = _measure(lens, layer, located, reference, request, progress=progress)
            if folder is not None:
                _keep(folder, layer, part)
        parts.append(part)
    return parts


def _measure(
    lens: Lens,
    layer: int,
    located: Sequence[Located],
    reference: Reference | None,
    request: dict[str, Any],
    *,
    progress: bool,
) -> _Part:
    numbers = [i for i, one in enumerate(located) if one.used and one.case.expert.layer == layer]
    chosen = [located[i] for i in numbers]
    silent = None if progress else True
    bar = tqdm(zip(numbers, chosen, strict=True), f"L{layer} clean", len(chosen), unit="case", disable=silent)
    others = other_targets(located, seed=request["seed"])
    direct = [look(lens, one, seed=[request["seed"], number]) for number, one in bar]
    measured, floor = measure_layer(
        lens, layer, chosen, direct, [others[i] for i in numbers], modes=request["modes"], reference=reference,
        seed=request["seed"], progress=progress,
    )  # fmt: skip
    found = pd.DataFrame([_row(number, one) for number, one in zip(numbers, direct, strict=True)])
    table = measured.assign(case=np.array(numbers)[measured["case"].to_numpy()])
    return _Part(found.merge(table, on="case"), floor)


def _row(number: int, found: Direct) -> dict[str, Any]:
    controls = found.controls
    return {
        "case": number, "routed": found.routed, "gate": found.gate, "gate_rank": found.gate_rank,
        "logit": found.logit, "rank": found.rank, "elsewhere": found.elsewhere,
        "ranks_matched": [one.rank for one in controls if np.isfinite(one.rank)],
        "gates_matched": [one.gate for one in controls],
        "logit_matched": float(np.mean([one.logit for one in controls])) if controls else np.nan,
    }  # fmt: skip


def _case_table(located: Sequence[Located], parts: Sequence[_Part], modes: Sequence[str], spec: Spec) -> pd.DataFrame:
    """One row per case and mode, used or not."""
    rows = [
        {
            "case": number, "layer": one.case.expert.layer, "expert": one.case.expert.expert, "mode": mode,
            "file": one.case.file, "number": one.case.number, "text": one.case.text, "trigger": one.case.trigger,
            "target": one.case.target, "defects": [str(defect) for defect in one.defects], "used": one.used,
            "position": one.position, "trigger_tokens": one.position - one.start + 1 if one.position >= 0 else 0,
            "gap": one.gap, "target_token": one.target_token, "n_chosen": _top_k(spec, one.case.expert.layer),
        }
        for mode in modes
        for number, one in enumerate(located)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    measured = pd.concat([part.table for part in parts], ignore_index=True) if parts else _nothing()
    table = table.merge(measured, how="left", on=["case", "mode"])
    table["routed"] = table["routed"].eq(True)
    for name in ("ranks_matched", "gates_matched"):
        table[name] = [list(found) if isinstance(found, list | np.ndarray) else [] for found in table[name]]
    return table


def _nothing() -> pd.DataFrame:
    """The columns of a part without rows, where no case can be used."""
    names = ["gate", "gate_rank", "logit", "rank", "elsewhere", "logit_matched", "log_p", "log_p_at_place", "effect"]
    names += [
        "effect_at_place",
        "effect_co_selected",
        "effect_co_selected_at_place",
        "effect_matched",
        "effect_other_targets",
    ]
    kinds = {"case": "int64", "mode": "object", "routed": "object", "ranks_matched": "object"}
    kinds |= {"gates_matched": "object", **dict.fromkeys(names, "float64")}
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})


def _top_k(spec: Spec, layer: int) -> int:
    entry = spec.at(layer)
    assert entry is not None
    return entry.top_k


def _reference(lens: Lens, text: Corpus, layers: Sequence[int], seed: int) -> Reference:
    context = min(256, lens.spec.max_positions or 256)
    tokenized = tokenize(text, lens.tokenizer, [], max_length=context, limit_tokens=REFERENCE_TOKENS, seed=seed)
    return reference_text(lens, tokenized, layers, seed=seed)


def _notes(lens: Lens) -> list[str]:
    reason = families.indirect_writes(lens.model.config)
    return [] if reason is None else [f"{lens.name} {reason}, so direct attribution is not defined and left out."]


def _kept(folder: Path, layer: int) -> _Part | None:
    table, about = folder / f"L{layer}.parquet", folder / f"L{layer}.json"
    if not about.exists():
        return None
    return _Part(pd.read_parquet(table), float(json.loads(about.read_text(encoding="utf-8"))["floor"]))


def _keep(folder: Path, layer: int, part: _Part) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / f"L{layer}.parquet", part.table)
    write_json(folder / f"L{layer}.json", {"floor": part.floor})  # last: it says that the table is whole


def _written(run: Run, result: Triggers, request: dict[str, Any], started: float) -> Triggers:
    run.write(TABLE, result.frame)
    run.write(CASES, result.cases)
    with replacing(run.path / PAGE) as temporary:
        temporary.write_text(result.to_markdown(), encoding="utf-8")
    entry = {
        "request": request, "settings": dict(result.settings), "seconds": round(time.perf_counter() - started, 2),
        "peak_memory": peak_memory_bytes(),
    }  # fmt: skip
    run.update_manifest(commands={COMMAND: entry})
    run.clear_partial(COMMAND)
    return Triggers.of(run)

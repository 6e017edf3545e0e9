"""``steer(lens, prompts, suppress=...)``: what a model writes when some experts are pushed, and when others are.

1. The clean model writes a text for each prompt. Its predictions along it are what steering is measured against.
2. The push on the router logits is made as strong as the common KL needs (`strength`).
3. Experts of like load on these texts are pushed in the same way, to the KL that the steered ones came to; where one
   cannot come that far others of its layer join it (`controls`).
4. Every arm writes its texts and is scored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from moe_lens.causal.steering import prompts as reading
from moe_lens.causal.steering import score as scoring
from moe_lens.causal.steering.controls import joined, matched_controls
from moe_lens.causal.steering.direction import Direction, check_direction, direction_of
from moe_lens.causal.steering.meter import PREDICTIONS, Meter, along
from moe_lens.causal.steering.result import CLEAN, STEERED, Steering
from moe_lens.causal.steering.strength import Strength, as_given, find_strength
from moe_lens.errors import BadConfig, NotAnMoE

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

    from moe_lens.causal.steering.controls import Control, Visits
    from moe_lens.causal.steering.prompts import Given, Prompt
    from moe_lens.causal.steering.score import Goal
    from moe_lens.models.edits.base import Addresses
    from moe_lens.models.edits.steered import Steered
    from moe_lens.models.lens import Lens
    from moe_lens.types import ExpertAddress


NOTHING = 1e-6
"""Nats below which a mean KL is rounding, and there is nothing to steer controls to."""


@dataclass(frozen=True)
class Task:
    """All that was asked for, checked."""

    prompts: tuple[Prompt, ...]
    direction: Direction
    kl: float | None
    controls: int
    max_new_tokens: int
    goal: Goal
    temperature: float
    seed: int

    def settings(self, lens: Lens) -> dict[str, Any]:
        """Plain values that tell this task from others."""
        return {
            "model": lens.name, "pushes": [[str(push.expert), push.way, push.value] for push in self.direction.pushes],
            "prompts": [prompt.text for prompt in self.prompts], "kl": self.kl, "controls": self.controls,
            "max_new_tokens": self.max_new_tokens, "target": self.goal.pattern and self.goal.pattern.pattern,
            "flags": self.goal.pattern and self.goal.pattern.flags, "target_text": self.goal.text,
            "temperature": self.temperature, "seed": self.seed,
        }  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """What one arm came to."""

    name: str
    direction: Direction | None
    """None for the clean model."""
    strength: Strength
    matched: bool
    replies: list[tuple[int, ...]]
    """Token ids after each prompt."""
    texts: list[str]
    scores: Float[ndarray, "prompt"]

    def rows(self, task: Task, shares: Mapping[int, Float[ndarray, "expert"]]) -> list[dict[str, Any]]:
        """One row per prompt; `shares` of tokens that visit each expert, by layer."""
        experts = () if self.direction is None else self.direction.experts
        load = [shares[expert.layer][expert.expert] for expert in experts]
        return [
            {
                "prompt": number, "arm": self.name, "address": ", ".join(map(str, experts)),
                "load": float(np.mean(load)) if load else math.nan, "strength": self.strength.value,
                "kl": float(self.strength.kl[number]), "reached": self.strength.reached, "matched": self.matched,
                "utmost": self.strength.utmost, "n_tokens": len(self.replies[number]), "prompt_text": prompt.text,
                "text": self.texts[number], "score": float(self.scores[number]),
            }
            for number, prompt in enumerate(task.prompts)
        ]  # fmt: skip


def steer(
    lens: Lens,
    prompts: Given | Sequence[Given],
    *,
    suppress: Addresses = (),
    force: Addresses = (),
    bias: Mapping[str, float] | Mapping[ExpertAddress, float] | None = None,
    kl: float | None = 1.0,
    controls: int = 5,
    max_new_tokens: int = 32,
    target: str | re.Pattern[str] | None = None,
    target_text: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Steering:
    """Generate with experts suppressed, forced or biased at a common KL, beside control experts (METRICS 3 item 8).

    A bias is added to the router logits of the experts at every token, prompt and reply, and the router chooses anew.
    Its size is found by bisection so that the next token's distribution moves by `kl` on average along the clean
    texts; where even the utmost moves it by less (the experts are never chosen, or always), that is what is done, and
    the controls are taken to that KL.

    Args:
        prompts: a text, a conversation (messages, as in `Lens.trace`), or a list of either.
        suppress: experts to push out of the choice.
        force: experts to push into it.
        bias: expert to bias: the ratio of the biases is kept, their size follows from `kl`.
        kl: mean KL(clean || steered) of the next token, nats. None takes biases as they are and suppresses or forces
            altogether.
        controls: control experts, of the same layer and of like load and gate mass on these texts. Others join one that
            cannot come to the KL alone.
        target: regular expression: the score is the share of the generated text that it covers.
        target_text: text: the score is the mean log-probability of its tokens right after the prompt, nats.
        temperature: 0 is greedy; above it every arm draws with the same seed.
        out: run directory for steering.parquet. A result of the same settings that it holds is read, not made again.

    Raises:
        NotAnMoE: a model without a router.
        OutOfRange: an expert that the model does not have, or a prompt that does not fit the context.
        BadConfig: experts, numbers or a target that cannot be used, or a call inside `Lens.edit`.
        BadCorpus: an empty prompt, or messages that the chat template refuses.
        BadOutput: `out` holds a run of another model.
        UnsupportedModel: a router that cannot be asked again with other logits.

    A text that changes does not show that the experts alone write what is lost: later layers answer to the change.
    """
    if not lens.spec.is_moe:
        raise NotAnMoE(f"{lens.name!r} is a dense model and has no router to steer: give a Mixture-of-Experts model")
    if lens.is_edited:
        raise BadConfig("steering is measured against the clean model: leave the lens.edit block first")
    check_numbers(kl=kl, controls=controls, max_new_tokens=max_new_tokens, temperature=temperature)
    direction = direction_of(suppress, force, bias)
    check_direction(direction, lens.spec)
    goal = scoring.goal_of(target, target_text)
    more = max(max_new_tokens, len(scoring.target_ids(lens, target_text)) if target_text is not None else 0)
    found = reading.tokenised(lens.tokenizer, reading.as_prompts(prompts), lens.spec, more=more)
    task = Task(tuple(found), direction, kl, controls, max_new_tokens, goal, temperature, seed)
    if out is None:
        return _run(lens, task, progress)
    from moe_lens.causal.steering.store import in_directory

    return in_directory(lens, out, task.settings(lens), resume=resume, make=lambda: _run(lens, task, progress))


def check_numbers(*, kl: float | None, controls: int, max_new_tokens: int, temperature: float) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        BadConfig: see the sentence.
    """
    if kl is not None and not 0 < kl < math.inf:
        raise BadConfig(f"kl={kl}: give the nats that the next token is to move by, above 0, such as 1.0")
    if controls < 0:
        raise BadConfig(f"controls={controls}: give a number of control experts, 0 for none")
    if max_new_tokens < 1:
        raise BadConfig(f"max_new_tokens={max_new_tokens}: generate at least one token")
    if not 0 <= temperature < math.inf:
        raise BadConfig(f"temperature={temperature}: give 0 for greedy text, or a number above it")


def _plain(push: Any) -> list[Any]:
    return [str(push.expert), push.way, push.value]


def _run(lens: Lens, task: Task, progress: bool) -> Steering:
    n_prompts = len(task.prompts)
    with tqdm(desc="steer", unit="step", disable=None if progress else True) as bar:
        none = Strength(0.0, np.zeros(n_prompts), True, (), math.nan)
        clean = _written(lens, task, CLEAN, None, none, bar)
        most = max(1, PREDICTIONS // n_prompts)
        texts = zip(task.prompts, clean.replies, strict=True)
        meter = Meter(lens, [along(prompt.ids, reply, most=most) for prompt, reply in texts])
        visits = meter.visits(sorted({expert.layer for expert in task.direction.experts}))

        strength = _strength(meter, task.direction, task.kl, bar)
        common = float(strength.kl.mean())
        arms = [clean, _written(lens, task, STEERED, task.direction, strength, bar)]
        wanted = task.controls if task.kl is None or common > NOTHING else 0
        for number, control in enumerate(matched_controls(task.direction, visits, wanted), start=1):
            direction, found = _control(meter, task, control, common, visits, number, bar)
            arms.append(_written(lens, task, f"control_{number}", direction, found, bar, matched=control.matched))
    n_tokens = sum(len(text.ids) for text in meter.readings)
    shares = {layer: load / n_tokens for layer, (load, _) in visits.items()}
    frame = pd.DataFrame([row for arm in arms for row in arm.rows(task, shares)])
    tried = [(arm.name, *point) for arm in arms for point in arm.strength.tried]
    curve = pd.DataFrame(tried, columns=["arm", "strength", "kl"])
    return Steering(frame, curve, _visits_table(shares, visits), task.settings(lens))


def _visits_table(shares: Mapping[int, Float[ndarray, "expert"]], visits: Visits) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"layer": layer, "expert": np.arange(len(load)), "load": load, "gate_mass": visits[layer][1]})
        for layer, load in shares.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _strength(meter: Meter, direction: Direction, kl: float | None, bar: Any) -> Strength:
    def measure(strength: float) -> Float[ndarray, "prompt"]:
        bar.update()
        return meter.kl(direction.mode(strength))

    if kl is None:
        return as_given(measure, direction.given)
    return find_strength(measure, kl)


def _control(
    meter: Meter, task: Task, control: Control, common: float, visits: Visits, number: int, bar: Any
) -> tuple[Direction, Strength]:
    """A control at the common KL, joined by other experts where it cannot reach that; alone if they do not help."""
    alone = direction = task.direction.on(control.experts)
    first = found = _strength(meter, direction, None if task.kl is None else common, bar)
    rng = np.random.default_rng([task.seed, number])
    while not found.reached and found.utmost < common:
        more = joined(direction, task.direction, visits, meter.lens.spec, rng)
        if more is None:
            break
        direction, found = more, _strength(meter, more, common, bar)
    return (direction, found) if found.reached else (alone, first)


def _written(
    lens: Lens, task: Task, name: str, direction: Direction | None, strength: Strength, bar: Any, *,
    matched: bool = True,
) -> Arm:  # fmt: skip
    """Let one arm write its texts, and score them."""
    edit = None if direction is None else direction.mode(strength.value)
    replies = _generate(lens, task, bar, edit)
    texts = [lens.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in replies]
    with _edited(lens, edit):
        scores = task.goal.scores(lens, task.prompts, texts)
    return Arm(name, direction, strength, matched, replies, texts, scores)


def _edited(lens: Lens, edit: Steered | None) -> AbstractContextManager[Any]:
    return nullcontext() if edit is None else lens.edit(edit, whole_layers=True)


def _generate(lens: Lens, task: Task, bar: Any, edit: Steered | None) -> list[tuple[int, ...]]:
    """The tokens that follow each prompt, one prompt at a time: padding would change what some families compute."""
    options: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "do_sample": task.temperature > 0}
    if task.temperature > 0:
        options["temperature"] = task.temperature
    pad = getattr(lens.tokenizer, "pad_token_id", None)
    options["pad_token_id"] = pad if pad is not None else getattr(lens.tokenizer, "eos_token_id", None)
    replies = []
    for number, prompt in enumerate(task.prompts):
        ids = torch.tensor([prompt.ids], dtype=torch.long, device=lens.device)
        with torch.no_grad(), torch.random.fork_rng(), _edited(lens, edit):
            torch.manual_seed(task.seed + number)
            made = lens.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        replies.append(tuple(made[0, len(prompt.ids) :].tolist()))
        bar.update()
    return replies

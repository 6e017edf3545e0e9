"""Trigger-target cases: reading them, and finding trigger and target among a tokenizer's tokens.

A case says: where `text` has `trigger`, this expert is visited and promotes `target`. Cases are the released format
of arXiv 2604.02178 (a file ``L4-E0.json`` with a list of ``{text, trigger, target}``), or any ``.json`` or ``.jsonl``
whose entries name ``layer`` and ``expert`` too.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_lens.corpus.windows import require_offsets, whole_spans
from moe_lens.errors import BadConfig, OutOfRange
from moe_lens.types import ExpertAddress

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

    from moe_lens.models.spec import Spec

_Span = tuple[int, int]
FIELDS = ("text", "trigger", "target")
_NAME = re.compile(r"^L(\d+)[-._]?E(\d+)$", re.IGNORECASE)
_BEFORE = "a "
"""What the target is tokenised after, so that it starts a word."""


class Defect(StrEnum):
    """What is wrong with a case. The first six leave nothing to measure, the others are measured as said."""

    EMPTY = "empty field"
    TWICE = "the same case again"
    ABSENT = "trigger absent"
    TOO_LONG = "text longer than the context"
    FIRST = "trigger is the first token"
    """An attention sink (METRICS 2.4)."""
    BEGUN = "trigger inside the target"
    """At the trigger the target has begun, so there is nothing to promote."""
    OTHER_CASE = "trigger in other case"
    INSIDE = "trigger inside a word"
    REPEATED = "trigger repeated"
    """Used is the last one before the target, or of all if the target is not in the text."""
    AT_END = "trigger at the end"
    """Nothing follows in the text."""
    SPLIT_TRIGGER = "several trigger tokens"
    """The last one is used."""
    SPLIT_TARGET = "several target tokens"
    """The first one is used."""
    BARE_TARGET = "target token without a space"
    """The target starts no word, in the text or by its first character, or the tokenizer keeps blanks apart."""
    EARLIER = "target before the trigger"
    """It can be copied from there."""
    BLANK = "text ends with a blank"
    """It is left out: the target brings its own."""


UNUSABLE = frozenset(list(Defect)[:6])


@dataclass(frozen=True)
class Case:
    """One line of a file of cases."""

    expert: ExpertAddress
    file: str
    number: int
    """Place in the file, from 0."""
    text: str
    trigger: str
    target: str


@dataclass(frozen=True)
class Located:
    """A case among tokens. Positions count special tokens; -1 where there is none."""

    case: Case
    defects: tuple[Defect, ...]
    text: str
    """What is read: the text of the case without blanks at its end."""
    input_ids: tuple[int, ...] = ()
    """Of the text, up to its last character."""
    first: int = 0
    """Position of the first token of text."""
    start: int = -1
    """Of the trigger's first token."""
    position: int = -1
    """Of the trigger's last token, where the expert is looked at."""
    place: int = -1
    """Of the token before the target in the text, after the trigger; of the last token if the target is not there."""
    target_id: int = -1
    """The target's first token."""
    target_token: str = ""

    @property
    def used(self) -> bool:
        return not UNUSABLE & set(self.defects)

    @property
    def gap(self) -> int:
        """Tokens between the trigger and the place of the target; -1 where there is no trigger."""
        return self.place - self.position if self.position >= 0 else -1


def read_cases(source: Path) -> list[Case]:
    """Cases of a folder of ``.json`` and ``.jsonl`` files, or of one such file, by layer, expert and place.

    Raises:
        BadConfig: no such folder, no file in it, a file that is no list of cases, or that names no expert.
    """
    source = Path(source)
    files = [source] if source.is_file() else sorted(p for p in source.glob("*.json*") if p.suffix in _READERS)
    if not files:
        missing = "has no .json or .jsonl file" if source.is_dir() else "does not exist"
        raise BadConfig(f"{source} {missing}: give a folder with files such as L4-E0.json")
    cases = [case for file in files for case in _cases_of(file)]
    if not cases:
        raise BadConfig(f"{source} holds no case: give files with a list of {{text, trigger, target}}")
    return sorted(cases, key=lambda case: case.expert)


def check_experts(cases: Iterable[Case], spec: Spec) -> None:
    """Refuse cases of experts that the model does not have.

    Raises:
        OutOfRange: the message names the file.
    """
    for case in cases:
        entry = spec.at(case.expert.layer)
        if entry is None or case.expert.layer not in spec.moe_layers:
            known = ", ".join(map(str, spec.moe_layers))
            raise OutOfRange(
                f"{case.file} has cases of {case.expert}, and {spec.name} has experts in layers {known}: "
                "take the file out, or give the model that it was made for"
            )
        if case.expert.expert >= entry.n_experts:
            raise OutOfRange(
                f"{case.file} has cases of {case.expert}, and layer {case.expert.layer} of {spec.name} has experts 0 "
                f"to {entry.n_experts - 1}: take the file out, or give the model that it was made for"
            )


def locate(cases: Sequence[Case], tokenizer: Any, *, context: int | None = None) -> list[Located]:
    """Find trigger and target of every case among the tokens, with all that is wrong with it.

    Args:
        context: most tokens that the model reads, the target included.

    Raises:
        UnsupportedModel: a tokenizer without character offsets.
    """
    require_offsets(tokenizer)
    seen: set[tuple[ExpertAddress, str, str, str]] = set()
    found = []
    for case in cases:
        key = (case.expert, case.text, case.trigger, case.target)
        found.append(_located(case, tokenizer, context, twice=key in seen))
        seen.add(key)
    return found


def count_defects(located: Iterable[Located]) -> dict[str, int]:
    """Cases by defect, in the order of `Defect`; a case with two counts twice."""
    counts = Counter(defect for one in located for defect in one.defects)
    return {str(defect): counts[defect] for defect in Defect if counts[defect]}


def _located(case: Case, tokenizer: Any, context: int | None, *, twice: bool) -> Located:
    text, trigger, target = case.text.rstrip(), case.trigger.strip(), case.target.strip()
    if not (text and trigger and target):
        return Located(case, (Defect.EMPTY,), text)
    read = _Read.of(tokenizer, text)
    is_wrong = {
        Defect.TWICE: twice,
        Defect.BLANK: text != case.text,
        Defect.TOO_LONG: context is not None and len(read.ids) + 1 > context,
    }
    trigger_at, target_at, found_wrong = _choose(text, trigger, target)
    is_wrong |= found_wrong
    token = read.target_in_text(target_at, target) or _target_alone(tokenizer, target)
    is_wrong |= {Defect.SPLIT_TARGET: token.is_split, Defect.BARE_TARGET: token.is_bare}
    if trigger_at is None:
        return Located(case, _listed(is_wrong), text, read.ids, read.first)
    covered = read.covering(*trigger_at)
    last = len(read.ids) - 1
    is_wrong |= {
        Defect.SPLIT_TRIGGER: len(covered) > 1,
        Defect.FIRST: covered[-1] == read.first,
        Defect.AT_END: covered[-1] == last,
    }
    place = last if target_at is None else max(read.covering(*target_at)[0] - 1, covered[-1])
    return Located(
        case, _listed(is_wrong), text, read.ids, read.first, covered[0], covered[-1], place, token.id,
        tokenizer.decode([token.id]),
    )  # fmt: skip


def _choose(text: str, trigger: str, target: str) -> tuple[_Span | None, _Span | None, dict[Defect, bool]]:
    """Characters of the trigger and, after it, of the target; what is wrong with them.

    Of several triggers the one that stands nearest before the target, and the last one without a target.
    """
    whole, part = _occurrences(text, trigger)
    triggers, targets = whole or part, [span for found in _occurrences(text, target) for span in found]
    wrong = {Defect.ABSENT: not triggers, Defect.REPEATED: len(triggers) > 1}
    if not triggers:
        return None, None, wrong
    pairs = [(at, to) for at in triggers for to in targets if at[1] <= to[0]]
    trigger_at, target_at = min(pairs, key=lambda pair: pair[1][0] - pair[0][1]) if pairs else (triggers[-1], None)
    wrong |= {
        Defect.INSIDE: not whole,
        Defect.OTHER_CASE: text[slice(*trigger_at)] != trigger,
        Defect.BEGUN: target_at is None and any(a <= trigger_at[0] < b for a, b in targets),
        Defect.EARLIER: any(b <= trigger_at[0] for _, b in targets),
    }
    return trigger_at, target_at, wrong


def _occurrences(text: str, words: str) -> tuple[list[_Span], list[_Span]]:
    """Characters where `words` stand as whole words, and inside words.

    Upper and lower case count only where nothing is found as it is written.
    """
    for flags in (0, re.IGNORECASE):
        spans = [match.span() for match in re.finditer(re.escape(words), text, flags)]
        if spans:
            whole = [span for span in spans if _is_word(text, *span)]
            return whole, [span for span in spans if span not in whole]
    return [], []


def _is_word(text: str, begin: int, stop: int) -> bool:
    """Whether no letter or digit goes on beyond either end."""
    left = begin > 0 and text[begin - 1].isalnum() and text[begin].isalnum()
    right = stop < len(text) and text[stop].isalnum() and text[stop - 1].isalnum()
    return not (left or right)


@dataclass(frozen=True)
class _Target:
    id: int
    is_split: bool
    is_bare: bool


@dataclass(frozen=True, eq=False)
class _Read:
    """A text as `Lens.trace` reads it, without special tokens behind it."""

    text: str
    ids: tuple[int, ...]
    first: int
    """Position of the first token of text."""
    start: Int[ndarray, "token"]
    end: Int[ndarray, "token"]

    @classmethod
    def of(cls, tokenizer: Any, text: str, *, special: bool = True) -> _Read:
        coded = tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True,
            verbose=False,
        )  # fmt: skip
        is_text = np.flatnonzero(np.array(coded["special_tokens_mask"]) == 0)
        first, last = int(is_text[0]), int(is_text[-1])
        spans = np.array(coded["offset_mapping"], np.int64).reshape(-1, 2)[first : last + 1]
        return cls(text, tuple(coded["input_ids"][: last + 1]), first, *whole_spans(text, spans))

    def covering(self, begin: int, stop: int) -> list[int]:
        """Positions of the tokens that hold one of the characters from `begin` up to `stop`."""
        return (np.flatnonzero((self.start < stop) & (self.end > begin)) + self.first).tolist()

    def target_in_text(self, span: _Span | None, target: str) -> _Target | None:
        """The target's first token as the text has it; None where it is not there or shares a token with a word."""
        if span is None:
            return None
        covered = self.covering(*span)
        before = self.text[int(self.start[covered[0] - self.first]) : span[0]]
        if before.strip() or self.text[slice(*span)] != target:
            return None
        return _Target(self.ids[covered[0]], len(covered) > 1, not before)


def _target_alone(tokenizer: Any, target: str) -> _Target:
    """The first token of the target after a space; without one where its first character starts no word."""
    anchor = _BEFORE if target[0].isalnum() else _BEFORE.rstrip()
    read = _Read.of(tokenizer, anchor + target, special=False)
    found = read.target_in_text((len(anchor), len(anchor + target)), target)
    if found is not None:
        return found
    read = _Read.of(tokenizer, target, special=False)
    return _Target(read.ids[0], len(read.ids) > 1, True)


def _listed(is_wrong: dict[Defect, bool]) -> tuple[Defect, ...]:
    return tuple(defect for defect in Defect if is_wrong.get(defect))


def _cases_of(file: Path) -> Iterator[Case]:
    try:
        entries = _READERS[file.suffix](file.read_text(encoding="utf-8"))
    except KeyError:
        raise BadConfig(f"{file} is neither .json nor .jsonl: give cases in one of these") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadConfig(f"cannot read cases from {file} ({error}): give a JSON list of objects") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadConfig(f"{file} is no list of cases: write [{{text, trigger, target}}, ...]")
    if entries and not any(name in entry for entry in entries for name in FIELDS):
        raise BadConfig(f"{file} has no case with text, trigger and target: take it out of the folder")
    named = _NAME.match(file.stem)
    for number, entry in enumerate(entries):
        values = (entry.get(name) for name in FIELDS)
        words = [value if isinstance(value, str) else "" for value in values]
        yield Case(_expert(entry, named, file), file.name, number, *words)


def _expert(entry: dict[str, Any], named: re.Match[str] | None, file: Path) -> ExpertAddress:
    place = (entry.get("layer"), entry.get("expert"))
    if all(isinstance(value, int) and value >= 0 for value in place):
        return ExpertAddress(*place)  # type: ignore[arg-type]
    if named is None:
        raise BadConfig(f"{file} does not say whose cases it holds: call it L4-E0.json, or add layer and expert")
    return ExpertAddress(int(named[1]), int(named[2]))


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


_READERS = {".json": json.loads, ".jsonl": _lines}

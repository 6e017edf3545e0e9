"""What a language model may answer, and reading what it did answer. No network and no file here.

A reply is used when it holds exactly one JSON object of the shape that was asked for, with one answer for every
item. Anything else is an abstention with an ``Outcome`` that says why. Nothing is guessed, cut or filled in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError


class Outcome(StrEnum):
    """How a request ended. Every request ends as exactly one; all but the first two are abstentions."""

    OK = "ok"
    CACHED = "cached"
    INVALID = "invalid"
    REFUSED = "refused"
    EMPTY = "empty"
    TOO_FEW_ANSWERS = "too_few_answers"
    TOO_MANY_ANSWERS = "too_many_answers"
    BUDGET = "budget"
    FAILED = "failed"


def _whole(value: Any) -> Any:
    if value is not None and type(value) is not int:  # pydantic takes 3.0 and true for the members 3 and 1
        raise ValueError("must be a whole number")
    return value


Grade = Annotated[Literal[0, 1, 2, 3, 4], BeforeValidator(_whole)]


class Shape(BaseModel):
    """Base of reply shapes. No other keys, no coerced types: ``"3"``, ``3.0`` and ``true`` are not the number 3."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Answer(Shape):
    """A judge's answer for one item: 0 certainly does not fit, 4 certainly fits, None cannot tell."""

    id: int
    score: Grade | None


class Answers(Shape):
    """Reply to ``prompts/detection.md`` and ``prompts/fuzz.md``."""

    answers: list[Answer]

    @property
    def scores(self) -> dict[int, int | None]:
        """Score by item id."""
        return {answer.id: answer.score for answer in self.answers}


def _words(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank: write null for no label")
    return " ".join(text.split())


Phrase = Annotated[str, AfterValidator(_words)]
"""Text of at least one word, on one line."""
# the numbers of examples, which some models write as numbers in spite of the schema
Evidence = list[Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]]


class Explanation(Shape):
    """Reply to ``prompts/explain.md``. ``label`` is None where the labeller found nothing; it is one line."""

    label: Phrase | None
    evidence: Evidence
    confidence: Grade


class Parsed(NamedTuple):
    """A reply's text, read. ``value`` is an instance of the schema's shape if and only if ``outcome`` is ok."""

    outcome: Outcome
    value: Any = None
    why: str = ""


@dataclass(frozen=True)
class ReplySchema:
    """What is asked for: a shape and, for ``Answers``, the items that each need exactly one answer.

    A new kind of reply is a ``Shape`` subclass in the module that asks for it.
    """

    name: str
    shape: type[Shape]
    ids: tuple[int, ...] | None = None

    @classmethod
    def answers(cls, ids: Iterable[int]) -> ReplySchema:
        """Graded answers for the items `ids`."""
        return cls("answers", Answers, tuple(ids))

    @classmethod
    def explanation(cls) -> ReplySchema:
        """A label with its evidence."""
        return cls("explanation", Explanation)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes two requests of the same messages different requests."""
        return {"name": self.name, "json_schema": _json_schema(self.shape), "ids": self.ids}

    @cached_property
    def response_format(self) -> dict[str, Any]:
        """``response_format`` of a server with structured output."""
        form = {"name": self.name, "schema": _json_schema(self.shape), "strict": True}
        return {"type": "json_schema", "json_schema": form}

    @cached_property
    def instructions(self) -> str:
        """The same in words, for a server without."""
        schema = json.dumps(_json_schema(self.shape))
        return f"Answer with one JSON object and nothing else. It must follow this JSON schema: {schema}"

    def parse(self, text: str) -> Parsed:
        """Read a reply; never raises.

        A ``<think>`` block before the object, a code fence or a sentence around it are passed over. Two objects, an
        object that does not end, repeated keys and NaN are invalid. ``why`` quotes nothing of the reply.
        """
        if not text.strip():
            return Parsed(Outcome.EMPTY, why="the reply is empty")
        try:
            value = self.shape.model_validate(_only_object(text))
        except ValidationError as error:
            return Parsed(Outcome.INVALID, why=_first_problem(error))
        except (ValueError, RecursionError) as error:
            # recursion: brackets nested deeper than the JSON reader goes
            why = str(error) if type(error) is ValueError else "the JSON object cannot be read"
            return Parsed(Outcome.INVALID, why=why)
        if self.ids is not None and isinstance(value, Answers):
            return _one_answer_each(value, self.ids)
        return Parsed(Outcome.OK, value)


@lru_cache
def _json_schema(shape: type[Shape]) -> dict[str, Any]:
    return _bare(shape.model_json_schema())


def _bare(node: Any) -> Any:
    """A JSON schema without titles and docstrings: they cost tokens, and a reworded one would be another request."""
    if isinstance(node, list):
        return [_bare(child) for child in node]
    if not isinstance(node, dict):
        return node
    notes = {name for name in ("title", "description") if isinstance(node.get(name), str)}
    return {name: _bare(child) for name, child in node.items() if name not in notes}


def _only_object(text: str) -> Any:
    """The one JSON object in `text`.

    Raises:
        ValueError: none, more than one, or one that is not well-formed (as json.JSONDecodeError).
    """
    answer = text.rpartition("</think>")[2]
    start = answer.find("{")
    if "<think>" in answer or start < 0:  # an open block: the reply was cut before the answer
        raise ValueError("the reply holds no JSON object")
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    value, end = decoder.raw_decode(answer, start)
    json.dumps(value, ensure_ascii=False).encode()  # half surrogate pairs: no table and no terminal takes them
    if "{" in answer[end:]:
        raise ValueError("the reply holds more than one JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) < len(pairs):
        raise ValueError("the JSON object repeats a key")
    return keys


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"the JSON object holds {name}, which is not JSON")


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the object"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _one_answer_each(value: Answers, ids: tuple[int, ...]) -> Parsed:
    given = [answer.id for answer in value.answers]
    if sorted(given) == sorted(ids):
        return Parsed(Outcome.OK, value)
    if len(given) < len(ids):
        outcome = Outcome.TOO_FEW_ANSWERS
    elif len(given) > len(ids):
        outcome = Outcome.TOO_MANY_ANSWERS
    else:
        return Parsed(Outcome.INVALID, why=f"the answers are not for the items {_some(ids)}, one for each")
    return Parsed(outcome, why=f"there are {len(given)} answers for the {len(ids)} items {_some(ids)}")


def _some(ids: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ids[:30]))
    return shown + (", ..." if len(ids) > 30 else "")

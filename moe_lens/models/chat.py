"""Who says what in a conversation: messages through the chat template, every character with its role.

1. Cut every message into pieces: its content, its thinking field, and thinking between delimiters in its content.
2. Render the messages, and render them again with a stand-in for every piece.
3. Both renderings must agree outside the pieces, and hold the pieces where the other one has the stand-ins, with
   or without their outer blanks. That proves the places, whatever the contents are: repeated, or full of markers.
4. Where they disagree, the pieces are halved and tried again, until those that the template rewrites stand alone.
   Their text gets no role, and a warning names the message.

Characters that belong to no piece are the template's.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_lens.errors import BadCorpus, nearest

log = logging.getLogger("moe_lens")

SpanRole = Literal["system", "user", "assistant", "thinking", "tool", "template"]

ROLES: dict[str, SpanRole] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "model": "assistant", "gpt": "assistant", "tool": "tool", "function": "tool", "ipython": "tool",
    "observation": "tool",
}  # fmt: skip
"""Names of roles in messages and the role of their spans. Add your template's own."""

THINKING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold its thinking, as transformers reads them."""


@dataclass(frozen=True)
class Delimiters:
    """What stands before and after a thought."""

    opens: str
    closes: str
    template_opens: bool = False
    """Some templates open the thought in the generation prompt, so that a message starts inside it."""


THINKING: list[Delimiters] = [
    Delimiters("<think>", "</think>", template_opens=True),  # Qwen3, DeepSeek-R1, GLM, MiniMax, Nemotron
    Delimiters("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss (harmony)
    Delimiters("[THINK]", "[/THINK]"),  # Magistral
    Delimiters("<seed:think>", "</seed:think>", template_opens=True),  # Seed-OSS
]
"""Delimiters of thoughts. Append those of your model."""

HEADERS: list[str] = [r"<\|start\|>[^<]*", r"<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"]
"""Regular expressions for what a generated reply holds besides text and special tokens (harmony's headers)."""

OPEN, CLOSE = "\ue000", "\ue001"


@dataclass(frozen=True)
class Mark:
    """Characters ``start:stop`` of a text that have a role. A role of None: it cannot be told."""

    role: SpanRole | None
    start: int
    stop: int
    message: int | None
    generated: bool = False


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it."""

    text: str
    marks: tuple[Mark, ...]
    """Sorted and disjoint; the characters between them are the template's."""
    missing: tuple[str, ...]
    """One clause for each piece that is not in the text as it was given."""


@dataclass(frozen=True)
class Piece:
    """A part of one string of a message."""

    message: int
    role: SpanRole
    path: tuple[str | int, ...]
    """Keys from the message to the string."""
    start: int
    text: str


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> Rendered:
    """Apply the chat template and find every message in the result.

    Args:
        messages: dicts with `role` and `content` (text, or a list of ``{"type": "text", "text": ...}``), and maybe
            one of `THINKING_FIELDS`.

    Raises:
        BadCorpus: no chat template, no messages, a message that is none, or one that the template refuses.
    """
    checked = check_messages(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise BadCorpus("the tokenizer has no chat template: give one text instead, or set tokenizer.chat_template")
    template = _Template(tokenizer, checked, add_generation_prompt)
    found = pieces(checked)
    places, unknown = template.places(found)
    marks = [Mark(found[i].role, a, b, found[i].message) for i, spans in places.items() for a, b in spans if b > a]
    marks += _around(unknown + template.tool_calls(), marks, len(template.text))
    missing = tuple(_missing(checked, found, places))
    return Rendered(template.text, tuple(sorted(marks, key=lambda m: m.start)), missing)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dicts without empty keys.

    Raises:
        BadCorpus: no messages, or one without role or content, with an unknown role, or with a content that is no text.
    """
    if not messages:
        raise BadCorpus("there is no message: give at least one {'role': 'user', 'content': ...}")
    out = []
    for i, message in enumerate(messages):
        kept = {str(k): v for k, v in message.items() if v is not None}
        for key in ("role", "content"):
            if key not in kept and not (key == "content" and {"tool_calls", *THINKING_FIELDS} & kept.keys()):
                raise BadCorpus(f"message {i} has no {key!r}{nearest(key, kept)}: give it a role and a content")
        if str(kept["role"]) not in ROLES:
            raise BadCorpus(
                f"message {i} has the role {kept['role']!r}{nearest(str(kept['role']), ROLES)}: "
                "use system, user, assistant or tool"
            )
        if not all(isinstance(text, str) for _, text in strings(kept)):
            raise BadCorpus(f"the content of message {i} is not text: give a string, or a list of text parts")
        out.append(kept)
    return out


def pieces(messages: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """Everything that somebody says, cut by role; delimiters of thoughts belong to no piece."""
    found = []
    for i, message in enumerate(messages):
        role = ROLES[message["role"]]
        for path, text in strings(message):
            parts: list[tuple[SpanRole, int, int]] = [(role, 0, len(text))]
            if path[0] in THINKING_FIELDS:
                parts = [("thinking", 0, len(text))]
            elif role == "assistant":
                parts = split_thinking(text)
            found += [Piece(i, part, path, a, text[a:b]) for part, a, b in parts if b > a]
    return found


def split_thinking(
    text: str, *, reply: bool = False, inside: Delimiters | None = None, specials: Sequence[str] = ()
) -> list[tuple[SpanRole, int, int]]:
    """Cut what an assistant said into (role, start, stop), delimiters left out.

    In a message a thought must be closed, and a closing delimiter alone closes the thought that the message starts in.

    Args:
        reply: the text was generated: its last thought may be cut off, and `specials` and `HEADERS` are no text.
        inside: the delimiters of a thought that the prompt of the reply left open.
        specials: the tokenizer's special tokens.
    """
    opens, closes = {d.opens: d for d in THINKING}, {d.closes: d for d in THINKING}
    words = [re.escape(word) for word in sorted({*opens, *closes}, key=len, reverse=True)]
    if reply:
        words += [*HEADERS, *map(re.escape, specials)]
    out: list[tuple[SpanRole, int, int]] = []
    at = 0
    for match in re.finditer("|".join(words), text):
        word = match.group()
        role: SpanRole = "thinking" if inside else "assistant"
        if inside is not None and word == inside.closes:
            inside = None
        elif inside is None and word in opens and (reply or opens[word].closes in text[match.end() :]):
            inside = opens[word]
        elif not reply and at == 0 and word in closes and closes[word].template_opens:
            role = "thinking"
        elif not reply or (word not in specials and (word in opens or word in closes)):
            continue
        out.append((role, at, match.start()))
        at = match.end()
    out.append(("thinking" if inside else "assistant", at, len(text)))
    return [part for part in out if part[2] > part[1]]


def open_thought(rendered: Rendered) -> Delimiters | None:
    """The delimiters of a thought that the end of the prompt (the template's) leaves open."""
    tail = rendered.text[rendered.marks[-1].stop if rendered.marks else 0 :]
    return next((d for d in THINKING if tail.rfind(d.opens) > tail.rfind(d.closes)), None)


class _Template:
    """One conversation and its rendering, to compare with renderings of altered messages."""

    def __init__(self, tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
        self.tokenizer, self.messages, self.prompt = tokenizer, messages, add_generation_prompt
        try:
            self.text = self._apply(messages)
        except Exception as error:  # a template is a program of the checkpoint and raises anything
            why = " ".join(str(error).split()) or type(error).__name__
            raise BadCorpus(
                f"the chat template refuses these messages ({why}): change them to what it takes"
            ) from error

    def places(self, found: Sequence[Piece]) -> tuple[dict[int, list[tuple[int, int]]], list[tuple[int, int]]]:
        """Characters of each piece by its number, and those of pieces that the template rewrites.

        A piece that the template leaves out has no characters; one that it rewrites is not among the keys.
        """
        places: dict[int, list[tuple[int, int]]] = {}
        unknown = []
        groups = [list(range(len(found)))] if found else []
        while groups:
            some = groups.pop()
            altered = self._try(_with_stand_ins(self.messages, {i: found[i] for i in some}))
            aligned = None if altered is None else align(self.text, altered, {i: found[i].text for i in some})
            if aligned is not None:
                places.update(aligned)
            elif len(some) > 1:
                groups += [some[: len(some) // 2], some[len(some) // 2 :]]
            elif found[some[0]].text.strip():
                unknown.append(self._difference(altered))
        return places, unknown

    def tool_calls(self) -> list[tuple[int, int]]:
        """Characters that depend on the tool calls of a message."""
        regions = []
        for i, message in enumerate(self.messages):
            if message.get("tool_calls"):
                bare = {"content": ""} | {k: v for k, v in message.items() if k != "tool_calls"}
                regions.append(self._difference(self._try([*self.messages[:i], bare, *self.messages[i + 1 :]])))
        return regions

    def _apply(self, messages: list[dict[str, Any]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=self.prompt)

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._apply(messages)
        except Exception:  # a template is a program and may raise anything
            return None

    def _difference(self, altered: str | None) -> tuple[int, int]:
        """The characters that an altered rendering does not share; all of them if there is none."""
        if altered is None:
            return 0, len(self.text)
        before = _shared(self.text, altered)
        after = _shared(self.text[before:][::-1], altered[before:][::-1])
        return before, len(self.text) - after


def align(text: str, altered: str, contents: Mapping[int, str]) -> dict[int, list[tuple[int, int]]] | None:
    """Places in `text` of the contents whose stand-ins are in `altered`.

    Returns:
        Characters of each content, none if it is in neither text. None if the texts differ elsewhere, a content
        is changed by more than its outer blanks, or there are two ways to give the blanks to contents.
    """
    first, *rest = re.split(f"{OPEN}(\\d+){CLOSE}", altered)
    found: dict[int, list[tuple[int, int]]] = {i: [] for i in contents}
    if not text.startswith(first):
        return None
    at = len(first)
    names, literals = [int(name) for name in rest[::2]], rest[1::2]
    for n, (name, literal) in enumerate(zip(names, literals, strict=True), 1):
        if name not in contents:  # somebody's text looks like a stand-in
            return None
        ends = [end for end in _ends(text, at, contents[name]) if text.startswith(literal, end)]
        if n == len(names):
            ends = [end for end in ends if end + len(literal) == len(text)]
        if len(ends) != 1:
            return None
        found[name].append((at, ends[0]))
        at = ends[0] + len(literal)
    return found if at == len(text) else None


def _ends(text: str, at: int, content: str) -> Iterator[int]:
    """Where `content` may end in `text` when it starts at `at`, with or without its outer blanks."""
    core = content.strip()
    before, _, after = content.partition(core) if core else ("", "", content)
    for n in range(len(before) + 1):
        end = at + n + len(core)
        if text.startswith(before[len(before) - n :], at) and text.startswith(core, at + n):
            yield end
            yield from range(end + 1, end + 1 + _shared(after, text[end : end + len(after)]))


def _shared(a: str, b: str) -> int:
    """Characters that two texts have in common from their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _with_stand_ins(messages: list[dict[str, Any]], found: Mapping[int, Piece]) -> list[dict[str, Any]]:
    out = copy.deepcopy(messages)
    for i, piece in sorted(found.items(), key=lambda entry: -entry[1].start):
        *keys, last = piece.path
        holder: Any = out[piece.message]
        for key in keys:
            holder = holder[key]
        text = holder[last]
        holder[last] = f"{text[: piece.start]}{OPEN}{i}{CLOSE}{text[piece.start + len(piece.text) :]}"
    return out


def strings(message: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every text of a message with the keys that lead to it."""
    for key in (*THINKING_FIELDS, "content"):
        value = message.get(key)
        if isinstance(value, list | tuple):
            for n, part in enumerate(value):
                if isinstance(part, Mapping) and "text" in part:
                    yield (key, n, "text"), part["text"]
                else:
                    yield (key, n), None
        elif value is not None:
            yield (key,), value


def _around(regions: Sequence[tuple[int, int]], marks: Sequence[Mark], length: int) -> list[Mark]:
    """Marks without role for what `regions` have beside `marks`."""
    flags = bytearray(length)
    for a, b in regions:
        flags[a:b] = b"\1" * (b - a)
    for mark in marks:
        flags[mark.start : mark.stop] = bytes(mark.stop - mark.start)
    return [Mark(None, *match.span(), None) for match in re.finditer(b"\1+", flags)]


def _missing(messages: list[dict[str, Any]], found: Sequence[Piece], places: Mapping[int, Any]) -> Iterator[str]:
    for i, piece in enumerate(found):
        if piece.text.strip() and not places.get(i):
            what = "leaves it out" if i in places else "rewrites it, so that its tokens have no role"
            yield f"message {piece.message} ({piece.role}): the chat template {what}"
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            yield f"message {i} ({message['role']}): the tokens of its tool calls have no role"

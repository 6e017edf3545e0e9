"""Prompt files, and how text that nobody vetted is put into them.

A file of ``prompts/`` has a head (``version, task, reply``), a part ``# System`` and a part ``# User``; both are
jinja2 templates. ``render`` makes chat messages of it. The texts of a corpus, and labels, can hold anything: line
breaks that would start a new item, brackets that would forge a mark, role tokens of a chat template. ``marked`` and
``plain`` make one line of them that can do none of this, and from which the text can still be read.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_lens.config import prompt_hashes, prompts_dir
from moe_lens.errors import BadConfig, nearest

if TYPE_CHECKING:
    from jinja2 import Template

_PARTS = re.compile(r"\A---\n(?P<head>.*?)\n---\n# System\n(?P<system>.*?)\n# User\n(?P<user>.*)\Z", re.DOTALL)
_VISIBLE = {"\n": "⏎", "\t": "⇥"}
_BRACKETS = {"[": "［", "]": "］"}
# controls, line and paragraph separators, half surrogate pairs, and what changes the direction of the text after it
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u202a-\u202e\u2066-\u2069⏎⇥［］]")
_TOUCHING = re.compile(r"(?<=[\[\]])[\[\]]|[\[\]](?=[\[\]])")
_ROLE = re.compile(r"<(?=[|｜][^\s|｜]{1,40}[|｜]>|(?:start|end)_of_turn>)")


class Prompt(NamedTuple):
    """One prompt file: its two templates, and the sha256 of the file."""

    name: str
    version: int
    task: str
    system: Template
    user: Template
    sha256: str
    n_bytes: int
    """Size of the two templates."""

    def render(self, **values: Any) -> list[dict[str, str]]:
        """Chat messages. Values are put in as they are, never read as templates.

        Raises:
            jinja2.UndefinedError: a value is missing.
        """
        parts = {"system": self.system, "user": self.user}
        return [{"role": role, "content": part.render(**values).strip()} for role, part in parts.items()]


@lru_cache
def load_prompt(name: str) -> Prompt:
    """The prompt file ``prompts/NAME.md``.

    Raises:
        BadConfig: there is no such file, or it has another form than prompt files have.
    """
    import jinja2
    import yaml

    sha256 = prompt_hash(name)
    path = prompts_dir() / f"{name}.md"
    parts = _PARTS.match(path.read_text(encoding="utf-8"))
    try:
        if parts is None:
            raise ValueError("it needs a head between two lines ---, then # System, then # User")
        head = yaml.safe_load(parts["head"])
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        system, user = (environment.from_string(parts[part]) for part in ("system", "user"))
        n_bytes = len((parts["system"] + parts["user"]).encode())
        return Prompt(name, int(head["version"]), str(head["task"]), system, user, sha256, n_bytes)
    except (ValueError, KeyError, TypeError, yaml.YAMLError, jinja2.TemplateError) as error:
        raise BadConfig(f"the prompt file {path} cannot be used, install moe-lens again: {error}") from error


def prompt_hash(name: str) -> str:
    """sha256 of ``prompts/NAME.md``, as manifests hold it.

    Raises:
        BadConfig: there is no such file.
    """
    hashes = prompt_hashes()
    if f"{name}.md" not in hashes:
        known = [file.removesuffix(".md") for file in hashes]
        raise BadConfig(f"there is no prompt file {name}.md in {prompts_dir()}{nearest(name, known)}")
    return hashes[f"{name}.md"]


def marked(text: str, start: int, end: int) -> str:
    """`text` on one line with the characters from `start` to `end` marked as ``[[token]]``.

    Line break and tab are written ``⏎`` and ``⇥``. A bracket of the text that touches another one or the mark is
    written ``［`` or ``］``: the mark is the only ``[[`` and the only ``]]``, also where the token is a bracket. What
    no line can show, and those four characters where the text has them, is written as ``\\u0085``. Role tokens of the
    usual chat templates are broken, ``<\\|im_end|>``. Those that look like plain text are left, ``[INST]`` and
    ``</s>``: it is for a server to read no special token in the text of a message.
    """
    before, token, after = (_shown(part) for part in (text[:start], text[start:end], text[end:]))
    mark = {len(before), len(before) + 1, len(before + token) + 2, len(before + token) + 3}
    line = f"{before}[[{token}]]{after}"
    line = _TOUCHING.sub(lambda at: at[0] if at.start() in mark else _BRACKETS[at[0]], line)
    return _ROLE.sub(r"<\\", line)


def plain(text: str) -> str:
    """`text` on one line without any mark, written as ``marked`` writes."""
    return _ROLE.sub(r"<\\", _TOUCHING.sub(lambda at: _BRACKETS[at[0]], _shown(text)))


def _shown(text: str) -> str:
    return _UNSHOWN.sub(lambda at: _VISIBLE.get(at[0]) or f"\\u{ord(at[0]):04x}", text)

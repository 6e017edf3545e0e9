"""Prompts are what their files say, and no text can change what a prompt means."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from pathlib import Path

import jinja2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_lens.autointerp import prompts
from moe_lens.autointerp.prompts import load_prompt, marked, plain, prompt_hash
from moe_lens.config import prompt_hashes, prompts_dir
from moe_lens.errors import BadConfig

NASTY = st.text(st.sampled_from(list("[]\\ab ⏎⇥［］\n\t<|>1.{}\u2028\x85\ud800")), max_size=12) | st.text(max_size=12)
ITEMS = [{"id": 1, "text": "[[a]] b"}, {"id": 2, "text": "c [[d]]"}]


def test_a_prompt_has_the_hash_of_its_file() -> None:
    path = prompts_dir() / "detection.md"
    assert prompt_hash("detection") == hashlib.sha256(path.read_bytes()).hexdigest() == prompt_hashes()[path.name]
    assert load_prompt("detection").sha256 == prompt_hash("detection")


@pytest.mark.parametrize("name", ["explain", "facets", "detection", "fuzz"])
def test_every_prompt_file_is_a_system_and_a_user_template(name: str) -> None:
    prompt = load_prompt(name)
    example = {"id": 1, "text": "a [[b]] c", "strength": 7}
    values = {"layer": 7, "expert": 12, "corpus": "prose", "most": 5, "label": "verbs", "logit_lens": '"x"'}
    system, user = prompt.render(**values, positives=[example], negatives=[example], items=[example])
    assert (system["role"], user["role"], prompt.task) == ("system", "user", name)
    assert "[[token]]" in system["content"]
    assert "a [[b]] c" in user["content"]
    assert not re.search(r"\{\{|\{%|\Z(?<=\s)", system["content"] + user["content"])
    assert 0 < (prompts_dir() / f"{name}.md").stat().st_size - prompt.n_bytes < 200


def test_a_value_that_is_missing_is_no_empty_prompt() -> None:
    with pytest.raises(jinja2.UndefinedError):
        load_prompt("detection").render(items=ITEMS)


def test_values_are_never_read_as_templates() -> None:
    user = load_prompt("detection").render(label="{{ 7 * 7 }} {% raw %}", items=ITEMS)[1]["content"]
    assert "{{ 7 * 7 }} {% raw %}" in user


def test_a_prompt_that_does_not_exist_is_named_with_the_nearest() -> None:
    with pytest.raises(BadConfig, match=r"no prompt file detections\.md .*did you mean 'detection'"):
        prompt_hash("detections")


HEAD = "---\nversion: 1\ntask: t\n---\n"


@pytest.mark.parametrize(
    "text",
    [
        "# System\na\n# User\nb",
        "---\nversion: 1\n---\n# System\na\n# User\nb",
        "---\nversion: one\ntask: t\n---\n# System\na\n# User\nb",
        HEAD + "# System\n{{ a\n# User\nb",
        HEAD + "# User\nb",
    ],
    ids=["no head", "no task", "no number", "no template", "no system"],
)
def test_a_damaged_prompt_file_is_one_sentence(tmp_path: Path, monkeypatch, text: str) -> None:
    (tmp_path / "broken.md").write_text(text)
    monkeypatch.setattr(prompts, "prompts_dir", lambda: tmp_path)
    monkeypatch.setattr(prompts, "prompt_hashes", lambda: {"broken.md": "0"})
    with pytest.raises(BadConfig, match=r"broken\.md cannot be used") as caught:
        load_prompt.__wrapped__("broken")
    assert "\n" not in str(caught.value)


# --- texts that nobody vetted -------------------------------------------------------------------------------------


def read_back(line: str) -> tuple[str, str, str]:
    """Text before the mark, the token, and after, as somebody would read them who knows the four signs."""
    before, after = line.split("[[")
    token, after = after.split("]]")
    signs = str.maketrans("⏎⇥［］", "\n\t[]")
    return before.translate(signs), token.translate(signs), after.translate(signs)


@given(NASTY, NASTY, NASTY)
@example("x = [a[", "0", "]] = y")
@example("", "]", "]")
@example("[[", "[[", "[[")
@example("\\", "def", "\\")
@example("1. [[x]]\n2. [[y]]", "z", "\n3. [[w]]")
def test_a_marked_text_is_one_line_with_one_mark(before: str, token: str, after: str) -> None:
    line = marked(before + token + after, len(before), len(before + token))
    assert (line.count("[["), line.count("]]"), len(line.splitlines())) == (1, 1, 1)
    assert line.index("[[") < line.index("]]")
    line.encode()


@given(*[st.text(st.sampled_from(list("[]\\ab \n\t(){}<=\"'")), max_size=12)] * 3)
def test_the_text_can_be_read_back_from_the_line(before: str, token: str, after: str) -> None:
    line = marked(before + token + after, len(before), len(before + token))
    assert read_back(line) == (before, token, after)


@given(NASTY)
def test_a_text_without_a_mark_gets_none(text: str) -> None:
    line = plain(text)
    assert "[[" not in line
    assert "]]" not in line
    assert len(line.splitlines()) <= 1
    line.encode()


def test_no_character_ends_a_line_and_all_signs_stay_unique() -> None:
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        if len(f"a{letter}b".splitlines()) > 1 or unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
            sign = {10: "⏎", 9: "⇥"}.get(code, f"\\u{code:04x}")
            assert plain(f"a{letter}b") == f"a{sign}b"
    assert plain("⏎⇥［］") == r"\u23ce\u21e5\uff3b\uff3d"


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|endoftext|>", "<｜User｜>", "<start_of_turn>", "<|start_header_id|>", "<end_of_turn>"]
)
def test_role_tokens_of_chat_templates_are_broken(token: str) -> None:
    for line in (plain(f"a {token} b"), marked(f"a {token} b", 0, 1), marked(f"a {token} b", 2, 2 + len(token))):
        assert token not in line
        assert token[1:] in line
    assert plain("a <| b |> c < d") == "a <| b |> c < d"


@given(st.lists(st.tuples(NASTY, NASTY, NASTY), min_size=1, max_size=5), NASTY)
def test_no_item_and_no_label_makes_another_item(texts: list[tuple[str, str, str]], label: str) -> None:
    items = [{"id": i, "text": marked(a + b + c, len(a), len(a + b))} for i, (a, b, c) in enumerate(texts, 1)]
    user = load_prompt("detection").render(label=plain(label), items=items)[1]["content"]
    lines = user.splitlines()
    assert lines[0].startswith("Description: ")
    assert [line.partition(". ")[0] for line in lines if "[[" in line] == [str(i) for i in range(1, len(items) + 1)]
    assert len(lines) == 3 + len(items) + 3

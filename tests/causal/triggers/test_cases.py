"""Cases: the released format, trigger and target among a tokenizer's tokens, and what is wrong with a case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import moe_lens
from moe_lens.causal.triggers.cases import Case, Defect, Located, check_experts, count_defects, locate, read_cases
from moe_lens.errors import BadConfig, OutOfRange
from moe_lens.models.lens import Lens
from moe_lens.types import ExpertAddress
from tests.causal.triggers.planted import write
from tests.corpus.conftest import byte_level
from tests.models import tiny

EXPERT = ExpertAddress(4, 0)


@pytest.fixture(scope="module")
def words() -> Any:
    """The bundled tokenizer: many words are one token, with the blank before them."""
    return AutoTokenizer.from_pretrained(Path(moe_lens.__file__).parent / "bundled" / "tiny-moe")


def one(tokenizer: Any, text: str, trigger: str, target: str, **options: Any) -> Located:
    return locate([Case(EXPERT, "L4-E0.json", 0, text, trigger, target)], tokenizer, **options)[0]


def said(tokenizer: Any, located: Located, *, until: int) -> str:
    return tokenizer.decode(located.input_ids[: until + 1])


def test_released_files_are_read_by_their_names(tmp_path: Path) -> None:
    write(tmp_path, {"L14-E2": [("a b", "a", "b")], "L4-E11": [("c d", "c", "d"), ("e f", "e", "f")]})
    cases = read_cases(tmp_path)
    assert [str(case.expert) for case in cases] == ["L4.E11", "L4.E11", "L14.E2"]
    assert cases[1] == Case(ExpertAddress(4, 11), "L4-E11.json", 1, "e f", "e", "f")
    assert read_cases(tmp_path / "L14-E2.json") == cases[2:]


def test_lines_that_name_their_expert_are_read_too(tmp_path: Path) -> None:
    entry = {"layer": 1, "expert": 5, "text": "a b", "trigger": "a", "target": "b"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(entry) + "\n\n", encoding="utf-8")
    assert [str(case.expert) for case in read_cases(tmp_path)] == ["L1.E5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("L4-E0.json", "{", "cannot read cases"),
        ("L4-E0.json", '{"text": "a"}', "no list of cases"),
        ("L4-E0.json", '[{"hypothesis": "a"}]', "no case with text, trigger and target"),
        ("L4-E0.json", "[]", "holds no case"),
        ("mine.json", '[{"text": "a b", "trigger": "a", "target": "b"}]', "does not say whose"),
        ("notes.txt", "a", "has no .json"),
    ],
)
def test_files_without_cases_are_refused_in_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(BadConfig, match=message) as caught:
        read_cases(tmp_path)
    assert ": " in str(caught.value)  # names the fix


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="does not exist"):
        read_cases(tmp_path / "nowhere")


@pytest.mark.parametrize("expert", [ExpertAddress(9, 0), ExpertAddress(0, 77)])
def test_experts_that_the_model_has_not_are_refused_with_the_file(expert: ExpertAddress) -> None:
    spec = Lens(tiny.build("olmoe"), tiny.tokenizer()).spec
    with pytest.raises(OutOfRange, match="has cases of L"):
        check_experts([Case(expert, "made.json", 0, "a b", "a", "b")], spec)


def test_the_position_is_that_of_the_triggers_last_token(words: Any) -> None:
    found = one(words, "the old philosophy of numbers", "philosophy", "things")
    assert said(words, found, until=found.position) == "the old philosophy"
    assert said(words, found, until=found.start - 1) == "the old"
    assert found.used


def test_positions_count_special_tokens() -> None:
    plain, with_bos = (byte_level(bos_template=bos) for bos in (False, True))
    a, b = (one(tokenizer, "one two three", "two", "x") for tokenizer in (plain, with_bos))
    assert b.position == a.position + 1
    assert b.first == a.first + 1
    assert b.input_ids[1:] == a.input_ids


def test_the_target_starts_after_a_space(words: Any) -> None:
    found = one(words, "there is a man in this house and", "house", "the")
    assert found.target_token == " the"
    assert not {Defect.BARE_TARGET, Defect.SPLIT_TARGET} & set(found.defects)


def test_a_target_of_several_tokens_is_its_first_and_reported(words: Any) -> None:
    found = one(words, "there is a man in this house and", "house", "thermodynamics")
    assert Defect.SPLIT_TARGET in found.defects
    assert found.used
    assert " thermodynamics".startswith(found.target_token)
    assert found.target_token != " "


def test_a_tokenizer_with_blanks_of_their_own_uses_the_sign_after_the_blank() -> None:
    found = one(tiny.tokenizer(), "abc d", "c", "!")
    assert found.target_token == "!"
    assert Defect.BARE_TARGET in found.defects


def test_the_target_is_written_as_the_text_has_it(words: Any) -> None:
    assert one(words, "a list (the, that)", "list (", "the").target_token == "the"
    assert one(words, "a list and the", "and", "the").target_token == " the"


def test_of_several_triggers_the_one_right_before_the_target_counts(words: Any) -> None:
    found = one(words, "beating around the bush and tell me the truth", "the", "bush")
    assert said(words, found, until=found.position) == "beating around the"
    assert found.gap == 0
    assert Defect.REPEATED in found.defects
    nearest = one(words, "we let the cat out of the bag by the door", "the", "bag")
    assert said(words, nearest, until=nearest.position) == "we let the cat out of the"
    last = one(words, "beating around the bush and tell me the truth", "the", "water")
    assert said(words, last, until=last.position) == "beating around the bush and tell me the"


def test_the_place_of_the_target_is_before_it_or_the_end_of_the_text(words: Any) -> None:
    inside = one(words, "we said that he was a good man", "said", "good")
    assert said(words, inside, until=inside.place) == "we said that he was a"
    end = one(words, "we said that he was a", "said", "good")
    assert end.place == len(end.input_ids) - 1
    assert end.gap == inside.gap


@pytest.mark.parametrize(
    ("text", "trigger", "target", "defect", "used"),
    [
        ("we said that", "", "he", Defect.EMPTY, False),
        ("we said that", "spoke", "he", Defect.ABSENT, False),
        ("we said that", "we", "he", Defect.FIRST, False),
        ("we need some action now", "act", "action", Defect.BEGUN, False),
        ("it was international law", "inter", "law", Defect.INSIDE, True),
        ("it was Said that", "said", "he", Defect.OTHER_CASE, True),
        ("he said she said that", "said", "we", Defect.REPEATED, True),
        ("we all said", "said", "he", Defect.AT_END, True),
        ("he was here and then said", "said", "here", Defect.EARLIER, True),
        ("we said that ", "said", "he", Defect.BLANK, True),
    ],
)
def test_defects_are_named_and_only_some_end_a_case(
    words: Any, text: str, trigger: str, target: str, defect: Defect, used: bool
) -> None:
    found = one(words, text, trigger, target)
    assert defect in found.defects
    assert found.used is used


def test_a_case_without_defects_has_none(words: Any) -> None:
    assert one(words, "we said that he was", "that", "he").defects == ()


def test_a_text_longer_than_the_context_is_reported(words: Any) -> None:
    text = "we said that he was"
    n = len(one(words, text, "that", "he").input_ids)
    assert one(words, text, "that", "he", context=n + 1).used  # the target needs a place too
    assert one(words, text, "that", "he", context=n).defects == (Defect.TOO_LONG,)


def test_the_same_case_counts_once(words: Any) -> None:
    case = Case(EXPERT, "L4-E0.json", 0, "we said that he was", "that", "he")
    again = locate([case, case], words)
    assert [found.used for found in again] == [True, False]
    assert count_defects(again) == {str(Defect.TWICE): 1}


@given(
    before=st.text("abc xyz,.", min_size=2, max_size=20), trigger=st.sampled_from(["7", "42", "Q"]),
    after=st.text("abc xyz,.", max_size=20), bos=st.booleans(),
)  # fmt: skip
def test_the_prefix_ends_with_the_trigger_whatever_surrounds_it(
    before: str, trigger: str, after: str, bos: bool
) -> None:
    tokenizer = byte_level(bos_template=bos)
    found = one(tokenizer, f"{before.lstrip() or 'a'} {trigger} {after}", trigger, "n")
    ids = list(found.input_ids[found.first : found.position + 1])
    assert str(tokenizer.decode(ids)).rstrip().endswith(trigger)

"""A reply is read in full or not at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lens.autointerp.replies import Answers, Explanation, Outcome, ReplySchema
from moe_lens.config import prompts_dir
from tests.autointerp.llm_server import answers, explanation

TWO = ReplySchema.answers([1, 2])
GOOD = answers({1: 4, 2: None})
SCORE = st.sampled_from([0, 1, 2, 3, 4, None])


@given(st.dictionaries(st.integers(1, 60), SCORE, min_size=1), st.randoms())
def test_graded_answers_come_back_whatever_their_order(scores: dict[int, int | None], random) -> None:
    shuffled = list(scores.items())
    random.shuffle(shuffled)
    parsed = ReplySchema.answers(scores).parse(answers(dict(shuffled)))
    assert (parsed.outcome, parsed.value.scores) == (Outcome.OK, scores)


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{GOOD}\n```",
        f"Here is my answer:\n{GOOD}\nLet me know.",
        f"<think>item 1 {{maybe}} {answers({1: 0, 2: 0})}</think>{GOOD}",
        f"  {GOOD}\n\n",
    ],
)
def test_wrapping_around_the_object_is_passed_over(text: str) -> None:
    assert TWO.parse(text).value.scores == {1: 4, 2: None}


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("", Outcome.EMPTY),
        (" \n", Outcome.EMPTY),
        ("4, null", Outcome.INVALID),
        (GOOD[:-1], Outcome.INVALID),
        (GOOD[:-12], Outcome.INVALID),
        (GOOD + GOOD, Outcome.INVALID),
        (f"<think>{GOOD}", Outcome.INVALID),
        (json.dumps([1, 2]), Outcome.INVALID),
        ('{"answers": {"1": 4, "2": 0}}', Outcome.INVALID),
        ('{"answers": [], "answers": ' + json.dumps(json.loads(GOOD)["answers"]) + "}", Outcome.INVALID),
        ('{"a": ' * 100_000, Outcome.INVALID),
        (explanation(), Outcome.INVALID),
        (answers({1: 4}), Outcome.TOO_FEW_ANSWERS),
        (answers({}), Outcome.TOO_FEW_ANSWERS),
        (answers({1: 4, 2: 0, 3: 0}), Outcome.TOO_MANY_ANSWERS),
        (answers({1: 4, 3: 0}), Outcome.INVALID),
        ('{"answers": [{"id": 1, "score": 4}, {"id": 1, "score": 4}]}', Outcome.INVALID),
        (
            '{"answers": [{"id": 1, "score": 4}, {"id": 2, "score": 4}, {"id": 2, "score": 0}]}',
            Outcome.TOO_MANY_ANSWERS,
        ),
    ],
)
def test_anything_else_is_an_abstention_with_its_reason(text: str, outcome: Outcome) -> None:
    parsed = TWO.parse(text)
    assert (parsed.outcome, parsed.value) == (outcome, None)
    assert parsed.why


@pytest.mark.parametrize("score", ["5", "-1", '"3"', "3.0", "true", "NaN", "[3]", "{}"])
def test_a_grade_is_one_of_five_numbers_or_null(score: str) -> None:
    text = f'{{"answers": [{{"id": 1, "score": {score}}}, {{"id": 2, "score": 0}}]}}'
    assert TWO.parse(text).outcome is Outcome.INVALID


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5).map(json.dumps))
def test_no_text_raises(text: str) -> None:
    assert TWO.parse(text).outcome in (Outcome.INVALID, Outcome.EMPTY)


@pytest.mark.parametrize(("label", "read"), [("a\n b ", "a b"), (None, None)])
def test_a_label_is_one_line_or_null(label: str | None, read: str | None) -> None:
    assert ReplySchema.explanation().parse(explanation(label)).value.label == read


@pytest.mark.parametrize("label", ["", "  ", "\ud800"])
def test_a_label_of_no_words_or_no_text_is_invalid(label: str) -> None:
    assert ReplySchema.explanation().parse(explanation(label)).outcome is Outcome.INVALID


def test_the_reason_quotes_nothing_of_the_reply() -> None:
    assert "SECRET" not in TWO.parse('{"answers": [{"id": 1, "score": "SECRET"}]}').why


@pytest.mark.parametrize(("prompt", "shape"), [("detection", Answers), ("fuzz", Answers), ("explain", Explanation)])
def test_the_shapes_hold_what_the_prompts_ask_for(prompt: str, shape: type) -> None:
    head = next(line for line in (prompts_dir() / f"{prompt}.md").read_text().splitlines() if line.startswith("reply:"))
    assert all(f'"{name}"' in head for name in shape.model_fields)
    assert head.count('":') == len(shape.model_fields) + (2 if shape is Answers else 0)


@pytest.mark.parametrize("schema", [TWO, ReplySchema.explanation()], ids=lambda schema: schema.name)
def test_the_json_schema_is_closed_as_strict_servers_demand(schema: ReplySchema) -> None:
    """Structured output in strict mode wants every object closed and every property required."""

    def objects(node: object):
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for child in node.values():
                yield from objects(child)
        elif isinstance(node, list):
            for child in node:
                yield from objects(child)

    found = list(objects(schema.response_format["json_schema"]["schema"]))
    assert found
    assert "description" not in schema.instructions, "docstrings are for readers of the code"
    for node in found:
        assert node["additionalProperties"] is False
        assert set(node["required"]) == set(node["properties"])

"""Numbers in sentences are those of the table, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens.errors import BadOutput
from moe_lens.report.claims import Claim, Claims
from moe_lens.stats import wilson_interval
from tests.report import made

TABLE = pd.DataFrame(
    {
        "kind": list("aabbb"),
        "expert": [1, 1, 1, 2, 3],
        "x": [1.0, 2.0, 4.0, np.nan, -0.5],
        "ok": [True, False] * 2 + [True],
    }
)


def number(take: str, *, table: pd.DataFrame = TABLE, **claim: Any) -> float:
    return Claim("t", claim.pop("where", {}), take, **claim).compute(table)


@pytest.mark.parametrize(
    ("take", "claim", "expected"),
    [
        ("value", {"where": {"kind": "a", "x": 2.0}, "column": "x"}, 2.0),
        ("value", {"where": {"expert": 3}, "column": "x", "times": 1000}, -500.0),
        ("count", {}, 5),
        ("count", {"where": {"kind": "b"}}, 3),
        ("count", {"where": {"kind": ["a", "b"], "ok": True}}, 3),
        ("count", {"where": {"kind": "nothing"}}, 0),
        ("count", {"where": {"x": {">": 1}}}, 2),
        ("count", {"where": {"x": {">=": 1, "<": 4}}}, 2),
        ("count", {"where": {"x": {"<=": 2}, "kind": {"!=": "b"}}}, 2),
        ("count", {"where": {"x": None}}, 1),
        ("count", {"distinct": ("expert",)}, 3),
        ("count", {"distinct": ("kind", "expert")}, 4),
        ("sum", {"column": "x"}, 6.5),
        ("mean", {"where": {"kind": "a"}, "column": "x"}, 1.5),
        ("median", {"where": {"kind": "b"}, "column": "x"}, 1.75),
        ("min", {"column": "x"}, -0.5),
        ("max", {"column": "x"}, 4.0),
        ("share", {"where": {"ok": True}, "among": {"kind": "a"}}, 0.5),
        ("share", {"where": {"ok": True}, "among": {"kind": "b"}, "distinct": ("expert",)}, 2 / 3),
    ],
)
def test_a_number_is_what_the_rows_give(take: str, claim: dict[str, Any], expected: float) -> None:
    assert number(take, **claim) == pytest.approx(expected)


def test_a_share_has_its_wilson_interval() -> None:
    claim = {"where": {"ok": True}, "among": {"kind": "b"}}
    low, high = wilson_interval(np.array([2]), np.array([3]))
    assert (number("share_low", **claim), number("share_high", **claim)) == pytest.approx((low[0], high[0]))
    z, p = 1.959964, 2 / 3  # Wilson's centre and half width, written out
    centre, half = (p + z * z / 6) / (1 + z * z / 3), z * math.sqrt(p * (1 - p) / 3 + z * z / 36) / (1 + z * z / 3)
    assert (low[0], high[0]) == pytest.approx((centre - half, centre + half), abs=1e-5)


def test_what_is_not_there_is_a_dash_and_not_a_number() -> None:
    claim = Claim("t", {"expert": 2}, "value", "x", form=".2f")
    assert math.isnan(claim.compute(TABLE))
    assert claim.text(claim.compute(TABLE)) == "–"
    assert math.isnan(number("share", where={"ok": True}, among={"kind": "nothing"}))


def test_numbers_read_as_people_write_them() -> None:
    assert Claim("t", {}, "count").text(17408) == "17,408"
    assert Claim("t", {}, "value", "x", form="+.3f").text(-0.5) == "−0.500"
    assert Claim("t", {}, "share", form=".0%").text(0.084) == "8%"


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (Claim("t", {"nix": 1}, "count"), "has no column 'nix'"),
        (Claim("t", {}, "sum", "nix"), "has no column 'nix'"),
        (Claim("t", {}, "count", distinct=("nix",)), "has no column 'nix'"),
        (Claim("t", {"kind": "a"}, "value", "x"), "has 2 rows for"),
        (Claim("t", {"kind": "c"}, "value", "x"), "has 0 rows for"),
        (Claim("t", {"x": {"=~": 1}}, "count"), "nothing is known to compare with as '=~'"),
        (Claim("t", {}, "to_pickle", "x"), "nothing is known to take as 'to_pickle'"),
    ],
)
def test_a_claim_that_cannot_be_taken_says_why(claim: Claim, said: str) -> None:
    with pytest.raises(BadOutput, match=said):
        claim.compute(TABLE)


def test_a_claim_survives_its_text() -> None:
    claim = Claim("t", {"kind": ["a", made.QUOTES]}, "share", None, ("kind",), ".0%", {"ok": True})
    again = Claim.from_json(claim.to_json())
    assert again.compute(TABLE) == claim.compute(TABLE)
    assert again.source == claim.source


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"table": 1}', '{"distinct": [], "colour": 1}', "null"])
def test_text_that_is_no_claim_is_refused(text: str) -> None:
    with pytest.raises(BadOutput, match="no claim of a report"):
        Claim.from_json(text)


@pytest.mark.parametrize("form", ["999999999f", "s", ".3f ", "{0}"])
def test_a_form_that_no_sentence_uses_is_refused(form: str) -> None:
    text = Claim("t", {}, "count").to_json()
    assert Claim.from_json(text).compute(TABLE) == len(TABLE)
    with pytest.raises(BadOutput, match="no claim of a report"):
        Claim.from_json(text.replace('"form": ""', f'"form": "{form}"'))


def test_a_number_without_a_value_meets_no_condition() -> None:
    table = TABLE.assign(n=pd.array([1, 2, None, None, 3], dtype="Int64"))
    assert number("count", table=table, where={"n": {">": 1}}) == 2
    assert number("count", table=table, where={"n": None}) == 2


def test_a_claim_tells_people_where_its_number_is_from() -> None:
    where = {"kind": "a", "x": {"<": 0.05}, "expert": None, "ok": [True, False], "y": list(range(9))}
    said = Claim("t", where, "count", distinct=("kind",)).source
    assert said == (
        "t.parquet: count of distinct kind where kind = a, x < 0.05, expert is missing, ok is one of True, False, "
        "y is one of 9 values"
    )
    assert Claim("manifest", {}, "fact", "commands.validate.settings.n_labels").source == (
        "manifest.json: commands.validate.settings.n_labels"
    )


def test_a_number_of_the_manifest_goes_by_its_dotted_name(tmp_path: Path) -> None:
    from moe_lens.capture.run import Run

    manifest = {"model": {}, "commands": {"validate": {"n": 1234, "state": "done", "complete": True}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    say = Claims(Run(tmp_path))
    assert say.fact("commands.validate.n").endswith(">1,234</data>")
    for name in ("commands.validate.nix", "commands.validate.state", "commands.validate.complete", "commands", ""):
        with pytest.raises(BadOutput, match=r"manifest.json has no number"):
            say.fact(name)


def test_html_of_a_claim_shows_the_number_and_escapes_where_it_came_from(tmp_path: Path) -> None:
    from moe_lens.capture.run import Run

    TABLE.assign(kind=made.SCRIPT).to_parquet(tmp_path / "t.parquet")
    html = Claims(Run(tmp_path)).count("t", where={"kind": made.SCRIPT})
    assert html.endswith(">5</data>")
    assert "<script" not in html

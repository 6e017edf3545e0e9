"""How results look in Jupyter, and what a notebook of ours must be: without outputs, and with claims that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from moe_lens.notebook import result_html, table_html

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
HOSTILE = "<script>alert(1)</script>\"'&"


def test_findings_cells_and_headings_are_escaped():
    frame = pd.DataFrame({HOSTILE: [HOSTILE], "need": [0.25]})
    for page in (result_html(HOSTILE), result_html([HOSTILE]), table_html(frame, headings={"need": HOSTILE})):
        assert "<script" not in page
        assert "&lt;script&gt;" in page


def test_numbers_have_three_digits_unless_told_and_a_dash_where_there_is_none():
    page = table_html(pd.DataFrame({"a": [0.12345, float("nan")], "n": [7, 8], "q": [-0.5, 0.25]}), forms={"q": ".1f"})
    cells = [part.split("</td>")[0].rpartition(">")[2] for part in page.split("<td")[1:]]
    assert cells == ["0.123", "7", "−0.5", "–", "8", "0.2"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        left = cell.get("outputs") or cell.get("execution_count")
        assert not left, f"{cell['id']}: clear the outputs"


def test_there_are_four_notebooks_and_each_says_what_must_be_true():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    assert all("assert " in path.read_text(encoding="utf-8") for path in NOTEBOOKS)

"""`verify` finds every difference between a report and its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from moe_lens.errors import BadOutput
from moe_lens.report.page import report
from moe_lens.report.verify import verify
from tests.cli.conftest import Cli
from tests.report import made


def edit(folder: Path, old: str, new: str) -> None:
    """Change the first `old` in the page."""
    page = folder / "report.html"
    text = page.read_text(encoding="utf-8")
    assert old in text
    page.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_an_untouched_report_agrees(full: Path) -> None:
    found = verify(full)
    assert found.is_ok, found.problems
    assert found.n_tables == len(list(full.glob("*.parquet")))
    assert found.n_claims > 40
    assert found.finding().endswith("numbers of the report agree, and so does the rest of it.")


def test_a_changed_table_is_found(mine: Path) -> None:
    table = pd.read_parquet(mine / "validation.parquet")
    table.assign(verdict="refuted").to_parquet(mine / "validation.parquet")
    problems = verify(mine).problems
    assert problems[0] == "validation.parquet changed after the report was written: write it again"
    assert any(re.match(r"the report says 1 where validation.parquet: count .* is 0", p) for p in problems)


def test_a_table_that_only_reads_the_same_is_found(mine: Path) -> None:
    table = pd.read_parquet(mine / "coactivation.parquet")
    table.to_parquet(mine / "coactivation.parquet", compression="gzip")
    assert verify(mine).problems == ("coactivation.parquet changed after the report was written: write it again",)


@pytest.mark.parametrize("name", ["validation", "waterfall", "coactivation"])
def test_a_removed_table_is_found(mine: Path, name: str) -> None:
    (mine / f"{name}.parquet").unlink()
    assert f"{name}.parquet is gone" in verify(mine).problems


def test_an_added_table_is_found(mine: Path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(mine / "more.parquet")
    assert verify(mine).problems == ("more.parquet is not in the report: write it again",)


def test_an_edited_number_is_found(mine: Path) -> None:
    edit(mine, ">+0.200</data>", ">+0.300</data>")
    (problem,) = verify(mine).problems
    assert problem.startswith("the report says +0.300 where waterfall.parquet: value of value where")
    assert problem.endswith("is +0.200")


def test_an_edited_claim_is_found(mine: Path) -> None:
    edit(mine, "&#34;step&#34;: &#34;raw&#34;", "&#34;step&#34;: &#34;nix&#34;")
    assert "has 0 rows" in verify(mine).problems[0]


@pytest.mark.parametrize("claim", ["{}", "no json", '{"distinct": 1}'])
def test_a_broken_claim_is_found(mine: Path, claim: str) -> None:
    page = (mine / "report.html").read_text(encoding="utf-8")
    page = re.sub(r'data-claim="[^"]*"', f'data-claim="{claim.replace(chr(34), "&#34;")}"', page, count=1)
    (mine / "report.html").write_text(page, encoding="utf-8")
    assert verify(mine).problems == (f"this is no claim of a report: {claim!r}",)


def test_an_edited_figure_is_found(mine: Path) -> None:
    edit(mine, '"load_share":[0.1,', '"load_share":[0.2,')
    (problem,) = verify(mine).problems
    assert problem.startswith("report.html is not what the tables give now")


def test_an_edited_sentence_is_found(mine: Path) -> None:
    edit(mine, "is left for the neurons", "is lost")
    assert len(verify(mine).problems) == 1


def test_a_removed_claim_is_found(mine: Path) -> None:
    page = (mine / "report.html").read_text(encoding="utf-8")
    (mine / "report.html").write_text(re.sub(r"<data .*?</data>", "0.5", page, count=1), encoding="utf-8")
    assert len(verify(mine).problems) == 1


def test_settings_that_changed_are_found(mine: Path) -> None:
    manifest = json.loads((mine / "manifest.json").read_text())
    (mine / "manifest.json").write_text(json.dumps({**manifest, "seed": 7}))
    assert len(verify(mine).problems) == 1
    report(mine)
    assert verify(mine).is_ok


def test_a_file_that_is_no_report_is_refused(mine: Path) -> None:
    (mine / "report.html").write_text("<p>hello", encoding="utf-8")
    with pytest.raises(BadOutput, match="no report of moe-lens"):
        verify(mine)


def test_exit_codes(cli: Cli, mine: Path, tmp_path: Path) -> None:
    good = cli("verify", mine)
    assert (good.code, good.last_line, good.err) == (0, str(mine), "")
    edit(mine, ">+0.200</data>", ">+0.300</data>")
    bad = cli("verify", mine)
    assert bad.code == 1
    assert bad.out.startswith("1 difference")
    assert bad.last_line == str(mine)
    found = json.loads(cli("verify", mine, "--json").out)
    assert (found["ok"], len(found["problems"])) == (False, 1)
    without = made.write_run(tmp_path / "without")
    refused = cli("verify", without)
    assert refused.code == 2
    assert refused.err == f"moe-lens: {without} has no report.html: write it with moe-lens report {without}\n"

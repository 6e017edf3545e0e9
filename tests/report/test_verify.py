"""`verify` finds every difference between a report and its tables."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

from moe_lens.errors import BadOutput
from moe_lens.report.claims import Claim
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


def claims_in(folder: Path, section: str) -> list[tuple[Claim, str]]:
    """Claims of one section of the page, with what they show."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    part = re.search(rf'<section id="{section}".*?</section>', page, re.DOTALL)
    assert part is not None
    found = re.findall(r'<data class="claim"[^>]* data-claim="([^"]*)">([^<]*)</data>', part[0])
    return [(Claim.from_json(unescape(claim)), text) for claim, text in found]


def test_an_untouched_report_agrees(full: Path) -> None:
    found = verify(full)
    assert found.is_ok, found.problems
    assert found.n_tables == len(list(full.glob("*.parquet")))
    assert found.n_claims > 40
    assert found.finding().endswith("numbers of the report agree, and so do its figures, rows, cards and other words.")


def test_a_changed_table_is_found(mine: Path) -> None:
    table = pd.read_parquet(mine / "validation.parquet")
    table.assign(verdict="refuted").to_parquet(mine / "validation.parquet")
    problems = verify(mine).problems
    assert problems[0] == "validation.parquet changed after the report was written"
    assert any(re.match(r"the report says 1 where validation.parquet: count .* is 0", p) for p in problems)


def test_a_table_that_only_reads_the_same_is_found(mine: Path) -> None:
    table = pd.read_parquet(mine / "coactivation.parquet")
    table.to_parquet(mine / "coactivation.parquet", compression="gzip")
    assert verify(mine).problems == ("coactivation.parquet changed after the report was written",)


def shown(claims: list[tuple[Claim, str]], **about: str) -> str:
    """What the page shows in the claim about a table and column."""
    return next(text for claim, text in claims if all(getattr(claim, name) == value for name, value in about.items()))


@pytest.mark.parametrize(
    ("section", "table", "column", "number"),
    [
        ("findings", "waterfall", "value", 0.777),
        ("routing", "routing", "load_share", 0.99),
        ("probing", "comparison", "moe", 0.777),
        ("faithfulness", "faithfulness_gaps", "gap", 0.777),
        ("faithfulness", "faithfulness_alignment", "spearman", 0.77),
    ],
)
def test_a_changed_number_is_found_in_each_section(
    mine: Path, section: str, table: str, column: str, number: float
) -> None:
    old = shown(claims_in(mine, section), table=table, column=column)
    frame = pd.read_parquet(mine / f"{table}.parquet")
    frame.assign(**{column: number}).to_parquet(mine / f"{table}.parquet")
    problems = verify(mine).problems
    assert f"{table}.parquet changed after the report was written" in problems
    assert any(p.startswith(f"the report says {old} where {table}.parquet: ") and column in p for p in problems)


@pytest.mark.parametrize(("section", "verdict"), [("findings", "supported"), ("trial", "underpowered")])
def test_a_changed_verdict_is_found_in_each_section(mine: Path, section: str, verdict: str) -> None:
    assert any(claim.where.get("verdict") == verdict for claim, _ in claims_in(mine, section))
    table = pd.read_parquet(mine / "validation.parquet")
    table.assign(verdict=table["verdict"].replace(verdict, "refuted")).to_parquet(mine / "validation.parquet")
    assert any(f"verdict = {verdict}" in problem and problem.endswith(" is 0") for problem in verify(mine).problems)


def test_a_number_of_the_manifest_that_changed_is_found(mine: Path) -> None:
    manifest = json.loads((mine / "manifest.json").read_text())
    manifest["commands"]["faithfulness"]["n_tokens"] = 1601
    (mine / "manifest.json").write_text(json.dumps(manifest))
    said = "the report says 600 where manifest.json: commands.faithfulness.n_tokens is 1,601"
    assert said in verify(mine).problems


@pytest.mark.parametrize("content", [b"", b"nothing of a table", None])
def test_a_damaged_table_is_found_and_not_a_crash(mine: Path, content: bytes | None) -> None:
    path = mine / "validation.parquet"
    path.write_bytes(path.read_bytes() + b"more" if content is None else content)
    problems = verify(mine).problems
    assert problems[0] == "validation.parquet changed after the report was written"
    assert problems[1].startswith("validation.parquet is damaged: put its copy back, or run the command that wrote it")
    assert len(problems) == 2


def test_rows_that_were_added_are_found(mine: Path) -> None:
    table = pd.read_parquet(mine / "probe.parquet")
    pd.concat([table, table.tail(1)]).to_parquet(mine / "probe.parquet")
    problems = verify(mine).problems
    assert problems[0] == "probe.parquet changed after the report was written"
    assert any(problem.startswith(f"the report says {len(table)} where probe.parquet: count") for problem in problems)


@pytest.mark.parametrize("name", ["validation", "waterfall", "coactivation"])
def test_a_removed_table_is_found(mine: Path, name: str) -> None:
    (mine / f"{name}.parquet").unlink()
    assert f"{name}.parquet is gone: put it back" in verify(mine).problems


def test_an_added_table_is_found(mine: Path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(mine / "more.parquet")
    assert verify(mine).problems == ("more.parquet is not in the report, it was added later",)


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
    assert problem.startswith("the part 'routing-load' of the page is not what the tables give")


def test_an_edited_sentence_is_found_and_its_section_named(mine: Path) -> None:
    edit(mine, "Both ablation modes must agree", "One ablation mode must agree")
    (problem,) = verify(mine).problems
    assert problem.startswith("the part 'trial' of the page is not what the tables give")


def test_an_edited_table_is_named(mine: Path) -> None:
    page = (mine / "report.html").read_text(encoding="utf-8")
    at = page.index('"lift":[', page.index('id="data-trial-verdicts"')) + len('"lift":[')
    (mine / "report.html").write_text(page[:at] + "9" + page[at:], encoding="utf-8")
    (problem,) = verify(mine).problems
    assert problem.startswith("the part 'trial-verdicts' of the page is not what the tables give")


def test_an_edited_card_is_named(mine: Path) -> None:
    page = (mine / "report.html").read_text(encoding="utf-8")
    at = page.index("exemplars", page.index('data-card="L2.E4"'))
    (mine / "report.html").write_text(page[:at] + "EXEMPLARS" + page[at + 9 :], encoding="utf-8")
    (problem,) = verify(mine).problems
    assert problem.startswith("the card of L2.E4 is not what the tables give")


def test_a_claim_with_a_condition_that_makes_no_sense_is_found(mine: Path) -> None:
    edit(mine, "&#34;p&#34;: {&#34;&lt;&#34;: 0.05}", "&#34;p&#34;: {&#34;&lt;&#34;: &#34;x&#34;}")
    assert any("which nobody can take from faithfulness_gaps" in problem for problem in verify(mine).problems)


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
    assert bad.out.startswith("1 difference between the report and its tables: the report says +0.300 where ")
    assert f"write the report again with moe-lens report {mine}" in bad.out
    assert bad.last_line == str(mine)
    found = json.loads(cli("verify", mine, "--json").out)
    assert (found["ok"], len(found["problems"])) == (False, 1)
    without = made.write_run(tmp_path / "without")
    refused = cli("verify", without)
    assert refused.code == 2
    assert refused.err == f"moe-lens: {without} has no report.html: write it with moe-lens report {without}\n"

"""``verify(run)``: is the report what the tables say?

1. The tables are the files that the report was written from (sha256).
2. Every claim in the page is taken from them again, and reads as the page shows it.
3. All the rest of the page (figures, tables, cards, other sentences) is made again, and is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lens.capture.run import Run, open_run
from moe_lens.errors import BadOutput
from moe_lens.report.claims import Claim, Claims
from moe_lens.report.page import FILE, render, table_hashes

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Verification:
    """What was checked, and every difference found."""

    n_tables: int
    n_claims: int
    problems: tuple[str, ...]

    @property
    def is_ok(self) -> bool:
        return not self.problems

    def finding(self) -> str:
        """In a sentence."""
        if self.is_ok:
            return (
                f"{self.n_tables} tables and {self.n_claims} numbers of the report agree, and so does the rest of it."
            )
        return f"{len(self.problems)} differences between the report and its tables: {self.problems[0]}"

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.is_ok, "tables": self.n_tables, "claims": self.n_claims, "problems": list(self.problems)}


def verify(run: Run | str | Path) -> Verification:
    """Check the report of a run against its tables.

    It does not show that the tables are right: they are what commands wrote.

    Raises:
        BadOutput: no run, or a run without a report.
    """
    run = run if isinstance(run, Run) else open_run(run)
    path = run.path / FILE
    if not path.exists():
        raise BadOutput(f"{run.path} has no {FILE}: write it with moe-lens report {run.path}")
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    hashes = page.hashes()
    there = [
        (claim, shown) for claim, shown in page.claims if run.has(claim.table)
    ]  # a table that is gone is said once
    problems = _tables(hashes, table_hashes(run)) + page.unreadable + _claims(there, Claims(run))
    if not problems and render(run) != text:
        problems.append(f"{FILE} is not what the tables give now, though its quoted numbers are: write it again")
    return Verification(len(hashes), len(page.claims), tuple(problems))


def _tables(written: dict[str, str], now: dict[str, str]) -> list[str]:
    problems = [f"{name} is gone" for name in written if name not in now]
    problems += [f"{name} is not in the report: write it again" for name in now if name not in written]
    return problems + [
        f"{name} changed after the report was written: write it again"
        for name in written
        if name in now and now[name] != written[name]
    ]


def _claims(claims: Sequence[tuple[Claim, str]], say: Claims) -> list[str]:
    problems = []
    for claim, shown in claims:
        try:
            expected = claim.text(say.number(claim))
        except BadOutput as error:
            problems.append(str(error))
            continue
        if shown != expected:
            problems.append(f"the report says {shown} where {claim.source} is {expected}")
    return problems


class _Page(HTMLParser):
    """Claims and hashes of a report."""

    def __init__(self) -> None:
        super().__init__()
        self.claims: list[tuple[Claim, str]] = []
        self.unreadable: list[str] = []
        self._claim: Claim | None = None
        self._hashes = ""
        self._in_hashes = False

    def hashes(self) -> dict[str, str]:
        import json

        try:
            return json.loads(self._hashes)
        except ValueError as error:
            raise BadOutput(f"{FILE} names no tables: it is no report of moe-lens, or it was edited") from error

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "data" and given.get("class") == "claim":
            try:
                self._claim = Claim.from_json(given.get("data-claim") or "{}")
            except BadOutput as error:
                self.unreadable.append(str(error))
                return
            self.claims.append((self._claim, ""))
        self._in_hashes = tag == "script" and given.get("id") == "hashes"

    def handle_endtag(self, tag: str) -> None:
        if tag == "data":
            self._claim = None
        self._in_hashes = False

    def handle_data(self, data: str) -> None:
        if self._claim is not None:
            claim, shown = self.claims[-1]
            self.claims[-1] = claim, shown + data
        elif self._in_hashes:
            self._hashes += data

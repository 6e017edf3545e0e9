"""Numbers in sentences: each knows the table, rows and column it came from, so that anybody can take it again.

    say = Claims(run)
    say.count("validation", where={"label_kind": "real", "verdict": "supported"}, distinct=("layer", "expert"))
    say.value("comparison", "gap", where={"arm": "held_out", ...}, form="+.3f")
    say.count("faithfulness_gaps", where={"p": {"<": 0.05}})
    say.fact("commands.faithfulness.n_documents")

What they return is HTML: the number in a ``<data>`` element with its claim beside it, shown on hover, read by `verify`.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from moe_lens.errors import BadOutput
from moe_lens.stats import wilson_interval

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.capture.run import Run


MANIFEST = "manifest"
"""What a number of the manifest has in place of a table."""
_TAKES = ("value", "count", "share", "share_low", "share_high", "sum", "mean", "median", "min", "max", "fact")
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "!=": operator.ne}
_FORM = re.compile(r"[+,]*(\.\d\d?)?[feg%]?")
_MANY = 4
"""Values of a column from which on their number is said in place of them."""


@dataclass(frozen=True)
class Claim:
    """One number: which rows of which table, and what is made of them."""

    table: str
    where: Mapping[str, Any]
    """Column to the value that it has, to a list of values, to None where it has none, or to a comparison such as
    ``{"<": 0.05}``."""
    take: str
    """value (of the one row), count, share (of the rows `among`), share_low or share_high (its Wilson interval), sum,
    mean, median, min, max, or fact (the entry of the manifest with the dotted name `column`)."""
    column: str | None = None
    distinct: tuple[str, ...] = ()
    """Count combinations of these columns, not rows."""
    form: str = ""
    """Format specification of Python."""
    among: Mapping[str, Any] | None = None
    """Of a share: the rows that it is a share of."""
    times: float = 1.0
    """What the number is multiplied by, 1,000 for a thousandth of the table's unit."""

    def compute(self, table: pd.DataFrame) -> float:
        """The number, from its table.

        Raises:
            BadOutput: a column that is not there, `value` of several rows or none, or something else to take.
        """
        if self.take not in _TAKES:
            raise BadOutput(f"nothing is known to take as {self.take!r}: write the report again")
        for name in (*self.where, *(self.among or {}), *self.distinct, *([self.column] if self.column else [])):
            if name not in table:
                raise BadOutput(f"{self.table}.parquet has no column {name!r}: write the report again")
        rows = _chosen(table, self.where)
        if self.take == "count":
            return self._count(rows)
        if self.take.startswith("share"):
            n, total = self._count(_chosen(rows, self.among or {})), self._count(_chosen(table, self.among or {}))
            low, high = wilson_interval(np.array([n]), np.array([total]))
            return {"share": n / total if total else math.nan, "share_low": low[0], "share_high": high[0]}[self.take]
        if self.take == "value" and len(rows) != 1:
            raise BadOutput(f"{self.table}.parquet has {len(rows)} rows for {self.source}: write the report again")
        found = rows[self.column]
        return self.times * float(found.iloc[0] if self.take == "value" else getattr(found, self.take)())

    def of_manifest(self, manifest: Mapping[str, Any]) -> float:
        """The number, from the manifest.

        Raises:
            BadOutput: there is no such number.
        """
        found: Any = manifest
        for name in (self.column or "").split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise BadOutput(f"manifest.json has no number {self.column}: write the report again")
        return self.times * found

    def _count(self, rows: pd.DataFrame) -> int:
        return len(rows.drop_duplicates(list(self.distinct)) if self.distinct else rows)

    def text(self, number: float) -> str:
        """The number as it is shown, with a true minus sign."""
        return "–" if math.isnan(number) else format(number, self.form or ",.0f").replace("-", "−")

    @property
    def source(self) -> str:
        """In words, for the reader who hovers over the number."""
        if self.take == "fact":
            return f"manifest.json: {self.column}"
        what = self.column or ("distinct " + ", ".join(self.distinct) if self.distinct else "rows")
        said = f"{self.table}.parquet: {self.take} of {what}{_worded(' where ', self.where)}"
        return said + _worded(" among ", self.among or {})

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=_plain)

    @classmethod
    def from_json(cls, text: str) -> Claim:
        """What `to_json` gave.

        Raises:
            BadOutput: something else.
        """
        try:
            values = json.loads(text)
            found = cls(**{**values, "distinct": tuple(values["distinct"])})
            if not _FORM.fullmatch(found.form):  # a page comes from anywhere, and 999999999f takes a gigabyte
                raise ValueError(found.form)
            return found
        except (ValueError, TypeError, KeyError) as error:
            raise BadOutput(f"this is no claim of a report: {text[:80]!r}") from error


@dataclass
class Claims:
    """Reads tables once, and makes sentences' numbers from them."""

    run: Run
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def table(self, name: str) -> pd.DataFrame:
        """A table of the run, read once."""
        if name not in self._tables:
            self._tables[name] = self.run.frame(name)
        return self._tables[name]

    def number(self, claim: Claim) -> float:
        if claim.table == MANIFEST:
            return claim.of_manifest(self.run.manifest)
        return claim.compute(self.table(claim.table))

    def show(self, claim: Claim) -> Markup:
        """A claim as HTML."""
        number = self.number(claim)
        return Markup('<data class="claim" value="{}" title="{}" data-claim="{}">{}</data>').format(
            repr(number), claim.source, claim.to_json(), claim.text(number)
        )

    def value(self, table: str, column: str, *, where: Mapping[str, Any], form: str = ".3f") -> Markup:
        """One cell."""
        return self.show(Claim(table, where, "value", column, form=form))

    def count(self, table: str, *, where: Mapping[str, Any] | None = None, distinct: Sequence[str] = ()) -> Markup:
        """How many rows, or how many combinations of the columns `distinct`."""
        return self.show(Claim(table, where or {}, "count", distinct=tuple(distinct)))

    def share(
        self, table: str, *, where: Mapping[str, Any], among: Mapping[str, Any], distinct: Sequence[str] = ()
    ) -> Markup:
        """A share in per cent with its Wilson interval."""
        low, mid, high = (
            self.show(Claim(table, where, take, distinct=tuple(distinct), form=".0%", among=among))
            for take in ("share_low", "share", "share_high")
        )
        return Markup("{} [{}, {}]").format(mid, low, high)

    def of(
        self, take: str, table: str, column: str, *, where: Mapping[str, Any] | None = None, form: str = ".3f"
    ) -> Markup:
        """sum, mean, median, min or max of a column."""
        return self.show(Claim(table, where or {}, take, column, form=form))

    def fact(self, name: str, *, form: str = "", times: float = 1.0) -> Markup:
        """A number of the manifest, by its dotted name."""
        return self.show(Claim(MANIFEST, {}, "fact", name, form=form, times=times))

    def interval(
        self, table: str, columns: tuple[str, str, str], *, where: Mapping[str, Any], form: str = ".3f",
        times: float = 1.0,
    ) -> Markup:  # fmt: skip
        """A value with the two ends of its interval, from one row."""
        value, low, high = (self.show(Claim(table, where, "value", name, form=form, times=times)) for name in columns)
        return Markup("{} [{}, {}]").format(value, low, high)


def _chosen(table: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    for name, wanted in where.items():
        if wanted is None:
            table = table[table[name].isna()]
        elif isinstance(wanted, Mapping):
            for sign, value in wanted.items():
                compare = _SIGNS.get(sign)
                if compare is None:
                    raise BadOutput(f"nothing is known to compare with as {sign!r}: write the report again")
                table = table[compare(table[name], value).fillna(False).astype(bool)]
        else:
            table = table[table[name].isin(wanted if isinstance(wanted, list | tuple) else [wanted])]
    return table


def _worded(lead: str, where: Mapping[str, Any]) -> str:
    return lead + ", ".join(_condition(name, value) for name, value in where.items()) if where else ""


def _condition(name: str, value: Any) -> str:
    if value is None:
        return f"{name} is missing"
    if isinstance(value, Mapping):
        return " and ".join(f"{name} {sign} {bound}" for sign, bound in value.items())
    if isinstance(value, list | tuple):
        listed = ", ".join(map(str, value)) if len(value) < _MANY else f"{len(value)} values"
        return f"{name} is one of {listed}" if value else f"{name} is none"
    return f"{name} = {value}"


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's own, for JSON."""
    return value.item() if hasattr(value, "item") else str(value)

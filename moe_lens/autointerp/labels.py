"""The table of labels: what a labeller, a person or another tool says about experts.

    layer,expert,label,rule
    7,12,"closing brackets in code","[)\\]}]+"

A label is a sentence. A rule is the same claim as a regular expression over characters: a token fits if one of its
characters is part of a match, so a label with a rule needs no judge. A column ``concept`` may name a built-in concept
in place of a rule, or a YAML file that holds one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from moe_lens.corpus.concepts import DOCUMENT_FIELDS, builtin_concepts
from moe_lens.corpus.patterns import check_pattern
from moe_lens.errors import BadConfig, MoELensError, OutOfRange, UnknownConcept, nearest
from moe_lens.types import ExpertAddress, Status

if TYPE_CHECKING:
    from moe_lens.models.spec import Spec

KEY = ("layer", "expert", "facet")
LABEL_COLUMNS = (
    *KEY, "label", "rule", "labeller", "model_id", "prompt_hash", "n_exemplars", "confidence", "evidence", "status",
    "why",
)  # fmt: skip
CONCEPT = "concept"
"""Column that tables of labels have where one of them names a concept."""
_LABELLERS = r"lexical$|openai:|gguf:"
_WHOLE = {"layer": "int64", "expert": "int64", "facet": "int64", "n_exemplars": "int64", "confidence": "Int64"}


def label_frame(rows: Iterable[Mapping[Any, Any]]) -> pd.DataFrame:
    """A table of labels (`LABEL_COLUMNS`), sorted by expert and facet; what a row leaves out is empty.

    If any row names a concept, the table has the column `CONCEPT` too.

    ``facet`` 0 is an expert's one label, 1 to 5 are facets of it. ``status`` is ok for a row with a label, and a row
    without one says in ``why`` what it is missing for.

    Raises:
        BadConfig: two rows for the same expert and facet.
    """
    empty: dict[str, Any] = dict.fromkeys(("labeller", "model_id", "prompt_hash", "why"), "")
    empty |= {"label": None, "rule": None, "facet": 0, "n_exemplars": 0, "confidence": None, "status": str(Status.OK)}
    filled = [{**empty, "evidence": [], **row} for row in rows]
    more = [CONCEPT] if any(row.get(CONCEPT) for row in filled) else []
    frame = pd.DataFrame(filled, columns=[*LABEL_COLUMNS, *more]).astype(_WHOLE)
    frame = with_none(frame)
    twice = frame[frame.duplicated(list(KEY))]
    if len(twice):
        at = ExpertAddress(int(twice["layer"].iloc[0]), int(twice["expert"].iloc[0]))
        raise BadConfig(f"there are two labels for {at}: keep one, or number them in a column facet (1, 2, ...)")
    return frame.sort_values(list(KEY), ignore_index=True)


def with_none(labels: pd.DataFrame) -> pd.DataFrame:
    """`labels` with None where there is no label, rule or concept; a parquet file gives NaN back."""
    names = [name for name in ("label", "rule", CONCEPT) if name in labels]
    texts = {name: labels[name].astype(object).where(labels[name].notna(), None) for name in names}
    return labels.assign(**texts)


def usable(labels: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold a label."""
    return labels[labels["status"] == str(Status.OK)]


def given_labels(table: pd.DataFrame) -> pd.DataFrame:
    """A person's table of labels, held to what a CSV file is held to; the labeller is ``given`` unless it is named.

    Labels of one of our own labellers (``lexical``, ``openai:...``, ``gguf:...``) go by ``given:lexical`` and so on.

    Raises:
        BadConfig: a missing column, an empty label, a rule that does not compile, two labels for one expert, or
            labels of several labellers.
    """
    missing = [name for name in ("layer", "expert", "label") if name not in table]
    if missing:
        raise BadConfig(f"the table of labels has no column {missing[0]!r}: give layer, expert and label")
    named = table["labeller"] if "labeller" in table else pd.Series("", index=table.index)
    named = named.astype(object).where(named.notna() & (named != ""), "given").astype(str)
    # else they would take the place of that labeller's own in a run directory
    named = named.where(~named.str.match(_LABELLERS), "given:" + named)
    if named.nunique() > 1:
        raise BadConfig(f"the table holds labels of {', '.join(sorted(map(str, named.unique())))}: give one labeller's")
    records = with_none(table.assign(labeller=named, rule=table.get("rule"))).to_dict("records")
    ok = [row for row in records if row.get("status", str(Status.OK)) == str(Status.OK)]
    return label_frame([{**row, **_checked(row)} for row in ok])


def _checked(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Expert, facet, label, rule and concept of a row that somebody wrote.

    Raises:
        BadConfig, BadConcept, UnknownConcept: see `read_labels`.
    """
    at = ExpertAddress(_number(row["layer"], "L"), _number(row["expert"], "E"))
    label = " ".join(str(row["label"] or "").split())
    if not label:
        raise BadConfig(f"the label of {at} is empty; write one or take the row out")
    rule = row.get("rule") or None
    if rule is not None:
        check_pattern(rule, owner=f"the rule of {at}")
    concept = str(row.get(CONCEPT) or "").strip() or None
    if concept is not None:
        _check_concept(concept, at)
    facet = _number(row.get("facet") or 0, "")
    return {
        "layer": at.layer, "expert": at.expert, "facet": facet, "label": label, "rule": rule, CONCEPT: concept,
    }  # fmt: skip


def _check_concept(name: str, at: ExpertAddress) -> None:
    """Refuse a name that nothing defines; files, and fields of the text (``domain_code``), are looked at with it."""
    known = [concept.name for concept in builtin_concepts()]
    later = name.startswith(tuple(f"{field}_" for field in DOCUMENT_FIELDS)) or name.endswith((".yaml", ".yml"))
    if name not in known and not later:
        raise UnknownConcept(f"no concept is named {name!r}, of {at}{nearest(name, known)}; a rule can say it instead")


def read_labels(path: str | Path, spec: Spec | None = None) -> pd.DataFrame:
    """Labels of a CSV file with the columns ``layer, expert, label``, and if it has them ``rule, facet, concept``.

    Args:
        spec: of the model, to refuse experts that it does not have.

    Raises:
        BadConfig: no such file, no CSV, a missing column, an empty label, a rule that does not compile, two labels
            for one expert.
        OutOfRange: an expert that the model does not have.
        UnknownConcept: a concept that nothing defines.
    """
    path = Path(path)
    rows = []
    for line, row in enumerate(_read(path), start=2):
        if (row.get("status") or str(Status.OK)) != str(Status.OK):  # our own tables, exported, hold abstentions too
            continue
        try:
            checked = _checked(row)
            if spec is not None:
                _check_expert(spec, ExpertAddress(checked["layer"], checked["expert"]))
        except MoELensError as error:
            raise type(error)(f"{path}, row {line}: {error}") from error
        rows.append({**checked, "labeller": f"file:{path.name}"})
    if not rows:
        raise BadConfig(f"{path} holds no label: write a row 'layer,expert,label' for each")
    try:
        return label_frame(rows)
    except BadConfig as error:
        raise BadConfig(f"{path}: {error}") from error


def _read(path: Path) -> list[dict[str, str]]:
    import csv

    header = "its header must be layer,expert,label[,rule]"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            rows = list(reader)
            names = [name.strip() for name in reader.fieldnames or []]
    except OSError as error:
        raise BadConfig(f"cannot read the labels {path}: {error.strerror or error}; give a CSV file") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadConfig(f"{path} is not a CSV file: {error}; {header}") from error
    for name in ("layer", "expert", "label"):
        if name not in names:
            raise BadConfig(f"{path} has no column {name!r}: {header}")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise BadConfig(
                f"{path}, row {line}: it has not as many fields as the header; put texts with commas in quotes"
            )
    return [{str(name).strip(): value for name, value in row.items()} for row in rows]


def _number(value: Any, letter: str) -> int:
    digits = str(value).strip().removeprefix(letter).removesuffix(".0")
    if not digits.isascii() or not digits.isdigit():
        raise BadConfig(f"cannot read {value!r} as a number: write a layer, expert or facet as 7")
    return int(digits)


def _check_expert(spec: Spec, at: ExpertAddress) -> None:
    entry = spec.at(at.layer)
    if entry is None or at.layer not in spec.moe_layers:
        layers = spec.moe_layers
        raise OutOfRange(f"{spec.name!r} has no MoE layer {at.layer}: its MoE layers are {layers[0]} to {layers[-1]}")
    if at.expert >= entry.n_experts:
        raise OutOfRange(
            f"layer {at.layer} of {spec.name!r} has no expert {at.expert}: give 0 to {entry.n_experts - 1}"
        )

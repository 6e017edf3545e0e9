"""Concepts of a YAML file::

- name: ip_address
  category: network           # optional, "user"
  regex: '\\b(?:\\d{1,3}\\.){3}\\d{1,3}\\b'
- name: french
  field: language
  equals: fr                  # or [fr, fr_CA]
- name: docstring
  token_class: String.Doc     # or a list of pygments classes
  scope: {language: python}   # optional
  granularity: span           # optional: type | span | document
"""

from __future__ import annotations

from pathlib import Path

from moe_lens.corpus.concepts import Concept, builtin_concepts, concept
from moe_lens.errors import BadConcept, nearest

KEYS = ("name", "category", "regex", "field", "equals", "token_class", "granularity", "scope", "doc")


def load_concepts(path: str | Path) -> list[Concept]:
    """Read the concepts of a YAML file.

    Raises:
        BadConcept: the file cannot be read, is no list of mappings, or an entry is unusable; names the entry.
    """
    import yaml

    path = Path(path).expanduser()
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadConcept(f"{path}: no such file of concepts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadConcept(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise BadConcept(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise BadConcept(
            f"{path}: a list of concepts is needed, each with name and regex | field + equals | token_class"
        )
    out: list[Concept] = []
    taken = {c.name for c in builtin_concepts()}
    for number, entry in enumerate(entries, 1):
        one = _entry(path, number, entry)
        if one.name in taken:
            raise BadConcept(f"{path}, entry {number}: the name {one.name!r} is taken, choose another")
        taken.add(one.name)
        out.append(one)
    return out


def _entry(path: Path, number: int, entry: object) -> Concept:
    if not isinstance(entry, dict):
        raise BadConcept(f"{path}, entry {number}: a mapping with the key name is needed, not {entry!r}")
    label = f"{path}, entry {number} ({entry.get('name', 'no name')})"
    for key in entry:
        if key not in KEYS:
            raise BadConcept(f"{label}: unknown key {key!r}{nearest(str(key), KEYS)}")
    if "name" not in entry:
        raise BadConcept(f"{label}: the key 'name' is missing")
    if not isinstance(entry.get("scope", {}), dict):
        raise BadConcept(f"{label}: scope is a mapping of fields to values, such as {{language: python}}")
    for value in (entry.get("equals"), *entry.get("scope", {}).values()):
        if any(isinstance(v, bool) for v in (value if isinstance(value, list) else [value])):
            raise BadConcept(f"{label}: YAML reads no, yes, on and off as true or false: put the value in quotes")
    try:
        return concept(**{str(k): v for k, v in entry.items()})
    except BadConcept as error:
        raise BadConcept(f"{label}: {error}") from None

"""Who may import whom, and what a bare import may cost."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moe_lens

PACKAGE = Path(moe_lens.__file__).parent
FLOORS = {
    **dict.fromkeys(("types", "errors", "config", "stats", "plots", "notebook", "_callable"), 0),
    "models": 1,
    "corpus": 2,
    "capture": 3,
    **dict.fromkeys(("probing", "autointerp", "causal", "overlap"), 4),
    "report": 5,
    "cli": 6,
    "__main__": 7,
}
SIDE_ROOMS = {"organisms"}  # builds what is bundled; nothing but tests imports it
HEAVY = ("torch", "transformers", "plotly", "openai", "pandas", "sklearn", "datasets", "nnsight")


def imports(tree: ast.AST, *, module: str) -> Iterator[tuple[str, bool]]:
    """Every ``moe_lens`` module that a file imports, with whether only type checkers see it."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def only_typing(node: ast.AST) -> bool:
        while node in parents:
            node = parents[node]
            if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                return True
        return False

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "moe_lens":
                yield name, only_typing(node)


def floor_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def violations(path: Path, source: str) -> list[str]:
    """Imports of a later floor, or of a neighbour on the same one."""
    module = ".".join(("moe_lens", *path.relative_to(PACKAGE).with_suffix("").parts))
    here = floor_of(module)
    if here in SIDE_ROOMS or here == "__init__":
        return []
    found = []
    for name, typing_only in imports(ast.parse(source), module=module):
        there = floor_of(name)
        if there == here or there not in FLOORS.keys() | SIDE_ROOMS:  # a name of moe_lens/__init__.py
            continue
        if there in SIDE_ROOMS or FLOORS[there] >= FLOORS[here] > 0 or FLOORS[there] > FLOORS[here]:
            found.append(f"{module} imports {name}" + (" for its types" if typing_only else ""))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_floor_imports_only_floors_below_it(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("models/x.py", "from moe_lens.capture.run import Run", False),
        ("models/x.py", "def f():\n    import moe_lens.cli.app", False),
        ("models/x.py", "if TYPE_CHECKING:\n    from moe_lens.probing import probe", False),
        ("probing/x.py", "from moe_lens.causal import ablate", False),
        ("corpus/x.py", "from moe_lens import organisms", False),
        ("types.py", "from moe_lens.models.spec import Spec", False),
        ("probing/x.py", "from moe_lens.capture.run import Run\nfrom moe_lens.probing import fit", True),
        ("types.py", "from moe_lens.errors import OutOfRange", True),
    ],
)
def test_the_direction_rule_sees_what_it_should(file: str, source: str, allowed: bool) -> None:
    assert (violations(PACKAGE / file, source) == []) == allowed


def test_the_public_names_are_known_to_type_checkers() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {name.split(".")[-1] for name, typing_only in imports(tree, module="moe_lens") if typing_only}
    assert typed == set(moe_lens.__all__) - {"__version__"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "statement",
    ["import moe_lens", "from moe_lens.cli.app import main; main(['--help'])", "import moe_lens.config"],
)
def test_nothing_heavy_is_imported_by(statement: str) -> None:
    done = run("-c", f"{statement}; import sys; print(*(m for m in {HEAVY} if m in sys.modules), file=sys.stderr)")
    assert (done.returncode, done.stderr.strip()) == (0, "")


def cpu_seconds(*words: str) -> float:
    """Processor time of the cheapest of five runs, which other load on the machine hardly changes."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*words).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_import_takes_at_most_300_ms() -> None:
    assert cpu_seconds("-c", "import moe_lens") <= 0.3


def test_help_takes_at_most_500_ms() -> None:
    assert cpu_seconds("-m", "moe_lens", "--help") <= 0.5

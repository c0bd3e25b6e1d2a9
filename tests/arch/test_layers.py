"""Imports go down only: a module may import from its own folder and from folders below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hpcserve"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"config", "rundir", "http"}),
    frozenset({"plan"}),
    frozenset({"engines"}),
    frozenset({"render"}),
    frozenset({"slurm", "images"}),
    frozenset({"router", "node", "batch", "doctor"}),
    frozenset({"bench"}),
    frozenset({"control", "launch"}),
    frozenset({"cli"}),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def unit(module: tuple[str, ...]) -> str:
    """The folder (or top-level module) a dotted module below `hpcserve` belongs to."""
    return module[0] if module else ""


def imports(path: Path) -> set[tuple[str, ...]]:
    """Modules below `hpcserve` that a file imports anywhere, as tuples without the package name."""
    own = path.relative_to(PACKAGE).with_suffix("").parts
    package = own[:-1]
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = tuple(alias.name.split("."))
                if parts[0] == "hpcserve":
                    found.add(parts[1:])
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - (node.level - 1)]
                module = base + tuple((node.module or "").split(".") if node.module else ())
            elif node.module and node.module.split(".")[0] == "hpcserve":
                module = tuple(node.module.split(".")[1:])
            else:
                continue
            found |= {(*module, alias.name) for alias in node.names} if not module else {module}
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if "data" not in p.relative_to(PACKAGE).parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    own = unit(path.relative_to(PACKAGE).with_suffix("").parts)
    if own in ("__init__", "__main__"):
        return
    assert own in RANK, f"{own} has no layer yet: add it to LAYERS"
    for module in imports(path):
        other = unit(module)
        if other in ("", "__version__") or other == own:
            continue
        assert RANK[other] < RANK[own], f"{own} imports {other}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_stays_one_noun(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 450, f"{lines} lines: split it"


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    """The check above must be able to fail."""
    source = PACKAGE / "config" / "keys.py"
    assert RANK["cli"] > RANK[unit(source.relative_to(PACKAGE).parts)]
    assert any(unit(m) == "config" for m in imports(PACKAGE / "plan" / "plan.py"))

"""Imports go down the rows of the house only (README, "The house")."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llm_jax"
ROWS = [
    ["__init__", "main", "generate", "convert", "show_data", "report", "describe", "score", "tune"],
    ["jobs"],
    ["training", "inference"],
    ["data", "objectives", "adapters"],
    ["models"],
    ["sharding"],
    ["storage", "kernels"],
    ["base"],
]
ROW = {room: i for i, rooms in enumerate(ROWS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    inside = file.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(file: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in a file, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute"
            names = [a.name for a in node.names] if node.module == "llm_jax" else [""]
            found += [(node.lineno, f"{node.module}.{name}".rstrip(".")) for name in names]
    return found


def lazy_names(file: Path) -> list[tuple[int, str]]:
    """What a package's `lazy_exports` will import."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("llm_jax."):
            found.append((node.lineno, node.value.partition(":")[0]))
    return found


def test_every_room_has_its_row():
    rooms = {room_of(file) for file in FILES}
    assert rooms <= set(ROW), "a new room needs a row here and in the README"
    assert rooms >= {"main", "jobs", "models", "base"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file):
    room = room_of(file)
    seen = imports(file) + (lazy_names(file) if file.name == "__init__.py" else [])
    for line, name in seen:
        if name.split(".")[0] != "llm_jax":
            continue
        other = name.split(".")[1] if "." in name else "__init__"
        assert other == room or ROW[other] > ROW[room], f"{file}, line {line}: {room} imports {name}"


DEFAULTS = [f for f in FILES if f.name == "config.py" or (room_of(f) == "models" and f.name.endswith("_config.py"))]


@pytest.mark.parametrize("file", DEFAULTS, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_defaults_import_nothing_heavy(file):
    for line, name in imports(file):
        top = name.split(".")[0]
        light = name.endswith((".config", "_config")) or name.startswith("llm_jax.base.")
        assert top in sys.stdlib_module_names or (top == "llm_jax" and light), f"{file}, line {line}: {name}"


def test_kernels_see_no_mesh():
    for file in PACKAGE.glob("kernels/**/*.py"):
        names = [name for _, name in imports(file)]
        assert not [n for n in names if n.startswith(("jax.sharding", "jax.experimental.shard_map"))], file

"""What scripts in experiments/ take from the package is there: most of them are run by hand, long after a change."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments"


def is_there(module: str, name: str) -> bool:
    """As a name in the module, or as a module in the package."""
    found = importlib.import_module(module)
    return hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("script", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_what_a_script_imports_is_there(script):
    absent = [
        f"{node.module}.{name.name}"
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llm_jax"
        for name in node.names
        if not is_there(node.module or "", name.name)
    ]
    assert absent == []

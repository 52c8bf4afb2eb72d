"""Parameters that a rule of their own moves, and no gradient: those declared with `learned=False`.

In a train state they lie in `model_state`, by role, apart from what the optimizer sees; the model takes both together.
"""

from collections.abc import Mapping
from typing import Any

from llm_jax.base.trees import flatten, unflatten

Tree = Mapping[str, Any]


def split(tree: Tree, declarations: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree of parameters by role in two: what the optimizer trains, and the rest, `{}` where there is none.

    `declarations` has all of the tree's paths, and may have more.
    """
    flat, declared = flatten(tree), flatten(declarations)
    parts = (
        {path: leaf for path, leaf in flat.items() if declared[path].learned is learned} for learned in (True, False)
    )
    learned, rest = (unflatten(part) for part in parts)
    return learned, rest


def join(learned: Tree, rest: Tree) -> Tree:
    """The other way."""
    return unflatten({**flatten(learned), **flatten(rest)}) if rest else learned

"""Searched trees as inline SVG: steps from left to right, what was visited often thick, the better the greener."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llm_jax.training.page import folded, text

COLUMN, ROW, MARGIN, CHARACTERS = 250, 34, 12, 34
MOST_NODES = 120
"""Of a larger tree only the nodes that a simulation went through are drawn."""
STYLE = """
.tree { overflow-x: auto; } .tree svg { display: block; width: auto; height: auto; max-width: none; }
.tree text { fill: var(--ink); font: 11px ui-monospace, monospace; } .tree .soft { fill: var(--soft); }
.tree path { fill: none; stroke: var(--line); } .tree .main { stroke: var(--run-0); }
"""

Tree = Mapping[str, Any]


class Total(NamedTuple):
    """Of a whole tree."""

    nodes: int
    visits: int


def trees(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each tree under its prompt, shown on a click. A row has `prompt`, `tree` and perhaps `answer`.

    A tree has `text` (its last step), `N`, `Q`, `V`, `value`, `terminal` and `children`.
    """
    drawn = []
    for row in rows:
        answer = "" if row.get("answer") is None else f" → {row['answer']}"
        drawn.append(folded(f"{row['prompt']}{answer}", f'<div class="tree">{draw(row["tree"])}</div>'))
    return "".join(drawn)


def draw(tree: Tree) -> str:
    """One tree as SVG; a node's numbers are shown beside it, all of them where the pointer rests on it."""
    total = Total(_count(tree), tree["N"])
    marks: list[str] = []
    rows, depth = _place(tree, 0, 0.0, marks, total, on_path=True)[1:]
    width, height = (depth + 1) * COLUMN + 2 * MARGIN, round(rows * ROW + 2 * MARGIN)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    label = f"search tree of {tree['N']} simulations"
    return f'<svg {size} role="img" aria-label="{label}">{"".join(marks)}</svg>'


def _place(
    node: Tree, depth: int, top: float, marks: list[str], total: Total, on_path: bool
) -> tuple[float, float, int]:
    """Draws a node and what is below it; where it lies, how many rows it takes and how deep it goes."""
    children = [child for child in node["children"] if total.nodes <= MOST_NODES or child["N"]]
    best = max(children, key=lambda child: (child["N"], child["Q"], child["V"]), default=None)
    x = MARGIN + depth * COLUMN
    edges, row, deepest = [], top, depth
    for child in children:
        followed = on_path and child is best and child["N"] > 0
        y, rows, below = _place(child, depth + 1, row, marks, total, followed)
        edges.append((y, child, followed))
        row, deepest = row + rows, max(deepest, below)
    taken = max(1.0, row - top)
    own = sum(y for y, *_ in edges) / len(edges) if edges else MARGIN + (top + 0.5) * ROW
    for y, child, followed in sorted(edges, key=lambda edge: edge[2]):  # the path above the others
        start, end = x + 8, x + COLUMN - 8
        middle = (x + COLUMN * 0.86, x + COLUMN * 0.93)
        thick = 1 + 3 * child["N"] / max(1, total.visits)
        marks.append(
            f'<path class="{"main" if followed else "edge"}" stroke-width="{thick:.1f}"'
            f' d="M{start:.0f} {own:.1f} H{middle[0] - 10:.0f} C{middle[1]:.0f} {own:.1f} {middle[0]:.0f} {y:.1f}'
            f' {end:.0f} {y:.1f}"/>'
        )
    marks.append(_node(node, x, own))
    return own, taken, deepest


def _node(node: Tree, x: float, y: float) -> str:
    said = node["text"].strip().replace("\n", " ⏎ ") or "start"
    short = said if len(said) <= CHARACTERS else f"{said[: CHARACTERS - 1]}…"
    hidden = sum(1 for child in node["children"] if not child["N"])
    numbers = f"N {node['N']} · Q {node['Q']:.2f}"
    told = f"{node['text']}\nN {node['N']}, Q {node['Q']:.4g}, V {node['V']:.4g}, value {node['value']:.4g}"
    if node.get("tokens"):
        told += f", log π {node['logp']:.4g} of {node['tokens']} tokens"
    if hidden:
        told += f"\n{hidden} of {len(node['children'])} steps behind it were never visited"
    hue = 60 + 60 * max(-1.0, min(1.0, node["Q"]))
    fill = f"hsl({hue:.0f} 70% 45%)" if node["N"] else "none"
    shape = (
        f'<rect x="{x - 5:.0f}" y="{y - 5:.1f}" width="10" height="10"'
        if node["terminal"]
        else f'<circle cx="{x:.0f}" cy="{y:.1f}" r="5"'
    )
    return (
        f'<g><title>{text(told)}</title>{shape} fill="{fill}" style="stroke:var(--soft)"/>'
        f'<text x="{x + 9:.0f}" y="{y - 4:.1f}">{text(short)}</text>'
        f'<text class="soft" x="{x + 9:.0f}" y="{y + 13:.1f}">{numbers}</text></g>'
    )


def _count(node: Tree) -> int:
    return 1 + sum(_count(child) for child in node["children"])

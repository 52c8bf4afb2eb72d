"""Preferences from a searched tree: at each depth the better over the worse child, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_jax.jobs.alignment.tree import Node, every_node, main_path


@dataclass(frozen=True)
class PairRules:
    """Which children become pairs. Defaults are the paper's."""

    nodes: Literal["path", "all"] = "path"
    """Whose children: of the nodes on the best path, one pair a depth; or of every node."""
    rejected: Literal["worst", "second"] = "worst"
    """The child of the lowest Q (paper, and the authors' --choose_worst), or of the second highest (authors)."""
    visited: bool = True
    """Takes children only that a simulation went through; the authors take all, whose Q then is their own reward."""
    smoothing: Literal["visits", "none"] = "visits"
    """visits: the paper's conservative DPO, `visit_smoothing`; the authors' trainer has none but with --conservative."""


@dataclass(frozen=True)
class TreePair:
    """Two children of one node."""

    chosen: Node
    rejected: Node
    label_smoothing: float


def visit_smoothing(chosen_visits: int, rejected_visits: int) -> float:
    """How likely the label is flipped: α = 1 / (N_w / N_l + 1) (Xie et al. 2024, below eq. 6), at most 1/2.

    The authors' code: min(1 - 1 / (1 + N_l / max(1, N_w)), 1/2), which is the same number for N_w of at least 1.
    """
    return min(1 - 1 / (1 + rejected_visits / max(1, chosen_visits)), 0.5)


def tree_pairs(start: Node, rules: PairRules) -> list[TreePair]:
    """The pairs of a tree, parents before children. None where the best Q is not above the other's."""
    nodes = main_path(start) if rules.nodes == "path" else every_node(start)
    pairs = [_pair(node.children or (), rules) for node in nodes]
    return [pair for pair in pairs if pair is not None]


def _pair(children: Sequence[Node], rules: PairRules) -> TreePair | None:
    # The authors sort by (Q, π, r, value); at temperature 0 their π marks the child that was visited most.
    ranked = sorted(
        (child for child in children if child.visits or not rules.visited),
        key=lambda child: (child.quality, child.visits, child.reward, child.step.value),
    )
    if len(ranked) < 2:
        return None
    chosen, rejected = ranked[-1], ranked[0 if rules.rejected == "worst" else -2]
    if not chosen.quality > rejected.quality:
        return None
    smoothing = visit_smoothing(chosen.visits, rejected.visits) if rules.smoothing == "visits" else 0.0
    return TreePair(chosen, rejected, smoothing)

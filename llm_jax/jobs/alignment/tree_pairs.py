"""Preferences from a searched tree: at each depth the better over the worse child, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass

from llm_jax.jobs.alignment.tree import Node, every_node, main_path
from llm_jax.jobs.config import TreeConfig


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


def tree_pairs(start: Node, config: TreeConfig) -> list[TreePair]:
    """The pairs of a tree, parents before children. None where the best Q is not above the other's."""
    nodes = main_path(start) if config.pairs_of == "path" else every_node(start)
    pairs = [_pair(node.children or (), config) for node in nodes]
    return [pair for pair in pairs if pair is not None]


def _pair(children: Sequence[Node], config: TreeConfig) -> TreePair | None:
    # The authors sort by (Q, π, r, value); at temperature 0 their π marks the child that was visited most.
    ranked = sorted(
        (child for child in children if child.visits or config.unvisited),
        key=lambda child: (child.quality, child.visits, child.reward, child.step.value),
    )
    if len(ranked) < 2:
        return None
    chosen, rejected = ranked[-1], ranked[0 if config.rejected == "worst" else -2]
    if not chosen.quality > rejected.quality:
        return None
    smoothing = visit_smoothing(chosen.visits, rejected.visits) if config.smoothing == "visits" else 0.0
    return TreePair(chosen, rejected, smoothing)

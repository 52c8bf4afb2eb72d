"""Monte Carlo tree search over the steps of an answer, without a model in sight: MCTS-DPO's search.

Xie et al. 2024 (arXiv:2405.00451), section 3.1. A node is an answer so far, its edge its last step a. A simulation

    selects    argmax_a Q(s, a) + c p(a) √N(s) / (1 + N(s, a))                 from the root down, the first of equals
    expands    the node it comes to, and goes on selecting, until it is at an answer's end
    backs up   Q(s, a) = r(s, a) + γ V(s'),  V(s) = Σ_a w(a) Q(s, a) / Σ_a w(a),  N += 1    from there to the root

with r(s, a) = R(s') - R(s), the difference of what the two nodes are worth by themselves. Where the authors' code
(github.com/YuxiXie/MCTS-DPO, `mcts.py`) reads this differently, a field of `TreeConfig` chooses.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_jax.jobs.config import TreeConfig


@dataclass(frozen=True)
class Step:
    """A step that was drawn, and what is known of the answer that it leads to."""

    text: str
    logp: float
    """log π of its tokens, in nats, summed."""
    tokens: int
    value: float
    """R of the node: what it is worth by itself, an outcome or the policy's own estimate."""
    terminal: bool = False
    """Whether the answer is over."""
    ended: bool = False
    """Whether it is over since the policy said so (not for want of room)."""


@dataclass(eq=False)
class Node:
    """An answer so far."""

    step: Step
    parent: "Node | None" = None
    depth: int = 0
    children: "list[Node] | None" = None
    """None before it is expanded."""
    visits: int = 0
    """N"""
    total: float = 0.0
    """V"""
    quality: float = 0.0
    """Q, of the edge that leads here."""

    def __post_init__(self) -> None:
        self.quality = self.reward

    @property
    def reward(self) -> float:
        """r, of the edge that leads here."""
        return self.step.value - (self.parent.step.value if self.parent is not None else 0.0)

    @property
    def terminal(self) -> bool:
        """Whether nothing can follow: the answer is over, or nothing was found to follow."""
        return self.step.terminal or self.children == []

    @property
    def text(self) -> str:
        """The answer so far."""
        return ("" if self.parent is None else self.parent.text) + self.step.text


def root(value: float = 0.0) -> Node:
    """The answer before its first step."""
    return Node(Step("", 0.0, 0, value))


def expand(node: Node, steps: Sequence[Step]) -> None:
    """Gives a node its children; of equal texts the first."""
    assert node.children is None
    distinct = {step.text: step for step in reversed(steps)}
    node.children = [Node(distinct[text], node, node.depth + 1) for text in dict.fromkeys(s.text for s in steps)]


def prior(step: Step, config: TreeConfig) -> float:
    """p(a): how likely the policy finds a step, for its length."""
    scale = max(1, step.tokens) ** config.length_penalty
    return math.exp(step.logp / scale) if config.prior == "authors" else math.exp(step.logp) / scale


def puct(node: Node, config: TreeConfig) -> float:
    """What the selection maximises."""
    assert node.parent is not None
    explored = prior(node.step, config) * math.sqrt(node.parent.visits) / (1 + node.visits)
    return node.quality + config.exploration * explored


def back_up(path: Sequence[Node], config: TreeConfig) -> None:
    """Carries what was found at a path's end to its beginning."""
    for node in reversed(path):
        if node.children:
            weights = [max(1, c.visits) if config.weights == "authors" else c.visits for c in node.children]
            if any(weights):
                pairs = zip(weights, node.children, strict=True)
                node.total = sum(w * child.quality for w, child in pairs) / sum(weights)
        node.visits += 1
        if node.parent is not None:
            node.quality = node.reward + config.discount * node.total


def search(start: Node, config: TreeConfig) -> Iterator[Node]:
    """Searches a tree; yields each node that is to be expanded, which the caller has to do before it goes on.

    So that one caller can expand a node each of many trees at a time.
    """
    node = start
    while not node.terminal:
        for _ in range(config.simulations * (config.root_factor if node.parent is None else 1)):
            yield from _simulate(node, config)
        if not config.every_depth or not node.children:
            return
        node = best(node)


def _simulate(start: Node, config: TreeConfig) -> Iterator[Node]:
    path = [start]
    start.visits += config.visits == "authors"
    while not path[-1].terminal:
        node = path[-1]
        if node.children is None:
            yield node
            if not node.children:
                break
        path.append(max(node.children or (), key=lambda child: puct(child, config)))
    back_up(path, config)


def best(node: Node) -> Node:
    """The child that was visited most, of these the one of the highest Q, then V (the authors' choice at temperature 0,
    without its factor for the diversity of grandchildren)."""
    assert node.children
    return max(node.children, key=lambda child: (child.visits, child.quality, child.total))


def main_path(start: Node) -> list[Node]:
    """From the root along the best children, as far as they were visited."""
    path = [start]
    while path[-1].children and any(child.visits for child in path[-1].children):
        path.append(best(path[-1]))
    return path


def every_node(start: Node) -> Iterator[Node]:
    """The node and all below it, parents first."""
    yield start
    for child in start.children or ():
        yield from every_node(child)


def as_json(node: Node) -> dict[str, Any]:
    """A tree as JSON values: `text`, `value`, `N`, `Q`, `V`, `logp`, `tokens`, `terminal`, `children`."""
    step = node.step
    return {
        "text": step.text,
        "value": step.value,
        "N": node.visits,
        "Q": node.quality,
        "V": node.total,
        "logp": step.logp,
        "tokens": step.tokens,
        "terminal": node.terminal,
        "children": [as_json(child) for child in node.children or ()],
    }

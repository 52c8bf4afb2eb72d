"""A hand-made tree: visits, Q and pairs equal PUCT worked out by hand, and by a table of plain numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llm_jax.jobs.alignment import tree
from llm_jax.jobs.alignment.tree import Step, expand, search
from llm_jax.jobs.alignment.tree_pairs import tree_pairs, visit_smoothing
from llm_jax.jobs.config import TreeConfig

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "mcts_dpo_authors.json").read_text())
# name: (parent, p, R, terminal). Steps have one token, so that p = π whatever λ is.
HAND = {
    "A": ("", 0.5, 0.4, False),
    "B": ("", 0.5, 0.3, False),
    "A1": ("A", 0.8, -1.0, True),
    "A2": ("A", 0.2, 1.0, True),
    "B1": ("B", 0.5, 1.0, True),
    "B2": ("B", 0.5, -1.0, True),
}
DEEP = {
    "A": ("", 0.6, 0.5, False),
    "B": ("", 0.3, 0.45, False),
    "C": ("", 0.1, 0.2, False),
    "A1": ("A", 0.5, 0.1, False),
    "A2": ("A", 0.4, 0.6, False),
    "B1": ("B", 0.9, 0.7, False),
    "C1": ("C", 0.9, 1.0, True),
    "C2": ("C", 0.1, -1.0, True),
    "A1x": ("A1", 0.7, 1.0, True),
    "A1y": ("A1", 0.2, -1.0, True),
    "A2x": ("A2", 0.5, -1.0, True),
    "A2y": ("A2", 0.5, -1.0, True),
    "B1x": ("B1", 0.3, -1.0, True),
    "B1y": ("B1", 0.3, 1.0, True),
}


def searched(table, config):
    """A tree of the table's nodes, and its nodes by name."""
    start = tree.root()
    for node in search(start, config):
        own = "" if node.parent is None else node.step.text
        children = [(name, *rest) for name, (parent, *rest) in table.items() if parent == own]
        expand(node, [Step(name, math.log(p), 1, value, terminal) for name, p, value, terminal in children])
    return start, {node.step.text: node for node in tree.every_node(start)}


def by_table(table, simulations, c=1.0, discount=1.0, authors=False):
    """N, V and Q by name, from the definitions: numbers in dicts, paths as lists of names, nothing of the package's."""
    worth = {"": 0.0} | {name: row[2] for name, row in table.items()}
    above = {name: row[0] for name, row in table.items()}
    reward = {name: worth[name] - worth[above[name]] for name in table}
    N = dict.fromkeys(worth, 0)
    V = dict.fromkeys(worth, 0.0)
    Q = dict(reward)
    opened = set()

    def below(name):
        return [child for child in table if above[child] == name]

    def carry(path):
        for i in range(len(path) - 1, -1, -1):
            name = path[i]
            if i < len(path) - 1:
                share = {child: max(N[child], 1 if authors else 0) for child in below(name)}
                if sum(share.values()):
                    V[name] = sum(share[x] * Q[x] for x in share) / sum(share.values())
            N[name] += 1
            if name:
                Q[name] = reward[name] + discount * V[name]

    for _ in range(simulations):
        path = [""]
        N[""] += authors
        while path[-1] == "" or not table[path[-1]][3]:
            if path[-1] not in opened:
                opened.add(path[-1])
            scores = [(Q[x] + c * table[x][1] * math.sqrt(N[path[-1]]) / (1 + N[x]), x) for x in below(path[-1])]
            top = max(score for score, _ in scores)
            path.append(next(x for score, x in scores if score == top))
        carry(path)
    return N, V, Q


# Worked out with pencil and paper, c = 1: (N of A, B, A1, A2, B1, B2), Q of A and of B, V of the root.
#  1: Q(A) = .4 > .3; A2 = .6 > -1.4; Q(A) = .4 + .6
#  2: A 1 + .5 / 2 = 1.25 over B .3 + .5;  A2 .6 + .2 / 2 over A1 -1.4 + .8
#  3: A 1 + .5 * 1.414 / 3 = 1.236 over B .3 + .5 * 1.414 = 1.007
#  4: A 1 + .5 * 1.732 / 4 = 1.217 over B .3 + .5 * 1.732 = 1.166
#  5: B .3 + .5 * 2 = 1.3 over A 1 + .5 * 2 / 5 = 1.2;  B1; Q(B) = .3 + .7
#  6: B 1 + .5 * 2.236 / 2 = 1.559 over A 1 + .5 * 2.236 / 5 = 1.224;  B1 .7 + .5 / 2 over B2 -1.3 + .5
BY_HAND = {
    1: ((1, 0, 0, 1, 0, 0), 1.0, 0.3, 1.0),
    2: ((2, 0, 0, 2, 0, 0), 1.0, 0.3, 1.0),
    3: ((3, 0, 0, 3, 0, 0), 1.0, 0.3, 1.0),
    4: ((4, 0, 0, 4, 0, 0), 1.0, 0.3, 1.0),
    5: ((4, 1, 0, 4, 1, 0), 1.0, 1.0, 1.0),
    6: ((4, 2, 0, 4, 2, 0), 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("simulations", BY_HAND)
def test_first_simulations_are_those_worked_out_by_hand(simulations):
    visits, quality_a, quality_b, total = BY_HAND[simulations]
    start, nodes = searched(HAND, TreeConfig(simulations=simulations))
    opened = [name for name in HAND if name in nodes]
    assert {name: nodes[name].visits for name in opened} == {n: v for n, v in zip(HAND, visits) if n in opened}
    assert nodes["A"].quality == pytest.approx(quality_a) and nodes["B"].quality == pytest.approx(quality_b)
    assert start.total == pytest.approx(total) and start.visits == simulations


@pytest.mark.parametrize("simulations", range(1, 21))
@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("table", [HAND, DEEP], ids=["hand", "deep"])
@pytest.mark.parametrize(("exploration", "discount"), [(1.0, 1.0), (3.0, 0.9)])
def test_visits_and_qualities_equal_the_table(simulations, authors, table, exploration, discount):
    how = "authors" if authors else "paper"
    config = TreeConfig(simulations, exploration=exploration, discount=discount, weights=how, visits=how)
    start, nodes = searched(table, config)
    N, V, Q = by_table(table, simulations, exploration, discount, authors)
    for name, node in nodes.items():
        assert node.visits == N[name]
        assert node.total == pytest.approx(V[name], abs=1e-12)
        if name:
            assert node.quality == pytest.approx(Q[name], abs=1e-12)
    assert start.visits == simulations * (2 if authors else 1)
    _check_pairs(start, nodes, table, N, Q)


@pytest.mark.parametrize("case", GOLDEN["trees"], ids=["first", "second"])
def test_the_authors_reading_is_their_code_s(case):
    """`tests/oracles/mcts_dpo_authors.py`: N, Q and V of all nodes after each of 20 simulations; the child chosen."""
    how: dict[str, Any] = {"weights": "authors", "visits": "authors", "prior": "authors"}
    how |= {"exploration": case["exploration"], "discount": case["discount"]}
    for simulations, expected in enumerate(case["after"], 1):
        start = tree.root()
        for node in search(start, TreeConfig(simulations, **how)):
            own = node.step.text
            rows = [(name, *row[1:]) for name, row in case["steps"].items() if row[0] == own]
            expand(node, [Step(name, sum(logps), len(logps), value, end) for name, logps, value, end in rows])
        found = {node.step.text: [node.visits, node.quality, node.total] for node in tree.every_node(start)}
        assert found.keys() == expected.keys()
        for name, numbers in expected.items():
            assert found[name][0] == numbers[0]
            assert found[name][1:] == pytest.approx(numbers[1:], abs=1e-9)
    assert tree.best(start).step.text == case["best"]


def _check_pairs(start, nodes, table, N, Q):
    """Pairs along the path of the most visited nodes, from the table's numbers."""
    expected, name = [], ""
    while children := [child for child in table if table[child][0] == name and N[child]]:
        ranked = sorted(children, key=lambda x: (Q[x], N[x]))
        if len(ranked) > 1 and Q[ranked[-1]] > Q[ranked[0]]:
            few, many = N[ranked[0]], N[ranked[-1]]
            expected.append((ranked[-1], ranked[0], min(few / (few + many), 0.5)))
        name = max(children, key=lambda x: (N[x], Q[x]))
    pairs = tree_pairs(start, TreeConfig())
    assert [(pair.chosen.step.text, pair.rejected.step.text) for pair in pairs] == [pair[:2] for pair in expected]
    assert [pair.label_smoothing for pair in pairs] == pytest.approx([pair[2] for pair in expected])


def test_pairs_after_twenty_simulations():
    """The two readings differ: who is rejected, and whether a child counts that no simulation went through."""
    start, nodes = searched(DEEP, TreeConfig(20, exploration=3.0))
    root_children = sorted((nodes[name].quality, name) for name in "ABC")
    by_paper = tree_pairs(start, TreeConfig())[0]
    by_authors = tree_pairs(start, TreeConfig(rejected="second", unvisited=True, smoothing="none"))[0]
    assert (by_paper.chosen.step.text, by_paper.rejected.step.text) == (root_children[2][1], root_children[0][1])
    assert (by_authors.chosen.step.text, by_authors.rejected.step.text) == (root_children[2][1], root_children[1][1])
    assert by_authors.label_smoothing == 0 < by_paper.label_smoothing <= 0.5
    everywhere = tree_pairs(start, TreeConfig(pairs_of="all"))
    assert len(everywhere) >= len(tree_pairs(start, TreeConfig()))
    assert all(pair.chosen.parent is pair.rejected.parent for pair in everywhere)


def test_equal_children_are_no_pair():
    table = {"A": ("", 0.5, 1.0, True), "B": ("", 0.5, 1.0, True)}
    start, _ = searched(table, TreeConfig(8, exploration=5.0))
    assert [child.visits > 0 for child in start.children or ()] == [True, True]
    assert tree_pairs(start, TreeConfig()) == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "smoothing"), [(3, 1, 0.25), (1, 3, 0.5), (2, 0, 0.0), (0, 0, 0.0), (5, 5, 0.5)]
)
def test_smoothing(chosen, rejected, smoothing):
    assert visit_smoothing(chosen, rejected) == pytest.approx(smoothing)
    if chosen and rejected:
        assert smoothing == min(1 / (chosen / rejected + 1), 0.5)  # the paper's


def test_priors():
    """p = π / |a|^λ and p = exp(log π / |a|^λ), λ = 1.25, of a step of 4 tokens."""
    step = Step("a", -2.0, 4, 0.0)
    assert tree.prior(step, TreeConfig(prior="paper")) == pytest.approx(math.exp(-2.0) / 4**1.25)
    assert tree.prior(step, TreeConfig()) == pytest.approx(math.exp(-2.0 / 4**1.25))


def test_searching_again_at_every_depth():
    start, _ = searched(DEEP, TreeConfig(4, root_factor=2, every_depth=True))
    path = tree.main_path(start)
    assert start.visits == 8 and path[-1].terminal
    # Each node of the path but its end was the root of four more simulations.
    once = searched(DEEP, TreeConfig(8))[1]
    assert path[1].visits == once[path[1].step.text].visits + 4
    assert all(node.visits >= 4 for node in path[1:])


def test_dead_ends_and_repeated_steps():
    """A node below which nothing was found ends its path; equal steps are one child."""
    start = tree.root()
    for node in search(start, TreeConfig(3)):
        same = Step("a", -1.0, 1, 0.5)
        expand(node, [same, same, Step("b", -1.0, 1, 0.1)] if node is start else [])
    assert [child.step.text for child in start.children or ()] == ["a", "b"]
    assert [child.terminal for child in start.children or ()][0] and start.visits == 3


def test_trees_are_json():
    start, _ = searched(HAND, TreeConfig(6))
    stored = json.loads(json.dumps(tree.as_json(start)))
    assert stored["N"] == 6 and [child["text"] for child in stored["children"]] == ["A", "B"]
    assert stored["children"][0]["children"][1] == {
        "text": "A2",
        "value": 1.0,
        "N": 4,
        "Q": pytest.approx(0.6),
        "V": 0.0,
        "logp": pytest.approx(math.log(0.2)),
        "tokens": 1,
        "terminal": True,
        "children": [],
    }

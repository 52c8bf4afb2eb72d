# pyright: reportMissingImports=false
"""Trees of the MCTS-DPO authors' search (github.com/YuxiXie/MCTS-DPO at fb23437), after each of 20 simulations.

    python tests/oracles/mcts_dpo_authors.py FILE

FILE is the repository's `mcts_rl/algorithms/mcts/mcts/mcts.py`, whose search is run as it is on trees of random steps;
what it imports of the repository is stood in for by as much as the search uses. Writes
`tests/golden/mcts_dpo_authors.json`: each tree's steps by name (parent, log-probabilities of its tokens, value, whether
it is terminal), and of every node that was opened N, Q and V, the root first, after each simulation; then the child
that is chosen at temperature 0.
"""

import importlib.util
import json
import random
import sys
import types
from pathlib import Path

import torch

TARGET = Path(__file__).parents[1] / "golden" / "mcts_dpo_authors.json"
SIMULATIONS = 20


def load(file: str) -> types.ModuleType:
    base = types.ModuleType("mcts_rl.algorithms.mcts.mcts.base")
    for name in ("State", "Action", "Example", "Args"):
        setattr(base, name, __import__("typing").TypeVar(name))
    for name in ("SearchAlgorithm", "WorldModel", "SearchConfig"):
        generic = types.new_class(name, (), {}, lambda body: body.update(__class_getitem__=classmethod(lambda c, _: c)))
        setattr(base, name, generic)
    utils = types.ModuleType("mcts_rl.utils")
    utils.calculate_diversity_score = lambda children: 0.0
    sys.modules |= {base.__name__: base, utils.__name__: utils}
    for part in ("mcts_rl", "mcts_rl.algorithms", "mcts_rl.algorithms.mcts", "mcts_rl.algorithms.mcts.mcts"):
        sys.modules[part] = types.ModuleType(part)
    spec = importlib.util.spec_from_file_location("authors", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_tree(seed: int) -> dict[str, tuple[str, list[float], float, bool]]:
    """Three children each, three deep; some answers end early."""
    rng, table = random.Random(seed), {}

    def grow(parent: str, depth: int) -> None:
        for letter in "abc":
            name = parent + letter
            terminal = depth == 3 or rng.random() < 0.2
            value = rng.choice((-1.0, 1.0)) if terminal else round(rng.uniform(0, 1), 3)
            tokens = [round(-rng.expovariate(1.5), 3) for _ in range(rng.randint(1, 6))]
            table[name] = (parent, tokens, value, terminal)
            if not terminal:
                grow(name, depth + 1)

    grow("", 1)
    return table


class World:
    """Steps are names: a state is the name of the last one."""

    def __init__(self, table: dict):
        self.table, self.n_actions = table, 3

    def init_state(self) -> str:
        return ""

    def step(self, state: str, action: str, log_probs: torch.Tensor) -> str:
        return action

    def is_terminal(self, state: str) -> bool:
        return self.table[state][3]

    def get_actions(self, policy, state: str, add_kl: bool):
        rows = [(name, row) for name, row in self.table.items() if row[0] == state]
        return [(name, (torch.tensor(row[1], dtype=torch.float64), None), None) for name, row in rows]

    def get_values(self, policy, state: str, actions, *_, **__):
        return [(self.table[name][2], None, self.table[name][3]) for name in actions]


def searched(authors: types.ModuleType, table: dict, discount: float, exploration: float) -> dict:
    world = World(table)
    search = authors.MCTS(
        authors.MCTSConfig(gamma=discount, w_exp=exploration, depth_limit=9, consider_diversity=False)
    )
    search.world_model = search.search_config = world
    search.root = authors.MCTSNode(state="", action=None)
    after = []
    for _ in range(SIMULATIONS):
        search.iterate(search.root)
        opened, found = [search.root], {}
        while opened:
            node = opened.pop()
            found[node.action or ""] = [node.N, round(node.Q, 12), round(node.V, 12)]
            opened += node.children or []
        after.append(found)
    best = search._get_simulated_pi(search.root, return_selection=True)[1]
    return {"steps": table, "discount": discount, "exploration": exploration, "after": after, "best": "abc"[best]}


if __name__ == "__main__":
    module = load(sys.argv[1])
    cases = [searched(module, random_tree(seed), *rest) for seed, *rest in ((1, 1.0, 1.0), (2, 0.9, 2.0))]
    TARGET.write_text(json.dumps({"commit": "fb23437f", "torch": torch.__version__, "trees": cases}) + "\n")
    print(f"wrote {TARGET}, {TARGET.stat().st_size / 1e3:.0f} kB")

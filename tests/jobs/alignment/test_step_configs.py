"""configs/step_dpo.py:test and configs/mcts_dpo.py:test from the chain's model."""

import json
import os
from pathlib import Path

import pytest

from llm_jax.jobs.graph import Node, run
from llm_jax.jobs.registry import load_config
from tests.jobs.alignment.conftest import overrides
from tests.jobs.conftest import CONFIGS


@pytest.fixture(scope="module")
def trees(chain: dict[str, Node], tmp_path_factory: pytest.TempPathFactory) -> Node:
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("trees"))
    try:
        return run(f"{CONFIGS / 'mcts_dpo.py'}:test", overrides(chain), workdir=str(Path("whole").absolute()))
    finally:
        os.chdir(before)


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_trees_are_saved_and_drawn(trees):
    shown = lines(trees.workdir.trees)
    assert len(shown) == 2 and all(one["tree"]["N"] == 8 and one["tree"]["children"] for one in shown)
    page = trees.workdir.report.read_text()
    assert "Search trees" in page and page.count('<div class="tree">') == 2
    chunks = sorted((trees.workdir.path / "rounds" / "02" / "chunks").glob("*.json"))
    kept = [note["tree"] for file in chunks for note in json.loads(file.read_text())["notes"]]
    assert kept[:2] == [one["tree"] for one in shown] and len(kept) == 4


def test_pairs_of_trees_are_trained_on(trees):
    pairs = lines(trees.workdir.path / "rounds" / "01" / "pairs.jsonl")
    counts = lines(trees.workdir.metrics)[1]
    assert counts["pairs/pairs"] == len(pairs) >= 2 and counts["rewards/accuracies"] >= 0
    assert all(0 <= pair["label_smoothing"] <= 0.5 and pair["chosen_score"] > pair["rejected_score"] for pair in pairs)


def test_a_call_of_the_sampler_serves_all_trees_of_a_chunk(trees):
    """As many calls as the tree that takes most of them, not one a node."""
    for chunk in sorted((trees.workdir.path / "rounds" / "01" / "journal").glob("*.jsonl")):
        calls = lines(chunk)
        prompts = [1 + max(c["prompt"] for c in call["completions"]) for call in calls]
        assert prompts[0] == 2 and sum(prompts) > len(calls)


def test_made_up_steps_are_trained_on(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = run(f"{CONFIGS / 'step_dpo.py'}:test", overrides(chain), workdir=str(tmp_path / "run"))
    last = {name: value for line in lines(node.workdir.metrics) for name, value in line.items()}
    assert {
        "eval_rewards/accuracies_answers",
        "eval_rewards/accuracies_equations",
        "eval_equations_loss",
    } <= last.keys()
    page = node.workdir.report.read_text()
    assert "Accuracy by kind" in page and "equations" in page


@pytest.mark.parametrize("variant", ["step_dpo", "step_dpo:written", "mcts_dpo"])
def test_full_sizes_bind(variant):
    name, _, rest = variant.partition(":")
    config = load_config(f"{CONFIGS / f'{name}.py'}" + (f":{rest}" if rest else "")).resolve(())
    assert config.job in ("rounds", "preference")


@pytest.mark.parametrize("variant", ["step_dpo:gsm8k", "step_dpo:records", "mcts_dpo:gsm8k"])
def test_real_data_bind(variant):
    name, _, rest = variant.partition(":")
    given = [("init_from", "MODEL"), ("data.path", "FILE")]
    config = load_config(f"{CONFIGS / f'{name}.py'}:{rest}").resolve(given)
    assert config.data.path == "FILE" and config.data.on_long == "drop"

"""Online DPO: who is asked, when, and that nothing is asked twice."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm_jax.base.trees import flatten
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs.alignment.making import ChunkStore, prompt_seed
from llm_jax.jobs.alignment.methods import ScoredPairs, pair_maker
from llm_jax.jobs.alignment.policies import Policies
from llm_jax.jobs.alignment.prompts import training_prompts
from llm_jax.jobs.alignment.scorers import open_scorer
from llm_jax.jobs.graph import Node, run
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from tests.jobs.alignment.conftest import overrides
from tests.jobs.conftest import CONFIGS

STEPS, EVERY = 4, 2


def go(folder: Path, chain: dict[str, Node]) -> Node:
    fields = {"preference.train.steps": STEPS, "sample_every": EVERY, "task_eval.problems": 0}
    # Fast enough that two steps change what is said.
    fields |= {"preference.train.optimizer.learning_rate": 0.01, "preference.train.batch_size": 2}
    fields |= {"preference.train.checkpoint.keep_last": STEPS}
    given = [*overrides(chain), *((name, str(value)) for name, value in fields.items())]
    return run(f"{CONFIGS / 'iterative_dpo.py'}:online_test", given, workdir=str(folder))


def last(node: Node, step: int = STEPS) -> dict[str, np.ndarray]:
    return flatten(Checkpoints(training(node).checkpoints).restore_numpy(step))


def training(node: Node) -> Workdir:
    return Workdir(node.workdir.path / "rounds" / "01" / "run")


def test_blocks_are_what_the_policy_says_then_and_resume_repeats_them(chain, tmp_path, monkeypatch):
    whole = go(tmp_path / "whole", chain)
    store = ChunkStore(whole.workdir.path / "rounds" / "01" / "online")
    blocks = store.all()
    assert len(blocks) == STEPS // EVERY
    assert [made.counts["samples"] for made in blocks] == [EVERY * 2 * 3] * 2

    (line,) = [json.loads(line) for line in whole.workdir.metrics.read_text().splitlines()]
    assert line["pairs/samples"] == STEPS * 2 * 3 and line["reward"] > 0

    # Block 1 again, by the policy after two steps.
    tokenizer, prompts = load_tokenizer(whole.workdir.tokenizer), training_prompts(whole.config)
    policies = Policies(whole, tokenizer)
    with open_scorer(whole.config.scorer, None) as scorer:
        maker = pair_maker(whole.config, tokenizer, scorer)
        params = Checkpoints(training(whole).checkpoints).restore_numpy(EVERY)["params"]["policy"]
        seed = prompt_seed(prompt_seed(whole.config.seed, 1, "online"), 1, "block")
        assert maker(prompts[4:8], policies.with_params(params), seed) == blocks[1]
        params = Checkpoints(training(whole).checkpoints).restore_numpy(2 * EVERY)["params"]["policy"]
        assert maker(prompts[4:8], policies.with_params(params), seed) != blocks[1]

    # Stopped when it asks for the second block; then it goes on.
    asked: list[int] = []
    make = ScoredPairs.__call__

    def stopping(self, chunk, sampler, seed):
        asked.append(chunk[0].number)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return make(self, chunk, sampler, seed)

    monkeypatch.setattr(ScoredPairs, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", chain)
    stopped = go(tmp_path / "stopped", chain)
    # Two chunks to evaluate on, then the blocks; the second one a second time.
    assert asked == [0, 2, 0, 4, 4]
    assert ChunkStore(stopped.workdir.path / "rounds" / "01" / "online").all() == blocks
    for name, array in last(whole).items():
        np.testing.assert_array_equal(last(stopped)[name], array, err_msg=name)
    told = [
        [
            {name: value for name, value in json.loads(line).items() if "perf/" not in name}
            for line in training(node).metrics.read_text().splitlines()
        ]
        for node in (whole, stopped)
    ]
    assert told[0] == told[1]
    # The reference is where it began.
    frozen = {name: array for name, array in last(whole).items() if name.startswith("frozen/ref/")}
    start = flatten(Checkpoints(chain["sft"].workdir.checkpoints).restore_numpy(4)["params"]["policy"])
    assert frozen.keys() == {f"frozen/ref/{name}" for name in start}
    for name, array in start.items():
        np.testing.assert_array_equal(frozen[f"frozen/ref/{name}"], array)

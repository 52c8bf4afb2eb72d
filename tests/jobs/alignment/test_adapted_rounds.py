"""Rounds that train an adapter each: what is sampled from, and what is left, is the model with all of them in it."""

import jax
import numpy as np
import pytest
from chex import assert_trees_all_close

from llm_jax.adapters.loading import load_merged
from llm_jax.base.trees import flatten
from llm_jax.data.tokenizers import load_tokenizer
from llm_jax.jobs.adapting import Adapting
from llm_jax.jobs.alignment.making import ChunkStore, prompt_seed
from llm_jax.jobs.alignment.methods import pair_maker
from llm_jax.jobs.alignment.policies import Policies
from llm_jax.jobs.alignment.prompts import training_prompts
from llm_jax.jobs.alignment.scorers import open_scorer
from llm_jax.jobs.graph import Node, run
from llm_jax.models.loading import load
from llm_jax.storage.checkpoints import Checkpoints
from tests.jobs.alignment.conftest import CONFIG, overrides
from tests.jobs.conftest import CONFIGS

FIELDS = {"preference.adapter.r": 2, "preference.train.optimizer.learning_rate": 0.05, "task_eval.problems": 0}


def go(config: str, chain: dict[str, Node], folder, **fields: object) -> Node:
    given = [*overrides(chain), *((name, str(value)) for name, value in (FIELDS | fields).items())]
    return run(config, given, workdir=str(folder))


def test_the_last_policy_is_a_model_by_itself(chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = go(CONFIG, chain, "w")
    rounds = [node.workdir.path / "rounds" / f"{number:02d}" / "run" for number in (1, 2)]
    first, second = (flatten(load_merged(path).params) for path in rounds)
    own, exported = (flatten(load(path).params) for path in (node.workdir.path, node.workdir.export))
    begun = flatten(load(chain["sft"].workdir.path).params)
    name = next(name for name in begun if name.endswith("q/weight"))
    assert not np.allclose(begun[name], first[name]) and not np.allclose(first[name], second[name])
    assert_trees_all_close(own, second, rtol=0, atol=0)
    assert_trees_all_close(exported, second, rtol=0, atol=0)


@pytest.mark.slow
def test_online_the_policy_is_asked_with_its_adapter(chain, tmp_path):
    fields = {"preference.train.steps": 4, "sample_every": 2, "preference.train.batch_size": 2}
    node = go(f"{CONFIGS / 'iterative_dpo.py'}:online_test", chain, tmp_path / "w", **fields)
    folder = node.workdir.path / "rounds" / "01"
    base, adapter = load(chain["sft"].workdir.path), node.config.preference.adapter
    adapting = Adapting.of(base.decoder, adapter)
    checkpoint = Checkpoints(folder / "run" / "checkpoints").restore_numpy(2)["params"]
    params = jax.jit(adapting.merged)(checkpoint, {"base": base.params})
    policies = Policies(node, load_tokenizer(node.workdir.tokenizer))
    with open_scorer(node.config.scorer, None) as scorer:
        maker = pair_maker(node.config, policies.tokenizer, scorer)
        seed = prompt_seed(prompt_seed(node.config.seed, 1, "online"), 1, "block")
        asked = training_prompts(node.config)[4:8]
        block = ChunkStore(folder / "online").read(1)
        assert maker(asked, policies.with_params(params), seed) == block
        assert maker(asked, policies.of(node.parents["init_from"]), seed) != block

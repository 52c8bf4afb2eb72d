"""Reward models that are an adapter and a projection: one model in workdir, PEFT folder and merged, resumed alike."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import llm_jax
from llm_jax.adapters.loading import load_merged
from llm_jax.adapters.scores import of_scores
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.convert import main as convert
from llm_jax.jobs.describe import describe, read_setting
from llm_jax.jobs.graph import Node, prepare, run
from llm_jax.models.families.heads import PAIRWISE
from llm_jax.storage.checkpoints import Checkpoints
from tests.adapters.conftest import load_adapted
from tests.jobs.conftest import CONFIGS
from tests.jobs.test_reward_runs import left

REWARD = f"{CONFIGS / 'reward.py'}:lora_test"
PROMPTS = [[{"role": "user", "content": "Ben has 2 apples."}], "Ben has", "Ben has"]
ANSWERS = ["Answer: 2", " 3", " 4 apples."]


@pytest.fixture(scope="module")
def reward(chain: dict[str, Node]):
    """`configs/reward.py:lora_test` in the chain's folder, where its parents are done; tests run there."""
    before = os.getcwd()
    os.chdir(Path(chain["sft"].workdir.path).parents[1])
    yield run(REWARD)
    os.chdir(before)


def test_one_model_in_all_its_folders(chain: dict[str, Node], reward: Node, tmp_path: Path):
    """Equal scores of the workdir, of the PEFT folder, which is on the language model alone, and merged."""
    scores = llm_jax.score(reward.workdir.path, PROMPTS, ANSWERS)
    assert np.isfinite(scores).all() and len(set(scores.tolist())) == 3
    np.testing.assert_array_equal(llm_jax.score(reward.workdir.export, PROMPTS, ANSWERS), scores)
    convert([str(reward.workdir.path), str(tmp_path / "merged")])
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"] and fields["pad_token_id"] is not None
    np.testing.assert_allclose(llm_jax.score(tmp_path / "merged", PROMPTS, ANSWERS), scores, atol=1e-5)
    said = json.loads((reward.workdir.export / "adapter_config.json").read_text())
    assert said["task_type"] == "SEQ_CLS" and said["modules_to_save"] == ["classifier", "score"]
    assert said["base_model_name_or_path"] == str(chain["sft"].workdir.export)
    model = load_adapted(reward.workdir.export)
    llm_jax.save(model, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (reward.workdir.export / name).read_bytes()


def test_what_is_trained_and_kept(reward: Node):
    """Factors and the projection, which has moved from where the model's stays; nothing else."""
    model = load_adapted(reward.workdir.path)
    _, adapter = model.adapters["default"]
    trained = flatten(adapter.params)
    assert {path.rpartition("/")[2] for path in trained if path != "score/weight"} == {"a", "b"}
    assert "score/weight" in trained and not np.array_equal(
        trained["score/weight"], model.base.params["score"]["weight"]
    )
    kept = flatten(Checkpoints(reward.workdir.checkpoints).restore_numpy(4))
    assert {path.partition("/")[0] for path in kept} == {"step", "params", "opt_state"}
    assert flatten(kept).keys() >= {f"params/policy/{path}" for path in trained}
    told = describe(read_setting(REWARD, ()))
    assert told["parameters"]["trained"] == sum(leaf.size for leaf in trained.values())


def test_a_stopped_run_goes_on_to_the_same_end(reward: Node, tmp_path: Path):
    """The state as a kill after step 2 leaves it: the same arrays and metrics, bit for bit; the frozen projection is
    drawn again."""
    kept = tmp_path / "kept"
    shutil.copytree(reward.workdir.path, kept)
    wanted = left(reward)
    try:
        shutil.rmtree(reward.workdir.checkpoints / "step_00000004")
        shutil.rmtree(reward.workdir.export)
        reward.workdir.done.unlink()
        found = left(run(REWARD))
        files = [(reward.workdir.export / name).read_bytes() for name in ("adapter_model.safetensors",)]
    finally:
        shutil.rmtree(reward.workdir.path)
        shutil.copytree(kept, reward.workdir.path)
    assert files == [(reward.workdir.export / "adapter_model.safetensors").read_bytes()]
    assert found[0].keys() == wanted[0].keys() and found[1] == wanted[1]
    for path, value in wanted[0].items():
        np.testing.assert_array_equal(found[0][path], value, err_msg=path)


def test_a_child_starts_from_the_scores_there(reward: Node, tmp_path: Path):
    """Another adapter on the reward model: at step 0 it is that model."""
    child = prepare(REWARD, [("init_from", str(reward.workdir.export))], str(tmp_path))
    base = json.loads((child.workdir.path / "adapter.json").read_text())["base_model_name_or_path"]
    assert base == str(reward.workdir.export)
    scores = llm_jax.score(load_merged(base), PROMPTS, ANSWERS)
    np.testing.assert_allclose(scores, llm_jax.score(reward.workdir.path, PROMPTS, ANSWERS), atol=1e-5)
    with pytest.raises(UserError, match="ends in 1 scores, and task=classify has 2"):
        overrides = {"init_from": base, "task": "classify", "center_rewards_coefficient": "None"}
        prepare(REWARD, list(overrides.items()), str(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "fields"), [("test_pairwise", {PAIRWISE: True}), ("test_classify", {"id2label": 0, "label2id": 0})]
)
def test_what_scores_mean_is_kept(reward: Node, variant: str, fields: dict, tmp_path: Path):
    """A PEFT folder says that its model compares, and what its classes are called; so does the merged model."""
    del reward
    overrides = [("adapter.r", "2"), ("train.steps", "2")]
    node = run(f"{CONFIGS / 'reward.py'}:{variant}", overrides, str(tmp_path / "run"))
    for folder in (node.workdir.path, node.workdir.export):
        model = load_merged(folder)
        assert of_scores(model.extra).keys() == fields.keys()
        ask = llm_jax.compare if PAIRWISE in fields else llm_jax.score
        texts = (PROMPTS, ANSWERS, ANSWERS[::-1]) if PAIRWISE in fields else (PROMPTS, ANSWERS)
        assert np.isfinite(ask(folder, *texts)).all()

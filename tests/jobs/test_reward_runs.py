"""The job `reward` from config to folder: the chain at test size, goes on after an interruption, refuses bad input."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llm_jax
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.data.formats import read_examples
from llm_jax.jobs.graph import Node, prepare, run
from llm_jax.jobs.score_file import score_file
from llm_jax.storage.checkpoints import Checkpoints
from tests.jobs.conftest import CONFIGS

REWARD = f"{CONFIGS / 'reward.py'}:test"


@pytest.fixture(scope="module")
def reward(chain: dict[str, Node]):
    """`configs/reward.py:test` in the chain's folder, where its parents are done; tests run there."""
    before = os.getcwd()
    os.chdir(Path(chain["sft"].workdir.path).parents[1])
    yield run(REWARD)
    os.chdir(before)


def left(node: Node) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The last checkpoint's arrays, and metrics.jsonl without what depends on time."""
    arrays = flatten(Checkpoints(node.workdir.checkpoints).restore_numpy(node.config.train.steps))
    lines = [json.loads(line) for line in node.workdir.metrics.read_text().splitlines()]
    return arrays, [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def test_the_chain_ends_in_a_reward_model(chain: dict[str, Node], reward: Node):
    """Parents are found done, metrics have TRL's names, and the exported folder scores as the workdir."""
    assert reward.parents["init_from"].hash == chain["sft"].hash  # pyright: ignore[reportAttributeAccessIssue]
    lines = left(reward)[1]
    names = {"accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens", "loss"}
    assert names <= {name for line in lines for name in line}
    assert {"eval_accuracy", "eval_min_reward"} <= {name for line in lines for name in line}
    fields = json.loads((reward.workdir.export / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"] and fields["pad_token_id"] is not None
    asked = [{"role": "user", "content": "Ben has 2 apples."}]
    folders = [reward.workdir.path, reward.workdir.export]
    one, two = llm_jax.score(folders, [asked, "Ben has"], ["Answer: 2", " 3"])
    np.testing.assert_array_equal(one, two)
    assert one[0] != one[1]


def test_a_stopped_run_goes_on_to_the_same_end(reward: Node, tmp_path: Path):
    """The state as a kill after step 2 leaves it: the same parameters, optimizer state and metrics, bit for bit."""
    kept = tmp_path / "kept"
    shutil.copytree(reward.workdir.path, kept)
    wanted = left(reward)
    try:
        shutil.rmtree(reward.workdir.checkpoints / "step_00000004")
        shutil.rmtree(reward.workdir.export)
        reward.workdir.done.unlink()
        again = run(REWARD)
        assert again.is_done() and again.workdir.export.exists()
        found = left(again)
    finally:
        shutil.rmtree(reward.workdir.path)
        shutil.copytree(kept, reward.workdir.path)
    assert found[0].keys() == wanted[0].keys()
    for path, value in wanted[0].items():
        np.testing.assert_array_equal(found[0][path], value, err_msg=path)
    assert found[1] == wanted[1]


def test_a_file_of_pairs_is_scored(reward: Node, tmp_path: Path):
    """What `preference` reads: both answers' scores in every record."""
    source, target = tmp_path / "pairs.jsonl", tmp_path / "scored.jsonl"
    records = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, {"prompt": "x", "chosen": "y", "rejected": "z"}]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert score_file([str(reward.workdir.export)], str(source), str(target), 4) == 2
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    alone = llm_jax.score(reward.workdir.export, ["2 + 2 ="], [" 4"])
    np.testing.assert_allclose(lines[0]["chosen_score"], alone[0], rtol=1e-6)
    assert [line["prompt"] for line in lines] == ["2 + 2 =", "x"]
    told = {name: f"\n\nHuman: Ben has?\n\nAssistant: {said}" for name, said in (("chosen", "4"), ("rejected", "5"))}
    asked = [{"role": "user", "content": "Ben has?"}]
    whole = {
        name: [*asked, {"role": "assistant", "content": said}] for name, said in (("chosen", "4"), ("rejected", "5"))
    }
    source.write_text("".join(json.dumps(record) + "\n" for record in (told, {"prompt": "Ben has?", **whole})))
    score_file([str(reward.workdir.export)], str(source), str(target), 4)
    alone = llm_jax.score(reward.workdir.export, [asked, asked], ["4", "5"])
    for line in map(json.loads, target.read_text().splitlines()):
        np.testing.assert_allclose([line["chosen_score"], line["rejected_score"]], alone, rtol=1e-6)
    source.write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: the model reads `prompt`, `completion`"):
        score_file([str(reward.workdir.export)], str(source), str(target), 4)


def test_another_number_of_scores_is_refused(reward: Node):
    given = {"init_from": str(reward.workdir.export), "task": "classify", "center_rewards_coefficient": "None"}
    with pytest.raises(UserError, match="ends in 1 scores, and task=classify has 2"):
        prepare(REWARD, list(given.items()))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"task": "classify"}, "center_rewards_coefficient=0.01 is set, but task=classify does not read it"),
        ({"pairwise": "True"}, "pairwise=True compares them"),
        ({"num_labels": "3"}, "num_labels=3 is set, but task=pairs does not read it"),
        ({"pooling": "mean"}, "there is no folder to export"),
        ({"center_rewards_coefficient": "-1"}, "center_rewards_coefficient is -1.0"),
        ({"train.z_loss": "0.1"}, "reward has scores"),
        ({"task": "rankings", "center_rewards_coefficient": "None"}, "there are no embedded rankings"),
    ],
)
def test_contradictions_are_refused(reward: Node, overrides: dict[str, str], said: str):
    with pytest.raises(UserError, match=said):
        prepare(REWARD, list(overrides.items()))


def test_a_smoothing_is_refused(reward: Node, tmp_path: Path):
    source = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i}?", "chosen": "a", "rejected": "b", "label_smoothing": 0.1} for i in range(4)]
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = {"init_from": str(reward.workdir.path), "data.path": source, "data.eval_path": source}
    with pytest.raises(UserError, match="records have a `label_smoothing`, which reward does not read"):
        prepare(REWARD, [(name, str(value)) for name, value in given.items()])


def test_a_label_out_of_range_is_refused(reward: Node, tmp_path: Path):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}", "label": i % 3}) + "\n" for i in range(6)))
    overrides = {"data.path": source, "data.eval_path": source}
    with pytest.raises(UserError, match=r"texts\.jsonl:3: label 2 is out of range: num_labels=2 knows 0 to 1"):
        prepare(f"{CONFIGS / 'reward.py'}:test_classify", [(name, str(value)) for name, value in overrides.items()])


@pytest.mark.parametrize(
    ("kind", "record", "said"),
    [
        ("ranking", {"prompt": "a", "completions": ["b"]}, "a ranking of one answer says nothing"),
        ("ranking", {"prompt": "a", "completions": []}, "has to have 2 or more entries: it is empty"),
        ("ranking", {"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}, "`scores` has ties"),
        ("ranking", {"prompt": "a", "completions": ["b", "c"], "ranks": [1]}, "a list of 2 numbers"),
        ("ranking", {"prompt": "a", "completions": ["b", "b"]}, "two of `completions` are equal"),
        ("ranking", {"prompt": "a", "completions": ["b", " "]}, r"`completions\[1\]` is empty"),
        ("ranking", {"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}, "no ranking"),
        ("labelled", {"text": "a", "label": -1}, "the number of a class"),
        ("labelled", {"text": "a", "label": "good"}, "the number of a class"),
        ("labelled", {"text": "", "label": 0}, "`text` is empty"),
        ("labelled", {"text": "a"}, "labelled needs `text`"),
        ("steps", {"prompt": "a", "completions": ["b", "c"], "labels": [1]}, "a list of 2, one for each step, not 1"),
        ("steps", {"prompt": "a", "completions": [], "labels": []}, "it is empty"),
        ("steps", {"prompt": "a", "completions": "b", "labels": [1]}, "a list of strings"),
    ],
)
def test_bad_records_are_refused(kind: Any, record: dict, said: str):
    with pytest.raises(UserError, match=f"line 7: .*{said}"):
        read_examples(kind, record, "line 7")

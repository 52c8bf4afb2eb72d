"""The configs of further preference losses, run at test size from the chain's models."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from llm_jax.jobs.graph import Node, run
from llm_jax.jobs.registry import load_config
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training.metrics import last_values
from tests.jobs.conftest import CONFIGS

TOLD = {"loss", "eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_probs/rejected", "eval_lengths/chosen"}
TRANSCRIPTS = [
    {
        side: f"\n\nHuman: Is {i} even?\n\nAssistant: {answer}"
        for side, answer in (("chosen", "I see."), ("rejected", "No."))
    }
    for i in range(40)
]


def made(config: str, parent: Node, folder: Path, *overrides: tuple[str, str]) -> Node:
    fields = [
        ("init_from", str(parent.workdir.path)),
        ("task_eval.problems", "0"),
        ("train.checkpoint.export", "false"),
    ]
    before = os.getcwd()
    os.chdir(folder)
    try:
        return run(str(CONFIGS / config), [*fields, *overrides])
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("name", "further"), [("simpo", set()), ("ipo", {"eval_implicit_kl"}), ("orpo", {"nll_loss"})])
def test_paired_configs(name: str, further: set[str], chain: dict[str, Node], tmp_path: Path):
    node = made(f"{name}.py:test", chain["sft"], tmp_path, ("train.steps", "2"))
    values = last_values(node.workdir.metrics)
    assert values.keys() >= TOLD | further and all(np.isfinite(v) for v in values.values() if v is not None)


def test_kto_of_unpaired_answers_and_of_pairs_taken_apart(chain: dict[str, Node], tmp_path: Path):
    node = made("kto.py:test", chain["sft"], tmp_path, ("train.steps", "2"))
    assert last_values(node.workdir.metrics).keys() >= TOLD | {"eval_kl", "kl", "eval_implicit_kl"}
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(record) + "\n" for record in TRANSCRIPTS))
    small = {"data.path": "hh.jsonl", "data.window": "64", "train.steps": "2", "train.batch_size": "8"}
    node = made("kto.py:hh", chain["sft"], tmp_path, ("train.optimizer.warmup_steps", "1"), *small.items())
    assert last_values(node.workdir.metrics)["eval_rewards/margins"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("name", ["dpo", "simpo", "ipo", "kto", "orpo"])
def test_real_data_are_an_override_away(name: str):
    assert sorted(load_config(f"{CONFIGS / name}.py:hh").missing(())) == ["data.path", "init_from"]


@pytest.mark.slow
def test_a_moving_reference_is_resumed_bit_for_bit(
    chain: dict[str, Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two steps, then two more in another process's stead, against four: the reference lies in the checkpoint."""
    given = {"reference_logps": "live", "sync_ref_model": "true", "ref_model_sync_steps": "1", "train.log_every": "1"}
    given |= {"train.optimizer.schedule": "constant", "train.optimizer.warmup_steps": "0"}
    states, folders = [], [tmp_path / "whole", tmp_path / "halves"]
    for folder, stops in zip(folders, (("4",), ("2", "4")), strict=True):
        folder.mkdir()
        for steps in stops:
            monkeypatch.chdir(folder)
            node = run(
                f"{CONFIGS / 'dpo.py'}:test",
                [("init_from", str(chain["sft"].workdir.path)), ("train.steps", steps), *given.items()],
                str(folder / "run"),
            )
        states.append(Checkpoints(node.workdir.checkpoints, 1, 0, False).restore_numpy(4))
    flat = [dict(_leaves(state)) for state in states]
    assert flat[0].keys() == flat[1].keys() and any(name.startswith("frozen/ref") for name in flat[0])
    for name, leaf in flat[0].items():
        np.testing.assert_array_equal(leaf, flat[1][name], err_msg=name)


def _leaves(tree: dict, prefix: str = ""):
    for name, child in tree.items():
        if isinstance(child, dict):
            yield from _leaves(child, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", child

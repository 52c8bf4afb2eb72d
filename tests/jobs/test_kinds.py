"""The chain of the main job from a mixture of experts, a Mamba-2 and a hybrid; a resumed run repeats itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import llm_jax
from llm_jax.base.trees import flatten
from llm_jax.jobs.graph import Node, run
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.storage.workdir import Workdir
from tests.jobs.conftest import CONFIGS

SILENT = [("task_eval.problems", "0")]
FAMILIES = {"experts": "mixtral", "mamba2": "mamba2", "hybrid": "jamba"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def kind(request, tmp_path_factory):
    """The kind's name, and the nodes of its chain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(request.param))
        base = run(f"{CONFIGS / 'pretrain.py'}:{request.param}_test", SILENT)
        sft = run(f"{CONFIGS / 'sft.py'}:test", [*SILENT, ("init_from", str(base.workdir.path))])
        dpo = run(f"{CONFIGS / 'dpo.py'}:test", [("init_from", str(sft.workdir.path))])
    return request.param, {"base": base, "sft": sft, "dpo": dpo}


def lines(node: Node) -> list[dict[str, float]]:
    """metrics.jsonl, without what depends on time."""
    read = [json.loads(line) for line in node.workdir.metrics.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in read]


def test_the_chain_leaves_a_model_of_the_kind_at_each_stage(kind):
    name, nodes = kind
    for stage, node in nodes.items():
        exported = llm_jax.load(node.workdir.export)
        assert exported.config.family == FAMILIES[name]
        told = {metric for line in lines(node) for metric in line}
        assert ("experts/load_max" in told) == bool(exported.config.experts.num)
        assert "eval_rewards/accuracies" in told if stage == "dpo" else "eval_loss" in told
    base, sft, dpo = ([line["loss"] for line in lines(node) if "loss" in line] for node in nodes.values())
    assert base[-1] < base[0] and np.isfinite([*base, *sft, *dpo]).all()


def test_the_export_is_the_model(kind):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    workdir = kind[1]["dpo"].workdir
    ours, exported = llm_jax.load(workdir.path)(tokens), llm_jax.load(workdir.export)(tokens)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(exported))


def test_a_resumed_run_repeats_itself_bit_for_bit(kind, tmp_path, monkeypatch):
    """The base run as if it had been killed after the checkpoint in its middle."""
    name, nodes = kind
    node = nodes["base"]
    other: Path = tmp_path / "runs" / node.workdir.path.name
    shutil.copytree(node.workdir.path, other)
    last, middle = (
        max(Checkpoints(node.workdir.checkpoints).steps()),
        min(Checkpoints(node.workdir.checkpoints).steps()),
    )
    assert middle < last
    shutil.rmtree(Checkpoints(other / "checkpoints").path(last))
    Workdir(other).done.unlink()
    monkeypatch.chdir(tmp_path)
    again = run(f"{CONFIGS / 'pretrain.py'}:{name}_test", SILENT, workdir=str(other))
    want, got = (flatten(Checkpoints(n.workdir.checkpoints).restore_numpy(last)) for n in (node, again))
    assert want.keys() == got.keys()
    assert all(np.array_equal(want[path], got[path]) for path in want)
    assert lines(again) == lines(node)

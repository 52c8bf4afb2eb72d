"""Runs that train an adapter: what is trained and kept, the same on any mesh, resumed bit for bit, as parents."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.loading import load_merged
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.jobs.adapting import Adapting, check_adapter
from llm_jax.jobs.graph import prepare, run
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import Decoder, ModelConfig, init_params
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.storage.checkpoints import Checkpoints
from llm_jax.training import OptimizerConfig, TrainConfig, init_state, make_optimizer, make_train_step
from llm_jax.training.config import BalancingConfig
from tests.jobs.conftest import CONFIGS
from tests.jobs.test_regularization import DPO, SIZES, rows

DECODER = Decoder(ModelConfig(**SIZES, init_std=0.2, embed_init_std=1.0))
CONFIG = LoraConfig(r=3, lora_alpha=6.0, use_dora=True, lora_dropout=0.2, init_lora_weights=False)


def stepped(kind: str, mesh: MeshConfig, microbatches: int, config: LoraConfig = CONFIG, dtype: Any = "float32"):
    """Metrics of two steps, and the state before and after them."""
    plan = make_plan(mesh, compute_dtype=dtype, devices=jax.devices()[: mesh.data * mesh.tensor])
    adapting = Adapting.of(DECODER, config)
    of = adapting.decoder
    inner = sft_objective(of) if kind == "sft" else paired_objective(of, DPO, "live", reference_decoder=DECODER)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), {"policy": adapting.adaptation.declarations}, 10)
    base = init_params(DECODER, 0)
    trained = {"policy": adapting.init(base, 1)}
    frozen = adapting.frozen(base, plan)
    before = jax.device_get(frozen["base"])
    state = init_state(trained, optimizer, adapting.declarations, plan, frozen=frozen)
    step = make_train_step(adapting.objective(inner, training=True), optimizer, plan, adapting.declarations, seed=3)
    found = []
    for _ in range(2):
        state, metrics = step(state, rows(kind, microbatches))
        found.append({name: np.asarray(value) for name, value in metrics.items()})
    return found, before, state


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_same_on_any_mesh(kind):
    """Dropout included: loss, metrics and the adapter after two steps."""
    expected, before, state = stepped(kind, MeshConfig(data=1), 1)
    after = flatten(jax.device_get(state["params"]))
    assert all(metrics["finite"] for metrics in expected) and expected[0]["loss"] != expected[1]["loss"]
    for mesh, microbatches in ((MeshConfig(data=1), 4), (MeshConfig(data=2, tensor=2, zero=3), 2)):
        found, _, other = stepped(kind, mesh, microbatches)
        for ours, theirs in zip(found, expected, strict=True):
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{mesh} {name}")
        for path, value in flatten(jax.device_get(other["params"])).items():
            np.testing.assert_allclose(value, after[path], rtol=1e-4, atol=1e-6, err_msg=f"{mesh} {path}")


def test_what_is_trained(kind="sft"):
    """The model is as it was, has no optimizer state, and lies in the compute dtype; magnitudes and factors move."""
    _, before, state = stepped(kind, MeshConfig(data=1), 1, dtype="bfloat16")
    for path, value in flatten(jax.device_get(state["frozen"]["base"])).items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, flatten(before)[path])
    trained = flatten(state["params"]["policy"])
    assert {path.rpartition("/")[2] for path in trained} == {"a", "b", "magnitude"}
    for name in ("mu", "nu"):
        assert flatten(state["opt_state"][name]["policy"]).keys() == trained.keys()
        assert all(leaf.any() for leaf in jax.device_get(flatten(state["opt_state"][name])).values())


def test_dpo_begins_at_the_reference():
    """With an adapter that has learned nothing the policy is the reference: ln 2, no margin."""
    found, _, _ = stepped("dpo", MeshConfig(data=1), 1, LoraConfig(r=2))
    np.testing.assert_allclose(found[0]["loss"], np.log(2), rtol=1e-6)
    assert found[0]["rewards/margins"] == 0 and found[1]["rewards/margins"] != 0


def test_what_an_adapter_excludes():
    with pytest.raises(UserError, match="bias_rate moves the model's own biases"):
        check_adapter(CONFIG, TrainConfig(balancing=BalancingConfig(bias_rate=0.1)))
    with pytest.raises(UserError, match="mtp_weight is for the model's own layers"):
        check_adapter(CONFIG, TrainConfig(mtp_weight=0.1))


def overrides(chain, **more: str) -> list[tuple[str, str]]:
    return [("init_from", str(chain["sft"].workdir.path)), ("mesh.data", "1"), *more.items()]


@pytest.fixture(scope="module")
def aligned(chain, tmp_path_factory):
    """`configs/dpo.py:lora_test` on the chain's fine-tuned model."""
    return run(f"{CONFIGS / 'dpo.py'}:lora_test", overrides(chain), str(tmp_path_factory.mktemp("lora") / "run"))


def test_resumed(chain, aligned):
    """Checkpoints hold the adapter alone; a run that goes on from the middle ends bit for bit as it did."""
    checkpoints = Checkpoints(aligned.workdir.checkpoints)
    whole = flatten(checkpoints.restore_numpy(4))
    assert {path.partition("/")[0] for path in whole} == {"step", "params", "opt_state"}
    assert sum(leaf.nbytes for leaf in whole.values()) < 0.2 * 3 * sum(
        leaf.nbytes for leaf in flatten(llm_jax.load(aligned.workdir.path).base.params).values()
    )
    lines = aligned.workdir.metrics.read_text().splitlines()
    shutil.rmtree(checkpoints.path(4))
    aligned.workdir.done.unlink()
    run(f"{CONFIGS / 'dpo.py'}:lora_test", overrides(chain), str(aligned.workdir.path))
    for path, value in flatten(Checkpoints(aligned.workdir.checkpoints).restore_numpy(4)).items():
        np.testing.assert_array_equal(value, whole[path], err_msg=path)
    timeless = [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
    later = [json.loads(line) for line in aligned.workdir.metrics.read_text().splitlines()]
    assert [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in later] == timeless


def test_as_a_parent(chain, aligned, tmp_path):
    """The workdir, the PEFT folder in it, and what a child of either starts from are one model."""
    tokens = np.arange(30).reshape(2, 15)
    model = llm_jax.load(aligned.workdir.path)
    folder = llm_jax.load(aligned.workdir.export)
    np.testing.assert_array_equal(model(tokens), folder(tokens))
    np.testing.assert_allclose(load_merged(aligned.workdir.path)(tokens), model(tokens), atol=1e-5)
    given = json.loads((aligned.workdir.export / "adapter_config.json").read_text())
    assert given["base_model_name_or_path"] == str(chain["sft"].workdir.export)
    child = prepare(
        f"{CONFIGS / 'sft.py'}:lora_test",
        [("init_from", str(aligned.workdir.export)), ("mesh.data", "1")],
        str(tmp_path),
    )
    assert json.loads((child.workdir.path / "adapter.json").read_text())["base_model_name_or_path"] == str(
        aligned.workdir.export
    )


def test_a_target_that_is_not_there(chain, tmp_path):
    with pytest.raises(UserError, match=r"target_modules 'q_prj' matches nothing; the nearest is q_proj"):
        prepare(
            f"{CONFIGS / 'sft.py'}:lora_test",
            overrides(chain, **{"adapter.target_modules": '["q_prj"]'}),
            str(tmp_path),
        )

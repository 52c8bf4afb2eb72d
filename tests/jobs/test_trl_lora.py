"""Steps of adapters against TRL 1.16 with PEFT 0.21.2: loss, metrics, gradients, and LoRA+'s step of AdamW.

Gold files: `tests/oracles/trl_lora.py`. DPO's reference is the model without its adapter.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.peft_files import from_tensors, to_tensors
from llm_jax.adapters.scores import with_projection
from llm_jax.adapters.start import start_of
from llm_jax.base.config import bind
from llm_jax.base.trees import unflatten
from llm_jax.jobs.adapting import Adapting, with_loraplus
from llm_jax.jobs.config import PreferenceConfig
from llm_jax.jobs.paired import paired_objective
from llm_jax.jobs.preference_loss import preference_loss
from llm_jax.jobs.reward_terms import pairs_objective
from llm_jax.jobs.terms import sft_objective
from llm_jax.models import HeadConfig, with_head
from llm_jax.training.config import OptimizerConfig
from llm_jax.training.optimizer import make_optimizer
from tests.jobs.batches import Pair, document_rows, evaluate, pair_rows
from tests.jobs.test_trl import BETA, FURTHER, load_with, trl_documents, trl_pairs
from tests.oracles import adapters_recipe as recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "trl"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_with(tmp_path_factory.mktemp("policy"), 0.0)


def ends_in_a_score(model):
    """As the oracle's reward model begins, but for the projection, which is the adapter's."""
    return with_head(model, HeadConfig(1))


@pytest.mark.parametrize("case", list(recipe.STEPS))
def test_step_equals_trl(policy, case):
    golden = dict(np.load(GOLDEN / f"lora_{case}.npz"))
    kind, fields = recipe.STEPS[case]
    ours = {name: value for name, value in fields.items() if name != "task_type"}
    config = bind(LoraConfig, {**ours, "loraplus_lr_ratio": recipe.LR_RATIO})
    if kind == "reward":
        policy, config = ends_in_a_score(policy), with_projection(config)
    adapting = Adapting.of(policy.decoder, config)
    adaptation = adapting.adaptation
    drawn = {name: recipe.draw(case, name, shape, {}) for name, shape in to_tensors(adaptation).items()}
    params = from_tensors(adaptation, drawn)
    frozen = {"base": policy.params} | ({"start": start} if (start := start_of(adaptation, policy.params)) else {})
    if kind == "sft":
        objective = sft_objective(adapting.decoder)
        rows = document_rows([[document] for document in trl_documents(golden)], 96)
    elif kind == "reward":
        objective = pairs_objective(adapting.decoder, pad_id=0)
        records = json.loads(str(np.load(GOLDEN / "reward_strings.npz")["tokens"]))
        rows = pair_rows([[Pair([], each["chosen_ids"], each["rejected_ids"]) for each in records]], 384, most_pairs=4)
        rows["margin"] = np.full(rows["pair_index"].shape, np.nan, np.float32)
    else:
        loss = preference_loss(PreferenceConfig(beta=BETA))
        objective = paired_objective(adapting.decoder, loss, "live", reference_decoder=policy.decoder)
        rows = pair_rows([trl_pairs(golden)], 320, most_pairs=4)
    loss, metrics, grads = evaluate(adapting.objective(objective, training=True), params, frozen, rows)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    theirs = {name.removeprefix("metric:"): value for name, value in golden.items() if name.startswith("metric:")}
    assert metrics.keys() == theirs.keys() | (FURTHER if kind == "dpo" else set())
    for name, value in theirs.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    grads = unflatten(grads)
    compare(to_tensors(adaptation, grads), golden, "grad:")

    rules = OptimizerConfig(
        learning_rate=1e-2, eps=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.0, clip_norm=None, schedule="constant"
    )
    optimizer = make_optimizer(with_loraplus(rules, config), {"policy": adaptation.declarations}, 1)
    state = optimizer.init({"policy": params})
    updates, _ = jax.jit(optimizer.update)({"policy": grads}, state, {"policy": params})
    after = to_tensors(adaptation, jax.tree.map(lambda p, u: p + u, params, updates["policy"]))
    moved = {f"grad:{name}": golden[f"step:{name}"] - drawn[name] for name in drawn}
    compare({name: after[name] - drawn[name] for name in drawn}, moved, "grad:")


def compare(ours, golden, start):
    """Per tensor ‖Δ‖₂/‖g‖₂ ≤ 1e-5."""
    theirs = {name.removeprefix(start): value for name, value in golden.items() if name.startswith(start)}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert np.linalg.norm(ours[name] - value) <= 1e-5 * np.linalg.norm(value), name

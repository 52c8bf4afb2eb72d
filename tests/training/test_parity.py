"""200 AdamW steps, loss by loss, against a plain PyTorch loop (tests/oracles/torch_training.py); and bfloat16."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.trees import unflatten
from llm_jax.models import Decoder, ModelConfig, bind, declarations, token_scores
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import Objective, OptimizerConfig, init_state, make_optimizer, make_train_step
from tests.oracles import training_recipe as recipe
from tests.oracles.recipe import draw

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "training.json").read_text())
CONFIG = ModelConfig(
    vocab_size=recipe.CONFIG["vocab_size"],
    hidden_size=recipe.CONFIG["hidden_size"],
    intermediate_size=recipe.CONFIG["intermediate_size"],
    num_layers=recipe.CONFIG["num_hidden_layers"],
    num_heads=recipe.CONFIG["num_attention_heads"],
    num_kv_heads=recipe.CONFIG["num_key_value_heads"],
    head_dim=recipe.CONFIG["head_dim"],
    norm_eps=recipe.CONFIG["rms_norm_eps"],
    rope_theta=recipe.CONFIG["rope_theta"],
)
NAMES = {
    "attention_norm/weight": "input_layernorm",
    "mlp_norm/weight": "post_attention_layernorm",
    **{f"attention/{p}/weight": f"self_attn.{p}_proj" for p in "qkvo"},
    **{f"mlp/{p}/weight": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}


def params():
    theirs = recipe.weights(draw)
    out = {
        "embed/weight": theirs["model.embed_tokens.weight"],
        "norm/weight": theirs["model.norm.weight"],
        "head/weight": theirs["lm_head.weight"].T,
    }
    for ours, name in NAMES.items():
        layers = [theirs[f"model.layers.{i}.{name}.weight"].T for i in range(CONFIG.num_layers)]
        out[f"segments/0/0/{ours}"] = np.stack(layers)
    return unflatten({path: jnp.asarray(x) for path, x in out.items()})


def losses(dtype: str, mesh: MeshConfig | None = None, microbatches: int = 1) -> tuple[np.ndarray, np.ndarray]:
    plan = make_plan(mesh or MeshConfig(data=1), compute_dtype=dtype)
    decoder = Decoder(CONFIG)
    declared = {"policy": declarations(decoder)}

    def terms(params, frozen, rows, statistics, key):
        model = bind(decoder, params["policy"])
        hidden, _, _ = model(rows["tokens"])
        inside = jnp.arange(recipe.LENGTH) < recipe.LENGTH - 1
        mask = jnp.broadcast_to(inside, rows["tokens"].shape)
        logps = token_scores(model, hidden, jnp.roll(rows["tokens"], -1, axis=1), mask)["logps"]
        return {"nll": -logps.sum()}, {}

    count = jnp.float32(recipe.BATCH * (recipe.LENGTH - 1))
    objective = Objective(terms, lambda batch: {"nll": count})
    optimizer = make_optimizer(OptimizerConfig(**recipe.OPTIMIZER), declared, recipe.STEPS)
    step = make_train_step(objective, optimizer, plan, declared)
    state = init_state({"policy": params()}, optimizer, declared, plan)
    history = []
    for s in range(recipe.STEPS):
        batch = recipe.batch(s).reshape(microbatches, -1, recipe.LENGTH)
        state, metrics = step(state, {"tokens": batch})
        history.append((metrics["loss"], metrics["grad_norm"]))
    values = np.asarray(history, np.float64)
    return values[:, 0], values[:, 1]


@pytest.fixture(scope="module")
def float32():
    return losses("float32")


def test_equals_pytorch_at_every_step(float32):
    assert sum(norm > 1 for norm in GOLDEN["grad_norms"]) > 10, "clipping acts"
    np.testing.assert_allclose(float32[0], GOLDEN["losses"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(float32[1], GOLDEN["grad_norms"], rtol=0, atol=5e-3)


def test_sharded_training_equals_pytorch():
    got, _ = losses("float32", MeshConfig(data=4, tensor=2, zero=3), 2)
    np.testing.assert_allclose(got, GOLDEN["losses"], rtol=0, atol=1e-3)


def test_bfloat16_ends_within_a_percent(float32):
    got, _ = losses("bfloat16")
    assert abs(got[-20:].mean() / float32[0][-20:].mean() - 1) < 0.01

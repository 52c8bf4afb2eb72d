"""Gates on what attention gives (arXiv:2505.06708, section 2.2): against the formula in float64, and what has none."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.attention import Attention
from llm_jax.models.cache import Meta, Packed
from llm_jax.models.config import ModelConfig
from llm_jax.models.families import family
from llm_jax.models.latent_config import LatentConfig
from llm_jax.models.parameter import abstract_params, bind
from llm_jax.models.segments import LayerSpec
from llm_jax.models.shared import Shared

B, T, D, N, H = 2, 9, 16, 4, 6
CONFIG = ModelConfig(
    family="llm_jax", vocab_size=31, hidden_size=D, num_heads=N, num_kv_heads=2, head_dim=H, attention_bias=True
).resolved()
META = Meta(jnp.broadcast_to(jnp.arange(T), (B, T)))


def run(config, params, x):
    attention = Attention(config, LayerSpec(rope="none"))
    return np.asarray(jax.jit(lambda p: bind(attention, p)(x, Shared(META, None, None), Packed())[0])(params))


@pytest.mark.parametrize("kind", ["head", "element"])
def test_gates_by_the_formula(kind):
    rng = np.random.default_rng(0)
    config = replace(CONFIG, attention_gate=kind)
    shapes = abstract_params(Attention(config, LayerSpec(rope="none")))
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) * 0.4, shapes)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    assert params["gate"]["weight"].shape == (D, N if kind == "head" else N * H)
    # Ungated heads, side by side: a width of N H, and an identity for the last projection.
    ungated = {name: dict(part) for name, part in params.items() if name != "gate"}
    heads = []
    for first in range(0, N * H, D):
        columns = np.eye(N * H, dtype=np.float32)[:, first : first + D]
        ungated["o"] = {"weight": np.pad(columns, ((0, 0), (0, D - columns.shape[1]))), "bias": np.zeros(D, np.float32)}
        heads.append(run(CONFIG, ungated, x)[..., : columns.shape[1]])
    gate = x.astype(np.float64) @ params["gate"]["weight"] + params["gate"]["bias"]
    gate = 1 / (1 + np.exp(-gate))
    gated = np.concatenate(heads, axis=-1) * (np.repeat(gate, H, axis=-1) if kind == "head" else gate)
    want = gated @ params["o"]["weight"].astype(np.float64) + params["o"]["bias"]
    np.testing.assert_allclose(run(config, params, x), want, atol=1e-5 * np.abs(want).max())


def test_models_that_have_none():
    """No published family here has it, nor has latent attention."""
    with pytest.raises(UserError, match="model.attention_gate='head': the llama family has 'none' there"):
        family("llama").check(ModelConfig(vocab_size=32, attention_gate="head"))
    latent = LatentConfig(kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4)
    with pytest.raises(UserError, match="model.attention_gate='element': latent attention has 'none' only"):
        ModelConfig(vocab_size=32, head_dim=4, latent=latent, attention_gate="element").resolved()

"""Scores of given tokens: against log-softmax in plain numpy, and with the vocabulary cut over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.head import token_scores
from llm_jax.models.init import init_params
from llm_jax.models.parameter import bind
from llm_jax.sharding import make_plan, use
from llm_jax.sharding.config import MeshConfig

B, T, D, V = 8, 6, 16, 64
NAMES = ("logps", "lse", "entropy", "mean_logit", "argmax", "log_sum_sq_probs")


@pytest.fixture(scope="module", params=[False, True], ids=["separate", "tied"])
def case(request):
    config = ModelConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        init_std=0.5,
        tie_embeddings=request.param,
    )
    decoder = Decoder(config)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return decoder, init_params(decoder, 0), hidden, targets, rng.random((B, T)) < 0.7


def run(case, plan=None):
    """Outputs, and gradients of a mix of those that have one."""
    decoder, params, hidden, targets, mask = case
    mix = {name: np.sin(np.arange(B * T).reshape(B, T) + i) for i, name in enumerate(NAMES) if name != "argmax"}

    def loss(params, hidden):
        out = token_scores(bind(decoder, params), hidden, targets, mask, NAMES)
        return sum(jnp.sum(weight * out[name]) for name, weight in mix.items()), out

    with use(plan):
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, hidden)


def plain(case):
    decoder, params, hidden, targets, mask = case
    head = params["embed"]["weight"].T if decoder.config.tie_embeddings else params["head"]["weight"]
    z = hidden.astype(np.float64) @ np.asarray(head, np.float64)
    lse = np.log(np.exp(z).sum(-1))
    p = np.exp(z - lse[..., None])
    out = {
        "logps": np.take_along_axis(z, targets[..., None], -1)[..., 0] - lse,
        "lse": lse,
        "entropy": -(p * np.log(p)).sum(-1),
        "mean_logit": z.mean(-1),
        "argmax": z.argmax(-1),
        "log_sum_sq_probs": np.log((p**2).sum(-1)),
    }
    return {name: np.where(mask, x, 0) for name, x in out.items()}


def test_outputs(case):
    _, out = run(case)
    expected = plain(case)
    assert out["argmax"].dtype == jnp.int32
    np.testing.assert_array_equal(out["argmax"], expected["argmax"])
    for name in NAMES:
        np.testing.assert_allclose(out[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_masked_tokens_have_no_gradient(case):
    (_, hidden), _ = run(case)
    assert (np.asarray(hidden)[~case[-1]] == 0).all() and np.asarray(hidden)[case[-1]].any()


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=4, tensor=2), MeshConfig(data=2, tensor=4)])
def test_cut_vocabulary(case, mesh):
    grads, out = run(case)
    sharded_grads, sharded = run(case, make_plan(mesh))
    np.testing.assert_array_equal(sharded["argmax"], out["argmax"])
    for name in NAMES:
        np.testing.assert_allclose(sharded[name], out[name], rtol=1e-5, atol=2e-6, err_msg=name)
    for ours, theirs in zip(jax.tree.leaves(sharded_grads), jax.tree.leaves(grads)):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * max(np.linalg.norm(theirs), 1e-30)


def test_targets_outside_the_vocabulary(case):
    decoder, params, hidden, targets, mask = case
    beyond = jnp.where(mask, V, targets)
    for plan in (None, make_plan(MeshConfig(data=4, tensor=2))):
        with use(plan):
            run = jax.jit(lambda p, h: token_scores(bind(decoder, p), h, beyond, mask)["logps"])
            logps = np.asarray(run(params, hidden))
        assert np.isnan(logps[mask]).all() and (logps[~mask] == 0).all()


def test_only_what_is_asked_for(case):
    decoder, params, hidden, targets, mask = case
    out = token_scores(bind(decoder, params), hidden, targets, mask, ("entropy",))
    assert out.keys() == {"entropy"}
    with pytest.raises(UserError, match="'perplexity'"):
        token_scores(bind(decoder, params), hidden, targets, mask, ("perplexity",))

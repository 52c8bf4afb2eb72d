"""Statistics, losses and gradients of routers, by the papers' formulas and by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from llm_jax.models.experts import Experts
from llm_jax.models.noise import router_noise
from llm_jax.models.parameter import bind
from llm_jax.objectives import experts as losses
from llm_jax.sharding import MeshConfig, make_plan, use
from tests.models.experts_cases import drawn
from tests.models.tiny_experts import RNG, SEGMENTS, B, E, T, X, all_losses, config, run


def chosen_and_probs(x, weight):
    """Of a plain softmax router with top_k=2, in numpy in float64: one-hot sums and probabilities, [B, T, E]."""
    logits = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return logits >= np.sort(logits, -1)[..., -2:-1], probs


def test_documents_of_a_row_are_balanced_apart():
    """DeepSeek-V2's eq. 23-25 for each document with its own length, averaged over documents."""
    params = drawn(config())
    statistics = run(config(), params)[1]
    chosen, probs = chosen_and_probs(X, params["router"]["weight"])
    each = []
    for row in range(B):
        for document in range(1, 4):
            own = np.asarray(SEGMENTS[row]) == document
            if own.any():
                shares = E / (2 * own.sum()) * chosen[row, own].sum(0)
                each.append(np.sum(shares * probs[row, own].mean(0)))
    assert statistics["sequences"] == len(each) == 10
    got = losses.sequence_balance(statistics["sequence_product"], statistics["sequences"], E, 2)
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_statistics_of_microbatches_add_up(count):
    params = drawn(config(noisy=True))
    noise = router_noise(jax.random.split(jax.random.key(0), B), T, E)
    whole = run(config(noisy=True), params, noise=noise)[1]
    cut = [[a[i::count] for a in (X, SEGMENTS, noise)] for i in range(count)]
    parts = [run(config(noisy=True), params, *arrays)[1] for arrays in cut]
    for name, value in whole.items():
        np.testing.assert_allclose(sum(part[name] for part in parts), value, rtol=2e-5, err_msg=name)


def test_gradients_of_microbatches_add_up():
    def gradient(x, segment_ids, fixed):
        return jax.jit(jax.grad(lambda p: all_losses(bind(Experts(config()), p)(x, segment_ids)[1], fixed)))(params)

    params = drawn(config())
    whole = gradient(X, SEGMENTS, None)["router"]["weight"]
    fixed = run(config(), params)[1]
    parts = [gradient(X[i::2], SEGMENTS[i::2], fixed)["router"]["weight"] for i in range(2)]
    assert np.linalg.norm(sum(parts) - whole) <= 1e-5 * np.linalg.norm(whole)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"noisy": True},
        {"normalize": False, "top_k": 1},
        {"scores": "sigmoid", "correction_bias": True, "groups": 3, "top_groups": 2, "group_score": "top2"},
        {"scores": "sigmoid", "normalize": False, "weigh": "input", "top_k": 1},
    ],
    ids=str,
)
def test_router_gradients_by_finite_differences(fields):
    """Of the output and of all losses, along a random direction. Choices stay: the step is short."""
    c = config(**fields)
    params = drawn(c)
    noise = router_noise(jax.random.split(jax.random.key(1), B), T, E) if c.experts.noisy else None
    probe = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)

    @jax.jit
    def loss(router):
        out, s = bind(Experts(c), {**params, "router": router})(X, SEGMENTS, noise)
        shazeer = losses.importance(s["importance"]) + (losses.load(s["load"]) if c.experts.noisy else 0.0)
        return jnp.mean(out * probe) * 10 + all_losses(s) + shazeer

    router = params["router"]
    keys = iter(jax.random.split(jax.random.key(2), 4))
    direction = {name: jax.random.normal(next(keys), value.shape) for name, value in sorted(router.items())}
    if "correction" in router:
        direction["correction"] = jnp.zeros(E)
    step = 2e-3
    ends = [loss({name: router[name] + h * direction[name] for name in router}) for h in (step, -step)]
    slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(loss)(router), direction))))
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, rtol=2e-2, atol=2e-3)


def test_noisy_top_k_is_the_papers():
    """Shazeer et al. 2017: H = x W + ε softplus(x W_noise), softmax over its top k, P of eq. 9, CV² of the sums."""
    c = config(noisy=True)
    params = drawn(c)
    noise = np.asarray(router_noise(jax.random.split(jax.random.key(0), B), T, E), np.float64)
    _, s = run(c, params, segment_ids=None, noise=jnp.asarray(noise, jnp.float32))
    x, w, w_noise = (np.asarray(a, np.float64) for a in (X, params["router"]["weight"], params["router"]["noise"]))
    clean, spread = x @ w, np.log1p(np.exp(x @ w_noise))
    noisy = clean + noise * spread
    gates, load = np.zeros((B, T, E)), np.zeros((B, T, E))
    for b, t in np.ndindex(B, T):
        top = np.argsort(-noisy[b, t])[:2]
        gates[b, t, top] = np.exp(noisy[b, t, top]) / np.exp(noisy[b, t, top]).sum()
        for e in range(E):
            second = np.sort(np.delete(noisy[b, t], e))[-2]
            load[b, t, e] = norm.cdf((clean[b, t, e] - second) / spread[b, t, e])
    importance, load = gates.sum((0, 1)), load.sum((0, 1))
    np.testing.assert_allclose(s["importance"], importance, rtol=1e-4)
    np.testing.assert_allclose(s["load"], load, rtol=1e-4)
    np.testing.assert_allclose(
        losses.importance(s["importance"]), (importance.std() / importance.mean()) ** 2, rtol=1e-3
    )
    np.testing.assert_allclose(losses.load(s["load"]), (load.std() / load.mean()) ** 2, rtol=1e-3)


def test_bias_update_moves_towards_balance():
    """Wang et al. 2024, algorithm 1; and applied over and over, a router that sends all to one expert spreads out."""
    np.testing.assert_allclose(
        losses.bias_update(jnp.zeros(4), jnp.asarray([10.0, 2.0, 4.0, 4.0]), 0.001), [-0.001, 0.001, 0.001, 0.001]
    )
    c = config(correction_bias=True, scores="sigmoid", router_bias=True)
    params = drawn(c, scale=0.2)
    params["router"]["bias"] = jnp.asarray([5.0, 5.0, 0.0, 0.0, 0.0, 0.0])
    step = jax.jit(lambda p: bind(Experts(c), p).router(X, SEGMENTS, None)[1]["assigned"])
    loads = [step(params)]
    for _ in range(100):
        bias = losses.bias_update(params["router"]["correction"], loads[-1], 0.02)
        params = {**params, "router": {**params["router"], "correction": bias}}
        loads.append(step(params))
    assert loads[0].max() > 2.5 * loads[0].mean() and np.mean(loads[-10:], 0).max() < 1.3 * loads[0].mean()


def test_the_router_is_float32_in_bfloat16():
    """On a mesh in bfloat16 the router's weights are not rounded, so that its statistics stay those of float32."""
    c = config(correction_bias=True, scores="sigmoid")
    params, module = drawn(c), Experts(c)
    x = X.astype(jnp.bfloat16)
    want = bind(module, params).router(x, SEGMENTS, None)[1]
    with use(make_plan(MeshConfig(data=8), compute_dtype="bfloat16")):
        out, got = jax.jit(lambda p: bind(module, p)(x, SEGMENTS))(params)
    assert out.dtype == jnp.bfloat16
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)

"""Dropless = a dense sum over experts, padding, capacity, meshes, upcycling, what is refused."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.models.decoder import Decoder, unstack
from llm_jax.models.experts import Experts
from llm_jax.models.feed_forward import FeedForward
from llm_jax.models.init import init_params
from llm_jax.models.noise import layer_keys, router_noise
from llm_jax.models.parameter import abstract_params, bind, declarations
from llm_jax.models.upcycling import upcycle
from llm_jax.objectives import experts as losses
from llm_jax.sharding import MeshConfig, make_plan, storage_shardings, use
from tests.models.experts_cases import drawn
from tests.models.tiny_experts import SEGMENTS, B, D, E, F, T, X, all_losses, config, run


def test_dropless_is_the_dense_sum_over_experts():
    """Every expert computes every token, in numpy in float64; experts that get nothing and ones that get all."""
    params = drawn(config(bias=True, router_bias=True))
    params["router"]["bias"] = jnp.asarray([9.0, 0.0, 0.0, -9.0, 0.0, 0.0])
    out, statistics = run(config(bias=True, router_bias=True), params)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(X, np.float64)
    logits = x @ p["router"]["weight"] + p["router"]["bias"]
    kept = logits >= np.sort(logits, -1)[..., -2:-1]
    weights = np.where(kept, np.exp(logits), 0.0)
    weights = weights / weights.sum(-1, keepdims=True) * (np.asarray(SEGMENTS) > 0)[..., None]
    want = np.zeros((B, T, D))
    for e in range(E):
        gate, up = (x @ p[name]["weight"][e] + p[name]["bias"][e] for name in ("gate", "up"))
        y = (gate / (1 + np.exp(-gate)) * up) @ p["down"]["weight"][e] + p["down"]["bias"][e]
        want += weights[..., e : e + 1] * y
    np.testing.assert_allclose(out, want, atol=1e-6 * np.abs(want).max())
    assert statistics["assigned"][3] == 0 and statistics["assigned"][0] == statistics["tokens"]
    np.testing.assert_array_equal(statistics["assigned"], (kept * (np.asarray(SEGMENTS) > 0)[..., None]).sum((0, 1)))


def test_padding_goes_nowhere_and_counts_nowhere():
    params = drawn(config())
    out, statistics = run(config(), params)
    other, same = run(config(), params, jnp.where(SEGMENTS[..., None] > 0, X, 7.0))
    np.testing.assert_array_equal(out, other)
    assert not np.any(np.asarray(out)[np.asarray(SEGMENTS) == 0])
    jax.tree.map(np.testing.assert_array_equal, statistics, same)
    assert statistics["tokens"] == (SEGMENTS > 0).sum() and statistics["assigned"].sum() == 2 * statistics["tokens"]


def test_capacity_drops_and_counts():
    """All tokens want expert 0 first: 12 · 2 / 6 · 0.75 = 3 of each row get it; second choices go on as they come."""
    c = config(capacity_factor=0.75, router_bias=True)
    params = drawn(c)
    params["router"]["bias"] = jnp.asarray([50.0, 20.0, 0.0, 0.0, 0.0, 0.0])
    out, s = run(c, params, segment_ids=None)
    assert s["tokens"] == B * T and s["dropped"] == 2 * B * (T - 3)
    np.testing.assert_array_equal(s["assigned"], [B * T, B * T, 0, 0, 0, 0])
    assert np.all(np.any(np.asarray(out[:, :3]) != 0, -1)) and not np.any(np.asarray(out[:, 3:]))
    dropless = run(config(router_bias=True), params, segment_ids=None)[0]
    np.testing.assert_allclose(out[:, :3], dropless[:, :3], atol=1e-6)
    roomy, s = run(config(capacity_factor=6.0, router_bias=True), params)
    np.testing.assert_allclose(roomy, run(config(router_bias=True), params)[0], atol=1e-6)
    assert s["dropped"] == 0


@pytest.mark.parametrize("mesh", [MeshConfig(data=4, tensor=2, zero=3), MeshConfig(data=8, zero=1)], ids=str)
def test_mesh_equals_one_device(mesh):
    c = config(bias=True, noisy=True, shared_size=8, shared_gate=True)
    params = drawn(c)
    module = Experts(c)
    noise = router_noise(jax.random.split(jax.random.key(0), B), T, E)

    def loss(params):
        out, s = bind(module, params)(X, SEGMENTS, noise)
        total = jnp.sum(out**2) / 1000 + all_losses(s) + losses.importance(s["importance"]) + losses.load(s["load"])
        return total, (out, s)

    f = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))  # noqa: E731  traced anew under each plan
    (_, (out, statistics)), grads = f()(params)
    plan = make_plan(mesh)
    placed = jax.device_put(params, storage_shardings(declarations(module), abstract_params(module), plan))
    with use(plan):
        (_, (sharded_out, sharded_statistics)), sharded = f()(placed)
    np.testing.assert_allclose(sharded_out, out, atol=1e-5)
    for name, value in statistics.items():
        np.testing.assert_allclose(sharded_statistics[name], value, rtol=1e-5, err_msg=name)
    for (path, ours), want in zip(jax.tree.leaves_with_path(sharded), jax.tree.leaves(grads)):
        assert np.linalg.norm(np.asarray(ours) - want) <= 1e-5 * np.linalg.norm(want), path


@pytest.mark.parametrize("stacked", [False, True])
def test_upcycled_equals_dense(stacked):
    c = config()
    rng = np.random.default_rng(3)
    dense = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=(2, *s.shape) if stacked else s.shape) * 0.3, jnp.float32),
        abstract_params(FeedForward(c)),
    )
    experts = upcycle(dense, E, jax.random.key(0), router_std=1.0)
    noisy = upcycle(dense, E, jax.random.key(0), noise=0.1)
    layer = (lambda tree: jax.tree.map(lambda a: a[1], tree)) if stacked else (lambda tree: tree)
    want = bind(FeedForward(c), layer(dense))(X)
    np.testing.assert_allclose(
        run(c, layer(experts), segment_ids=None)[0], want, atol=1e-6 * float(jnp.abs(want).max())
    )
    difference = layer(noisy)["up"]["weight"] - layer(dense)["up"]["weight"]
    np.testing.assert_allclose(np.std(difference, (1, 2)), 0.1 * np.std(layer(dense)["up"]["weight"]), rtol=0.15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 7}, "top_k=7 of 6 experts"),
        ({"groups": 4}, "groups=4 does not divide model.experts.num=6"),
        ({"groups": 3, "top_groups": 1, "top_k": 3}, "top_k=3 of 2 experts"),
        ({"groups": 6, "top_groups": 3, "group_score": "top2"}, "groups of at least 2"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"noisy": True, "scores": "sigmoid"}, "noisy needs scores=softmax"),
        ({"shared_gate": True}, "shared_gate needs shared experts"),
        ({"limit": 2.0, "model": {"activation": "relu"}}, "limit needs model.activation=silu"),
        ({"model": {"feed_forwards": ("dense",) * 4}}, "feed_forwards=dense,dense,dense,dense does not go with"),
        ({"num": 0, "top_k": 3}, "num is 0"),
    ],
)
def test_what_no_layer_can_have_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config(**fields)


@pytest.mark.parametrize("bias", [False, True], ids=["one op", "one by one"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_the_backward_pass_keeps(remat, bias):
    """Never weights. With `dots` both products of gated experts and nothing else of their width, as without experts;
    with that and `none` no product of theirs is made again."""
    decoder = Decoder(config({"num_layers": 2}, bias=bias), remat=remat)
    with use(make_plan(MeshConfig(), compute_dtype="bfloat16")):
        grads = jax.make_jaxpr(jax.grad(lambda p: bind(decoder, p)(TOKENS)[0].astype(jnp.float32).sum()))
        program = grads(abstract_params(decoder))
    forward = next(e for e in program.eqns if e.primitive.name == "scan")
    kept = [aval.shape for aval in cast(list[Any], [v.aval for v in forward.outvars[1:]])]
    assert not {v.shape for v in jax.tree.leaves(abstract_params(decoder)) if len(v.shape) >= 3} & set(kept)
    wide = kept.count((2, 2 * B * T, F))
    assert wide == {"none": 4, "dots": 2, "full": 0}[remat]
    forward, backward = (grouped_products(e) for e in program.eqns if e.primitive.name == "scan")
    again = {"none": 0, "dots": 0, "full": 2}[remat]
    assert (forward, backward) == (3, (6 if bias else 5) + again)


def grouped_products(equation) -> int:
    """How many there are in a program: on a CPU each is a loop over the experts."""
    inner = [x for value in equation.params.values() for x in jax.tree.leaves(value, is_leaf=is_program)]
    programs = [getattr(x, "jaxpr", x) for x in inner if is_program(x)]
    own = equation.primitive.name == "scan" and equation.params["length"] == E
    return own + sum(grouped_products(e) for program in programs for e in program.eqns)


def is_program(x) -> bool:
    return hasattr(x, "jaxpr") or hasattr(x, "eqns")


MIXED = dict(feed_forwards=("dense", "experts", "dense", "experts"), num_kv_heads=2, init_std=0.3)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 16)


def decoder_loss(decoder: Decoder, params, inputs=None):
    bound = bind(decoder, params)
    hidden, _, aux = bound(TOKENS, None, SEGMENTS, layer_inputs=inputs)
    return jnp.sum(hidden**2) / 1000 + all_losses(aux["experts"]).sum(), aux["experts"]


def test_a_decoders_statistics_have_a_row_per_layer_with_experts():
    """In the order of layers, however they are grouped; each layer's noise from its own keys."""
    c = config(MIXED, noisy=True)
    decoder, alone = Decoder(c), Decoder(c, segments="unrolled")
    params = init_params(decoder, 0)
    inputs = {"router_noise": layer_keys(jax.random.split(jax.random.key(0), B), 4)}
    seen = jax.jit(lambda p: decoder_loss(decoder, p, inputs)[1])(params)
    other = jax.jit(lambda p: decoder_loss(alone, p, inputs)[1])(unstack(params, decoder))
    assert seen["assigned"].shape == (2, E) and not np.array_equal(seen["assigned"][0], seen["assigned"][1])
    for name, value in seen.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)
    with pytest.raises(UserError, match="router_noise is for models with noisy routers"):
        decoder_loss(plain := Decoder(config(MIXED)), init_params(plain, 0), inputs)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_decoder_on_a_mesh_equals_one_device(remat):
    """Data 4 x tensor 2, ZeRO-3, rows with several documents."""
    decoder = Decoder(config(MIXED, shared_size=8), remat=remat)
    params = init_params(decoder, 0)
    f = lambda: jax.jit(jax.value_and_grad(lambda p: decoder_loss(decoder, p)[0]))  # noqa: E731  traced anew
    value, grads = f()(params)
    plan = make_plan(MeshConfig(data=4, tensor=2, zero=3))
    placed = jax.device_put(params, storage_shardings(declarations(decoder), abstract_params(decoder), plan))
    with use(plan):
        sharded_value, sharded = f()(placed)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    for (path, ours), want in zip(jax.tree.leaves_with_path(sharded), jax.tree.leaves(grads)):
        assert np.linalg.norm(np.asarray(ours) - want) <= 1e-5 * np.linalg.norm(want), path

"""constrain, on_shards and compute_weights: values and gradients, nested, against the same code without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llm_jax.sharding import (
    MeshConfig,
    axis_index,
    axis_max,
    axis_size,
    axis_sum,
    compute_weights,
    constrain,
    current_plan,
    make_plan,
    on_shards,
    use,
)

MESHES = [MeshConfig(data=8), MeshConfig(data=4, tensor=2), MeshConfig(data=2, tensor=4), MeshConfig(data=1)]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def head_loss(hidden, head, targets):
    """A vocabulary-parallel cross-entropy: a softmax over shards with its maximum, sum and target logit reduced."""
    local = head.shape[1]
    logits = hidden @ head
    top = axis_max(jnp.max(logits, -1), "vocab")
    total = axis_sum(jnp.sum(jnp.exp(logits - top[..., None]), -1), "vocab")
    at = targets - axis_index("vocab") * local
    here = (at >= 0) & (at < local)
    picked = jnp.take_along_axis(logits, jnp.clip(at, 0, local - 1)[..., None], -1)[..., 0]
    return axis_sum(jnp.where(here, picked, 0.0), "vocab") - top - jnp.log(total)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_on_shards_equals_one_device(mesh: MeshConfig, nested: bool):
    hidden, head, scale = normal(0, 8, 3, 16), normal(1, 16, 8), normal(2, 16)
    targets = jnp.asarray(np.random.default_rng(3).integers(0, 8, (8, 3)), jnp.int32)
    weights = normal(4, 8, 3)

    def inner(h, s):
        # constrain inside of shards: every axis is manual there, so it does nothing instead of failing
        return constrain(h * s, ("batch", "length", "embed"))

    def kernel(hidden, head, scale, targets):
        scaled = on_shards(inner, (("batch", "length", None), None), ("batch", "length", None))(hidden, scale)
        return head_loss(scaled, head, targets)

    def loss(hidden, head, scale):
        hidden = constrain(hidden, ("batch", "length", "embed"))
        f = on_shards(
            kernel if nested else lambda h, w, s, t: head_loss(h * s, w, t),
            (("batch", "length", None), (None, "vocab"), None, ("batch", "length")),
            ("batch", "length"),
        )
        return jnp.sum(constrain(f(hidden, head, scale, targets), ("batch", "length")) * weights)

    reference = jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, head, scale)
    plan = make_plan(mesh)
    with use(plan):
        sharded = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(hidden, head, scale)
    for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(sharded)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_axes_trees_and_none_arguments():
    plan = make_plan(MeshConfig(data=4, tensor=2))

    def fn(batch, nothing):
        assert nothing is None
        assert axis_size("vocab") == 2 and axis_size("batch") == 4 and axis_size("length") == 1
        return {"sum": axis_sum(jnp.sum(batch["x"]), "batch"), "x": batch["x"] * batch["y"][0]}

    mapped = on_shards(fn, ({"x": ("batch", "mlp"), "y": [None]}, None), {"sum": None, "x": ("batch", "mlp")})
    x = normal(0, 8, 4)
    with use(plan):
        out = jax.jit(lambda x: mapped({"x": x, "y": [jnp.float32(2)]}, None))(x)
        assert out["x"].sharding.spec == P("data", "tensor")
    np.testing.assert_allclose(out["x"], 2 * x)


def test_identities_without_a_plan():
    x = normal(0, 4, 4)
    assert constrain(x, ("batch", "embed")) is x
    assert axis_sum(x, "batch") is x and axis_size("vocab") == 1 and int(axis_index("vocab")) == 0
    assert compute_weights({"w": x}, {"w": ("embed", "mlp")})["w"] is x
    assert current_plan() is None


def test_rank_must_match():
    with use(make_plan(MeshConfig())), pytest.raises(ValueError, match="2 axis names"):
        constrain(normal(0, 8, 2, 2), ("batch", "embed"))


def test_another_plan_is_another_trace():
    """jit keeps programs apart by plan, though mesh and arguments are the same."""

    @jax.jit
    def stage(x):
        return x + current_plan().zero  # type: ignore[union-attr]

    for zero in (0, 1, 0, 3):
        with use(make_plan(MeshConfig(zero=zero))):
            assert float(stage(jnp.float32(0))) == zero


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_compute_weights_casts_then_gathers_and_scatters_gradients(zero: int):
    plan = make_plan(MeshConfig(data=4, tensor=2, zero=zero), compute_dtype="bfloat16")
    axes = ("embed", "mlp")
    w, x = normal(0, 16, 8), normal(1, 8, 16)
    seen = {}

    def loss(w, x):
        used = compute_weights({"w": w}, {"w": axes})["w"]
        jax.debug.inspect_array_sharding(used, callback=lambda s: seen.setdefault("used", s))
        return jnp.sum((x.astype(used.dtype) @ used).astype(jnp.float32) ** 2)

    with use(plan):
        stored = jax.device_put(w, plan.storage_sharding(axes, w.shape))
        grad = jax.jit(jax.grad(loss))(stored, jax.device_put(x, plan.activation_sharding(("batch", None))))
    assert grad.dtype == jnp.float32
    assert grad.sharding.spec == plan.gradient_spec(axes, w.shape)
    assert seen["used"].is_equivalent_to(plan.sharding(plan.compute_spec(axes)), 2)
    reference = jax.grad(lambda w: jnp.sum((x.astype(jnp.bfloat16) @ w).astype(jnp.float32) ** 2))(
        w.astype(jnp.bfloat16)
    )
    np.testing.assert_allclose(grad, reference.astype(jnp.float32), rtol=0.03, atol=0.3)


def test_compute_weights_leaves_integers_alone():
    with use(make_plan(MeshConfig(), compute_dtype="bfloat16")):
        codes = jnp.ones((8, 8), jnp.int8)
        assert compute_weights({"codes": codes}, {"codes": ("embed", "mlp")})["codes"] is codes


def test_casting_weights_is_casting():
    """Rounding before the cast, which keeps XLA from hoisting it, changes no bit: ties, subnormals, infinities."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits = np.concatenate([bits, (bits & 0xFFFF0000) | 0x8000])
    values = bits.view(np.float32)
    values = jnp.asarray(values[~np.isnan(values)])
    for dtype in (jnp.bfloat16, jnp.float32):
        got = jax.jit(lambda v, d=dtype: compute_weights([v], [("embed",)], d)[0])(values)
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(values.astype(dtype)))

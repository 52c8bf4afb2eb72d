"""linear_cross_entropy: `xla` against float64, `reference`, optax and closed forms; shards of a vocabulary; memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import linear_cross_entropy, partial_linear_cross_entropy
from tests.kernels.losses import ALL, arrays, combine, formula, relative, value_and_grads
from tests.kernels.numerics import assert_numbers

M, D, V = 1100, 16, 9000
"""On a CPU two chunks of tokens in nine blocks of the vocabulary; of 2,000 in place of 9,000, three chunks."""


def make(dtype=jnp.float32, m=M, v=V):
    return arrays(m, D, v, dtype)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(outputs=ALL, label_smoothing=0.1, z_loss=1e-2, scale=0.7, softcap=3.0),
        dict(outputs=("loss", "entropy"), label_smoothing=0.2),
        dict(outputs=("entropy",)),
        dict(outputs=("log_sum_sq_probs", "logps"), softcap=2.0),
    ],
)
@pytest.mark.parametrize("masked, v", [(False, V), (True, V), (True, 2000)])
def test_xla_equals_reference(options, masked, v):
    hidden, head, targets, mask = make(v=v)
    if masked:
        options = options | {"mask": mask}
    made, grads = value_and_grads(hidden, head, targets, "xla", **options)
    want, want_grads = value_and_grads(hidden, head, targets, "reference", **options)
    assert made.keys() == want.keys()
    for name in made:
        np.testing.assert_allclose(made[name], want[name], rtol=2e-6, atol=5e-6, err_msg=name)
        assert made[name].dtype == (jnp.int32 if name == "argmax" else jnp.float32)
        if masked:
            assert not np.asarray(made[name])[~np.asarray(mask)].any()
    assert relative(grads[0], want_grads[0]) < 3e-6 and relative(grads[1], want_grads[1]) < 3e-6
    if masked:
        assert not np.asarray(grads[0])[~np.asarray(mask)].any()


def test_equals_optax():
    hidden, head, targets, _ = make()
    logits = jnp.matmul(hidden, head, precision="highest")
    made = linear_cross_entropy(
        hidden, head, targets, outputs=("logps", "loss", "argmax", "entropy"), label_smoothing=0.1
    )
    np.testing.assert_allclose(
        -made["logps"], optax.softmax_cross_entropy_with_integer_labels(logits, targets), rtol=1e-5
    )
    smooth = optax.smooth_labels(jax.nn.one_hot(targets, V), 0.1)
    np.testing.assert_allclose(made["loss"], optax.softmax_cross_entropy(logits, smooth), rtol=1e-5)
    np.testing.assert_array_equal(made["argmax"], logits.argmax(-1))
    probs = jax.nn.softmax(logits)
    np.testing.assert_allclose(made["entropy"], -jnp.sum(probs * jnp.log(probs), -1), rtol=1e-5)


def test_closed_forms():
    """A head of zeros is the uniform distribution."""
    hidden, head, targets, _ = make()
    made = linear_cross_entropy(hidden, 0 * head, targets, outputs=ALL, z_loss=0.5)
    log_v = np.log(V)
    want = dict(
        logps=-log_v,
        loss=log_v + log_v**2 / 2,
        lse=log_v,
        entropy=log_v,
        argmax=0,
        mean_logit=0,
        log_sum_sq_probs=-log_v,
    )
    for name in ALL:
        np.testing.assert_allclose(made[name], np.full(M, want[name]), rtol=1e-6, atol=1e-6, err_msg=name)


def test_shards_of_the_vocabulary_combine():
    """Four shards' statistics, combined by hand, give the values and gradients of the whole."""
    hidden, head, targets, _ = make(v=800)
    names = ("target_logit", "lse", "expected_logit", "sum_logit", "lse2", "argmax", "max")

    def sharded(hidden, head):
        parts = [
            partial_linear_cross_entropy(hidden, head[:, i : i + 200], targets - i, softcap=4.0, outputs=names)
            for i in range(0, 800, 200)
        ]
        return combine(parts, 800)

    outputs = ("logps", "entropy", "mean_logit", "log_sum_sq_probs", "argmax")
    whole = lambda h, w: linear_cross_entropy(h, w, targets, softcap=4.0, outputs=outputs)  # noqa: E731
    made, want = sharded(hidden, head), whole(hidden, head)
    for name in outputs:
        np.testing.assert_allclose(made[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)
    total = lambda f: lambda h, w: sum(jnp.sin(f(h, w)[n]).sum() for n in outputs[:-1])  # noqa: E731
    for a, b in zip(jax.grad(total(sharded), (0, 1))(hidden, head), jax.grad(total(whole), (0, 1))(hidden, head)):
        assert relative(a, b) < 5e-6


def test_masked_tokens_may_hold_anything():
    hidden, head, targets, mask = make()
    dirty = jnp.where(mask[:, None], hidden, jnp.nan)
    wild = jnp.where(mask, targets, -100)
    clean_made, clean_grads = value_and_grads(hidden, head, targets, "xla", mask=mask)
    made, grads = value_and_grads(dirty, head, wild, "xla", mask=mask)
    for a, b in zip(jax.tree.leaves((made, grads)), jax.tree.leaves((clean_made, clean_grads))):
        np.testing.assert_array_equal(a, b)
    none, grads = value_and_grads(dirty, head, wild, "xla", mask=jnp.zeros_like(mask))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((none, grads)))


def test_a_target_outside_the_vocabulary_is_nan():
    hidden, head, targets, _ = make(m=8)
    logps = linear_cross_entropy(hidden, head, targets.at[3].set(V).at[5].set(-1))["logps"]
    np.testing.assert_array_equal(np.isnan(logps), np.isin(np.arange(8), [3, 5]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_equals_the_formula(dtype):
    """In two blocks of the vocabulary."""
    hidden, head, targets, mask = make(dtype, m=140)
    options: Any = dict(outputs=ALL, label_smoothing=0.1, z_loss=1e-2, scale=0.7, softcap=3.0, mask=mask)
    results = [value_and_grads(hidden, head, targets, name, **options) for name in ("xla", "reference")]
    results.append(formula(hidden, head, targets, **options))
    got, plain, want = ([*(made[name] for name in ALL), *grads] for made, grads in results)
    assert_numbers((*ALL, "d_hidden", "d_head"), got, plain, want, dtype)


def test_memory_holds_one_chunk_of_logits():
    hidden, head = jax.ShapeDtypeStruct((4096, D), jnp.float32), jax.ShapeDtypeStruct((D, V), jnp.float32)
    ints = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def loss(hidden, head, targets, mask):
        return linear_cross_entropy(hidden, head, targets, mask=mask)["logps"].sum()

    for f in (loss, jax.grad(loss, (0, 1))):
        memory = jax.jit(f).lower(hidden, head, ints, ints).compile().memory_analysis()
        assert memory is not None and memory.temp_size_in_bytes < 4096 * V * 4 / 5


def test_shapes_and_transformations():
    """[B, T] tokens; a tied embedding; jit, scan, checkpoint and vmap nested."""
    hidden, head, targets, mask = make(m=60, v=300)
    embed, batch = head.T, (hidden.reshape(3, 20, D), targets.reshape(3, 20), mask.reshape(3, 20))

    def loss(hidden, embed, targets, mask):
        return -linear_cross_entropy(hidden, embed.T, targets, mask=mask)["logps"].sum()

    want = jax.grad(loss, (0, 1))(*(batch[0], embed, *batch[1:]))

    def scanned(hidden, embed, targets, mask):
        body = jax.checkpoint(lambda total, x: (total + loss(x[0], embed, x[1], x[2]), None))
        return jax.lax.scan(body, 0.0, (hidden, targets, mask))[0]

    def mapped(hidden, embed, targets, mask):
        return jax.vmap(loss, (0, None, 0, 0))(hidden, embed, targets, mask).sum()

    for f in (scanned, mapped):
        got = jax.jit(jax.grad(f, (0, 1)))(batch[0], embed, *batch[1:])
        assert all(relative(a, b) < 2e-6 for a, b in zip(got, want))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """Tokens over 8 devices, the head on all of them, uneven masks: the head's gradient is the sum."""
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("data",))
    hidden, head, targets, mask = make(v=500)
    hidden, targets = hidden[:640], targets[:640]
    mask = mask[:640] & (jnp.arange(640) > 100)
    f = lambda h, w, t, m: linear_cross_entropy(h, w, t, mask=m)["logps"]  # noqa: E731
    sharded = jax.shard_map(
        f, mesh=mesh, in_specs=(P("data"), P(), P("data"), P("data")), out_specs=P("data"), check_vma=check_vma
    )
    grads = lambda f: jax.grad(lambda h, w: jnp.sin(f(h, w, targets, mask)).sum(), (0, 1))  # noqa: E731
    got, want = jax.jit(grads(sharded))(hidden, head), grads(f)(hidden, head)
    assert all(relative(a, b) < 2e-6 for a, b in zip(got, want))


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(outputs=("logp",)), "logp"),
        (dict(outputs="logps"), "outputs"),
        (dict(label_smoothing=0.1), "label_smoothing"),
        (dict(z_loss=0.1), "z_loss"),
        (dict(label_smoothing=1.5, outputs=("loss",)), "label_smoothing"),
        (dict(softcap=0.0), "softcap"),
        (dict(mask=jnp.ones(3)), "mask"),
        (dict(targets=jnp.ones(M)), "targets"),
        (dict(head=jnp.ones((D + 1, 5))), "head"),
        (dict(implementation="cuda"), "cuda"),
    ],
)
def test_bad_calls_name_the_argument(change, word):
    hidden, head, targets, _ = make()
    with pytest.raises(UserError, match=word):
        linear_cross_entropy(**dict(hidden=hidden, head=head, targets=targets) | change)

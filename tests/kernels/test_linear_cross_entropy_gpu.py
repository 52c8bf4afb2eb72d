"""linear_cross_entropy's GPU kernels in the GPU interpreter: against float64, masked tokens, a split vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import explain, linear_cross_entropy
from llm_jax.kernels.linear_cross_entropy.gpu import Tiles
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.losses import ALL, arrays, formula, shards, value_and_grads
from tests.kernels.numerics import assert_float32, assert_half

# Two tiles of tokens, in two chunks; a masked call needs one. Steps of 64 in the width.
M, D = 140, 72
TILES = Tiles(width=64, stages=2, band=2, chunk=128)
CASES = {
    "all": dict(outputs=ALL, label_smoothing=0.1, z_loss=1e-2, scale=0.7, softcap=3.0, vocab=100, masked=True),
    "whole tiles": dict(head_dtype="float32", vocab=128),
}
SLOW = {
    "float16": dict(dtype="float16", outputs=("loss", "argmax"), label_smoothing=0.2, vocab=70),
    "softcap": dict(outputs=("entropy", "log_sum_sq_probs"), softcap=2.0, vocab=64, masked=True),
}


def run(f, *args, **options):
    with devices.interpreter("gpu", devices.SMALL_GPU), trying("linear_cross_entropy", "gpu", TILES):
        return jax.block_until_ready(f(*args, **options))


def check(case):
    """Masked tokens are NaN, with targets outside the vocabulary."""
    options = dict(case)
    dtype, vocab = options.pop("dtype", "bfloat16"), options.pop("vocab")
    hidden, head, targets, mask = arrays(M, D, vocab, dtype, options.pop("head_dtype", dtype))
    bad = hidden, targets
    if options.pop("masked", False):
        options["mask"] = mask
        bad = jnp.where(mask[:, None], hidden, jnp.nan), jnp.where(mask, targets, -100)
    made, grads = run(value_and_grads, bad[0], head, bad[1], "gpu", **options)
    plain, plain_grads = value_and_grads(hidden, head, targets, "reference", **options)
    exact, exact_grads = formula(hidden, head, targets, **options)
    assert made.keys() == exact.keys() and [g.dtype for g in grads] == [hidden.dtype, head.dtype]
    for name in made:
        assert made[name].dtype == (jnp.int32 if name == "argmax" else jnp.float32)
        assert_float32(name, made[name], exact[name])
    for name, grad, reference, want in zip(("hidden", "head"), grads, plain_grads, exact_grads):
        assert_half(name, grad, reference, want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW.values(), ids=SLOW)
def test_more_options(case):
    check(case)


@pytest.mark.slow
def test_masked_tokens_change_nothing():
    hidden, head, targets, mask = arrays(M, D, 64, "bfloat16")
    wild = jnp.where(mask[:, None], hidden, 1e4 * hidden)
    before = run(value_and_grads, hidden, head, targets, "gpu", mask=mask)
    after = run(value_and_grads, wild, head, targets, "gpu", mask=mask)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    nothing = run(value_and_grads, wild, head, targets, "gpu", mask=jnp.zeros_like(mask))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(nothing))


@pytest.mark.slow
def test_shards_of_the_vocabulary_combine():
    hidden, head, targets, _ = arrays(M, D, 140, "bfloat16")
    made, grads = run(shards, hidden, head, targets, "gpu")
    _, plain = shards(hidden, head, targets, "reference")
    exact, exact_grads = formula(hidden, head, targets, softcap=4.0, outputs=tuple(made))
    for name in made:
        assert_float32(name, made[name], exact[name])
    for name, grad, reference, want in zip(("hidden", "head"), grads, plain, exact_grads):
        assert_half(name, grad, reference, want)


def test_what_is_refused():
    hidden, head, targets, _ = arrays(M, D, 100)
    with devices.target(devices.GPU):
        assert "not float32" in explain(linear_cross_entropy, hidden, head, targets).reasons["gpu"]
        half = hidden.astype("bfloat16"), head
        assert explain(linear_cross_entropy, *half, targets).implementation == "gpu"
    assert explain(linear_cross_entropy, *half, targets).reasons["gpu"] == "written for Hopper GPUs, not for cpu"


def test_kernels_are_named():
    hidden, head, targets, _ = arrays(M, D, 100, "bfloat16")
    with devices.target(devices.GPU):
        f = jax.grad(lambda h, w: linear_cross_entropy(h, w, targets)["logps"].sum(), (0, 1))
        text = str(jax.make_jaxpr(f)(hidden, head))
    for name in ("linear_cross_entropy", "linear_cross_entropy_logit_gradient"):
        assert f"llm_jax_{name}" in text

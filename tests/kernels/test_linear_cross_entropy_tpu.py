"""linear_cross_entropy's TPU kernels in the TPU interpreter: against float64, masked tokens, a split vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import explain, linear_cross_entropy
from llm_jax.kernels.linear_cross_entropy.tpu import Tiles
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.losses import ALL, arrays, formula, shards, value_and_grads
from tests.kernels.numerics import assert_float32, assert_half

M, D = 40, 24
TILES = Tiles(tokens=16, vocab=128)
CASES = {
    "all": dict(outputs=ALL, label_smoothing=0.1, z_loss=1e-2, scale=0.7, softcap=3.0, vocab=300, masked=True),
    "one tile": dict(dtype="bfloat16", vocab=100, masked=True),
    "whole tiles": dict(dtype="bfloat16", head_dtype="float32", outputs=("loss", "argmax"), z_loss=0.1, vocab=256),
    "bfloat16": dict(dtype="bfloat16", outputs=ALL, softcap=2.0, label_smoothing=0.2, vocab=300, masked=True),
    "entropy": dict(outputs=("entropy", "log_sum_sq_probs"), scale=1.5, vocab=140),
}


def run(f, *args, **options):
    with devices.interpreter("tpu"), trying("linear_cross_entropy", "tpu", TILES):
        return jax.block_until_ready(f(*args, **options))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case):
    """Masked tokens are NaN, with targets outside the vocabulary."""
    options = dict(case)
    dtype, vocab = options.pop("dtype", "float32"), options.pop("vocab")
    hidden, head, targets, mask = arrays(M, D, vocab, dtype, options.pop("head_dtype", dtype))
    bad = hidden, targets
    if options.pop("masked", False):
        options["mask"] = mask
        bad = jnp.where(mask[:, None], hidden, jnp.nan), jnp.where(mask, targets, -100)
    made, grads = run(value_and_grads, bad[0], head, bad[1], "tpu", **options)
    plain, plain_grads = value_and_grads(hidden, head, targets, "reference", **options)
    exact, exact_grads = formula(hidden, head, targets, **options)
    assert made.keys() == exact.keys() and [g.dtype for g in grads] == [hidden.dtype, head.dtype]
    for name in made:
        assert made[name].dtype == (jnp.int32 if name == "argmax" else jnp.float32)
        assert_float32(name, made[name], exact[name])
    for name, grad, reference, want in zip(("hidden", "head"), grads, plain_grads, exact_grads):
        if dtype == "float32":
            assert_float32(name, grad, want)
        else:
            assert_half(name, grad, reference, want)


def test_masked_tokens_change_nothing():
    hidden, head, targets, mask = arrays(M, D, 100, "bfloat16")
    wild = jnp.where(mask[:, None], hidden, 1e4 * hidden)
    before = run(value_and_grads, hidden, head, targets, "tpu", mask=mask)
    after = run(value_and_grads, wild, head, targets, "tpu", mask=mask)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    nothing = run(value_and_grads, wild, head, targets, "tpu", mask=jnp.zeros_like(mask))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(nothing))


def test_shards_of_the_vocabulary_combine():
    hidden, head, targets, _ = arrays(M, D, 280)
    made, grads = run(shards, hidden, head, targets, "tpu")
    want, want_grads = formula(hidden, head, targets, softcap=4.0, outputs=tuple(made))
    for name in made:
        assert_float32(name, made[name], want[name])
    for name, grad, exact in zip(("hidden", "head"), grads, want_grads):
        assert_float32(name, grad, exact)


def test_what_is_refused():
    hidden, head, targets, _ = arrays(M, D, 100, "float16")
    with devices.target(devices.TPU):
        assert "float16" in explain(linear_cross_entropy, hidden, head, targets).reasons["tpu"]
        wide = jax.ShapeDtypeStruct((M, 2**15), "bfloat16"), jax.ShapeDtypeStruct((2**15, 100), "bfloat16")
        assert "a width of 32768" in explain(linear_cross_entropy, *wide, targets).reasons["tpu"]
        half = hidden.astype("bfloat16"), head
        assert explain(linear_cross_entropy, *half, targets).implementation == "tpu"
    assert explain(linear_cross_entropy, *half, targets).reasons["tpu"] == "written for TPUs, not for cpu"


def test_kernels_are_named():
    hidden, head, targets, _ = arrays(M, D, 100, "bfloat16")
    with devices.target(devices.TPU):
        f = jax.grad(lambda h, w: linear_cross_entropy(h, w, targets)["logps"].sum(), (0, 1))
        text = str(jax.make_jaxpr(f)(hidden, head))
    for name in ("", "_hidden_gradient", "_head_gradient"):
        assert f"name=llm_jax_linear_cross_entropy{name}\n" in text

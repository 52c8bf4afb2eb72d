"""State-space mixers: equal to transformers' (tests/oracles/transformers_mixers.py); packed, cached, sharded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.cache import Meta, Packed
from llm_jax.models.mamba_config import MambaConfig
from llm_jax.models.parameter import bind, declarations
from llm_jax.models.shared import Shared
from llm_jax.models.state_cache import StateCache, init_state
from llm_jax.sharding import make_plan, place, storage_shardings, use
from llm_jax.sharding.config import MeshConfig
from tests.models.mixers import RECIPE, as_ours, config, golden, mixer, params

B, T = RECIPE.BATCH, RECIPE.LENGTH
SEGMENTS = np.array([[1] * 9 + [2] * 1 + [3] * 20 + [0] * 7, [0] * 2 + [4] * 20 + [5] * 15])


SOME = pytest.mark.parametrize("case", ["mamba", "jamba_options", "mamba2", "nemotron_h"])


def run(case, weights, x, segment_ids=None, cache=None):
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return bind(mixer(case), weights)(x, Shared(Meta(positions, ids), None, None), cache or Packed())


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("case", RECIPE.CASES)
def test_equals_transformers(case):
    x, loss_weights = RECIPE.inputs(case)
    weights = params(case)

    @jax.jit
    def value_and_grads(weights, x):
        def loss(weights, x):
            out = run(case, weights, x)[0]
            return jnp.sum(loss_weights * out), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, x)

    (_, out), (d_weights, d_input) = value_and_grads(weights, jnp.asarray(x))
    theirs = golden(case)
    want = theirs["out"]
    assert np.abs(out - want).max() <= 1e-5 * max(1.0, np.abs(want).max())
    assert relative(d_input, theirs["d_input"]) < 1e-5
    theirs = as_ours(case, {k.removeprefix("grad/"): v for k, v in theirs.items() if k.startswith("grad/")})
    ours = flatten(d_weights)
    assert ours.keys() == theirs.keys()
    assert {path: e for path, value in theirs.items() if (e := relative(ours[path], value)) > 1e-5} == {}


@SOME
def test_packed_equals_each_document_alone(case):
    x, weights = jnp.asarray(RECIPE.inputs(case)[0]), params(case)
    step = jax.jit(partial(run, case))
    packed = step(weights, x, SEGMENTS)[0]
    for row, document in ((0, 1), (0, 3), (1, 5)):
        mine = SEGMENTS[row] == document
        alone = step(weights, x[row : row + 1, mine])[0]
        np.testing.assert_allclose(packed[row, mine], alone[0], rtol=1e-5, atol=1e-5)


@SOME
def test_cached_equals_whole(case):
    """A prompt in two ragged pieces (padding on the right, then on the left), then token by token."""
    x, weights = jnp.asarray(RECIPE.inputs(case)[0]), params(case)
    step = jax.jit(partial(run, case))
    want = step(weights, x)[0]
    cache, done, got = init_state(config(case).mamba, B), np.zeros(B, int), [[], []]
    for counts, left in (((3, 8), False), ((6, 2), True), *(((1, 1), False),) * 12, ((0, 1), False), ((1, 0), False)):
        width = max(counts)
        piece, ids = np.full((B, width, RECIPE.HIDDEN), 1e3, np.float32), np.zeros((B, width), np.int32)
        spans = [slice(width - n, width) if left else slice(0, n) for n in counts]
        for row, (n, span) in enumerate(zip(counts, spans)):
            piece[row, span], ids[row, span] = x[row, done[row] : done[row] + n], 1
        out, cache = step(weights, jnp.asarray(piece), ids, cache)
        for row, span in enumerate(spans):
            got[row].append(out[row, span])
        done += counts
    assert isinstance(cache, StateCache) and cache.state.dtype == jnp.float32
    for row in range(B):
        np.testing.assert_allclose(np.concatenate(got[row]), want[row, : done[row]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["jamba", "mamba2", "mamba2_options"])
def test_sharded_equals_one_device(case):
    """Channels or heads over 2 devices, rows over 2; groups one per shard, shared by all shards, and ZeRO 3."""
    x, loss_weights = RECIPE.inputs(case)
    weights = params(case)

    def grads(weights, x):
        return jax.grad(lambda w, x: jnp.sum(loss_weights * run(case, w, x, SEGMENTS)[0]), (0, 1))(weights, x)

    want = jax.jit(grads)(weights, jnp.asarray(x))
    plan = make_plan(MeshConfig(data=2, tensor=2, zero=3), compute_dtype="float32")
    shardings = flatten(storage_shardings(declarations(mixer(case)), weights, plan))
    flat = {path: place(np.asarray(value), shardings[path]) for path, value in flatten(weights).items()}
    with use(plan):
        got = jax.jit(grads)(unflatten(flat), jnp.asarray(x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert relative(np.asarray(a), np.asarray(b)) < 1e-5


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(inner_size=0), "inner_size"),
        (dict(num_heads=5), "num_heads"),
        (dict(num_groups=4), "num_groups"),
        (dict(dt_min=2.0, dt_max=1.0), "dt_min"),
        (dict(chunk_size=1000), "chunk_size"),
        (dict(selection_norm="plain"), "selection_norm"),
    ],
)
def test_bad_sizes_name_the_field(fields, word):
    with pytest.raises(UserError, match=word):
        MambaConfig(**dict(inner_size=48, state_size=4, num_heads=6) | fields).check(heads=True)

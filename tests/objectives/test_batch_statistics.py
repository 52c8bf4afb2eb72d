"""Losses with statistics of the batch: cut into microbatches, padded or not, they are those of the whole batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_close

from llm_jax import objectives as o

RNG = np.random.default_rng(5)
# Three microbatches of two rows of two places; two places of the last rows hold nothing.
SHAPE = (3, 2, 2)
LOGPS: Any = tuple(jnp.array(-RNG.uniform(5, 40, SHAPE), jnp.float32) for _ in range(4))
PRESENT = jnp.ones(SHAPE, bool).at[2, 0, 1].set(False).at[2, 1, 1].set(False)
LABELS = jnp.array(RNG.integers(0, 2, SHAPE).astype(bool))
NUMBER = int(PRESENT.sum())


def whole(x: jax.Array) -> jax.Array:
    return x[PRESENT]


def by_microbatches(losses_of, policy):
    """Sum of each microbatch's losses where something is, one after the other, and its gradient."""

    def total(policy):
        parts = [jnp.where(PRESENT[i], losses_of(i, [x[i] for x in policy]), 0.0).sum() for i in range(SHAPE[0])]
        return jnp.stack(parts).sum() / NUMBER

    return jax.value_and_grad(total)(policy)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_optimal_transport_is_over_the_whole_batch(name):
    loss, matching = getattr(o, name), getattr(o, f"{name}_matched")
    matched = matching(*LOGPS, PRESENT)

    def microbatch(i, policy):
        own = jax.tree.map(lambda x: x[i], matched)
        return loss(*policy, LOGPS[2][i], LOGPS[3][i], 0.1, 0.1, own)[0]

    def at_once(policy):
        return loss(*map(whole, policy), whole(LOGPS[2]), whole(LOGPS[3]), 0.1, 0.1)[0].mean()

    expected = jax.value_and_grad(at_once)(list(LOGPS[:2]))
    assert_trees_all_close(by_microbatches(microbatch, list(LOGPS[:2])), expected, rtol=1e-6, atol=1e-9)


def test_matched_numbers_have_equal_ranks():
    margins, references = np.array(LOGPS[0] - LOGPS[1]), np.array(LOGPS[2] - LOGPS[3])
    matched = np.array(o.aot_matched(*LOGPS, present=PRESENT))
    present = np.array(PRESENT)
    order = np.argsort(margins[present])
    np.testing.assert_array_equal(matched[present][order], np.sort(references[present]))
    np.testing.assert_array_equal(matched[~present], 0)
    # TRL sorts within a device's microbatch: another loss.
    apart = o.aot_matched(*(x[0] for x in LOGPS))
    assert not np.array_equal(apart, matched[0])


def test_kto_reads_one_reference_point():
    kl = o.kto_kl(LOGPS[1], LOGPS[1] - 0.5 + jnp.arange(12.0).reshape(SHAPE) / 40, PRESENT)

    def microbatch(i, policy):
        return o.kto(policy[0], LOGPS[2][i], LABELS[i], kl)[0]

    def at_once(policy):
        z = o.kto_kl(whole(LOGPS[1]), whole(LOGPS[1] - 0.5 + jnp.arange(12.0).reshape(SHAPE) / 40))
        return o.kto(whole(policy[0]), whole(LOGPS[2]), whole(LABELS), z)[0].mean()

    assert 0.1 < kl < 0.5
    expected = jax.value_and_grad(at_once)([LOGPS[0]])
    assert_trees_all_close(by_microbatches(microbatch, [LOGPS[0]]), expected, rtol=1e-6, atol=1e-9)


def test_bco_reads_one_shift_and_a_running_one():
    delta, running = o.bco_delta(LOGPS[0], LOGPS[2], LABELS, 0.1, PRESENT)
    rewards = 0.1 * np.array(LOGPS[0] - LOGPS[2], np.float64)
    up, down = np.array(LABELS & PRESENT), np.array(~LABELS & PRESENT)
    np.testing.assert_allclose(delta, (rewards[up].mean() + rewards[down].mean()) / 2, rtol=1e-5)

    def microbatch(i, policy):
        return o.bco_unpaired(policy[0], LOGPS[2][i], LABELS[i], delta)[0]

    def at_once(policy):
        given = whole(policy[0]), whole(LOGPS[2]), whole(LABELS)
        return o.bco_unpaired(*given, o.bco_delta(*given, 0.1)[0])[0].mean()

    expected = jax.value_and_grad(at_once)([LOGPS[0]])
    assert_trees_all_close(by_microbatches(microbatch, [LOGPS[0]]), expected, rtol=1e-6, atol=1e-9)
    # Batch by batch the running means end at those of all examples.
    running = None
    for i in range(SHAPE[0]):
        later, running = o.bco_delta(LOGPS[0][i], LOGPS[2][i], LABELS[i], 0.1, PRESENT[i], running)
    np.testing.assert_allclose(later, delta, rtol=1e-5)
    # The paired loss takes the shift of both sides.
    both = jnp.concatenate([LOGPS[0], LOGPS[1]]), jnp.concatenate([LOGPS[2], LOGPS[3]])
    shift = o.bco_delta(*both, jnp.arange(6)[:, None, None] < jnp.full((6, 2, 2), 3), 0.1)[0]
    assert_trees_all_close(o.bco(*LOGPS, delta=shift)[0], o.bco(*LOGPS)[0], rtol=1e-6)

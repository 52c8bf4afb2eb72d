"""What the tests of the three state-space ops share: calls of both implementations, compared tensor by tensor."""

import jax
import jax.numpy as jnp
import numpy as np

RAGGED = [[1] * 11 + [2] * 20 + [3] * 14, [0] * 3 + [4] * 7 + [2] * 30 + [0] * 5]
"""Documents of two rows of 45 tokens: boundaries inside chunks, padding before and after."""


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def value_and_grads(op, arrays, implementation, **options):
    """Output and final state of `op(*arrays, initial_state=last of the arrays)`, and the gradients of all arrays."""
    rng = np.random.default_rng(9)

    def loss(arrays):
        *inputs, state = arrays
        y, final = op(*inputs, initial_state=state, return_final_state=True, implementation=implementation, **options)
        weights = [normal(rng, *x.shape) for x in (y, final)]
        return sum(jnp.sum(w * x.astype(jnp.float32)) for w, x in zip(weights, (y, final))), (y, final)

    (_, made), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(tuple(arrays))
    return *made, *grads


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    norm = np.linalg.norm(want)
    return np.linalg.norm(got - want) / norm if norm else np.abs(got).max(initial=0.0)


def errors(got, want):
    """‖Δ‖/‖g‖ of each tensor."""
    assert [x.shape for x in got] == [x.shape for x in want]
    return [error(a, b) for a, b in zip(got, want)]


def documents(segment_ids):
    """(row, slice) of every document of the rows, in order."""
    for row, ids in enumerate(np.asarray(segment_ids)):
        edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
        yield from ((row, slice(a, b)) for a, b in zip(edges, edges[1:]) if ids[a])

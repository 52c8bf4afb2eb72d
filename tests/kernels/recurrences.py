"""What the tests of the three state-space ops share: calls of all implementations, compared tensor by tensor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("y", "final", "d_x", "d_dt", "d_A", "d_B", "d_C", "d_skip", "d_initial")
"""What `value_and_grads` makes of `selective_scan` and `ssd`."""
RAGGED = [[1] * 11 + [2] * 20 + [3] * 14, [0] * 3 + [4] * 7 + [2] * 30 + [0] * 5]
"""Documents of two rows of 45 tokens: boundaries inside chunks, padding before and after."""


def normal(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def make_scan(
    op: str, dtype=jnp.float32, *, batch, length, channels=5, heads=(4, 8), groups=2, states=6, steepness=1.0, seed=0
):
    """Arguments of `selective_scan` (of `channels`) or `ssd` (of `heads`: number, size) with the initial state last.

    With `steepness`, a third of the steps stay small.
    """
    rng = np.random.default_rng(seed)
    lead = (batch, length)
    mamba2 = op == "ssd"
    inner = heads if mamba2 else (channels,)
    dt = jax.nn.softplus(normal(rng, *lead, *inner[:1]))
    dt = jnp.where(jnp.asarray(rng.uniform(size=dt.shape)) < 1 / 3, dt / steepness, dt)
    selected = (groups, states) if mamba2 else (states,)
    rates = -steepness * jnp.exp(normal(rng, *(heads[:1] if mamba2 else (channels, states))))
    b, c = (normal(rng, *lead, *selected, dtype=dtype) for _ in range(2))
    return (
        normal(rng, *lead, *inner, dtype=dtype),
        dt,
        rates,
        b,
        c,
        normal(rng, *inner[:1]),
        normal(rng, batch, *inner, states),
    )


def with_grads(scan, arrays, dtype):
    """Output and final state of `scan(arrays)`, and the gradients of all arrays for fixed cotangents.

    The output's cotangent has values that `dtype` holds.
    """

    def loss(arrays):
        rng = np.random.default_rng(9)
        y, final = scan(arrays)
        weights = normal(rng, *y.shape).astype(dtype), normal(rng, *final.shape)
        made = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (y, final)]
        return sum(jnp.sum(w.astype(x.dtype) * x) for w, x in zip(weights, made)), (y, final)

    (_, made), grads = jax.value_and_grad(loss, has_aux=True)(tuple(arrays))
    return *made, *grads


def value_and_grads(op, arrays, implementation, **options):
    """Output and final state of `op(*arrays, initial_state=last of the arrays)`, and the gradients of all arrays."""

    def scan(arrays):
        *inputs, state = arrays
        return op(*inputs, initial_state=state, return_final_state=True, implementation=implementation, **options)

    return jax.jit(lambda arrays: with_grads(scan, arrays, arrays[0].dtype))(tuple(arrays))


class Exact(NamedTuple):
    """In float64."""

    numbers: tuple[np.ndarray, ...]
    """What `value_and_grads` makes."""
    narrow: dict[str, np.ndarray]
    """Of `ssd`: those that are float32 sums of products in x's dtype; in place of d_A its terms [B, T, H], which
    cancel."""


def exact(op: str, arrays, segment_ids=None) -> Exact:
    """By the recurrence."""
    lead = arrays[0].shape[:2]
    ids = np.ones(lead, int) if segment_ids is None else np.asarray(segment_ids)
    begins = np.zeros(lead, bool)
    for row, places in enumerate(ids):
        real = np.flatnonzero(places)
        begins[row, real[1:][places[real[1:]] != places[real[:-1]]]] = True
    real = ids > 0
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        wide[2] = jnp.broadcast_to(wide[2], (*lead, *wide[2].shape))

        def scan(arrays):
            *tokens, skip, state = arrays
            x, dt, A, b, c = tokens
            x, dt, b, c = (jnp.where(real.reshape(lead + (1,) * (y.ndim - 2)), y, 0) for y in (x, dt, b, c))
            if op == "ssd":
                b, c = (jnp.repeat(y, x.shape[2] // y.shape[2], axis=2)[:, :, :, None] for y in (b, c))
                dt, A, skip = dt[..., None], A[..., None, None], skip[:, None]
            else:
                b, c = b[:, :, None], c[:, :, None]

            def token(state, xs):
                x, dt, A, b, c, begin, is_real = xs
                over = (slice(None), *(None,) * (state.ndim - 1))
                state = jnp.where(begin[over], 0.0, state)
                after = jnp.exp(dt[..., None] * A) * state + (dt * x)[..., None] * b
                y = jnp.sum(after * c, axis=-1) + skip * x
                return jnp.where(is_real[over], after, state), jnp.where(is_real[over[:-1]], y, 0.0)

            xs = (x, dt, A, b, c, jnp.asarray(begins), jnp.asarray(real))
            final, y = jax.lax.scan(token, state, tuple(jnp.swapaxes(y, 0, 1) for y in xs))
            return jnp.swapaxes(y, 0, 1), final

        run = jax.jit(lambda wide: with_grads(scan, wide, arrays[0].dtype))
        made = dict(zip(NAMES, jax.tree.map(np.asarray, run(wide)), strict=True))
    narrow = {name: made[name] for name in ("final", "d_dt", "d_A", "d_initial") if op == "ssd"}
    made["d_A"] = made["d_A"].sum((0, 1))
    return Exact(tuple(made.values()), narrow)


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

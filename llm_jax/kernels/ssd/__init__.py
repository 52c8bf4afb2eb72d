"""The state-space dual of Mamba-2: a selective scan whose chunks are products of matrices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.documents import runs, starts
from llm_jax.kernels.ssd import gpu, reference, tpu, xla
from llm_jax.kernels.ssd.spec import SsdSpec, ssd_spec

OP = Op(
    "ssd",
    ssd_spec,
    {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference},
    order=("tpu", "gpu", "xla"),
)


def ssd(
    x: Float[Array, "B T H P"],
    dt: Float[Array, "B T H"],
    A: Float[Array, " H"],
    B: Float[Array, "B T G N"],
    C: Float[Array, "B T G N"],
    skip: Float[Array, " H"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B H P N"] | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]ᵀ for each head (h is [P, N]); y[t] = h[t] C[t] + skip x[t].

    States, decays and sums are float32; products of matrices take their factors in x's dtype.

    Args:
        x, B, C: one dtype of float32, bfloat16, float16. G divides H; head h reads group h // (H / G).
        dt: the step sizes themselves: bias, softplus and limits are the caller's.
        A: not positive, else states grow without bound.
        segment_ids: documents of a packed row exchange no state. 0 is padding: gives 0, leaves the state as it is.
        initial_state: that before the row's first real token; None means zeros.
        return_final_state: also return the state after the row's last real token.
        chunk_size: tokens of a chunk, at most 256; changes no number.
            None: by machine. A kernel that does not have the size is not taken.
        implementation: "tpu", "gpu", "xla" or "reference"; None takes the best one for the machine.

    Returns:
        [B, T, H, P] in x's dtype, or that and float32[B, H, P, N]. Gradients flow to all arrays, also through the
        final state; reverse mode only.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit, or an unknown implementation.

    Source: Mamba-2, https://arxiv.org/abs/2405.21060, section 6.
    """
    options: dict[str, Any] = dict(segment_ids=segment_ids, initial_state=initial_state, chunk_size=chunk_size)
    spec = ssd_spec(x, dt, A, B, C, skip, **options)
    name = choose(OP, spec, implementation)
    real, begins = None, None
    if segment_ids is not None:
        run = runs(segment_ids)
        real, begins = run > 0, starts(run)
        dt = jnp.where(real[..., None], dt, 0)
        x, B, C = (jnp.where(real[..., None, None], y, 0) for y in (x, B, C))
    if skip is None:
        skip = jnp.zeros(spec.heads, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((spec.batch, spec.heads, spec.head_dim, spec.states), jnp.float32)
    if name == "reference" and begins is None:
        begins = jnp.zeros(x.shape[:2], bool)
    arrays = (x, dt, A, B, C, skip, begins, initial_state.astype(jnp.float32))
    arrays = manual_axes.vary(arrays, manual_axes.axes_of(arrays))
    y, final = reference.scan(spec, *arrays) if name == "reference" else _scan(name, spec, *arrays)
    if real is not None:
        y = jnp.where(real[..., None, None], y, 0)  # not 0 times a state too large for float16
    return (y, final) if return_final_state else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(name: str, spec: SsdSpec, *arrays: Any) -> tuple[Array, Array]:
    return OP.implementations[name].forward(spec, *arrays, keep_states=False)[:2]


def _forward(name: str, spec: SsdSpec, *arrays: Any) -> tuple[tuple[Array, Array], tuple]:
    y, final, states = OP.implementations[name].forward(spec, *arrays, keep_states=True)
    return (y, final), (*arrays[:-1], states)


def _backward(name: str, spec: SsdSpec, saved: tuple, cotangents: tuple[Array, Array]) -> tuple:
    *d_arrays, d_state = OP.implementations[name].backward(spec, *saved, *cotangents)
    return (*d_arrays, None, d_state)


_scan.defvjp(_forward, _backward)

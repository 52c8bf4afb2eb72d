"""The selective state-space scan of Mamba."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.documents import runs, starts
from llm_jax.kernels.selective_scan import gpu, reference, tpu, xla
from llm_jax.kernels.selective_scan.spec import ScanSpec, scan_spec

OP = Op(
    "selective_scan",
    scan_spec,
    {"tpu": tpu, "gpu": gpu, "xla": xla, "reference": reference},
    order=("tpu", "gpu", "xla"),
)


def selective_scan(
    u: Float[Array, "B T D"],
    delta: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    B: Float[Array, "B T N"],
    C: Float[Array, "B T N"],
    skip: Float[Array, " D"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B D N"] | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t] for each channel alone; y[t] = Σ_n C[t] h[t] + skip u[t].

    All in float32, whatever the dtypes of the arguments.

    Args:
        delta: the step sizes themselves: bias, softplus and limits are the caller's.
        A: not positive, else states grow without bound.
        segment_ids: documents of a packed row exchange no state. 0 is padding: gives 0, leaves the state as it is.
        initial_state: that before the row's first real token; None means zeros.
        return_final_state: also return the state after the row's last real token.
        chunk_size: tokens between two states that the backward pass starts from; changes no number.
            None: by machine. A kernel that does not have the size is not taken.
        implementation: "tpu", "gpu", "xla" or "reference"; None takes the best one for the machine.

    Returns:
        [B, T, D] in u's dtype, or that and float32[B, D, N]. Gradients flow to all arrays, also through the final
        state; reverse mode only.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit, or an unknown implementation.

    Source: Mamba, https://arxiv.org/abs/2312.00752, algorithm 2, with B discretised as delta B.
    """
    options: dict[str, Any] = dict(segment_ids=segment_ids, initial_state=initial_state, chunk_size=chunk_size)
    spec = scan_spec(u, delta, A, B, C, skip, **options)
    name = choose(OP, spec, implementation)
    real, begins = None, None
    if segment_ids is not None:
        run = runs(segment_ids)
        real, begins = run > 0, starts(run)
        u, delta, B, C = (jnp.where(real[..., None], x, 0) for x in (u, delta, B, C))
    if skip is None:
        skip = jnp.zeros(spec.channels, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((spec.batch, spec.channels, spec.states), jnp.float32)
    if name == "reference" and begins is None:
        begins = jnp.zeros(u.shape[:2], bool)
    arrays = (u, delta, A, B, C, skip, begins, initial_state.astype(jnp.float32))
    arrays = manual_axes.vary(arrays, manual_axes.axes_of(arrays))
    y, final = reference.scan(spec, *arrays) if name == "reference" else _scan(name, spec, *arrays)
    return (y, final) if return_final_state else y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(name: str, spec: ScanSpec, *arrays: Any) -> tuple[Array, Array]:
    return OP.implementations[name].forward(spec, *arrays, keep_states=False)[:2]


def _forward(name: str, spec: ScanSpec, *arrays: Any) -> tuple[tuple[Array, Array], tuple]:
    y, final, states = OP.implementations[name].forward(spec, *arrays, keep_states=True)
    return (y, final), (*arrays[:-1], states)


def _backward(name: str, spec: ScanSpec, saved: tuple, cotangents: tuple[Array, Array]) -> tuple:
    *d_arrays, d_state = OP.implementations[name].backward(spec, *saved, *cotangents)
    return (*d_arrays, None, d_state)


_scan.defvjp(_forward, _backward)

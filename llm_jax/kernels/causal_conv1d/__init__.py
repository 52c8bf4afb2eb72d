"""Depthwise causal convolution over the tokens of each document."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.causal_conv1d import reference, xla
from llm_jax.kernels.causal_conv1d.spec import ConvSpec, conv_spec
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.documents import runs, starts

OP = Op("causal_conv1d", conv_spec, {"xla": xla, "reference": reference}, order=("xla",))


def causal_conv1d(
    x: Float[Array, "B T D"],
    weight: Float[Array, "K D"],
    bias: Float[Array, " D"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B K-1 D"] | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> Any:
    """y[t] = activation(bias + Σ_i weight[i] · x[t - (K - 1) + i]), for each channel alone, sums in float32.

    Args:
        x: float32, bfloat16 or float16.
        weight: the last row meets the token itself.
        segment_ids: documents of a packed row see nothing of each other. 0 is padding, which may lie before, between
            and after documents, not inside one; it gives 0 and leaves no trace.
        initial_state: the K - 1 inputs before the row's first real token, oldest first; None means zeros.
        return_final_state: also return the state after the last real token, that of its document alone.
        implementation: "xla" or "reference"; None takes the best one for the machine.

    Returns:
        [B, T, D] in x's dtype, or that and the state [B, K-1, D] in the dtype of `initial_state` (of x without one).
        Gradients flow to x, weight, bias and initial_state, also through the final state; reverse mode only.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit, or an unknown implementation.

    Source: Mamba, https://arxiv.org/abs/2312.00752, section 3.4.
    """
    spec = conv_spec(x, weight, bias, activation=activation, segment_ids=segment_ids, initial_state=initial_state)
    name = choose(OP, spec, implementation)
    state_dtype = x.dtype if initial_state is None else initial_state.dtype
    run = None if segment_ids is None else runs(segment_ids)
    if name == "reference":
        if run is None:
            run = jnp.ones(x.shape[:2], jnp.int32)
        state = jnp.zeros((spec.batch, spec.width - 1, spec.channels)) if initial_state is None else initial_state
        y, final = reference.convolve(spec, x, weight, bias, run > 0, starts(run), state)
    else:
        extended, held = _extend(spec, x, run, initial_state)
        arrays = (extended, weight, bias, held, run)
        y = _convolve(name, spec, *manual_axes.vary(arrays, manual_axes.axes_of(arrays)))
        final = _last(spec, extended, held, run) if return_final_state else None
    return y if final is None or not return_final_state else (y, final.astype(state_dtype))


def _extend(spec: ConvSpec, x: Array, run: Array | None, state: Array | None) -> tuple[Array, Array | None]:
    """The inputs behind the state that they go on from, and the documents of both."""
    x = jnp.pad(x, ((0, 0), (spec.width - 1, 0), (0, 0)))
    held = None if run is None else jnp.pad(run, ((0, 0), (spec.width - 1, 0)))
    if state is None:
        return x, held
    if run is None or held is None:
        return x.at[:, : spec.width - 1].set(state.astype(x.dtype)), None
    # Where padding comes first, the state lies behind it.
    first = jnp.argmax(run > 0, axis=1)
    rows, places = jnp.arange(spec.batch)[:, None], first[:, None] + jnp.arange(spec.width - 1)
    return x.at[rows, places].set(state.astype(x.dtype)), held.at[rows, places].set(1)


def _last(spec: ConvSpec, extended: Array, held: Array | None, run: Array | None) -> Array:
    """The last K - 1 inputs of each row's last document."""
    if held is None or run is None:
        return extended[:, spec.length :]
    count = jnp.max(jnp.where(run > 0, jnp.arange(1, spec.length + 1), 0), axis=1)
    places = count[:, None] + jnp.arange(spec.width - 1)
    document = jnp.maximum(jnp.max(run, axis=1, keepdims=True), 1)
    inside = jnp.take_along_axis(held, places, axis=1) == document
    return jnp.where(inside[..., None], jnp.take_along_axis(extended, places[..., None], axis=1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(name: str, spec: ConvSpec, extended: Array, weight: Array, bias: Array | None, held: Any, run: Any):
    return OP.implementations[name].forward(spec, extended, weight, bias, held, run)


def _forward(name: str, spec: ConvSpec, *arrays: Any) -> tuple[Array, tuple]:
    return _convolve(name, spec, *arrays), arrays


def _backward(name: str, spec: ConvSpec, saved: tuple, d_out: Array) -> tuple:
    return (*OP.implementations[name].backward(spec, *saved, d_out), None, None)


_convolve.defvjp(_forward, _backward)

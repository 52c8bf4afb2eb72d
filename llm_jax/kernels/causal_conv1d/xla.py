"""K shifted products in one pass over the inputs, which are laid behind the state that they go on from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels.causal_conv1d.spec import ConvSpec


def supports(spec: ConvSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def forward(
    spec: ConvSpec,
    extended: Float[Array, "B K-1+T D"],
    weight: Float[Array, "K D"],
    bias: Float[Array, " D"] | None,
    held: Int[Array, "B K-1+T"] | None,
    run: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """Output in the inputs' dtype. `held` and `run` number the documents of `extended` and of the
    tokens, 0 for what is none; None: all is one."""
    z = _products(spec, extended, weight, bias, held, run)
    y = jax.nn.silu(z) if spec.silu else z
    if run is not None:
        y = jnp.where((run > 0)[..., None], y, 0.0)
    return y.astype(extended.dtype)


def backward(
    spec: ConvSpec,
    extended: Float[Array, "B K-1+T D"],
    weight: Float[Array, "K D"],
    bias: Float[Array, " D"] | None,
    held: Int[Array, "B K-1+T"] | None,
    run: Int[Array, "B T"] | None,
    d_out: Float[Array, "B T D"],
) -> tuple[Array, Array, Array | None]:
    """Gradients of the inputs, the weight and the bias. What the activation was given is made again."""
    dz = d_out.astype(jnp.float32)
    if run is not None:
        dz = jnp.where((run > 0)[..., None], dz, 0.0)
    if spec.silu:
        z = _products(spec, extended, weight, bias, held, run)
        sigmoid = jax.nn.sigmoid(z)
        dz = dz * sigmoid * (1.0 + z * (1.0 - sigmoid))
        # Used K times by either gradient: an array of its own, or each use makes it again.
        dz = jax.lax.optimization_barrier(dz)
    taps = (_tap(spec, extended, held, run, i) for i in range(spec.width))
    d_weight = jnp.stack([jnp.sum(dz * tap, axis=(0, 1)) for tap in taps]).astype(weight.dtype)
    d_extended = jnp.zeros((spec.batch, spec.length + spec.width - 1, spec.channels), jnp.float32)
    for i in range(spec.width):
        part = dz * weight[i].astype(jnp.float32)
        if held is not None and run is not None:
            part = jnp.where(_seen(held, run, i), part, 0.0)
        d_extended += jnp.pad(part, ((0, 0), (i, spec.width - 1 - i), (0, 0)))
    d_bias = None if bias is None else jnp.sum(dz, axis=(0, 1)).astype(bias.dtype)
    return d_extended.astype(extended.dtype), d_weight, d_bias


def _products(
    spec: ConvSpec, extended: Array, weight: Array, bias: Array | None, held: Array | None, run: Array | None
) -> Float[Array, "B T D"]:
    z = jnp.float32(0.0) if bias is None else bias.astype(jnp.float32)
    for i in range(spec.width):
        z += _tap(spec, extended, held, run, i) * weight[i].astype(jnp.float32)
    return z


def _tap(spec: ConvSpec, extended: Array, held: Array | None, run: Array | None, i: int) -> Float[Array, "B T D"]:
    """What weight[i] meets: the input K - 1 - i tokens back, 0 where that is of another document."""
    x = extended[:, i : i + spec.length].astype(jnp.float32)
    return x if held is None or run is None else jnp.where(_seen(held, run, i), x, 0.0)


def _seen(held: Array, run: Array, i: int) -> Bool[Array, "B T 1"]:
    return (held[:, i : i + run.shape[1]] == run)[..., None]

"""GPU kernels (Mosaic GPU, sm_90a): tiles of logits reduced in registers, and gradients of a chunk's logits in 16 bits.

Tokens outside the mask are sorted behind the others and the work ends before them.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.linear_cross_entropy.order import token_order
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.platform import hopper_refusal
from llm_jax.kernels.tiles import tiles


@dataclass(frozen=True)
class Tiles:
    """Tiles are 128 tokens high."""

    width: int = 256
    """Columns of the vocabulary."""
    stages: int = 4
    """Steps of 64 that are on their way from memory."""
    band: int = 16
    """Tiles of tokens that are made before the next columns, for the L2 cache."""
    chunk: int = 2048
    """Tokens whose gradients of logits exist at a time, in the backward pass."""


HEIGHT = 128


def supports(spec: LossSpec, platform: str) -> str | None:
    """bfloat16 and float16, with all options."""
    if refusal := hopper_refusal(platform):
        return refusal
    if spec.dtype == "float32":
        return "tensor cores multiply bfloat16 and float16, not float32"
    if spec.vocab > 2**24:
        return f"{spec.vocab} columns are more than the 2^24 that float32 counts"
    if 0 in (spec.tokens, spec.width, spec.vocab):
        return "there is nothing to multiply"
    return None


def held_bytes(spec: LossSpec, platform: str) -> int:
    """Gradients of the logits of one chunk, in 16 bits."""
    return 2 * _chunks(spec, _tiles(spec, "backward"))[1] * spec.vocab


def forward(
    spec: LossSpec,
    hidden: Float[Array, "M D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " M"],
    mask: Bool[Array, " M"] | None,
) -> dict[str, Array]:
    """The statistics that `spec` names, 0 where masked."""
    from llm_jax.kernels.linear_cross_entropy import gpu_forward

    order = token_order(mask, -spec.tokens % HEIGHT)
    blocks = (spec.tokens if order.active is None else order.active) + HEIGHT - 1
    hidden, targets = order.gather((hidden, targets))
    made = gpu_forward.statistics(
        spec,
        hidden,
        head.astype(hidden.dtype),
        targets,
        jnp.asarray(blocks // HEIGHT, jnp.int32),
        _tiles(spec, "forward"),
    )
    made = order.scatter(made)
    return made if mask is None else {name: jnp.where(mask, x, jnp.zeros_like(x)) for name, x in made.items()}


def backward(
    spec: LossSpec,
    hidden: Float[Array, "M D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " M"],
    mask: Bool[Array, " M"] | None,
    made: dict[str, Float[Array, " M"]],
    cotangents: dict[str, Float[Array, " M"]],
) -> tuple[Float[Array, "M D"], Float[Array, "D V"]]:
    """Gradients of hidden and head from the statistics (at least "lse") and their cotangents. A kernel makes the
    gradients of the logits of a chunk of tokens, in hidden's dtype; their products with head and hidden are XLA's."""
    from llm_jax.kernels.linear_cross_entropy import gpu_backward

    sizes = _tiles(spec, "backward")
    chunks, size = _chunks(spec, sizes)
    order = token_order(mask, chunks * size - spec.tokens)
    if mask is not None:
        cotangents = {name: jnp.where(mask, g, 0.0) for name, g in cotangents.items()}
    hidden, rows = order.gather((hidden, gpu_backward.rows_of(targets, made, cotangents)))
    cast_head = head.astype(hidden.dtype)

    def chunk(c: Array, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_head = grads
        own_hidden = lax.dynamic_slice_in_dim(hidden, c * size, size)
        own_rows = {name: lax.dynamic_slice_in_dim(x, c * size, size) for name, x in rows.items()}
        d_logits = gpu_backward.logit_gradient(spec, own_hidden, cast_head, own_rows, sizes)
        made = _dot(d_logits, cast_head, 1, 1).astype(hidden.dtype)
        d_hidden = lax.dynamic_update_slice_in_dim(d_hidden, made, c * size, 0)
        return d_hidden, d_head + _dot(own_hidden, d_logits, 0, 0)

    start = (
        manual_axes.full(hidden.shape, 0.0, (hidden, head), hidden.dtype),
        manual_axes.full(head.shape, 0.0, (hidden, head)),
    )
    stop = chunks if order.active is None else (order.active + size - 1) // size
    d_hidden, d_head = lax.fori_loop(0, stop, chunk, start)
    return order.scatter(d_hidden), d_head.astype(head.dtype)


def _chunks(spec: LossSpec, sizes: Tiles) -> tuple[int, int]:
    """Number of chunks, and tokens of each, in whole tiles."""
    chunks = -(-spec.tokens // sizes.chunk)
    return chunks, -(-spec.tokens // (chunks * HEIGHT)) * HEIGHT


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Float[Array, "m n"]:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _tiles(spec: LossSpec, kernel: str) -> Tiles:
    shape = f"{kernel} D{spec.width}"
    return tiles("linear_cross_entropy", "gpu", dtype=spec.dtype, shape=shape, default=Tiles())

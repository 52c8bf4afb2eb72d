"""TPU kernels (Mosaic) over tiles of tokens and of the vocabulary: a tile of logits exists at a time, in VMEM.

Tokens outside the mask are sorted behind the others and the grid ends before them.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels.linear_cross_entropy.order import TokenOrder, token_order
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.platform import tpu_refusal
from llm_jax.kernels.tiles import tiles


@dataclass(frozen=True)
class Tiles:
    """Tokens and columns of the head; all of the width is in VMEM at a time."""

    tokens: int
    vocab: int


WIDEST = {"bfloat16": 16384, "float32": 8192}
"""What VMEM takes of the narrowest tiles, on every generation."""
LARGEST_VOCAB = 2**24


def supports(spec: LossSpec, platform: str) -> str | None:
    """bfloat16 and float32, with all options."""
    if refusal := tpu_refusal(platform):
        return refusal
    if spec.dtype == "float16":
        return "TPUs multiply bfloat16 and float32, not float16"
    if spec.width > WIDEST[spec.dtype]:
        return f"a width of {spec.width} is more than the {WIDEST[spec.dtype]} of {spec.dtype} that VMEM takes"
    if spec.vocab > LARGEST_VOCAB:
        return f"{spec.vocab} columns are more than the 2^24 that float32 counts"
    if 0 in (spec.tokens, spec.width, spec.vocab):
        return "there is nothing to multiply"
    return None


def held_bytes(spec: LossSpec, platform: str) -> int:
    """Logits do not leave the chip."""
    return 0


def forward(
    spec: LossSpec,
    hidden: Float[Array, "M D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " M"],
    mask: Bool[Array, " M"] | None,
) -> dict[str, Array]:
    """The statistics that `spec` names, 0 where masked."""
    from llm_jax.kernels.linear_cross_entropy import tpu_forward

    sizes = _tiles(spec, "forward", hidden_bytes=8 * 2**20, head_bytes=4 * 2**20)
    order, blocks = _order(spec, mask, sizes.tokens)
    hidden, targets = order.gather((hidden, targets))
    made = tpu_forward.statistics(spec, hidden, head.astype(hidden.dtype), targets, blocks, sizes)
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
    """Gradients of hidden and head from the statistics (at least "lse") and their cotangents, each in a kernel of its
    own that makes the logits again."""
    from llm_jax.kernels.linear_cross_entropy import tpu_backward

    rows = _tiles(spec, "hidden gradient", hidden_bytes=4 * 2**20, head_bytes=4 * 2**20)
    columns = _tiles(spec, "head gradient", hidden_bytes=4 * 2**20, head_bytes=2 * 2**20)
    if mask is not None:
        cotangents = {name: jnp.where(mask, g, 0.0) for name, g in cotangents.items()}
    saved = {name: made[name] for name in ("lse", "expected_logit", "lse2") if name in made}
    inputs = hidden, targets, saved, cotangents
    cast_head = head.astype(hidden.dtype)

    order, blocks = _order(spec, mask, rows.tokens)
    d_hidden = order.scatter(tpu_backward.hidden_gradient(spec, rows, blocks, cast_head, *order.gather(inputs)))
    d_hidden = d_hidden if mask is None else jnp.where(mask[:, None], d_hidden, jnp.zeros_like(d_hidden))
    order, blocks = _order(spec, mask, columns.tokens)
    d_head = tpu_backward.head_gradient(spec, columns, blocks, cast_head, *order.gather(inputs))
    return d_hidden, d_head


def _order(spec: LossSpec, mask: Array | None, tile: int) -> tuple[TokenOrder, Int[Array, "1"]]:
    """Tokens in whole tiles, and the number of tiles that hold tokens that count (at least 1)."""
    whole = -(-spec.tokens // tile)
    order = token_order(mask, whole * tile - spec.tokens)
    blocks = whole if order.active is None else jnp.maximum(1, (order.active + tile - 1) // tile)
    return order, jnp.asarray(blocks, jnp.int32).reshape(1)


def _tiles(spec: LossSpec, kernel: str, *, hidden_bytes: int, head_bytes: int) -> Tiles:
    """Tiles of hidden and head that take these bytes, in powers of two; float32 takes a quarter of the elements, as
    its products are of several passes, whose operands take VMEM too."""
    element = 2 if spec.dtype == "bfloat16" else 8
    default = Tiles(_fitting(hidden_bytes, spec.width * element), _fitting(head_bytes, spec.width * element))
    chosen = tiles("linear_cross_entropy", "tpu", dtype=spec.dtype, shape=f"{kernel} D{spec.width}", default=default)
    return Tiles(min(chosen.tokens, -(-spec.tokens // 16) * 16), chosen.vocab)


def _fitting(budget: int, row: int) -> int:
    size = 1024
    while size > 128 and size * row > budget:
        size //= 2
    return size

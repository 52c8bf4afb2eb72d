"""Statistics of logits in chunks of tokens by plain XLA: the logits of one chunk exist at a time, forward and backward.

Tokens outside the mask are sorted behind the others and the loop ends before them, so they cost nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.linear_cross_entropy.order import TokenOrder, token_order
from llm_jax.kernels.linear_cross_entropy.spec import LossSpec
from llm_jax.kernels.platform import target_platform
from llm_jax.kernels.tiles import tiles

CHUNK_BYTES = {"cpu": 4 * 2**20, "gpu": 256 * 2**20, "tpu": 256 * 2**20}
"""What the float32 logits of a chunk may take."""
CHUNK_TOKENS = {"cpu": 128, "gpu": 1024, "tpu": 1024}
"""The least tokens of a chunk: each chunk reads the whole head."""


@dataclass(frozen=True)
class Tiles:
    """The size of a chunk: what its logits may take, and the least tokens."""

    logits_mib: int
    tokens: int


def supports(spec: LossSpec, platform: str) -> str | None:
    """Runs everything, everywhere."""
    return None


def held_bytes(spec: LossSpec, platform: str) -> int:
    """Logits, their softmax and their gradient, float32, of one chunk."""
    chunk = min(spec.tokens, max(CHUNK_BYTES[platform] // (4 * spec.vocab), CHUNK_TOKENS[platform]))
    return 3 * 4 * chunk * spec.vocab


def forward(
    spec: LossSpec,
    hidden: Float[Array, "M D"],
    head: Float[Array, "D V"],
    targets: Int[Array, " M"],
    mask: Bool[Array, " M"] | None,
) -> dict[str, Array]:
    """The statistics that `spec` names, 0 where masked."""
    size, count = _chunks(spec)
    order = token_order(mask, size * count - spec.tokens)
    head = head.astype(hidden.dtype)
    inputs = order.gather((hidden, targets))

    def chunk(c: Array, made: dict[str, Array]) -> dict[str, Array]:
        hidden, targets = _cut(inputs, c, size)
        logits = _logits(spec, hidden, head)
        values = _statistics(spec, logits, targets)
        return {name: lax.dynamic_update_slice_in_dim(made[name], values[name], c * size, 0) for name in made}

    empty = {
        name: manual_axes.full((size * count,), 0, (hidden, head), jnp.int32 if name == "argmax" else jnp.float32)
        for name in spec.statistics
    }
    made = order.scatter(_loop(order, size, count, chunk, empty))
    # The last chunk that ran may hold masked tokens.
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
    """Gradients of hidden and head from the statistics (at least "lse") and their cotangents; logits made again."""
    size, count = _chunks(spec)
    order = token_order(mask, size * count - spec.tokens)
    cast_head = head.astype(hidden.dtype)
    if mask is not None:
        cotangents = {name: jnp.where(mask, g, 0.0) for name, g in cotangents.items()}
    saved = {name: made[name] for name in ("lse", "expected_logit", "lse2") if name in made}
    inputs = order.gather((hidden, targets, saved, cotangents))

    def chunk(c: Array, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden, d_head = grads
        hidden, targets, saved, d = _cut(inputs, c, size)
        logits = _logits(spec, hidden, cast_head)
        d_logits = _logit_gradient(spec, logits, targets, saved, d)
        if spec.softcap is not None:
            d_logits *= 1.0 - (logits / spec.softcap) ** 2
        d_logits = (spec.scale * d_logits).astype(hidden.dtype)
        dh = _dot("cv,dv->cd", d_logits, cast_head).astype(hidden.dtype)
        d_hidden = lax.dynamic_update_slice_in_dim(d_hidden, dh, c * size, 0)
        return d_hidden, d_head + _dot("cd,cv->dv", hidden, d_logits)

    start = (
        manual_axes.full((size * count, spec.width), 0.0, (hidden, head), hidden.dtype),
        manual_axes.full((spec.width, spec.vocab), 0.0, (hidden, head)),
    )
    d_hidden, d_head = _loop(order, size, count, chunk, start)
    return order.scatter(d_hidden), d_head.astype(head.dtype)


def _statistics(spec: LossSpec, logits: Float[Array, "c V"], targets: Int[Array, " c"]) -> dict[str, Array]:
    top = logits.max(1)
    weights = jnp.exp(logits - top[:, None])
    total = weights.sum(1)
    columns = jnp.arange(spec.vocab)

    def target_logit() -> Array:
        here = (targets >= 0) & (targets < spec.vocab)
        at_target = jnp.take_along_axis(logits, jnp.where(here, targets, 0)[:, None], axis=1)[:, 0]
        return jnp.where(here, at_target, 0.0)

    every: dict[str, Callable[[], Array]] = {
        "target_logit": target_logit,
        "lse": lambda: top + jnp.log(total),
        "expected_logit": lambda: jnp.sum(weights * logits, 1) / total,
        "sum_logit": lambda: logits.sum(1),
        "lse2": lambda: 2.0 * top + jnp.log(jnp.sum(weights**2, 1)),
        # The first of the largest, as a reduction that vectorises.
        "argmax": lambda: jnp.where(logits == top[:, None], columns, spec.vocab - 1).min(1).astype(jnp.int32),
        "max": lambda: top,
    }
    return {name: every[name]() for name in spec.statistics}


def _logit_gradient(
    spec: LossSpec, logits: Float[Array, "c V"], targets: Array, saved: dict[str, Array], d: dict[str, Array]
) -> Float[Array, "c V"]:
    """With p the softmax: d lse = p, d expected = p (1 + z - expected), d lse2 = 2 softmax(2z), d sum = 1."""
    probs = jnp.exp(logits - saved["lse"][:, None])
    per_prob = d["lse"][:, None]
    if "expected_logit" in d:
        per_prob = per_prob + d["expected_logit"][:, None] * (1.0 + logits - saved["expected_logit"][:, None])
    gradient = probs * per_prob
    if "lse2" in d:
        gradient += d["lse2"][:, None] * 2.0 * jnp.exp(2.0 * logits - saved["lse2"][:, None])
    if "sum_logit" in d:
        gradient += d["sum_logit"][:, None]
    if "target_logit" in d:
        at_target = jnp.arange(spec.vocab) == targets[:, None]
        gradient += jnp.where(at_target, d["target_logit"][:, None], 0.0)
    return gradient


def _logits(spec: LossSpec, hidden: Array, head: Array) -> Float[Array, "c V"]:
    logits = spec.scale * _dot("cd,dv->cv", hidden, head)
    return logits if spec.softcap is None else spec.softcap * jnp.tanh(logits / spec.softcap)


def _dot(equation: str, a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _chunks(spec: LossSpec) -> tuple[int, int]:
    """Tokens of a chunk and number of chunks; of equal size, so that little is padding."""
    platform = target_platform()
    default = Tiles(CHUNK_BYTES.get(platform, 256 * 2**20) // 2**20, CHUNK_TOKENS.get(platform, 1024))
    shape = f"D{spec.width} V{spec.vocab}"
    chosen = tiles("linear_cross_entropy", "xla", dtype=spec.dtype, shape=shape, default=default)
    fitting = chosen.logits_mib * 2**20 // (4 * spec.vocab)
    count = max(1, math.ceil(spec.tokens / max(fitting, chosen.tokens)))
    size = math.ceil(spec.tokens / count)
    return (size if count == 1 else math.ceil(size / 8) * 8), count


def _loop(order: TokenOrder, size: int, count: int, chunk: Callable[[Array, Any], Any], state: Any) -> Any:
    stop = count if order.active is None else (order.active + size - 1) // size
    return lax.fori_loop(0, stop, chunk, state)


def _cut(tree: Any, c: Array, size: int) -> Any:
    # The barrier keeps slices with a run-time start out of the passes over the logits, where they cost vectorisation.
    return lax.optimization_barrier(jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, c * size, size, 0), tree))

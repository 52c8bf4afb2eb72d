"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, eq. 34) and their published scalings beyond the trained
length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.models.config import ModelConfig
from llm_jax.models.rope_config import RopeScaling


class Rotation(NamedTuple):
    """float32 cosines and sines, a pair of numbers for each pair of turned coordinates."""

    cos: Float[Array, "B T 1 R2"]
    sin: Float[Array, "B T 1 R2"]


@dataclass(frozen=True)
class Rope:
    """How positions become angles."""

    dim: int
    """Coordinates of a head that turn, R; the first ones."""
    theta: float
    scaling: RopeScaling | None
    trained: int
    """`max_position_embeddings`, where the dynamic kind begins to scale."""

    @classmethod
    def of(cls, config: ModelConfig, *, local: bool = False) -> Rope:
        """Of a model's layers; `local`: of those with a base of their own, which are not scaled (Gemma 3)."""
        config = config.resolved()
        assert config.rope_dim is not None
        if local and config.local_rope_theta is not None:
            return cls(config.rope_dim, config.local_rope_theta, None, config.max_position_embeddings)
        return cls(config.rope_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)

    @property
    def by_length(self) -> bool:
        """Whether the angles depend on how long the document is."""
        return self.scaling is not None and self.scaling.by_length


def turning_length(config: ModelConfig) -> int | None:
    """Tokens after which all of a text's queries and keys turn otherwise (LongRoPE); None where they never do."""
    scaling = config.rope_scaling
    return scaling.original_length if scaling is not None and scaling.kind == "longrope" else None


def rotation(
    rope: Rope,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> Rotation:
    """Of tokens at these positions, shared by layers and heads.

    `lengths` of each row's document count in some scalings. Where they are not given, a document's is one more than
    the largest position that the call holds of it: in training each packed document has its own, in decoding it is
    what the row has reached (transformers takes the largest of the whole batch).
    """
    if not rope.by_length:
        lengths = None
    elif lengths is None:
        lengths = _lengths(positions, segment_ids)[..., None]
    else:
        lengths = lengths[:, None, None]
    frequencies, scale = _frequencies(rope, lengths)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    return Rotation(cos, sin) if scale == 1.0 else Rotation(cos * scale, sin * scale)


def _lengths(positions: Array, segment_ids: Array | None) -> Int[Array, "B T"]:
    """Length of each token's document."""
    if segment_ids is None:
        return jnp.broadcast_to(positions.max(-1, keepdims=True) + 1, positions.shape)
    rows, size = jnp.arange(len(positions))[:, None], positions.shape[1] + 1
    longest = jnp.zeros((len(positions), size), jnp.int32).at[rows, segment_ids].max(positions + 1)
    return longest[rows, segment_ids]


def _frequencies(
    rope: Rope,
    lengths: Array | None,
) -> tuple[Float[Array, "*BT R2"], float]:
    """Radians per position of each pair, and what cosines and sines are multiplied by."""
    dim, theta, scaling = rope.dim, rope.theta, rope.scaling
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(plain, dim, theta, scaling), attention_factor(scaling)
    assert lengths is not None
    if scaling.kind == "dynamic":
        # "NTK-aware" with the base of the length at hand (reddit.com/r/LocalLLaMA, u/bloc97 and u/emozilla, 2023).
        beyond = jnp.maximum(lengths, rope.trained).astype(jnp.float32) / rope.trained
        base = theta * (scaling.factor * beyond - (scaling.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / base**exponents, 1.0
    # LongRoPE (Ding et al. 2024, arXiv:2402.13753, eq. 3).
    short, long = (jnp.array(factors, jnp.float32) for factors in (scaling.short_factor, scaling.long_factor))
    assert scaling.original_length is not None
    return plain / jnp.where(lengths > scaling.original_length, long, short), attention_factor(scaling)


def attention_factor(scaling: RopeScaling) -> float:
    """What YaRN and LongRoPE multiply queries and keys by, so that the logits of longer texts stay sharp."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    assert scaling.original_length is not None
    if scaling.kind == "longrope":
        longer = scaling.factor > 1
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_length)) if longer else 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), eq. 22, with DeepSeek's weight of the logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(plain: Array, dim: int, theta: float, scaling: RopeScaling) -> Array:
    """Eqs. 17 to 19: pairs that turn often keep their frequency, those that turn seldom are interpolated."""
    assert scaling.original_length is not None

    def pair_turning(times: float) -> float:
        return dim * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))  # type: ignore[operator]

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / (high - low or 0.001), 0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _llama3(plain: Array, scaling: RopeScaling) -> Array:
    """Llama 3.1: long waves are stretched, short ones kept, and between them the two are mixed (Llama 4: none are)."""
    assert scaling.original_length is not None
    turns = scaling.original_length * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1) if low < high else turns > low
    return (1 - kept) * plain / scaling.factor + kept * plain


def rotate(x: Float[Array, "B T N H"], by: Rotation, interleaved: bool = False) -> Float[Array, "B T N H"]:
    """Turns the first R coordinates of each head, in float32; the result has the dtype of `x`.

    The pairs are (i, i + R/2), or (2i, 2i + 1) where `interleaved`. The angles take no gradient.
    """
    size = 2 * by.cos.shape[-1]
    if size == x.shape[-1]:
        return _rotate(x, by, interleaved)
    return jnp.concatenate([_rotate(x[..., :size], by, interleaved), x[..., size:]], axis=-1)


@jax.custom_vjp
def _turn(x: Array, by: Rotation) -> Array:
    cos, sin = by
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    # Stacked before the last axis, not concatenated along it: on a CPU one pass over memory instead of two.
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)


def _turn_forward(x: Array, by: Rotation) -> tuple[Array, Rotation]:
    return _turn(x, by), by


def _turn_backward(by: Rotation, g: Array) -> tuple[Array, None]:
    """Turned back."""
    return _turn(g, Rotation(by.cos, -by.sin)), None


_turn.defvjp(_turn_forward, _turn_backward)


def _rotate(x: Array, by: Rotation, interleaved: bool) -> Array:
    if not interleaved:
        return _turn(x, by)
    pairs = jnp.swapaxes(x.reshape(*x.shape[:-1], -1, 2), -1, -2)
    turned = _turn(pairs.reshape(x.shape), by).reshape(pairs.shape)
    return jnp.swapaxes(turned, -1, -2).reshape(x.shape)

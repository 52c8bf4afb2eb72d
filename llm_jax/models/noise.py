"""Noise of training: dropout and noisy embeddings, drawn per example so that no mesh and no microbatch changes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from llm_jax.sharding import constrain


@partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=["rate"])
@dataclass(frozen=True)
class Dropout:
    """Inverted dropout (Srivastava et al. 2014): of each number with probability `rate` 0, else it over 1 - rate."""

    keys: Key[Array, "*L B"]
    """A key per example; as an input of layers one per layer and example."""
    rate: float

    def __call__(self, x: Float[Array, "B T D"], site: int) -> Float[Array, "B T D"]:
        """`x` with a part dropped; `site` tells the places apart that one layer drops at."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, site)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        kept = constrain(kept, ("batch", "length", "embed"))
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)

    def of_heads(self, heads: int) -> UInt32[Array, "B N 2"]:
        """Key data per example and head, for `kernels.flash_attention`."""
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        return jax.random.key_data(fold(self.keys, jnp.arange(heads, dtype=jnp.uint32)))


def example_keys(key: Key[Array, ""], purpose: int, examples: Int[Array, " B"]) -> Key[Array, " B"]:
    """`fold_in(fold_in(key, purpose), example)`: `key` is the step's, `examples` are places in the global batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, purpose), examples)


def layer_keys(keys: Key[Array, " B"], layers: int) -> Key[Array, "L B"]:
    """The layer's number folded in last."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    return fold(keys, jnp.arange(layers, dtype=jnp.uint32))


def neftune_noise(
    keys: Key[Array, " B"], segment_ids: Int[Array, "B T"], width: int, alpha: float
) -> Float[Array, "B T D"]:
    """float32, uniform in +- alpha / sqrt(L D) (Jain et al. 2024, arXiv:2310.05914, algorithm 1), 0 on padding.

    L is the length of the token's own document, as the authors count it (tokens without padding), so that packing
    changes no scale; transformers takes the length of the padded batch.
    """
    B, T = segment_ids.shape
    counts = jnp.zeros((B, T + 1), jnp.float32).at[jnp.arange(B)[:, None], segment_ids].add(1.0)
    lengths = jnp.take_along_axis(counts, segment_ids, axis=1)
    bound = jnp.where(segment_ids > 0, alpha / jnp.sqrt(lengths * width), 0.0)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (T, width), jnp.float32, -1.0, 1.0))(keys)
    return constrain(bound[..., None] * uniform, ("batch", "length", "embed"))


def router_noise(keys: Key[Array, " B"], length: int, experts: int) -> Float[Array, "B T E"]:
    """float32 standard normal numbers for the logits of one layer's router."""
    normal = jax.vmap(lambda key: jax.random.normal(key, (length, experts), jnp.float32))(keys)
    return constrain(normal, ("batch", "length", None))

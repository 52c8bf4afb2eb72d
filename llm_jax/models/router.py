"""Which experts a token goes to, with which weights, and the sums that balancing losses are made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llm_jax.models.config import ModelConfig
from llm_jax.models.experts_config import ExpertsConfig
from llm_jax.models.parameter import Declaration, Init, matrix, parameter, vector
from llm_jax.models.weights import gathered
from llm_jax.sharding import axis_sum, on_shards

CHOSEN = ("batch", "length", None)
STATISTICS = (
    "tokens",
    "assigned",
    "probability",
    "importance",
    "load",
    "z",
    "entropy",
    "dropped",
    "sequences",
    "sequence_product",
)


class Routes(NamedTuple):
    """Where tokens go."""

    experts: Int[Array, "B T k"]
    """Numbers of experts, the best first; E where a token goes nowhere, being padding or dropped."""
    weights: Float[Array, "B T k"]
    """float32; 0 where a token goes nowhere."""


class Router(nnx.Module):
    """Top-k of scores of a linear layer, in float32 whatever the dtype of tokens and compute.

    One rule with the options of `ExpertsConfig` covers: noisy top-k (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5),
    Switch (Fedus et al. 2021, arXiv:2101.03961: top_k=1, normalize=False), Mixtral, gpt-oss and Granite (softmax over
    the chosen), OLMoE and Qwen-MoE (normalize or not), DeepSeek-V2 (arXiv:2405.04434; groups by their best score) and
    -V3 (arXiv:2412.19437, eq. 12-16; sigmoid scores, correction bias, groups by their two best), Llama 4 (sigmoid).
    """

    def __init__(self, config: ModelConfig):
        experts, D = config.experts, config.hidden_size
        self.config = experts
        self.weight = matrix(D, experts.num, ("embed", "router"), config.init_std)
        self.bias = vector(experts.num, "router", "zeros") if experts.router_bias else None
        moved = Declaration(("router",), None, False, Init("zeros"), learned=False)
        self.correction = parameter((experts.num,), moved) if experts.correction_bias else None
        if experts.noisy:
            declared = Declaration(("embed", "router"), ((0,), (1,)), True, Init("zeros"))
            self.noise = parameter((D, experts.num), declared)

    @gathered
    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, noise: Float[Array, "B T E"] | None
    ) -> tuple[Routes, dict[str, Array]]:
        """Routes of the tokens, and the layer's statistics: float32 sums over all real tokens of all shards.

        `noise`: standard normal numbers (`noise.router_noise`) for a noisy router in training; None outside of it.
        Padding (segment 0) goes nowhere and counts in no statistic. With C the assignments of tokens to experts before
        any are dropped, and p the softmax of the logits or sigmoid scores over their sum:

            tokens []               assigned [E]: Σ C               probability [E]: Σ p
            importance [E]: Σ of the weights given                  z []: Σ logsumexp(logits)²
            load [E]: Σ of the probability that an expert is chosen under new noise (Shazeer, eq. 8-9); C without noise
            entropy []: Σ of p's, in nats                           dropped []: assignments over capacity
            sequences []: documents                                 sequence_product []: Σ over documents of T tokens
                                                                                         of Σ_e (Σ C / T) (Σ p / T)
        """
        config = self.config
        values = {name: getattr(self, name).get_value() for name in _names(config)} | {"weight": self.whole()}

        def route(x: Array, segment_ids: Array | None, noise: Array | None, values: dict[str, Array]):
            real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
            logits, clean, spread = _logits(x, noise, values)
            scores = jax.nn.softmax(logits) if config.scores == "softmax" else jax.nn.sigmoid(logits)
            experts = _choose(config, logits, scores, values.get("correction"))
            chosen = jax.nn.one_hot(experts, config.num, dtype=jnp.float32)
            weights = _weights(config, logits, scores, chosen)
            chosen = chosen * real[..., None, None]
            kept = jnp.broadcast_to(real[..., None], experts.shape)
            if config.capacity_factor is not None:
                kept &= _within_capacity(config, chosen)
            routes = jnp.where(kept, experts, config.num), jnp.where(kept, weights, 0.0)
            seen = _statistics(config, logits, scores, chosen, weights, real, segment_ids)
            seen["dropped"] = jnp.sum(real[..., None] & ~kept, dtype=jnp.float32)
            if spread is not None:
                seen["load"] = jnp.sum(_chosen_again(config, clean, logits, spread) * real[..., None], (0, 1))
            return routes, {name: axis_sum(seen[name], "batch") for name in STATISTICS}

        per_token = (("batch", "length", "embed"), ("batch", "length"), CHOSEN)
        in_axes = [None if argument is None else axes for argument, axes in zip((x, segment_ids, noise), per_token)]
        routes, statistics = on_shards(route, (*in_axes, None), ((CHOSEN, CHOSEN), None))(x, segment_ids, noise, values)
        return Routes(*routes), statistics

    def whole(self) -> Float[Array, "D E"]:
        """The matrix that gives the logits; of weights that are in use."""
        return self.weight.get_value()


def _names(config: ExpertsConfig) -> list[str]:
    present = {"weight": True, "bias": config.router_bias, "correction": config.correction_bias, "noise": config.noisy}
    return [name for name, there in present.items() if there]


def _logits(
    x: Array, noise: Array | None, values: dict[str, Array]
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"], Float[Array, "B T E"] | None]:
    """Logits as they are used, before noise, and the standard deviation of the noise (None without)."""

    def project(name: str) -> Array:
        return jnp.einsum("btd,de->bte", x.astype(jnp.float32), values[name], precision=jax.lax.Precision.HIGHEST)

    clean = project("weight")
    if "bias" in values:
        clean = clean + values["bias"]
    if noise is None:
        return clean, clean, None
    spread = jax.nn.softplus(project("noise"))
    return clean + noise * spread, clean, spread


def _choose(config: ExpertsConfig, logits: Array, scores: Array, correction: Array | None) -> Int[Array, "B T k"]:
    """The top k, within the best groups where there are groups."""
    # Logits order like scores, but two large ones do not round to the same score.
    choice = logits if config.group_score == "max" else scores
    if correction is not None:
        choice = scores + jax.lax.stop_gradient(correction)
    choice = jax.lax.stop_gradient(choice)
    if config.groups > 1:
        of_group = choice.reshape(*choice.shape[:2], config.groups, -1)
        best = 1 if config.group_score == "max" else 2
        groups = jax.lax.top_k(jax.lax.top_k(of_group, best)[0].sum(-1), config.top_groups)[1]
        among = jax.nn.one_hot(groups, config.groups, dtype=bool).any(-2)
        choice = jnp.where(among[..., None], of_group, -jnp.inf).reshape(choice.shape)
    return jax.lax.top_k(choice, config.top_k)[1]


def _weights(config: ExpertsConfig, logits: Array, scores: Array, chosen: Array) -> Float[Array, "B T k"]:
    """Of the chosen experts. Picked by products with `chosen`, whose gradient is a product too and no scatter."""
    if config.scores == "softmax" and config.normalize:
        return config.scale * jax.nn.softmax(jnp.sum(logits[:, :, None] * chosen, -1))
    weights = jnp.sum(scores[:, :, None] * chosen, -1)
    if config.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return config.scale * weights


def _within_capacity(config: ExpertsConfig, chosen: Float[Array, "B T k E"]) -> Bool[Array, "B T k"]:
    """Each expert takes a row's first choices in the order of tokens, then its second choices, while there is room.

    Rows are apart (as in transformers' Switch), so that neither mesh nor microbatches change what is dropped.
    """
    B, T, k, E = chosen.shape
    capacity = math.ceil(config.capacity_factor * T * k / E)  # type: ignore[operator]
    in_order = jnp.swapaxes(chosen, 1, 2).reshape(B, k * T, E)
    before = jnp.cumsum(in_order, axis=1) - in_order
    place = jnp.swapaxes(jnp.sum(before * in_order, -1).reshape(B, k, T), 1, 2)
    return place < capacity


def _chosen_again(config: ExpertsConfig, clean: Array, noisy: Array, spread: Array) -> Float[Array, "B T E"]:
    """Shazeer et al. 2017, eq. 9: the probability of being in the top k when an expert's own noise is drawn anew."""
    best = jax.lax.top_k(noisy, config.top_k + 1)[0]
    inside, outside = best[..., -2:-1], best[..., -1:]
    rival = jnp.where(noisy >= inside, outside, inside)
    return jax.scipy.stats.norm.cdf((clean - rival) / spread)


def _statistics(
    config: ExpertsConfig,
    logits: Array,
    scores: Array,
    chosen: Array,
    weights: Array,
    real: Bool[Array, "B T"],
    segment_ids: Array | None,
) -> dict[str, Array]:
    """This shard's sums, all but `dropped`."""
    among = chosen.sum(2)
    probs = scores if config.scores == "softmax" else scores / (scores.sum(-1, keepdims=True) + 1e-20)
    probs = probs * real[..., None]
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    entropy = -jnp.sum(probs * jnp.log(jnp.maximum(probs, jnp.finfo(jnp.float32).tiny)), -1)
    assigned = among.sum((0, 1))
    sequences, product = _by_sequence(among, probs, real, segment_ids)
    return {
        "tokens": jnp.sum(real, dtype=jnp.float32),
        "assigned": assigned,
        "probability": probs.sum((0, 1)),
        "importance": jnp.sum(weights[..., None] * chosen, (0, 1, 2)),
        "load": assigned,
        "z": jnp.sum(z * real),
        "entropy": entropy.sum(),
        "sequences": sequences,
        "sequence_product": product,
    }


def _by_sequence(
    among: Array, probs: Array, real: Array, segment_ids: Array | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Number of documents, and the sum over them of the products of their experts' shares."""
    each = jnp.concatenate([among, probs, real[..., None].astype(jnp.float32)], -1)
    if segment_ids is None:
        sums = each.sum(1, keepdims=True)
    else:
        T = segment_ids.shape[1]
        sums = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, T + 1))(each, segment_ids)[:, 1:]
    E = among.shape[-1]
    length = sums[..., -1]
    product = jnp.sum(sums[..., :E] * sums[..., E:-1], -1) / jnp.square(jnp.maximum(length, 1.0))
    return jnp.sum(length > 0, dtype=jnp.float32), product.sum()

"""What keeps the experts of a mixture equally busy: losses on the router, biases moved by load, and their metrics.

Statistics of the router are sums over tokens (`models.router.Router`). They are those of the whole batch, whatever the
number of microbatches and devices: losses that are not linear in a microbatch's own sums get the others' from a first
pass, which a batch of one microbatch does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.objectives import experts
from llm_jax.training.config import BalancingConfig
from llm_jax.training.terms import Pairs, Params, Rows, Statistics

Router = Mapping[str, Array]
"""A router's statistics, `[layers with experts, ...]`."""

PREFIX = "experts/"
"""Of metrics, and of the sums that they are made of."""
LINEAR = ("sequence_balance", "router_z")
"""Losses that are means over tokens or documents, so that microbatches add up."""


@dataclass(frozen=True)
class Balancing:
    """Of a model with experts. Each loss is the mean over layers of what `objectives.experts` says."""

    config: BalancingConfig
    num: int
    top_k: int
    further: bool = False
    """Whether layers for further tokens are trained too."""

    @property
    def coefficients(self) -> dict[str, float]:
        """Of the losses asked for."""
        return {name: value for name, value in asdict(self.config).items() if name != "bias_rate" and value}

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a microbatch's losses need the others' statistics."""
        return bool(self.coefficients.keys() - set(self.linear))

    @property
    def linear(self) -> tuple[str, ...]:
        """Losses whose microbatches add up. Layers for further tokens see fewer tokens than the others: with these,
        the mean over layers is no sum over tokens by one number."""
        return () if self.further else LINEAR

    def terms(self, own: Router, statistics: Statistics | None) -> dict[str, Float[Array, ""]]:
        """Sums of a microbatch whose router says `own`; `statistics` has those of all, None where this is all."""
        count, whole = 1, own
        if statistics is not None:
            everything = jax.tree.map(lambda x: x.sum(0), statistics.values)
            count = jax.tree.leaves(statistics.values)[0].shape[0]
            # The whole batch's numbers, with the gradient of this microbatch's part in them.
            whole = {name: x + jax.lax.stop_gradient(everything[name] - x) for name, x in own.items()}
        losses = {
            "load_balance": lambda: experts.load_balance(whole["assigned"], whole["probability"], whole["tokens"]),
            "importance": lambda: experts.importance(whole["importance"]),
            "load": lambda: experts.load(whole["load"]),
            "router_z": lambda: experts.router_z(*of("router_z", "z", "tokens")),
            "sequence_balance": lambda: experts.sequence_balance(
                *of("sequence_balance", "sequence_product", "sequences"), self.num, self.top_k
            ),
        }

        def of(name: str, total: str, by: str) -> tuple[Array, Array]:
            """Of a linear loss the microbatch's own sum, which is divided by `weights`."""
            linear = name in self.linear
            return (own[total], jnp.ones_like(own[by])) if linear else (whole[total], whole[by])

        sums = {name: jnp.mean(losses[name]()) for name in self.coefficients}
        # Every microbatch has the whole batch's loss: each counts a part of it.
        shared = {
            name: x - jax.lax.stop_gradient(x) * (1 - 1 / count) for name, x in sums.items() if name not in self.linear
        }
        return sums | shared

    def weights(self, batch: Rows) -> dict[str, Float[Array, ""]]:
        """What the sums of the whole batch are divided by."""
        ids = batch["segment_ids"]
        starts = jnp.concatenate([ids[..., :1], jnp.where(ids[..., 1:] != ids[..., :-1], ids[..., 1:], 0)], axis=-1)
        of = {"router_z": ids, "sequence_balance": starts}
        return {
            name: jnp.sum(of[name] > 0, dtype=jnp.float32) if name in self.linear else jnp.float32(1)
            for name in self.coefficients
        }


def metrics(own: Router) -> Pairs:
    """Sums that `summary` makes metrics of."""
    names = ("tokens", "assigned", "entropy", "dropped")
    return {f"{PREFIX}{name}": (jax.lax.stop_gradient(own[name]), jnp.float32(0)) for name in names}


def summary(pairs: Pairs) -> Pairs:
    """Means over the layers, of what is summed over the whole batch:

    experts/entropy      of the router's probabilities, nats per token
    experts/dropped      share of the assignments that were over capacity
    experts/load_max, experts/load_min    of the fullest and the emptiest expert of a layer, 1 being an equal share
    experts/load/NNN     of each expert
    """
    rest = {name: pair for name, pair in pairs.items() if not name.startswith(PREFIX)}
    sums = {name.removeprefix(PREFIX): pair[0] for name, pair in pairs.items() if name not in rest}
    assigned, one = sums["assigned"], jnp.float32(1)
    total = jnp.maximum(assigned.sum(-1, keepdims=True), 1.0)
    load = assigned / total * assigned.shape[-1]
    values = {
        "entropy": sums["entropy"] / jnp.maximum(sums["tokens"], 1.0),
        "dropped": sums["dropped"] / total[..., 0],
        "load_max": load.max(-1),
        "load_min": load.min(-1),
        **{f"load/{e:03}": load[:, e] for e in range(load.shape[-1])},
    }
    return rest | {PREFIX + name: (jnp.mean(value), one) for name, value in values.items()}


def moved_biases(decoder: Decoder, rate: float) -> Callable[[Params, Pairs], dict[str, Any]]:
    """`Objective.moved`: the correction biases of the policy's routers, by the load of the batch (`bias_update`)."""
    with_experts = [i for i, kind in enumerate(decoder.config.feed_forwards or ()) if kind == "experts"]

    def move(state: Params, pairs: Pairs) -> dict[str, Any]:
        assigned, flat = pairs[f"{PREFIX}assigned"][0], flatten(state)
        for path, bias in flat.items():
            _, part, number, position, _ = path.split("/", 4)
            if part == "segments":
                layers = decoder.groups[int(number)].layers(int(position))
                rows = jnp.array([with_experts.index(layer) for layer in layers])
                flat[path] = experts.bias_update(bias, assigned[rows], rate)
            elif len(assigned) > len(with_experts):
                # The routers of further tokens come behind the others, where they take part.
                flat[path] = experts.bias_update(bias, assigned[len(with_experts) + int(number)], rate)
        return unflatten(flat)

    return move


def check_balancing(config: BalancingConfig, model: ModelConfig) -> None:
    """Raises UserError for a number out of range, or for one that the model has no use for."""
    asked = {f"train.balancing.{name}": value for name, value in asdict(config).items() if value}
    for name, value in asked.items():
        if not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}; it must be a number of at least 0")
        if not model.experts.num:
            raise UserError(f"{name} is {value}, but the model has no experts")
    if config.load and not model.experts.noisy:
        raise UserError("train.balancing.load is for noisy routers (model.experts.noisy); load_balance is for others")
    if config.bias_rate and not model.experts.correction_bias:
        raise UserError(
            "train.balancing.bias_rate moves biases that the model does not have (model.experts.correction_bias)"
        )

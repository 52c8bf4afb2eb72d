"""Tuning of a small model, whole or by an adapter: how it is done, and the memory that it takes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import PLAN, Rows, count_parameters
from small_policies import Params, with_rate

from llm_jax.adapters import LoraConfig
from llm_jax.jobs.adapting import Adapting
from llm_jax.models import Decoder, abstract_params, declarations
from llm_jax.sharding import MeshConfig, make_plan
from llm_jax.training import (
    Objective,
    OptimizerConfig,
    abstract_state,
    init_state,
    make_optimizer,
    make_train_step,
    weights_in_use,
)


class Tuner:
    """One arm on one task, compiled once for all seeds and rates. AdamW without decay, warm-up, cosine to a tenth."""

    def __init__(
        self,
        decoder: Decoder,
        objective: Callable[[Decoder], Objective],
        adapter: LoraConfig | None,
        steps: int,
        batch: int,
    ):
        self.decoder, self.steps, self.batch = decoder, steps, batch
        self.adapting = None if adapter is None else Adapting.of(decoder, adapter)
        declared = {"policy": declarations(decoder)} if self.adapting is None else self.adapting.declarations
        if self.adapting is None:
            made = objective(decoder)
        else:
            made = self.adapting.objective(objective(self.adapting.decoder), training=True)
        self.declared = declared
        options = OptimizerConfig(
            learning_rate=1.0, warmup_steps=steps // 10, final_fraction=0.1, weight_decay=0.0, beta2=0.99
        )
        self.optimizer = with_rate(make_optimizer(options, {"policy": declared["policy"]}, steps))
        self.step = make_train_step(made, self.optimizer, PLAN(), declared)

    def state(self, params: Params, rate: float, seed: int) -> dict[str, Any]:
        given = jax.tree.map(np.array, params)
        if self.adapting is None:
            trained, frozen = given, {}
        else:
            trained, frozen = self.adapting.init(given, seed), self.adapting.frozen(given, PLAN())
        state = init_state({"policy": trained}, self.optimizer, self.declared, PLAN(), frozen=frozen)
        state["opt_state"]["rate"] = jax.numpy.float32(rate)
        return state

    def __call__(self, params: Params, rows: Rows, rate: float, seed: int) -> Params:
        """The whole model's parameters after all steps; the seed orders the rows."""
        state, order, count = self.state(params, rate, seed), np.random.default_rng(seed), len(rows["tokens"])
        places = np.concatenate([order.permutation(count) for _ in range(-(-self.steps * self.batch // count))])
        for index in places[: self.steps * self.batch].reshape(self.steps, 1, self.batch):
            state, metrics = self.step(state, {name: x[index] for name, x in rows.items()})
            if not metrics["finite"]:
                raise SystemExit(f"rate {rate:g}: loss or gradient are not finite")
        tuned = weights_in_use(state)["policy"]
        if self.adapting is not None:
            tuned = self.adapting.merged({"policy": tuned}, state["frozen"])
        return jax.device_get(tuned)

    @property
    def trained(self) -> int:
        """How many parameters; of an adapter as its files have them."""
        if self.adapting is not None:
            return self.adapting.adaptation.num_parameters
        return count_parameters(self.decoder.config)

    def bytes(self, params: Params, rows: Rows) -> int:
        """What XLA takes for a step: state, batch and all that is made on the way, at most."""
        state, batch = self.state(params, 1.0, 0), {name: x[None, : self.batch] for name, x in rows.items()}
        taken = self.step.lower(state, batch).compile().memory_analysis()
        made = taken.temp_size_in_bytes + taken.output_size_in_bytes - taken.alias_size_in_bytes
        return taken.argument_size_in_bytes + made


def held(decoder: Decoder, adapter: LoraConfig | None, compute_dtype: Any) -> int:
    """Bytes of weights, of Adam's state and of gradients (float32), by shapes: what a step has without activations."""
    plan = make_plan(MeshConfig(data=1), compute_dtype=compute_dtype)
    adapting = None if adapter is None else Adapting.of(decoder, adapter)
    declared = {"policy": declarations(decoder)} if adapting is None else adapting.declarations
    trained = abstract_params(decoder) if adapting is None else adapting.adaptation.abstract
    frozen = {} if adapting is None else adapting.abstract_frozen(plan)
    optimizer = make_optimizer(OptimizerConfig(), {"policy": declared["policy"]}, 10)
    state = abstract_state({"policy": trained}, optimizer, declared, plan, frozen=frozen)
    copied = 0 if compute_dtype == "float32" else 2

    def size(tree: Any) -> int:
        return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    # What is trained has a gradient, and a copy to compute with where that is not its own type.
    return size(state) + sum(int(np.prod(leaf.shape)) * (4 + copied) for leaf in jax.tree.leaves(trained))

"""What a job does otherwise where it trains an adapter (`adapter` in its config) and leaves the model as it is.

The trained role `policy` is then the adapter; the model lies in the frozen role `base`, of which checkpoints hold
nothing. An objective sees the model with its adapter as if it were a trained one, by `Adapting.objective`; a reference
that is the same model is `base` itself, under the decoder without adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
from jaxtyping import Array

from llm_jax.adapters.adapters import Adapters
from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.matching import check_config
from llm_jax.adapters.merging import merged_params
from llm_jax.adapters.sites import Adaptation
from llm_jax.adapters.start import abstract_start, init_adapter, start_of
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten, unflatten
from llm_jax.models.decoder import Decoder
from llm_jax.models.noise import example_keys
from llm_jax.models.parameter import abstract_params, declarations
from llm_jax.sharding import Plan, dtype_in_use, place, storage_shardings
from llm_jax.training.config import GroupConfig, OptimizerConfig, TrainConfig
from llm_jax.training.terms import Objective, Params, Rows

ADAPTER = 5
"""Folded into the step's key, beside the numbers of `regularization`."""
BASE, START = "base", "start"


@dataclass(frozen=True)
class Adapting:
    """An adapter to be trained, on an abstract model."""

    base: Decoder
    adaptation: Adaptation
    adapters: Adapters

    @classmethod
    def of(cls, decoder: Decoder, config: LoraConfig) -> Adapting:
        """Raises UserError as `Adaptation`."""
        adaptation = Adaptation(decoder, config)
        return cls(decoder, adaptation, Adapters(decoder, [adaptation]))

    @property
    def decoder(self) -> Decoder:
        """The model with the adapter in it, as objectives bind it."""
        return self.adapters.decoder

    def bound(self, params: Params, frozen: Params, keys: Array | None = None) -> dict[str, Any]:
        """Parameters of `decoder` from the roles of a train state."""
        starts = [frozen[START]] if START in frozen else []
        return unflatten(self.adapters.expand(frozen[BASE], [params["policy"]], starts, keys=keys))

    def objective(self, inner: Objective, training: bool) -> Objective:
        """`inner` is of `decoder`; the one returned is of the adapter's parameters. Where no other reference is among
        the frozen roles `inner` finds the model without its adapter as `ref`. In `training` there is dropout."""
        rate = self.adaptation.config.lora_dropout if training else 0.0

        def roles(params: Params, frozen: Params, rows: Rows, key: Array) -> tuple[dict[str, Any], dict[str, Any]]:
            keys = example_keys(key, ADAPTER, rows["example"]) if rate else None
            return {**params, "policy": self.bound(params, frozen, keys)}, {"ref": frozen[BASE], **frozen}

        def terms(params: Params, frozen: Params, rows: Rows, statistics: Any, key: Array) -> Any:
            return inner.terms(*roles(params, frozen, rows, key), rows, statistics, key)

        def batch_statistics(params: Params, frozen: Params, rows: Rows, key: Array) -> Any:
            assert inner.batch_statistics is not None
            return inner.batch_statistics(*roles(params, frozen, rows, key), rows, key)

        return replace(
            inner,
            terms=terms,
            batch_statistics=None if inner.batch_statistics is None else batch_statistics,
            random=inner.random or bool(rate),
        )

    def init(self, base: Params, seed: int) -> dict[str, Any]:
        """The adapter at step 0, on the host."""
        return init_adapter(self.adaptation, base, seed)

    def frozen(self, base: Params, plan: Plan) -> dict[str, Any]:
        """Frozen roles: the model in compute dtype, which is all that is ever computed of it, and what updates of some
        adapters start from. Takes the arrays of `base` over."""
        roles, start = {}, start_of(self.adaptation, base)
        roles[BASE] = jax.jit(self._cast(plan), donate_argnums=0)(base)
        if start:
            abstract = jax.eval_shape(lambda: start)
            roles[START] = place(start, storage_shardings(self.declarations[START], abstract, plan))
        return roles

    def _cast(self, plan: Plan) -> Any:
        declared = flatten(declarations(self.base))

        def cast(base: Params) -> dict[str, Any]:
            flat = flatten(base)
            return unflatten({p: x.astype(dtype_in_use(declared[p].axes, plan.compute_dtype)) for p, x in flat.items()})

        return cast

    @property
    def declarations(self) -> dict[str, Any]:
        """By role."""
        own, started = self.adaptation.declarations, flatten(abstract_start(self.adaptation))
        start = {path: declaration for path, declaration in flatten(own).items() if path in started}
        return {"policy": own, BASE: declarations(self.base), START: unflatten(start)}

    def abstract_frozen(self, plan: Plan) -> dict[str, Any]:
        """Shapes of `frozen`."""
        start = abstract_start(self.adaptation)
        return {BASE: jax.eval_shape(self._cast(plan), abstract_params(self.base))} | ({START: start} if start else {})

    def merged(self, params: Params, frozen: Params) -> dict[str, Any]:
        """Parameters of the model with the adapter in its weights, in the weights' dtype. Pure."""
        return merged_params(self.adapters, flatten(self.bound(params, frozen)))


def check_adapter(config: LoraConfig | None, train: TrainConfig) -> None:
    """Raises UserError for fields of an adapter out of range, and for what a run that trains one can't do besides."""
    if config is not None:
        check_config(config)
    if config is not None and train.balancing.bias_rate:
        raise UserError(
            "train.balancing.bias_rate moves the model's own biases, which stay as they are with an adapter"
        )
    if config is not None and train.mtp_weight:
        raise UserError("train.mtp_weight is for the model's own layers for further tokens, which have no adapter")


def with_loraplus(config: OptimizerConfig, adapter: LoraConfig) -> OptimizerConfig:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): `b`, and what else PEFT's optimizer puts with it (DoRA's magnitudes
    and biases), learn at `loraplus_lr_ratio` times the rate of `a`. The configuration's own groups come first."""
    ratio = adapter.loraplus_lr_ratio
    if ratio is None:
        return config
    group = GroupConfig(match=r"lora/[^/]+/(b|magnitude)$|/bias$", learning_rate_multiplier=ratio)
    return replace(config, groups=(*config.groups, group))

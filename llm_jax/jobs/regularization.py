"""What a run adds to its objective in training only: z-loss, NEFTune, dropout, balance, further tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array

from llm_jax.base.errors import UserError
from llm_jax.jobs.balancing import Balancing, check_balancing, moved_biases, summary
from llm_jax.jobs.scoring import run_rows, target_counts
from llm_jax.models.config import ModelConfig
from llm_jax.models.decoder import Decoder
from llm_jax.models.noise import Dropout, example_keys, layer_keys, neftune_noise
from llm_jax.models.parameter import bind
from llm_jax.training.config import TrainConfig
from llm_jax.training.terms import Params, Rows, Statistics

# Folded into the step's key.
NEFTUNE, RESIDUAL, ATTENTION, ROUTER = 1, 2, 3, 4


@dataclass(frozen=True)
class Regularization:
    """Of the trained model alone: references and evaluations have none."""

    z_loss: float = 0.0
    neftune_noise_alpha: float | None = None
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    router_noise: bool = False
    """Of models with noisy routers."""
    balancing: Balancing | None = None
    """Of models with experts."""
    further: tuple[float, int] | None = None
    """Weight of the further tokens' loss, and how many the model predicts (DeepSeek-V3, section 2.2, eq. 24-25)."""

    @property
    def random(self) -> bool:
        """Whether training draws random numbers (`Objective.random`)."""
        rates = self.neftune_noise_alpha, self.residual_dropout, self.attention_dropout
        return any(rates) or self.router_noise

    def decoder_arguments(self, decoder: Decoder, key: Array, rows: Rows) -> dict[str, Any]:
        """Keyword arguments of `run_rows`; none where nothing is random. `rows` then have `example`, int32[B]."""
        arguments, inputs, config = {}, {}, decoder.config
        layers = config.num_layers + self.depth
        if self.neftune_noise_alpha:
            keys = example_keys(key, NEFTUNE, rows["example"])
            noise = neftune_noise(keys, rows["segment_ids"], config.hidden_size, self.neftune_noise_alpha)
            arguments["embedding_noise"] = noise
        for name, purpose, rate in (
            ("residual_dropout", RESIDUAL, self.residual_dropout),
            ("attention_dropout", ATTENTION, self.attention_dropout),
        ):
            if rate:
                keys = example_keys(key, purpose, rows["example"])
                inputs[name] = Dropout(layer_keys(keys, layers), rate)
        if self.router_noise:
            inputs["router_noise"] = layer_keys(example_keys(key, ROUTER, rows["example"]), layers)
        return arguments | ({"layer_inputs": inputs} if inputs else {})

    @property
    def outputs(self) -> tuple[str, ...]:
        """More outputs of the head."""
        return ("lse",) if self.z_loss else ()

    def terms(self, scores: Mapping[str, Any], statistics: Statistics | None) -> dict[str, Array]:
        """The z-loss's sum (Chowdhery et al. 2022, arXiv:2204.02311, section 5): the squared log-sum-exp; and those of
        the balancing losses, and of further tokens, `mtp_1`, `mtp_2`, …"""
        own = {} if self.balancing is None else self.balancing.terms(scores["experts"], statistics)
        own |= {f"mtp_{k + 1}": -scores["logps_further"][k].sum() for k in range(self.depth)}
        return own | ({"z_loss": (scores["lse"] ** 2).sum()} if self.z_loss else {})

    @property
    def depth(self) -> int:
        """How many further tokens there is a loss of."""
        return 0 if self.further is None else self.further[1]

    def weights(self, batch: Rows) -> dict[str, Array]:
        """z-loss and further tokens are averaged over the target tokens of the whole batch."""
        own = {} if self.balancing is None else self.balancing.weights(batch)
        own |= {f"mtp_{k + 1}": target_counts(batch, k + 2).astype("float32") for k in range(self.depth)}
        return own | ({"z_loss": target_counts(batch).astype("float32")} if self.z_loss else {})

    @property
    def coefficients(self) -> dict[str, float]:
        own = {} if self.balancing is None else self.balancing.coefficients
        if self.further is not None:
            own |= {f"mtp_{k + 1}": self.further[0] / self.depth for k in range(self.depth)}
        return own | ({"z_loss": self.z_loss} if self.z_loss else {})

    def of_objective(self, decoder: Decoder) -> dict[str, Any]:
        """Keyword arguments of `Objective` that are not of one loss: randomness, and what routers report."""
        arguments: dict[str, Any] = {"random": self.random}
        if not decoder.config.experts.num:
            return arguments
        arguments["summary"] = summary
        if self.balancing is None:
            return arguments
        if self.balancing.config.bias_rate:
            arguments["moved"] = moved_biases(decoder, self.balancing.config.bias_rate)
        if self.balancing.needs_whole_batch:

            def statistics(params: Params, frozen: Params, rows: Rows, key: Array) -> Any:
                del frozen
                given = self.decoder_arguments(decoder, key, rows)
                return run_rows(bind(decoder, params["policy"]), rows, further=self.depth > 0, **given)[2]

            arguments |= {"batch_statistics": statistics, "statistics_of_one": False}
        return arguments


NONE = Regularization()


def regularization(config: TrainConfig, model: ModelConfig) -> Regularization:
    """What `train.*` asks for, of a model."""
    experts, further = model.experts, config.mtp_weight > 0
    return Regularization(
        config.z_loss,
        config.neftune_noise_alpha,
        config.residual_dropout,
        config.attention_dropout,
        router_noise=experts.noisy,
        balancing=Balancing(config.balancing, experts.num, experts.top_k, further) if experts.num else None,
        further=(config.mtp_weight, model.mtp) if further else None,
    )


def without_noise(config: TrainConfig, model: ModelConfig) -> Regularization:
    """The same less what draws random numbers."""
    quiet = {"neftune_noise_alpha": None, "residual_dropout": 0.0, "attention_dropout": 0.0}
    return replace(regularization(replace(config, **quiet), model), router_noise=False)


def frozen_patterns(config: TrainConfig, model: ModelConfig) -> tuple[str, ...]:
    """`train.freeze`, and what no loss of the run reaches: decay would shrink it."""
    return (*config.freeze, r"^mtp\.") if model.mtp and not config.mtp_weight else config.freeze


def check_of_model(config: TrainConfig, model: ModelConfig, fresh: bool = False) -> None:
    """Raises UserError for what the model has no part for. `fresh`: it starts at random, so all of it is trained."""
    check_balancing(config.balancing, model)
    if fresh and model.mtp and not config.mtp_weight:
        raise UserError(f"model.mtp={model.mtp} is not trained without train.mtp_weight (DeepSeek-V3: 0.3)")
    if config.mtp_weight and not model.mtp:
        raise UserError(
            f"train.mtp_weight is {config.mtp_weight}, but the model predicts no further tokens (model.mtp)"
        )


def check_regularization(config: TrainConfig) -> None:
    """Raises UserError for a number out of range."""
    for name in ("residual_dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"train.{name} is {getattr(config, name)}; it must be in [0, 1)")
    for name in ("z_loss", "mtp_weight"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise UserError(f"train.{name} is {getattr(config, name)}; it must be a number of at least 0")
    alpha, decay = config.neftune_noise_alpha, config.ema_decay
    if alpha is not None and not alpha > 0:
        raise UserError(f"train.neftune_noise_alpha is {alpha}; it must be positive, or None for no noise")
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"train.ema_decay is {decay}; it must be between 0 and 1, or None for no average")

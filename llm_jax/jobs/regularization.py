"""What a run adds to its objective in training only: z-loss, NEFTune, dropout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from llm_jax.base.errors import UserError
from llm_jax.jobs.scoring import target_counts
from llm_jax.models.decoder import Decoder
from llm_jax.models.noise import Dropout, example_keys, layer_keys, neftune_noise
from llm_jax.training.config import TrainConfig
from llm_jax.training.terms import Rows

# Folded into the step's key.
NEFTUNE, RESIDUAL, ATTENTION = 1, 2, 3


@dataclass(frozen=True)
class Regularization:
    """Of the trained model alone: references and evaluations have none."""

    z_loss: float = 0.0
    neftune_noise_alpha: float | None = None
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0

    @property
    def random(self) -> bool:
        """Whether training draws random numbers (`Objective.random`)."""
        return bool(self.neftune_noise_alpha or self.residual_dropout or self.attention_dropout)

    def decoder_arguments(self, decoder: Decoder, key: Array, rows: Rows) -> dict[str, Any]:
        """Keyword arguments of a decoder's call; none where nothing is random. `rows` have `example`, int32[B]."""
        arguments, inputs, config = {}, {}, decoder.config
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
                inputs[name] = Dropout(layer_keys(keys, config.num_layers), rate)
        return arguments | ({"layer_inputs": inputs} if inputs else {})

    @property
    def outputs(self) -> tuple[str, ...]:
        """Further outputs of the head."""
        return ("lse",) if self.z_loss else ()

    def terms(self, scores: Mapping[str, Array]) -> dict[str, Array]:
        """The z-loss's sum (Chowdhery et al. 2022, arXiv:2204.02311, section 5): the squared log-sum-exp."""
        return {"z_loss": (scores["lse"] ** 2).sum()} if self.z_loss else {}

    def weights(self, batch: Rows) -> dict[str, Array]:
        """Averaged over the target tokens of the whole batch."""
        return {"z_loss": target_counts(batch).astype("float32")} if self.z_loss else {}

    @property
    def coefficients(self) -> dict[str, float]:
        return {"z_loss": self.z_loss} if self.z_loss else {}


NONE = Regularization()


def regularization(config: TrainConfig) -> Regularization:
    """What `train.*` asks for."""
    return Regularization(config.z_loss, config.neftune_noise_alpha, config.residual_dropout, config.attention_dropout)


def check_regularization(config: TrainConfig) -> None:
    """Raises UserError for a number out of range."""
    for name in ("residual_dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"train.{name} is {getattr(config, name)}; it must be in [0, 1)")
    if not config.z_loss >= 0:
        raise UserError(f"train.z_loss is {config.z_loss}; it must be a number of at least 0")
    alpha, decay = config.neftune_noise_alpha, config.ema_decay
    if alpha is not None and not alpha > 0:
        raise UserError(f"train.neftune_noise_alpha is {alpha}; it must be positive, or None for no noise")
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"train.ema_decay is {decay}; it must be between 0 and 1, or None for no average")

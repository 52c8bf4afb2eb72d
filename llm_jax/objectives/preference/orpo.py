"""Odds Ratio Preference Optimization."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from llm_jax.objectives.preference.shared import check_positive, reward_metrics, token_means

LARGEST = -1e-7
"""Average log-probabilities above it count as it: the odds of a certain answer are infinite."""


def orpo(
    chosen_logps: Float[Array, "*batch"],
    rejected_logps: Float[Array, "*batch"],
    beta: float = 0.1,
    chosen_lengths: Num[Array, "*batch"] | None = None,
    rejected_lengths: Num[Array, "*batch"] | None = None,
    chosen_nll: Float[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Float[Array, "*batch"]]]:
    """ORPO: loss of each pair, eq. 4 and 7 of Hong et al. 2024 (arXiv:2403.07691).

        log P = log π(y|x) / |y|,    log odds = log P - log(1 - P)
        loss = NLL(y_w) - β log σ(log odds(y_w) - log odds(y_l))

    Args:
        chosen_logps, rejected_logps: summed log-probabilities in nats, float32, any shape, one entry per pair (as for
            `dpo`); there is no reference.
        beta: the paper's λ > 0, weight of the odds ratio.
        chosen_lengths, rejected_lengths: tokens per answer, the one that ends it included, same shape; needed.
        chosen_nll: the first term. The authors' code, TRL and Tunix take its mean over the tokens of *prompt and*
            answer (`nll_shares`); None is -log P(y_w), over the answer alone, as LLaMA-Factory takes it.

    Returns:
        float32 losses of the same shape, not reduced, and per pair the metrics of `implicit_rewards` as TRL logs them
        (rewards β log P, and `logps/*` the averages log P), `nll_loss`, `log_odds_chosen` (the difference of the log
        odds) and `log_odds_ratio` (log σ of it).

    Raises:
        UserError: beta not positive, or lengths missing.

    log P is cut at -1e-7 as Tunix does it; TRL's odds of an answer that is certain are infinite, the gradient NaN.
    """
    check_positive("orpo", beta=beta)
    chosen, rejected = token_means("orpo", chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    ratio = jax.nn.log_sigmoid(log_odds)
    nll = -chosen if chosen_nll is None else chosen_nll
    metrics = reward_metrics(beta * chosen, beta * rejected, chosen, rejected)
    further = {"nll_loss": nll, "log_odds_chosen": log_odds, "log_odds_ratio": ratio}
    return nll - beta * ratio, metrics | jax.lax.stop_gradient(further)


def _log_odds(logps: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """log(P / (1 - P)) from log P < 0: two forms of log(1 - P), each exact on its side of P = 1/2."""
    logps = jnp.minimum(logps, LARGEST)
    small, large = jnp.log1p(-jnp.exp(logps)), jnp.log(-jnp.expm1(logps))
    return logps - jnp.where(logps < -0.6931472, small, large)

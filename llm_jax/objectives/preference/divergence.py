"""Rewards of f-DPO: what the log-ratio becomes when another divergence than reverse KL holds the policy near."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.base.errors import UserError
from llm_jax.objectives.preference.shared import Logps, log_ratios

FDivergence = Literal["reverse_kl", "forward_kl", "js", "js_divergence", "alpha", "alpha_divergence"]


def f_divergence(
    logratios: Float[Array, "*batch"],
    f_divergence_type: FDivergence = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    power: int = 1,
) -> Float[Array, "*batch"]:
    """Reward of an answer up to β and a constant of the prompt, f'(π/π_ref): Wang et al. 2023 (arXiv:2309.16240).

        reverse_kl                 log r
        forward_kl                 1 - 1/r
        js, js_divergence          log(2 r / (1 + r))
        alpha                      (1 - r^-α) / α         α -> 0 is reverse_kl, α = 1 is forward_kl
        alpha_divergence           (r^(α-1) - 1) / (α-1)  α -> 1 is reverse_kl, α = 0 is forward_kl

    Args:
        logratios: log r = log π(y|x) - log π_ref(y|x) in nats, summed over the answer's tokens, any shape.
        f_divergence_type: `alpha` reads the coefficient as the paper does, `alpha_divergence` as TRL 1.16 does under
            that name; the two agree at 0.5 alone.
        f_alpha_divergence_coef: α.
        power: in which power the loss grows with what is returned. Beyond exp(80 / power) for float32 (700 for float64)
            the exponentials stay constant and so without gradient, as TRL's alpha-divergence does (what is left of
            the difference of two such is rounding); TRL's forward_kl gives infinity, and NaN for a difference.

    Raises:
        UserError: an unknown type.
    """
    limit = (700.0 if logratios.dtype == jnp.float64 else 80.0) / power

    def scaled_expm1(rate: float) -> Logps:
        if abs(rate) < 1e-6:
            return logratios
        return jnp.expm1(jnp.minimum(rate * logratios, limit)) / rate

    if f_divergence_type == "reverse_kl":
        return logratios
    if f_divergence_type == "forward_kl":
        return scaled_expm1(-1.0)
    if f_divergence_type in ("js", "js_divergence"):
        return math.log(2) + jax.nn.log_sigmoid(logratios)
    if f_divergence_type == "alpha":
        return scaled_expm1(-f_alpha_divergence_coef)
    if f_divergence_type == "alpha_divergence":
        return scaled_expm1(f_alpha_divergence_coef - 1)
    raise UserError(f"unknown f_divergence_type {f_divergence_type!r}; known: {', '.join(get_args(FDivergence))}")


def pair_scores(
    chosen_logps: Logps,
    rejected_logps: Logps,
    ref_chosen_logps: Logps,
    ref_rejected_logps: Logps,
    f_divergence_type: FDivergence,
    f_alpha_divergence_coef: float,
    power: int = 1,
) -> tuple[Logps, Logps]:
    """`f_divergence` of both answers' log-ratios."""
    kind = (f_divergence_type, f_alpha_divergence_coef, power)
    chosen = f_divergence(log_ratios(chosen_logps, ref_chosen_logps), *kind)
    return chosen, f_divergence(log_ratios(rejected_logps, ref_rejected_logps), *kind)

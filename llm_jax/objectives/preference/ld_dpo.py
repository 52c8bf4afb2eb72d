"""LD-DPO: less weight to what makes an answer longer than its rival."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.base.errors import UserError


def ld_dpo(
    logps: Float[Array, "*tokens"],
    answer_positions: Int[Array, "*tokens"],
    shared_lengths: Int[Array, "*tokens"],
    ld_alpha: float,
) -> Float[Array, "*tokens"]:
    """LD-DPO's transformation of per-token log-probabilities, Liu et al. 2024 (arXiv:2409.06411).

        log π(y|x) becomes  sum over t <= l of log π(y_t|…) + α * sum over t > l of it,    l = min(|y_w|, |y_l|)

    Sum what is returned over each answer, and give that to `dpo` or another loss.

    Args:
        logps: each token's log-probability in nats, float32, any shape.
        answer_positions: each token's place in its answer, from 0.
        shared_lengths: at each token, the smaller number of tokens of its pair's two answers.
        ld_alpha: α in [0, 1]; 1 changes nothing, 0 leaves the longer answer's tail out.

    Raises:
        UserError: ld_alpha outside its range.

    TRL and the paper transform policy and reference alike, LLaMA-Factory the policy alone: transform what you mean.
    """
    if not 0 <= ld_alpha <= 1:
        raise UserError(f"ld_dpo: ld_alpha must lie in [0, 1], not {ld_alpha}")
    return jnp.where(answer_positions < shared_lengths, logps, ld_alpha * logps)

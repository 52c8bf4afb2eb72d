"""Log-probabilities of target tokens from hidden states and the output head, never holding the logits of a batch."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llm_jax.kernels import manual_axes
from llm_jax.kernels.choice import Op, choose
from llm_jax.kernels.linear_cross_entropy import gpu, reference, tpu, xla
from llm_jax.kernels.linear_cross_entropy.spec import (
    LossSpec,
    loss_spec,
    needed_statistics,
    outputs_from_statistics,
    partial_spec,
)

OP = Op(
    "linear_cross_entropy",
    loss_spec,
    {"gpu": gpu, "tpu": tpu, "xla": xla, "reference": reference},
    order=("gpu", "tpu", "xla"),
)


def linear_cross_entropy(
    hidden: Float[Array, "*batch D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "*batch"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mask: Bool[Array, "*batch"] | Int[Array, "*batch"] | Float[Array, "*batch"] | None = None,
    outputs: tuple[str, ...] = ("logps",),
    implementation: str | None = None,
) -> dict[str, Float[Array, "*batch"]]:
    """Per-token values of softmax(z), z = softcap(scale · hidden @ head), in float32; only those in `outputs` are made.

    Outputs, all in nats and of the shape of `targets`:
        logps: log p(target); NaN for a target outside [0, V) that is not masked.
        loss: (1 - label_smoothing) · -log p(target) + label_smoothing · mean_j -log p_j + z_loss · lse². These two
            options change nothing else, so "loss" must be among the outputs where they are not 0.
        lse: log-sum-exp of z. entropy: -Σ p log p. mean_logit: Σ z / V.
        log_sum_sq_probs: log Σ p². argmax: int32, the first of the largest, without gradient.

    Args:
        hidden: float32, bfloat16 or float16; products are in this dtype (HIGHEST for float32) with float32 sums.
        head: cast to hidden's dtype; its gradient is summed in float32. A tied embedding is passed as `embed.T`.
        targets: any integers where `mask` is false.
        mask: tokens that count (nonzero). Others give 0 in every output, exactly 0 gradient, and no work.
        implementation: "gpu", "tpu", "xla" or "reference"; None takes the best one for the machine.

    Raises:
        ArgumentError: shapes, dtypes or options that do not fit.

    Gradients flow to hidden and head, reverse mode only; the backward pass makes the logits again, chunk by chunk.
    """
    names = needed_statistics(outputs, label_smoothing, z_loss)
    made = partial_linear_cross_entropy(
        hidden, head, targets, scale=scale, softcap=softcap, mask=mask, outputs=names, implementation=implementation
    )
    if "target_logit" in made:
        known = (targets >= 0) & (targets < head.shape[1])
        if mask is not None:
            known |= mask == 0
        made["target_logit"] = jnp.where(known, made["target_logit"], jnp.nan)
    return outputs_from_statistics(
        made, vocab=head.shape[1], outputs=outputs, label_smoothing=label_smoothing, z_loss=z_loss
    )


def partial_linear_cross_entropy(
    hidden: Float[Array, "*batch D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "*batch"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    mask: Bool[Array, "*batch"] | Int[Array, "*batch"] | Float[Array, "*batch"] | None = None,
    outputs: tuple[str, ...] = ("target_logit", "lse"),
    implementation: str | None = None,
) -> dict[str, Float[Array, "*batch"]]:
    """Per-token statistics of the logits of one shard of the vocabulary, to be combined across shards.

    target_logit: 0 where the target (an index into this shard's columns) is outside [0, V). lse: log Σ exp z.
    expected_logit: Σ p z under this shard's softmax. sum_logit: Σ z. lse2: log Σ exp 2z. argmax (int32) and max,
    without gradient. The other arguments as in `linear_cross_entropy`.
    """
    spec = partial_spec(hidden, head, targets, scale=scale, softcap=softcap, mask=mask, outputs=outputs)
    name = choose(OP, spec, implementation)
    flat_mask = None if mask is None else mask.reshape(-1) != 0
    arrays = hidden.reshape(-1, spec.width), head, targets.reshape(-1), flat_mask
    arrays = manual_axes.vary(arrays, manual_axes.axes_of(arrays))
    made = reference.statistics(spec, *arrays) if name == "reference" else _statistics(name, spec, *arrays)
    return {key: value.reshape(targets.shape) for key, value in made.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(name: str, spec: LossSpec, hidden: Array, head: Array, targets: Array, mask: Array | None):
    return OP.implementations[name].forward(spec, hidden, head, targets, mask)


def _forward(name: str, spec: LossSpec, hidden: Array, head: Array, targets: Array, mask: Array | None):
    made = OP.implementations[name].forward(_with_lse(spec), hidden, head, targets, mask)
    return {key: made[key] for key in spec.statistics}, (hidden, head, targets, mask, made)


def _backward(name: str, spec: LossSpec, saved: tuple, cotangents: dict[str, Array]):
    hidden, head, targets, mask, made = saved
    smooth = {key: g for key, g in cotangents.items() if key not in ("argmax", "max")}
    smooth.setdefault("lse", jnp.zeros_like(made["lse"]))
    d_hidden, d_head = OP.implementations[name].backward(spec, hidden, head, targets, mask, made, smooth)
    return d_hidden, d_head, None, None


def _with_lse(spec: LossSpec) -> LossSpec:
    """The backward pass needs the log-sum-exp, asked for or not."""
    names = spec.statistics if "lse" in spec.statistics else (*spec.statistics, "lse")
    return LossSpec(**{**spec.__dict__, "statistics": names})


_statistics.defvjp(_forward, _backward)

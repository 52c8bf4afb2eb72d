"""What a call asks for, and how per-token statistics of logits become its outputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.kernels.choice import ArgumentError

FLOATS = ("float32", "bfloat16", "float16")
STATISTICS = ("target_logit", "lse", "expected_logit", "sum_logit", "lse2", "argmax", "max")
OUTPUTS = ("logps", "loss", "lse", "entropy", "argmax", "mean_logit", "log_sum_sq_probs")


@dataclass(frozen=True)
class LossSpec:
    """The static part of a call on M flat tokens."""

    tokens: int
    width: int
    vocab: int
    dtype: str
    head_dtype: str
    scale: float
    softcap: float | None
    masked: bool
    statistics: tuple[str, ...]


def loss_spec(
    hidden: Any,
    head: Any,
    targets: Any,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mask: Any = None,
    outputs: tuple[str, ...] = ("logps",),
) -> LossSpec:
    """Checks a call of `linear_cross_entropy`, arguments as there; raises ArgumentError."""
    statistics = needed_statistics(outputs, label_smoothing, z_loss)
    return partial_spec(hidden, head, targets, scale=scale, softcap=softcap, mask=mask, outputs=statistics)


def partial_spec(
    hidden: Any,
    head: Any,
    targets: Any,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    mask: Any = None,
    outputs: tuple[str, ...] = ("target_logit", "lse"),
) -> LossSpec:
    """The same for `partial_linear_cross_entropy`."""
    if len(head.shape) != 2 or hidden.shape[-1:] != head.shape[:1]:
        raise _error(f"head {head.shape} must be [D, V] to go with hidden {hidden.shape}")
    if hidden.shape[:-1] != targets.shape or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise _error(f"targets must be integers {list(hidden.shape[:-1])}; got {targets.dtype}{list(targets.shape)}")
    if mask is not None and mask.shape != targets.shape:
        raise _error(f"mask {mask.shape} must have the shape of targets {targets.shape}")
    for name, array in (("hidden", hidden), ("head", head)):
        if jnp.dtype(array.dtype).name not in FLOATS:
            raise _error(f"{name} must be one of {', '.join(FLOATS)}; got {array.dtype}")
    if softcap is not None and not softcap > 0:
        raise _error(f"softcap={softcap!r} must be positive or None")
    _check_names(outputs, STATISTICS)
    tokens = 1
    for size in targets.shape:
        tokens *= size
    return LossSpec(
        tokens=tokens,
        width=head.shape[0],
        vocab=head.shape[1],
        dtype=jnp.dtype(hidden.dtype).name,
        head_dtype=jnp.dtype(head.dtype).name,
        scale=float(scale),
        softcap=softcap,
        masked=mask is not None,
        statistics=tuple(outputs),
    )


def needed_statistics(outputs: tuple[str, ...], label_smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[str, ...]:
    """Which per-token statistics `outputs` are made of, the log-sum-exp always among them."""
    _check_names(outputs, OUTPUTS)
    if (label_smoothing or z_loss) and "loss" not in outputs:
        raise _error('label_smoothing and z_loss change the output "loss", which outputs does not name')
    if not 0.0 <= label_smoothing < 1.0:
        raise _error(f"label_smoothing={label_smoothing!r} must be in [0, 1)")
    needs: dict[str, tuple[str, ...]] = {
        "logps": ("target_logit",),
        "loss": ("target_logit", "sum_logit") if label_smoothing else ("target_logit",),
        "lse": (),
        "entropy": ("expected_logit",),
        "argmax": ("argmax",),
        "mean_logit": ("sum_logit",),
        "log_sum_sq_probs": ("lse2",),
    }
    wanted = {"lse"}.union(*(needs[name] for name in outputs))
    return tuple(name for name in STATISTICS if name in wanted)


def outputs_from_statistics(
    statistics: Mapping[str, Array],
    *,
    vocab: int,
    outputs: tuple[str, ...],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> dict[str, Float[Array, "..."]]:
    """Outputs per token from statistics of the whole vocabulary (of all shards, where it is split)."""
    lse = statistics["lse"]
    made: dict[str, Array] = {}
    for name in outputs:
        if name == "logps":
            made[name] = statistics["target_logit"] - lse
        elif name == "loss":
            loss = (1.0 - label_smoothing) * (lse - statistics["target_logit"])
            if label_smoothing:
                loss += label_smoothing * (lse - statistics["sum_logit"] / vocab)
            made[name] = loss + z_loss * lse**2 if z_loss else loss
        elif name == "lse":
            made[name] = lse
        elif name == "entropy":
            made[name] = lse - statistics["expected_logit"]
        elif name == "argmax":
            made[name] = statistics["argmax"]
        elif name == "mean_logit":
            made[name] = statistics["sum_logit"] / vocab
        elif name == "log_sum_sq_probs":
            made[name] = statistics["lse2"] - 2.0 * lse
    return made


def _check_names(outputs: Any, known: tuple[str, ...]) -> None:
    if isinstance(outputs, str) or not outputs:
        raise _error(f"outputs={outputs!r} must be a tuple of names, of {', '.join(known)}")
    for name in outputs:
        if name not in known:
            raise _error(f"outputs names {name!r}, which is none of {', '.join(known)}")


def _error(text: str) -> ArgumentError:
    return ArgumentError(f"linear_cross_entropy: {text}")

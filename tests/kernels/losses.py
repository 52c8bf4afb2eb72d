"""What the tests of linear_cross_entropy share: arrays, a call with its gradients, the formula in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import linear_cross_entropy, partial_linear_cross_entropy
from llm_jax.kernels.linear_cross_entropy.spec import STATISTICS

ALL = ("logps", "loss", "lse", "entropy", "argmax", "mean_logit", "log_sum_sq_probs")


def arrays(tokens, width, vocab, dtype: Any = "float32", head_dtype: Any = None):
    """hidden, head, targets, and a mask of some three tokens in ten."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    head = jnp.asarray(rng.normal(size=(width, vocab)) * 0.5, head_dtype or dtype)
    targets = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    return hidden, head, targets, jnp.asarray(rng.uniform(size=tokens) < 0.3)


def weights_of(outputs, shape):
    """Cotangents of the outputs, whatever their order."""
    rng = np.random.default_rng(1)
    every = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name in ALL}
    return {name: every[name] for name in outputs}


def value_and_grads(hidden, head, targets, implementation, mask=None, **options):
    """Outputs, and the gradients of their sum with `weights_of`."""
    (_, made), grads = _compiled(implementation, tuple(options.items()))(hidden, head, targets, mask)
    return made, grads


@functools.cache
def _compiled(implementation, options):
    def loss(hidden, head, targets, mask):
        made = linear_cross_entropy(hidden, head, targets, mask=mask, implementation=implementation, **dict(options))
        weights = weights_of(made, targets.shape)
        return sum(jnp.sum(weights[name] * made[name]) for name in made if name != "argmax"), made

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def formula(
    hidden,
    head,
    targets,
    *,
    scale=1.0,
    softcap=None,
    label_smoothing=0.0,
    z_loss=0.0,
    mask=None,
    outputs=("logps",),
):
    """The same, in float64. The head is that which is multiplied: cast to hidden's dtype."""
    hidden, head = (np.asarray(x, np.float64) for x in (hidden, head.astype(hidden.dtype)))
    targets, vocab = np.asarray(targets), head.shape[1]
    raw = scale * (hidden @ head)
    z = raw if softcap is None else softcap * np.tanh(raw / softcap)
    lse = np.log(np.exp(z).sum(1))
    log_p = z - lse[:, None]
    p, hot = np.exp(log_p), np.eye(vocab)[targets]
    entropy, squares = -(p * log_p).sum(1), (p * p).sum(1)
    nll, uniform = -(hot * log_p).sum(1), np.full_like(p, 1.0 / vocab)
    made = {
        "logps": -nll,
        "loss": (1 - label_smoothing) * nll - label_smoothing * log_p.mean(1) + z_loss * lse**2,
        "lse": lse,
        "entropy": entropy,
        "argmax": z.argmax(1),
        "mean_logit": z.mean(1),
        "log_sum_sq_probs": np.log(squares),
    }
    target = (1 - label_smoothing) * hot + label_smoothing * uniform
    slopes = {
        "logps": hot - p,
        "loss": p - target + 2 * z_loss * lse[:, None] * p,
        "lse": p,
        "entropy": -p * (log_p + entropy[:, None]),
        "argmax": np.zeros_like(p),
        "mean_logit": uniform,
        "log_sum_sq_probs": 2 * p * p / squares[:, None] - 2 * p,
    }
    counts = np.ones(len(targets)) if mask is None else np.asarray(mask, np.float64)
    weights = weights_of(outputs, targets.shape)
    d_z = sum(np.asarray(weights[name], np.float64)[:, None] * slopes[name] for name in outputs) * counts[:, None]
    d_raw = scale * d_z * (1.0 if softcap is None else 1 - (z / softcap) ** 2)
    return {name: made[name] * counts for name in outputs}, (d_raw @ head.T, hidden.T @ d_raw)


def relative(a, b):
    """norm(a - b) / norm(b)."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def combine(parts, vocab):
    """Outputs of the whole vocabulary from the statistics of equal shards of it."""
    s = {name: jnp.stack([part[name] for part in parts]) for name in parts[0]}
    lse = jax.nn.logsumexp(s["lse"], 0)
    best = jnp.argmax(s["max"], 0)
    return {
        "logps": s["target_logit"].sum(0) - lse,
        "entropy": lse - jnp.sum(jnp.exp(s["lse"] - lse) * s["expected_logit"], 0),
        "mean_logit": s["sum_logit"].sum(0) / vocab,
        "log_sum_sq_probs": jax.nn.logsumexp(s["lse2"], 0) - 2 * lse,
        "argmax": jnp.take_along_axis(s["argmax"], best[None], 0)[0] + vocab // len(parts) * best,
    }


def shards(hidden, head, targets, implementation):
    """Outputs and gradients, as `value_and_grads` gives them, from two halves of the vocabulary, with softcap 4."""
    outputs, vocab = ("logps", "entropy", "mean_logit", "log_sum_sq_probs", "argmax"), head.shape[1]
    half = vocab // 2

    @jax.jit
    def part(hidden, head, targets):
        return partial_linear_cross_entropy(
            hidden, head, targets, softcap=4.0, outputs=STATISTICS, implementation=implementation
        )

    @jax.jit
    def finish(parts):
        made, weights = combine(parts, vocab), weights_of(outputs, targets.shape)
        return sum(jnp.sum(weights[name] * made[name]) for name in outputs if name != "argmax"), made

    def loss(hidden, head):
        return finish([part(hidden, head[:, i : i + half], targets - i) for i in (0, half)])

    (_, made), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    return made, grads

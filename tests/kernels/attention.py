"""Calls of flash_attention for tests, and the formula and its gradients in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import flash_attention


def make(shape, options, dtype=jnp.float32, seed=0):
    """q, k, v, sinks and slopes (differentiable) and the remaining options of a call.

    `shape` is (B, T, S, N, K, H, Hv). Options that are arrays are given as True, and made here.
    """
    B, T, S, N, K, H, Hv = shape
    rng = np.random.default_rng(seed)
    options = dict(options)
    arrays = {
        "q": jnp.asarray(rng.normal(size=(B, T, N, H)), dtype),
        "k": jnp.asarray(rng.normal(size=(B, S, K, H)), dtype),
        "v": jnp.asarray(rng.normal(size=(B, S, K, Hv)), dtype),
    }
    if options.pop("alibi_slopes", False):
        arrays["alibi_slopes"] = jnp.asarray(rng.uniform(0.01, 0.3, N), dtype)
    if options.pop("sinks", False):
        arrays["sinks"] = jnp.asarray(rng.normal(size=N), dtype)
    segments = np.sort(rng.integers(1, 5, (B, S)), axis=1).astype(np.int32)
    segments[:, -S // 10 :] = 0
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    if options.pop("segment_ids", False):
        pair = jnp.asarray(segments[:, S - T :]), jnp.asarray(segments)
        options["segment_ids"] = pair if T != S else pair[1]
    if options.pop("positions", False):
        positions = (np.arange(S) - starts).astype(np.int32)
        options["q_positions"], options["kv_positions"] = jnp.asarray(positions[:, S - T :]), jnp.asarray(positions)
    if options.pop("kv_ranges", False):
        start = rng.integers(0, S, (B, T))
        options["kv_ranges"] = jnp.asarray(np.stack([start, start + rng.integers(0, S // 2, (B, T))], -1), jnp.int32)
    return arrays, options


def positions(options, B, T, S):
    """Of queries [B, T] and keys [B, S]."""
    q_positions = np.asarray(options.get("q_positions", np.broadcast_to(np.arange(T) + S - T, (B, T))))
    kv_positions = np.asarray(options.get("kv_positions", np.broadcast_to(np.arange(S), (B, S))))
    return q_positions, kv_positions


def numpy_mask(options, B, T, S):
    """Who sees whom, from the words of DESIGN."""
    i, j = positions(options, B, T, S)
    i, j = i[:, :, None], j[:, None]
    segments = options.get("segment_ids")
    q_segments, kv_segments = segments if isinstance(segments, tuple) else (segments, segments)
    seen = np.ones((B, T, S), bool)
    if options.get("causal", True):
        seen &= j <= i
    if (window := options.get("window")) is not None:
        seen &= (i - window < j) & (j < i + window)
    if (chunk := options.get("chunk")) is not None:
        seen &= i // chunk == j // chunk
    if q_segments is not None:
        q_segments, kv_segments = np.asarray(q_segments)[:, :, None], np.asarray(kv_segments)[:, None]
        seen &= (q_segments == kv_segments) & (kv_segments != 0)
    if (ranges := options.get("kv_ranges")) is not None:
        start, end = np.moveaxis(np.asarray(ranges), -1, 0)[..., None]
        seen &= (start <= np.arange(S)) & (np.arange(S) < end)
    return seen


def cotangents(arrays, seed=1):
    """Of the output, in its dtype, and of the log-sum-exp."""
    rng = np.random.default_rng(seed)
    B, T, N = arrays["q"].shape[:3]
    d_out = jnp.asarray(rng.normal(size=(B, T, N, arrays["v"].shape[3])), arrays["q"].dtype)
    return d_out, jnp.asarray(rng.normal(size=(B, T, N)), jnp.float32)


def results(arrays, options, implementation):
    """{"out", "lse", and the gradient of each array under its name}, of one implementation."""
    static = {key: value for key, value in options.items() if not isinstance(value, jax.Array | tuple)}
    data = {key: value for key, value in options.items() if key not in static}

    @jax.jit
    def run(arrays, data, cotangents):
        def attend(arrays):
            return flash_attention(**arrays, **data, **static, return_lse=True, implementation=implementation)

        (out, lse), pull = jax.vjp(attend, arrays)
        return {"out": out, "lse": lse, **pull(cotangents)[0]}

    return run(arrays, data, cotangents(arrays))


def exact(arrays, options):
    """What `results` should be: the formula of attention and its gradients, in float64."""
    x = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    q, k, v = x["q"], x["k"], x["v"]
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    k, v = (np.repeat(y, N // K, axis=2) for y in (k, v))
    d_out, d_lse = (np.asarray(y, np.float64) for y in cotangents(arrays))
    scale = options.get("scale") or H**-0.5
    cap = options.get("softcap")
    raw = np.einsum("btnh,bsnh->bnts", q, k) * scale
    capped = raw if cap is None else cap * np.tanh(raw / cap)
    q_positions, kv_positions = positions(options, B, T, S)
    distance = np.abs(q_positions[:, None, :, None] - kv_positions[:, None, None, :])
    scores = capped if "alibi_slopes" not in x else capped - x["alibi_slopes"][:, None, None] * distance
    scores = np.where(numpy_mask(options, B, T, S)[:, None], scores, -np.inf)
    sinks = np.broadcast_to(x.get("sinks", np.full(N, -np.inf))[:, None, None], (B, N, T, 1))
    top = np.maximum(scores.max(-1, keepdims=True), sinks)
    top = np.where(np.isinf(top), 0.0, top)
    total = np.exp(scores - top).sum(-1, keepdims=True) + np.exp(sinks - top)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top
    safe = np.where(total > 0, lse, 0.0)
    probs, sink_probs = np.exp(scores - safe), np.exp(sinks - safe)
    out = np.einsum("bnts,bsnh->btnh", probs, v)
    delta = ((out * d_out).sum(-1) - d_lse).transpose(0, 2, 1)[..., None]
    d_scores = probs * (np.einsum("btnh,bsnh->bnts", d_out, v) - delta)
    d_raw = d_scores * scale * (1.0 if cap is None else 1.0 - (capped / cap) ** 2)
    per_key_head = lambda y: y.reshape(B, S, K, N // K, -1).sum(3)  # noqa: E731
    found = {
        "out": out,
        "lse": lse[..., 0].transpose(0, 2, 1),
        "q": np.einsum("bnts,bsnh->btnh", d_raw, k),
        "k": per_key_head(np.einsum("bnts,btnh->bsnh", d_raw, q)),
        "v": per_key_head(np.einsum("bnts,btnh->bsnh", probs, d_out)),
        "alibi_slopes": -(d_scores * distance).sum((0, 2, 3)),
        "sinks": -(sink_probs * delta).sum((0, 2, 3)),
    }
    return {key: found[key] for key in ("out", "lse", *arrays)}

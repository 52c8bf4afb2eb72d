"""Calls of attention: all options in combinations, who sees whom, and the formula in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.kernels import flash_attention
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.numerics import assert_float32, assert_half

OPTIONS: dict[str, list] = {
    "mask": ["causal", "full", "window", "window_both_sides"],
    "data": ["none", "segments", "positions", "ranges"],
    "sizes": [(64, 64), (96, 96), (192, 128), (256, 256)],
    "heads": [(4, 2), (2, 1), (2, 2)],
    "lengths": [(150, 150), (130, 270), (200, 140)],
    "softcap": [None, 2.0],
    "alibi": [False, True],
    "sinks": [False, True],
    "chunk": [None, 70],
    "dtype": ["bfloat16", "float16"],
}
"""Sizes are of the heads of queries and keys, and of values; heads and lengths of queries, and of keys. The lengths are
several blocks of 128, the last one not whole."""
PLAIN: dict[str, Any] = dict(softcap=None, alibi=False, sinks=False, chunk=None, dtype="bfloat16")
SHARED = [
    PLAIN | dict(mask=mask, data="shared", sizes=(64, 64), heads=(4, 2), lengths=(150, 150), alibi=alibi)
    for mask, alibi in (("causal", False), ("window", True))
]
"""Pairs of documents that begin alike, as `data/sharing.py` lays them."""
RISING = PLAIN | dict(mask="causal", data="none", sizes=(64, 64), heads=(2, 1), lengths=(150, 150), alibi=(-1.0, 0.1))
"""The farther a key, the larger its bias: that of queries which are only there to fill a block would overflow."""
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 45},
    "window_both_sides": {"causal": False, "window": 30},
}
BATCH = 2
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
"""Interpreters compile longer than they run."""


def make_case(mask, data, sizes, heads, lengths, softcap, alibi, sinks, chunk, dtype, seed=0):
    """Arrays with a gradient, and the other arguments of a call, by values of OPTIONS; `alibi` may be the slopes."""
    (T, S), (N, K), (H, Hv) = lengths, heads, sizes
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    arrays = {"q": normal(BATCH, T, N, H), "k": normal(BATCH, S, K, H), "v": normal(BATCH, S, K, Hv)}
    if alibi:
        arrays["alibi_slopes"] = jnp.asarray(rng.uniform(0.01, 0.3, N) if alibi is True else alibi, dtype)
    if sinks:
        arrays["sinks"] = normal(N)
    options = MASKS[mask] | {"softcap": softcap, "chunk": chunk}
    # The last tokens are padding. The second row is one document, in which some blocks need no mask.
    longest = max(T, S)
    documents = np.stack([np.sort(rng.integers(1, 5, longest)), np.ones(longest, int)])
    documents[:, -longest // 8 :] = 0
    q_documents, kv_documents = documents[:, -T:], documents[:, -S:]
    if data in ("segments", "positions"):
        pair = tuple(jnp.asarray(x, jnp.int32) for x in (q_documents, kv_documents))
        options["segment_ids"] = pair if T != S else pair[0]
    if data == "positions":
        starts = np.array([[np.argmax(row == document) for document in row] for row in documents])
        positions = np.arange(longest) - starts
        options["q_positions"], options["kv_positions"] = (jnp.asarray(positions[:, -n:], jnp.int32) for n in (T, S))
    if data == "ranges":  # nobody's holds the last keys
        start = rng.integers(0, S // 2, (BATCH, T))
        options["kv_ranges"] = jnp.asarray(np.stack([start, start + rng.integers(0, S // 3, (BATCH, T))], -1))
    if data == "shared":
        options["q_positions"], options["kv_positions"], options["kv_ranges"] = shared_rows(T)
    return arrays, options


def shared_rows(length):
    """Positions, again, and ranges of rows of pairs: one side, what both begin with, the other side; then padding."""
    positions, ranges = np.zeros((BATCH, length), np.int32), np.zeros((BATCH, length, 2), np.int32)
    for row, (first, both, second) in enumerate([(13, 20, 9), (5, length // 2, 11)]):
        for start in range(0, length - first - both - second + 1, first + both + second):
            middle, stop = start + first, start + first + both + second
            positions[row, start:middle] = both + np.arange(first)
            positions[row, middle:stop] = np.arange(both + second)
            ranges[row, start:middle] = start, middle + both
            ranges[row, middle:stop] = middle, stop
    return jnp.asarray(positions), jnp.asarray(positions), jnp.asarray(ranges)


def numpy_mask(options, B, T, S):
    """Who sees whom, by loops, from the words of DESIGN."""
    q_positions = np.asarray(options.get("q_positions", np.broadcast_to(np.arange(T) + S - T, (B, T))))
    kv_positions = np.asarray(options.get("kv_positions", np.broadcast_to(np.arange(S), (B, S))))
    segments = options.get("segment_ids")
    q_segments, kv_segments = segments if isinstance(segments, tuple) else (segments, segments)
    if q_segments is not None:
        q_segments, kv_segments = np.asarray(q_segments), np.asarray(kv_segments)
    ranges = options.get("kv_ranges")
    ranges = None if ranges is None else np.asarray(ranges)
    seen = np.zeros((B, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        i, j = int(q_positions[b, t]), int(kv_positions[b, s])
        ok = j <= i or not options.get("causal", True)
        if (window := options.get("window")) is not None:
            ok &= i - window < j and (j < i + window)
        if (chunk := options.get("chunk")) is not None:
            ok &= i // chunk == j // chunk
        if q_segments is not None:
            ok &= int(q_segments[b, t]) == int(kv_segments[b, s]) != 0
        if ranges is not None:
            ok &= int(ranges[b, t, 0]) <= s < int(ranges[b, t, 1])
        seen[b, t, s] = ok
    return seen


def cotangents(arrays, seed=1):
    """Of output and log-sum-exp, the output's such that its dtype holds them."""
    rng = np.random.default_rng(seed)
    B, T, N = arrays["q"].shape[:3]
    d_out = jnp.asarray(rng.normal(size=(B, T, N, arrays["v"].shape[3])), arrays["q"].dtype)
    return d_out, jnp.asarray(rng.normal(size=(B, T, N)), jnp.float32)


def called(options, implementation):
    """A function of the arrays and cotangents: output, log-sum-exp and the gradient of each array."""

    def run(arrays, d_out, d_lse):
        def call(arrays):
            out, lse = flash_attention(**arrays, **options, return_lse=True, implementation=implementation)
            return (out, jnp.where(jnp.isfinite(lse), lse, 0.0)), lse

        (out, _), pull, lse = jax.vjp(call, arrays, has_aux=True)
        return {"out": out, "lse": lse} | pull((d_out, d_lse))[0]

    return run


def compiled(options, implementation, compiler_options=None):
    """`called` as one program."""
    return jax.jit(called(options, implementation), compiler_options=compiler_options)


def formula(arrays, options, seen, d_out, d_lse):
    """What `compiled` gives, in float64."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (*(arrays[n] for n in "qkv"), d_out, d_lse))
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    scale, cap = options.get("scale") or H**-0.5, options.get("softcap")
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    capped = scale * np.einsum("btnh,bsnh->bnts", q, k)
    slope = 1.0
    if cap is not None:
        tanh = np.tanh(capped / cap)
        capped, slope = cap * tanh, 1 - tanh**2
    i = np.asarray(options.get("q_positions", np.broadcast_to(np.arange(T) + S - T, (B, T))))
    j = np.asarray(options.get("kv_positions", np.broadcast_to(np.arange(S), (B, S))))
    distance = np.abs(i[:, :, None] - j[:, None])[:, None].astype(np.float64)
    logits = capped
    if "alibi_slopes" in arrays:
        logits = logits - np.asarray(arrays["alibi_slopes"], np.float64)[:, None, None] * distance
    weights = np.where(seen[:, None], np.exp(logits), 0.0)
    sink = np.exp(np.asarray(arrays["sinks"], np.float64))[:, None] if "sinks" in arrays else 0.0
    total = weights.sum(-1) + sink
    with np.errstate(divide="ignore", invalid="ignore"):
        lse = np.log(total)
        probs = np.where(total[..., None] > 0, weights / total[..., None], 0.0)
    d_lse = np.where(np.isfinite(lse), d_lse.transpose(0, 2, 1), 0.0)
    d_probs = np.einsum("btnh,bsnh->bnts", d_out, v)
    delta = (probs * d_probs).sum(-1) - d_lse
    d_logits = probs * (d_probs - delta[..., None])
    d_scores = d_logits * slope * scale
    groups = (B, S, K, N // K, -1)
    result = {
        "out": np.einsum("bnts,bsnh->btnh", probs, v),
        "lse": lse.transpose(0, 2, 1),
        "q": np.einsum("bnts,bsnh->btnh", d_scores, k),
        "k": np.einsum("bnts,btnh->bsnh", d_scores, q).reshape(groups).sum(3),
        "v": np.einsum("bnts,btnh->bsnh", probs, d_out).reshape(groups).sum(3),
    }
    if "alibi_slopes" in arrays:
        result["alibi_slopes"] = -(d_logits * distance).sum((0, 2, 3))
    if "sinks" in arrays:
        result["sinks"] = -(sink / total * delta).sum((0, 2))
    return result


def check(case, implementation, sizes, reference=compiled):
    """Against the formula, with NaN in all that nobody sees; then again with numbers there and one key far larger:
    queries that may not see this key get the same bits. For many cases of the same shapes the reference is better
    `called`: compiled op by op, it needs a program for each of its operations, not for each case."""
    arrays, options = make_case(**case)
    d_out, d_lse = cotangents(arrays)
    (B, T), S = arrays["q"].shape[:2], arrays["k"].shape[1]
    seen = numpy_mask(options, B, T, S)
    unseen = {"q": ~seen.any(2), "k": ~seen.any(1), "v": ~seen.any(1)}
    holes = {name: jnp.where(unseen[name][:, :, None, None], jnp.nan, arrays[name]) for name in "qkv"}
    key = int(np.abs(seen.sum((0, 1)) - B * T / 2).argmin())  # that some see and some do not, if there is one
    changed = {name: arrays[name].at[:, key].multiply(1e4) for name in "kv"}
    run = compiled(options, implementation, None if implementation == "xla" else QUICK)
    with devices.interpreter(implementation), trying("flash_attention", implementation, sizes):
        got = run(arrays | holes, d_out, d_lse)
        again = run(arrays | changed, d_out, d_lse)
    exact = formula(arrays, options, seen, d_out, d_lse)
    plain = reference(options, "reference")(arrays, d_out, d_lse)
    for name, x in got.items():
        assert x.dtype == plain[name].dtype
        if x.dtype == jnp.float32:
            assert_float32(name, x, exact[name])
            assert_float32(f"{name} of the reference", plain[name], exact[name])
        else:
            assert_half(name, x, plain[name], exact[name])
    untouched = ~seen[:, :, key]
    for name in ("out", "lse", "q"):
        np.testing.assert_array_equal(np.asarray(again[name])[untouched], np.asarray(got[name])[untouched], name)
    assert not untouched.all() and not np.array_equal(again["out"], got["out"])

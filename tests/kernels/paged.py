"""Calls of `ragged_paged_attention` for tests, and the formula in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from llm_jax.kernels.ragged_paged_attention import Pages, init_pages, write_pages

BATCHES = {
    "decode": ((1, 1, 1, 1), (1, 17, 32, 39), 4),
    "prefill": ((7, 0, 12), (7, 0, 41), 21),
    "mixed": ((1, 9, 0, 1), (18, 9, 0, 40), 13),
}
"""New tokens and length of each request, and how many tokens there are room for."""
OPTIONS = {
    "batch": tuple(BATCHES),
    "dtype": ("float32", "bfloat16", "float16"),
    "packed": (None, "int8", "float8_e4m3fn"),
    "page": (16, 32),
    "heads": ((2, 1), (2, 3), (1, 4)),
    "values": ("same", "other", "latent"),
    "window": (None, 6),
    "softcap": (None, 2.0),
    "alibi": (False, True),
    "sinks": (False, True),
    "lse": (False, True),
}
"""`heads`: (K, N / K). `values`: their size beside that of a key."""


def allowed(case) -> bool:
    return case["values"] != "latent" or case["heads"][0] == 1


def name(case) -> str:
    return "-".join(str(value) for value in case.values() if value not in (None, False))


def make(case, head_dim=16, value_dim=8, seed=0, multiple=None):
    """Positional arguments, options, and (k, v) float64 [R, length, K, H] of each request as its pages hold them.

    Pages that no request has, and slots past a length, are NaN.
    """
    rng = np.random.default_rng(seed)
    q_lens, kv_lens, tokens = BATCHES[case["batch"]]
    (K, G), page = case["heads"], case["page"]
    table = -(-max(kv_lens) // page) + 1
    num_pages = len(kv_lens) * table + 3
    pages = init_pages(
        num_pages,
        page,
        K,
        head_dim,
        value_dim=None if case["values"] == "same" else value_dim,
        latent=case["values"] == "latent",
        dtype=case["packed"] or case["dtype"],
        multiple=multiple,
    )
    ids = rng.permutation(num_pages)[: len(kv_lens) * table].reshape(len(kv_lens), table)
    slots = [ids[r, np.arange(n) // page] * page + np.arange(n) % page for r, n in enumerate(kv_lens)]
    filled = np.concatenate(slots)
    k, v = (jnp.asarray(rng.normal(size=(filled.size, K, n)), case["dtype"]) for n in (head_dim, pages.value_dim or 0))
    pages = write_pages(pages, k, None if pages.v is None else v, jnp.asarray(filled, jnp.int32))
    unused = np.ones(num_pages * page, bool)
    unused[filled] = False
    pages = changed(pages, unused.reshape(num_pages, 1, page), np.nan)
    q = np.asarray(rng.normal(size=(tokens, K * G, head_dim)))
    q[sum(q_lens) :] = np.nan
    options = {"softcap": case["softcap"], "window": case["window"], "scale": 0.3}
    if case["alibi"]:
        options["alibi_slopes"] = jnp.asarray(rng.uniform(0.01, 0.3, K * G), jnp.float32)
    if case["sinks"]:
        options["sinks"] = jnp.asarray(rng.normal(size=K * G), jnp.float32)
    ids[:, -1] = 10**6  # never used, and nowhere
    arrays = (np.asarray(kv_lens, np.int32), ids.astype(np.int32), np.cumsum((0, *q_lens), dtype=np.int32))
    args = (jnp.asarray(q, case["dtype"]), pages, *map(jnp.asarray, arrays))
    return args, options, [held(pages, request, head_dim) for request in slots]


def changed(pages: Pages, where, value) -> Pages:
    """Numbers set to `value` where [P, 1, S] says so: those in the pages, or their scales where they have some."""

    names = ("k", "v") if pages.k_scales is None else ("k_scales", "v_scales")
    kept = {name: getattr(pages, name) for name in names}
    new = {
        name: jnp.where(where if x.ndim == 3 else where[..., None], value, x)
        for name, x in kept.items()
        if x is not None
    }
    return dataclasses.replace(pages, **new)


def unseen(case, args):
    """bool[P, 1, S]: slots that no token sees."""
    _, pages, kv_lens, tables, cu_q_lens = args
    page = pages.k.shape[2]
    hidden = np.ones((pages.k.shape[0], page), bool)
    for r, (length, q_len) in enumerate(zip(kv_lens.tolist(), np.diff(cu_q_lens).tolist())):
        if q_len:
            first = 0 if case["window"] is None else max(0, length - q_len - case["window"] + 1)
            slots = np.arange(first, length)
            hidden[np.asarray(tables)[r, slots // page], slots % page] = False
    return hidden[:, None]


def held(pages: Pages, slots, head_dim):
    """Keys and values in these slots, float64 [n, K, H]."""

    def take(x, scales, size):
        x = np.asarray(x, np.float64)
        if scales is not None:
            x = x * np.asarray(scales, np.float64)[..., None]
        page = x.shape[2]
        return x[slots // page, :, slots % page, :size]

    k = take(pages.k, pages.k_scales, head_dim)
    if pages.v is None:
        return k, k[..., : pages.value_dim]
    return k, take(pages.v, pages.v_scales, pages.value_dim)


def formula(args, options, kept):
    """Output and log-sum-exp in float64, a query and a head at a time."""
    q, kv_lens, cu_q_lens = (np.asarray(args[i]) for i in (0, 2, 4))
    tokens, heads, _ = q.shape
    out, lse = np.zeros((tokens, heads, kept[0][1].shape[-1])), np.full((tokens, heads), -np.inf)
    for r, (k, v) in enumerate(kept):
        for token in range(cu_q_lens[r], cu_q_lens[r + 1]):
            i = kv_lens[r] - (cu_q_lens[r + 1] - token)
            first = 0 if options.get("window") is None else max(0, i - options["window"] + 1)
            distance = i - np.arange(first, i + 1)
            for n in range(heads):
                head = n // (heads // k.shape[1])
                scores = options["scale"] * k[first : i + 1, head] @ q[token, n].astype(np.float64)
                if options.get("softcap"):
                    scores = options["softcap"] * np.tanh(scores / options["softcap"])
                if "alibi_slopes" in options:
                    scores = scores - float(options["alibi_slopes"][n]) * distance
                weights = np.exp(scores)
                total = weights.sum() + (np.exp(float(options["sinks"][n])) if "sinks" in options else 0.0)
                out[token, n] = weights @ v[first : i + 1, head] / total
                lse[token, n] = np.log(total)
    return out, lse

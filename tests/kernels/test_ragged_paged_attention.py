"""ragged_paged_attention: `xla` and `reference` against numpy in float64; writing pages; what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import debug, decode_attention, ragged_paged_attention
from llm_jax.kernels.ragged_paged_attention import Pages, init_pages, write_pages, xla_in_place
from tests.kernels import paged
from tests.kernels.numerics import assert_float32, assert_half
from tests.kernels.pairwise import covering, everything

CASES = covering(paged.OPTIONS, paged.allowed)
attend = jax.jit(ragged_paged_attention, static_argnames=("scale", "window", "softcap"))
PLAIN = {key: values[0] for key, values in paged.OPTIONS.items()}


@pytest.mark.parametrize("case", CASES, ids=paged.name)
def test_equals_the_formula(case):
    args, options, kept = paged.make(case, multiple=24 if case["sinks"] else 1)
    want_out, want_lse = paged.formula(args, options, kept)

    def run(implementation):
        call = dict(return_lse=case["lse"], implementation=implementation, **options)
        got = jax.jit(lambda *args: ragged_paged_attention(*args, **call))(*args)
        return got if case["lse"] else (got, None)

    reference, reference_lse = run("reference")
    out, lse = run("xla")
    assert out.dtype == case["dtype"]
    if case["dtype"] == "float32":
        assert_float32("reference", reference, want_out)
        assert_float32("xla", out, want_out)
    else:
        assert_half("xla", out, reference, want_out)
    for got in (reference_lse, lse):
        if got is not None:
            assert_float32("lse", got, want_lse)


@pytest.mark.parametrize(
    "implementation, batch, window, packed",
    [
        ("xla", "decode", None, None),
        ("xla", "mixed", 6, "int8"),
        ("xla", "prefill", 6, None),
        ("reference", "mixed", 6, None),
    ],
)
def test_slots_that_no_token_sees_change_nothing(implementation, batch, window, packed):
    case = PLAIN | {"batch": batch, "window": window, "packed": packed}
    (q, pages, *rest), options, _ = paged.make(case)
    options |= {"return_lse": True, "implementation": implementation}
    run = jax.jit(lambda q, pages: ragged_paged_attention(q, pages, *rest, **options))
    other = paged.changed(pages, paged.unseen(case, (q, pages, *rest)), 1e4)
    for a, b in zip(run(q, pages), run(q, other)):
        np.testing.assert_array_equal(a, b)


def test_pages_in_place_equal_pages_brought_together():
    """The same batch in as many pages as it has, and in twice as many, where decoding goes another way."""
    case = PLAIN | {"heads": (2, 3), "values": "other"}
    (q, pages, kv_lens, tables, cu_q_lens), options, kept = paged.make(case)
    used = np.unique(np.concatenate([np.asarray(t)[: -(-n // 16)] for t, n in zip(tables, kv_lens.tolist())]))
    names = np.zeros(10**6 + 1, np.int32)
    names[used] = np.arange(used.size)
    few = jax.tree.map(lambda x: x[used], pages)
    assert xla_in_place.IN_USE * pages.k.shape[0] > used.size  # else both go the same way
    got = attend(q, few, kv_lens, jnp.asarray(names[np.asarray(tables)]), cu_q_lens, **options)
    want, _ = paged.formula((q, few, kv_lens, tables, cu_q_lens), options, kept)
    assert_float32("in place", got, want)
    assert_float32("brought together", attend(q, pages, kv_lens, tables, cu_q_lens, **options), want)


def test_decoding_equals_decode_attention():
    rng = np.random.default_rng(0)
    B, N, K, S, H, page = 3, 6, 2, 48, 8, 16
    q = jnp.asarray(rng.normal(size=(B, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(B, K, S, H)), jnp.float32) for _ in range(2))
    lengths = jnp.asarray([1, 20, 48])
    table = rng.permutation(B * S // page).reshape(B, -1)
    slots = jnp.asarray((table[..., None] * page + np.arange(page)).reshape(-1))
    flat_k, flat_v = (jnp.swapaxes(x, 1, 2).reshape(B * S, K, H) for x in (k, v))
    pages = write_pages(init_pages(table.size, page, K, H, dtype="float32"), flat_k, flat_v, slots)
    sinks = jnp.asarray(rng.normal(size=N), jnp.float32)
    got = attend(q, pages, lengths, jnp.asarray(table), jnp.arange(B + 1), sinks=sinks)
    np.testing.assert_allclose(got, decode_attention(q, k, v, lengths, sinks=sinks), atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 3])
def test_inside_shard_map(tokens):
    """Two devices with the same queries and pages, and requests of their own: one token each, and several."""
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "data")
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2 * tokens, 2, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(6, 1, 16, 8)), jnp.float32) for _ in range(2))
    lens, tables = jnp.array([20, 9, 31, 3], jnp.int32), jnp.array([[0, 5], [2, 0], [1, 3], [4, 0]], jnp.int32)

    def attend(q, pages, lens, tables):
        return ragged_paged_attention(q, Pages(*pages), lens, tables, tokens * jnp.arange(3), implementation="xla")

    specs = P(), P(), P("data"), P("data")
    got = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P("data")))(q, (k, v), lens, tables)
    want = [attend(q, (k, v), lens[half], tables[half]) for half in (slice(2), slice(2, 4))]
    np.testing.assert_allclose(got, np.concatenate(want), atol=1e-6)


def test_a_prompt_in_chunks_equals_it_whole_and_one_token_at_a_time():
    rng = np.random.default_rng(1)
    T, N, H, page = 37, 4, 8, 16
    q, k, v = (jnp.asarray(rng.normal(size=(T, n, H)), jnp.float32) for n in (N, 2, 2))
    tables = jnp.asarray([[2, 0, 1]])

    @jax.jit
    def step(pages, start, size):
        index = start + jnp.arange(T)
        slots = jnp.where(index < start + size, tables[0, index // page] * page + index % page, -1)
        new_q, new_k, new_v = (jnp.roll(x, -start, axis=0) for x in (q, k, v))
        pages = write_pages(pages, new_k, new_v, slots)
        lengths, cu_q_lens = jnp.asarray([start + size]), jnp.asarray([0, size])
        return pages, ragged_paged_attention(new_q, pages, lengths, tables, cu_q_lens)

    def run(*chunks):
        pages, outs, start = init_pages(3, page, 2, H, dtype="float32"), [], 0
        for size in chunks:
            pages, out = step(pages, jnp.asarray(start), jnp.asarray(size))
            outs.append(np.asarray(out[:size]))
            start += size
        return np.concatenate(outs)

    whole = run(T)
    np.testing.assert_allclose(run(20, 17), whole, atol=2e-6)
    np.testing.assert_allclose(run(30, *[1] * 7), whole, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 4])
def test_writing_takes_place_and_drops_padding(tokens):
    rng = np.random.default_rng(2)
    pages = init_pages(3, 16, 2, 8, value_dim=4, dtype="float32")
    k, v = (jnp.asarray(rng.normal(size=(tokens, 2, size)), jnp.float32) for size in (8, 4))
    slots = jnp.asarray([37, 5, -1, 48][:tokens])
    new = jax.jit(write_pages, donate_argnums=0)(pages, k, v, slots)
    want_k, want_v = np.zeros((3, 2, 16, 8), np.float32), np.zeros((3, 2, 16, 4), np.float32)
    for i, slot in enumerate([37, 5][:tokens]):
        want_k[slot // 16, :, slot % 16], want_v[slot // 16, :, slot % 16] = k[i], v[i]
    np.testing.assert_array_equal(new.k, want_k)
    np.testing.assert_array_equal(new.v, want_v)
    assert pages.k.is_deleted() and pages.v is not None and pages.v.is_deleted()
    dropped = write_pages(new, k[:1], v[:1], jnp.asarray([-1]))
    np.testing.assert_array_equal(dropped.k, want_k)


@pytest.mark.parametrize("name, error", [("int8", 0.5 / 127), ("float8_e4m3fn", 2.0**-4)])
def test_packed_pages_are_off_by_half_a_step_at_most(name, error):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(32, 2, 8)), jnp.float32).at[3].set(0.0)
    pages = write_pages(init_pages(2, 16, 2, 8, dtype=name), x, x, jnp.arange(32))
    k, v = paged.held(pages, np.arange(32), 8)
    top = np.abs(x).max(-1, keepdims=True)
    limit = top if name == "int8" else np.maximum(np.abs(x), top * 2.0**-14)  # float8's step goes with the number
    assert (np.abs(k - np.asarray(x)) <= error * limit * (1 + 1e-6)).all()
    np.testing.assert_array_equal(k, v)


def bad(change):
    args, options, _ = paged.make(PLAIN)
    q, pages, kv_lens, tables, cu_q_lens = args
    return change(q, pages, kv_lens, tables.at[:, -1].set(0), cu_q_lens), options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, p, n, t, c: (q[0], p, n, t, c), r"q must be \[T, N, H\]"),
        (lambda q, p, n, t, c: (jnp.tile(q, 2), p, n, t, c), r"pages.k .* must be \[P, K, S, 32 or more\]"),
        (lambda q, p, n, t, c: (q[:, :1], p, n, t, c), "do not divide the 1 heads"),
        (lambda q, p, n, t, c: (q.astype("bfloat16"), p, n, t, c), "pages must be of q's bfloat16"),
        (lambda q, p, n, t, c: (q, p, n * 1.0, t, c), "kv_lens must be integers"),
        (lambda q, p, n, t, c: (q, p, n, t[:2], c), "page_tables must be integers"),
        (lambda q, p, n, t, c: (q, p, n, t, c[:-1]), "cu_q_lens must be integers"),
        (lambda q, p, n, t, c: (q, dataclasses.replace(p, v=None), n, t, c), "pages without v need one head"),
        (lambda q, p, n, t, c: (q, dataclasses.replace(p, k_scales=n), n, t, c), "k_scales must be None"),
        (lambda q, p, n, t, c: (q, init_pages(2, 16, 2, 16, dtype="int4"), n, t, c), "dtype=int4 is none of"),
    ],
)
def test_bad_calls_name_the_argument(change, message):
    with pytest.raises(UserError, match=message):
        args, options = bad(change)
        ragged_paged_attention(*args, **options)


WRONG = [
    (lambda q, p, n, t, c: (q, p, n, t.at[1, 0].set(-1), c), r"page_tables\[1\] has page -1"),
    (lambda q, p, n, t, c: (q, p, n, t.at[1, 1].set(99), c), r"page_tables\[1\] has page 99"),
    (lambda q, p, n, t, c: (q, p, n.at[2].set(999), t, c), r"kv_lens\[2\]=999 is beyond the 64 slots"),
    (lambda q, p, n, t, c: (q, p, n.at[0].set(0), t, c), r"kv_lens\[0\]=0 must count"),
    (lambda q, p, n, t, c: (q, p, n, t, c.at[2].set(0)), "cu_q_lens must go up"),
    (lambda q, p, n, t, c: (q, p, n, t, c + 1), "cu_q_lens must go up"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_debug_mode_finds_wrong_values(change, message):
    args, options = bad(change)
    with debug.checking(), pytest.raises(UserError, match=message):
        ragged_paged_attention(*args, **options)
    assert attend(*args).shape == args[0].shape


def test_debug_mode_finds_wrong_values_under_jit():
    args, _ = bad(WRONG[0][0])
    with debug.checking(), pytest.raises(jax.errors.JaxRuntimeError, match=WRONG[0][1]):
        jax.block_until_ready(jax.jit(lambda *args: ragged_paged_attention(*args))(*args))
        jax.effects_barrier()


@pytest.mark.parametrize(("slots", "message"), [([0, 32], "slots has 32"), ([5, 5], "one slot twice")])
def test_debug_mode_finds_wrong_slots(slots, message):
    pages, k = init_pages(2, 16, 1, 8, dtype="float32"), jnp.ones((2, 1, 8))
    with debug.checking(), pytest.raises(UserError, match=message):
        write_pages(pages, k, k, jnp.asarray(slots))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("heads", paged.OPTIONS["heads"])
@pytest.mark.parametrize("packed", paged.OPTIONS["packed"])
@pytest.mark.parametrize("batch", paged.BATCHES)
def test_the_full_product_in_float32(implementation, batch, packed, heads):
    chosen = {"batch": (batch,), "dtype": ("float32",), "packed": (packed,), "heads": (heads,), "lse": (True,)}
    options = paged.OPTIONS | chosen
    for case in filter(paged.allowed, everything(options)):
        args, options, kept = paged.make(case)
        got = ragged_paged_attention(*args, return_lse=True, implementation=implementation, **options)
        for a, b in zip(got, paged.formula(args, options, kept)):
            assert_float32(paged.name(case), a, b)
    # A process cannot hold the programs of all these tests.
    jax.clear_caches()


def test_pages_are_a_pytree():
    leaves, tree = jax.tree.flatten(init_pages(1, 16, 1, 8, value_dim=4, latent=True))
    assert len(leaves) == 1 and isinstance(jax.tree.unflatten(tree, leaves), Pages)

"""flash_attention: `xla` against `reference`, both against jax.nn, closed forms, and a mask written out in numpy."""

import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from llm_jax.base.errors import UserError
from llm_jax.kernels import flash_attention
from llm_jax.kernels.flash_attention import bounds, xla
from llm_jax.kernels.flash_attention.bounds import Tiles, Tiling, block_bounds, key_ranges, tiling
from llm_jax.kernels.flash_attention.spec import attention_spec, mask_arrays
from llm_jax.kernels.platform import cores_per_device
from llm_jax.kernels.tiles import trying
from tests.kernels.attention_cases import numpy_mask

OPTIONS = {
    "causal": {},
    "full": dict(causal=False),
    "window": dict(window=37),
    "window_both_sides": dict(causal=False, window=20),
    "chunk": dict(chunk=50),
    "softcap_scale": dict(softcap=2.0, scale=0.5),
    "alibi": dict(alibi_slopes=True),
    "alibi_softcap_full": dict(alibi_slopes=True, softcap=3.0, causal=False),
    "sinks": dict(sinks=True),
    "segments": dict(segment_ids=True),
    "segments_sinks_window": dict(segment_ids=True, sinks=True, window=9),
    "positions": dict(positions=True, chunk=40),
    "ranges": dict(kv_ranges=True, causal=False),
    "all": dict(
        segment_ids=True, positions=True, kv_ranges=True, window=60, softcap=4.0, alibi_slopes=True, sinks=True
    ),
}
SHAPES = {
    "blocks": (2, 300, 300, 4, 2, 16, 16),
    "one_tile": (3, 40, 40, 6, 2, 8, 12),
    "cross": (2, 9, 280, 4, 1, 8, 8),
}


def make(shape, options, dtype=jnp.float32, seed=0):
    """q, k, v, sinks and slopes (differentiable) and the remaining options of a call."""
    B, T, S, N, K, H, Hv = SHAPES[shape]
    rng = np.random.default_rng(seed)
    options = dict(options)
    arrays = {
        "q": jnp.asarray(rng.normal(size=(B, T, N, H)), dtype),
        "k": jnp.asarray(rng.normal(size=(B, S, K, H)), dtype),
        "v": jnp.asarray(rng.normal(size=(B, S, K, Hv)), dtype),
    }
    if options.pop("alibi_slopes", False):
        arrays["alibi_slopes"] = jnp.asarray(rng.uniform(0.01, 0.3, N), jnp.float32)
    if options.pop("sinks", False):
        arrays["sinks"] = jnp.asarray(rng.normal(size=N), jnp.float32)
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


def value_and_grads(arrays, options, implementation, seed=1):
    rng = np.random.default_rng(seed)
    B, T, N = arrays["q"].shape[:3]
    d_out = jnp.asarray(rng.normal(size=(B, T, N, arrays["v"].shape[3])), jnp.float32)
    d_lse = jnp.asarray(rng.normal(size=(B, T, N)), jnp.float32)

    @jax.jit
    def run(arrays):
        def loss(arrays):
            out, lse = flash_attention(**arrays, **options, return_lse=True, implementation=implementation)
            finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
            return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(finite * d_lse), (out, lse)

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    (_, (out, lse)), grads = run(arrays)
    return out, lse, grads


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_xla_equals_reference(name, shape):
    arrays, options = make(shape, OPTIONS[name])
    out, lse, grads = value_and_grads(arrays, options, "xla")
    want_out, want_lse, want_grads = value_and_grads(arrays, options, "reference")
    np.testing.assert_allclose(out, want_out, atol=2e-6)
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(want_lse))
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=2e-6)
    for key in arrays:
        assert np.isfinite(grads[key]).all()
        assert relative(grads[key], want_grads[key]) < 3e-6, key


@pytest.mark.parametrize("name", ["causal", "window", "window_both_sides", "chunk", "segments", "positions", "ranges"])
def test_equals_jax_nn_under_the_written_out_mask(name):
    arrays, options = make("one_tile", OPTIONS[name])
    B, T, N = arrays["q"].shape[:3]
    seen = numpy_mask(options, B, T, T)
    some = seen.any(-1)
    v = arrays["v"][..., :8]
    want = jax.nn.dot_product_attention(arrays["q"], arrays["k"], v, mask=jnp.asarray(seen)[:, None])
    for implementation in ("xla", "reference"):
        out, lse = flash_attention(
            arrays["q"], arrays["k"], v, **options, return_lse=True, implementation=implementation
        )
        np.testing.assert_allclose(np.asarray(out)[some], np.asarray(want)[some], atol=2e-6)
        assert not np.asarray(out)[~some].any()
        assert np.isneginf(np.asarray(lse)[~some]).all()


def test_closed_forms():
    B, T, N, H = 1, 260, 2, 8
    v = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, N, H)), jnp.float32)
    zero = jnp.zeros((B, T, N, H))
    out, lse = flash_attention(zero, zero, v, return_lse=True)
    counts = np.arange(1, T + 1)[None, :, None]
    np.testing.assert_allclose(out, np.cumsum(v, 1) / counts[..., None], atol=1e-5)
    np.testing.assert_allclose(lse, np.broadcast_to(np.log(counts), lse.shape), rtol=1e-6)
    # A sink of logit log(n) weighs as much as n keys of score 0.
    out, lse = flash_attention(zero, zero, v, sinks=jnp.log(jnp.array([1.0, 3.0])), return_lse=True)
    np.testing.assert_allclose(out, np.cumsum(v, 1) / (counts + [1, 3])[..., None], atol=1e-5)
    np.testing.assert_allclose(lse, np.log(counts + [1, 3]), rtol=1e-6)
    # A window of 1 is the token itself.
    np.testing.assert_array_equal(flash_attention(v, v, v, window=1), v)
    # Keys spread over 8 positions, slope log 2: weights 2^-distance.
    out = flash_attention(zero[:, :8], zero[:, :8], v[:, :8], alibi_slopes=jnp.log(2.0) * jnp.ones(N))
    weights = 2.0 ** -np.arange(8)[::-1]
    np.testing.assert_allclose(out[0, 7], np.einsum("s,snh->nh", weights / weights.sum(), v[0, :8]), rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_that_see_nothing(implementation):
    arrays, options = make("blocks", dict(segment_ids=True))
    dead = np.asarray(options["segment_ids"]) == 0
    out, lse, grads = value_and_grads(arrays, options, implementation)
    assert not np.asarray(out)[dead].any() and np.isneginf(np.asarray(lse)[dead]).all()
    for key in "qkv":
        assert not np.asarray(grads[key])[dead].any()
        assert np.isfinite(grads[key]).all()


def test_a_document_is_untouched_by_its_neighbours():
    """Bit for bit, outputs and gradients, at block edges that documents straddle."""
    B, T, N, H = 2, 520, 2, 16
    rng = np.random.default_rng(3)
    segments = np.repeat([1, 2, 3, 0], [150, 111, 200, 59])[None].repeat(B, 0).astype(np.int32)
    q, k, v, g = (rng.normal(size=(B, T, N, H)).astype(np.float32) for _ in range(4))
    mine = segments == 2

    @jax.jit
    def run(q, k, v, g, segments):
        f = lambda q, k, v: flash_attention(q, k, v, segment_ids=segments)  # noqa: E731
        out, pull = jax.vjp(f, q, k, v)
        return out, pull(g)

    first = jax.block_until_ready(run(q, k, v, g, segments))  # Its inputs are these arrays, not copies of them.
    for x in (q, k, v, g):
        x[~mine] = 30.0 * rng.normal(size=x[~mine].shape)
    second = run(q, k, v, g, segments)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        np.testing.assert_array_equal(np.asarray(a)[mine], np.asarray(b)[mine])
        assert not np.array_equal(a, b)


def test_same_call_twice_is_the_same_to_the_bit():
    arrays, options = make("blocks", OPTIONS["all"])
    for a, b in zip(*(jax.tree.leaves(value_and_grads(arrays, options, "xla")) for _ in range(2))):
        np.testing.assert_array_equal(a, b)


def test_numerical_gradient():
    arrays, options = make("one_tile", dict(sinks=True, alibi_slopes=True, softcap=3.0, segment_ids=True))
    names = list(arrays)

    def f(*values):
        out, lse = flash_attention(**dict(zip(names, values)), **options, return_lse=True)
        return out, jnp.where(jnp.isfinite(lse), lse, 0.0)

    check_grads(f, tuple(arrays.values()), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_decoding_equals_the_full_pass():
    arrays, _ = make("one_tile", {})
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    full = flash_attention(q, k, v)
    cache = [jnp.pad(x, ((0, 0), (0, 1000), (0, 0), (0, 0)), constant_values=7.0) for x in (k, v)]
    for t in (0, 17, 39):
        positions = jnp.full((q.shape[0], 1), t, jnp.int32)
        one = flash_attention(q[:, t : t + 1], *cache, q_positions=positions)
        np.testing.assert_allclose(one[:, 0], full[:, t], atol=2e-6)
    ragged = jnp.array([3, 20, 39], jnp.int32)
    one = flash_attention(q[jnp.arange(3), ragged][:, None], *cache, q_positions=ragged[:, None])
    np.testing.assert_allclose(one[:, 0], full[jnp.arange(3), ragged], atol=2e-6)


def test_memory_is_linear():
    """No buffer of T x S scores, forward or backward; doubling the length doubles the temporaries."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
        f = lambda q, k, v, s: flash_attention(q, k, v, segment_ids=s).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x, segments).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    small, large = temporaries(2048), temporaries(4096)
    assert large < 2 * 4096 * 4096 * 4 / 8
    assert large < 2.2 * small


WAYS = [Tiles(block=256, tile_mib=16), Tiles(block=16, tile_mib=1, whole=2048), Tiles(block=16, tile_mib=1, apart=1)]


@pytest.fixture(params=WAYS, ids=["loops", "short", "apart"])
def each_way(request):
    """Through the loops of `xla.py`, for all heads or each key head, and as `xla_short.py` does it."""
    with trying("flash_attention", "xla", request.param):
        yield


@pytest.mark.usefixtures("each_way")
def test_under_every_transformation():
    """jit, scan, checkpoint, vmap and grad, nested, give what the plain calls give."""
    arrays, options = make("one_tile", OPTIONS["segments"])
    q, k, v, segments = arrays["q"], arrays["k"], arrays["v"][..., :8], options["segment_ids"]

    def attend(x, segments):
        return x + flash_attention(x, k, v, segment_ids=segments)

    def plain(x):
        for _ in range(3):
            x = attend(x, segments)
        return jnp.sum(x**2)

    def nested(x):
        layer = jax.checkpoint(lambda x: attend(x, segments))
        return jnp.sum(jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)[0] ** 2)

    want = jax.grad(plain)(q)
    assert relative(jax.jit(jax.grad(nested))(q), want) < 1e-6
    xs = jnp.stack([q, 2 * q])
    batched = jax.vmap(jax.grad(plain))(xs)
    assert relative(batched[0], want) < 1e-6


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_key_head_by_itself_inside_shard_map(check_vma):
    """As the test below, without sinks, which keep heads together."""
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 60, n, 8)), jnp.float32) for n in (8, 4, 4))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 60)), 1), jnp.int32)
    heads = P("data", None, "tensor", None)

    def f(q, k, v, segments):
        return flash_attention(q, k, v, segment_ids=segments, implementation="xla")

    sharded = jax.shard_map(
        f, mesh=mesh, in_specs=(heads, heads, heads, P("data")), out_specs=heads, check_vma=check_vma
    )

    def grads(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)))(q, k, v, segments)

    want = grads(lambda q, k, v, s: flash_attention(q, k, v, segment_ids=s, implementation="reference"))
    with trying("flash_attention", "xla", WAYS[2]):
        assert tiling(attention_spec(q, k, v, segment_ids=segments), "cpu").apart
        for a, b in zip(grads(sharded), want, strict=True):
            assert relative(a, b) < 2e-6


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """Batch over 2 devices, heads over 2, keys shared along the batch axis: gradients are summed where replicated."""
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 260, 4, 8)), jnp.float32) for _ in range(3))
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (4, 260)), 1), jnp.int32)

    def f(q, k, v, sinks, segments):
        return flash_attention(q, k, v, sinks=sinks, segment_ids=segments)

    heads = P("data", None, "tensor", None)
    sharded = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(heads, heads, heads, P("tensor"), P("data")),
        out_specs=heads,
        check_vma=check_vma,
    )

    def grads(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2, 3)))(q, k, v, sinks, segments)

    for a, b in zip(grads(sharded), grads(f)):
        assert relative(a, b) < 2e-6


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(window=0), "window"),
        (dict(chunk=2.5), "chunk"),
        (dict(softcap=-1.0), "softcap"),
        (dict(implementation="triton"), "triton"),
        (dict(sinks=jnp.zeros(3)), "sinks"),
        (dict(alibi_slopes=jnp.zeros(3)), "alibi_slopes"),
        (dict(segment_ids=jnp.zeros((3, 39), jnp.int32)), "segment_ids"),
        (dict(segment_ids=jnp.zeros((3, 40))), "segment_ids"),
        (dict(kv_positions=jnp.zeros((3, 40), jnp.int32)), "q_positions"),
        (dict(kv_ranges=jnp.zeros((3, 40, 3), jnp.int32)), "kv_ranges"),
        (dict(k=jnp.zeros((3, 40, 4, 8)), v=jnp.zeros((3, 40, 4, 8))), "heads"),
        (dict(v=jnp.zeros((3, 41, 2, 8))), "v "),
        (dict(v=jnp.zeros((3, 40, 2, 0))), "empty"),
        (dict(q=jnp.zeros((3, 0, 4, 8))), r"empty.*\(3, 0, 4, 8\)"),
        (dict(k=jnp.zeros((3, 40, 2, 8), jnp.bfloat16)), "dtype"),
    ],
)
def test_bad_calls_name_the_argument(change, word):
    arrays, _ = make("one_tile", {})
    with pytest.raises(UserError, match=word) as caught:
        flash_attention(**arrays | change)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["causal", "window", "window_both_sides", "chunk", "segments", "positions", "ranges"])
def test_bounds_leave_out_only_what_nobody_sees(name):
    """Every visible key lies within the blocks visited; for one long row these are exactly the blocks needed."""
    arrays, options = make("blocks", OPTIONS[name])
    spec = attention_spec(**arrays, **options)
    tiles = Tiling(groups=2, rows=1, q_blocks=10, q_block=32, kv_blocks=13, kv_block=24)
    keys = ("segment_ids", "q_positions", "kv_positions", "kv_ranges")
    low, high = block_bounds(spec, tiles, mask_arrays(spec, **{k: options.get(k) for k in keys}))
    seen = np.zeros((2, 320, 312), bool)
    seen[:, :300, :300] = numpy_mask(options, 2, 300, 300)
    needed = seen.reshape(2, 10, 32, 13, 24).any((2, 4))
    visited = (np.arange(13) >= np.asarray(low)[..., None]) & (np.arange(13) < np.asarray(high)[..., None])
    assert not (needed & ~visited).any()
    if name in ("causal", "window", "window_both_sides"):
        np.testing.assert_array_equal(needed, visited)
    if name == "segments":
        causal_blocks = 2 * np.ceil(np.minimum(np.arange(1, 11) * 32, 300) / 24).sum()
        assert visited.sum() < 0.8 * causal_blocks


@pytest.fixture
def cores(monkeypatch):
    """Says how many cores of the CPU a device has."""
    return lambda n: monkeypatch.setattr(bounds, "cores_per_device", lambda: n)


@pytest.mark.parametrize(("rows", "length", "block"), [(6, 1536, 128), (2, 2048, 256), (1, 1536, 256)])
def test_blocks_on_a_cpu_are_small_where_the_rows_still_fill_a_tile(cores, rows, length, block):
    cores(2)
    q = jax.ShapeDtypeStruct((rows, length, 8, 32), jnp.float32)
    tiles = tiling(attention_spec(q, q, q), "cpu")
    assert (tiles.q_block, tiles.kv_block, tiles.rows, tiles.whole) == (block, block, rows, False)


@pytest.mark.parametrize(
    ("rows", "length", "packed", "block", "together"),
    [
        (6, 768, False, 128, 1),
        (8, 256, False, 128, 4),
        (8, 256, True, 128, 4),
        (1, 400, False, 200, 1),
        (64, 128, False, 128, 8),
    ],
)
def test_short_rows_on_a_cpu_meet_all_their_keys_at_once(cores, rows, length, packed, block, together):
    cores(2)
    q = jax.ShapeDtypeStruct((rows, length, 8, 32), jnp.float32)
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32) if packed else None
    tiles = tiling(attention_spec(q, q, q, segment_ids=segments), "cpu")
    assert (tiles.q_block, tiles.kv_block, tiles.rows, tiles.whole) == (block, length, together, True)


@pytest.mark.parametrize("change", [{"segment_ids": (8, 512)}, {"q_positions": (8, 512)}, {"kv_ranges": (8, 512, 2)}])
def test_rows_whose_mask_is_data_go_through_loops(cores, change):
    cores(2)
    q = jax.ShapeDtypeStruct((8, 512, 8, 32), jnp.float32)
    arrays: Any = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in change.items()}
    assert not tiling(attention_spec(q, q, q, **arrays), "cpu").whole
    assert tiling(attention_spec(q, q, q), "cpu").whole and not tiling(attention_spec(q, q, q), "gpu").whole


@pytest.mark.parametrize(
    ("shape", "kv_heads", "change", "want"),
    [
        ((8, 2048, 8, 32), 8, {}, Tiling(64, 1, 8, 256, 8, 256, apart=True)),
        ((2, 512, 8, 32), 8, {}, Tiling(16, 1, 4, 128, 16, 128, apart=True)),
        ((8, 1, 8, 32), 8, {}, Tiling(1, 8, 1, 1, 4, 512)),
        ((2, 2048, 32, 64), 8, {"window": 100}, Tiling(16, 1, 16, 128, 16, 128, apart=True)),
        ((8, 200, 8, 32), 8, {}, Tiling(64, 1, 2, 104, 14, 152, apart=True)),
        ((8, 2048, 8, 32), 8, {"segment_ids": (8, 2048)}, Tiling(64, 1, 16, 128, 16, 128, apart=True)),
        ((8, 2048, 8, 32), 8, {"q_positions": (8, 2048)}, Tiling(64, 1, 16, 128, 16, 128, apart=True)),
        ((8, 2048, 8, 32), 8, {"sinks": (8,)}, Tiling(1, 8, 16, 128, 16, 128)),
    ],
)
def test_tiles_of_a_device_that_is_one_core(cores, shape, kv_heads, change, want):
    """What a core's cache holds: one key head at a time, if nothing is said of heads."""
    cores(1)
    q = jax.ShapeDtypeStruct(shape, jnp.float32)
    k = jax.ShapeDtypeStruct((shape[0], max(shape[1], 2048), kv_heads, shape[3]), jnp.float32)
    arrays: Any = {n: jax.ShapeDtypeStruct(x, jnp.int32) if isinstance(x, tuple) else x for n, x in change.items()}
    spec = attention_spec(q, k, k, **arrays)
    assert tiling(spec, "cpu") == want
    short = tiling(replace(spec, q_len=256, kv_len=256), "cpu")
    assert short.whole == ("q_positions" not in change)
    if want.apart:
        assert xla.held_bytes(spec, "cpu") == 3 * 4 * spec.group * want.q_block * want.kv_block


def test_cores_are_divided_among_devices(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    for devices, cores in ((1, 16), (5, 3), (16, 1), (64, 1)):
        monkeypatch.setattr(jax, "local_device_count", lambda devices=devices: devices)
        assert cores_per_device() == cores


def test_a_single_tile_goes_the_way_of_the_loops():
    q = jax.ShapeDtypeStruct((8, 128, 4, 32), jnp.float32)
    assert not tiling(attention_spec(q, q, q), "cpu").whole


def test_short_rows_of_several_groups():
    """3 rows of which a tile has room for 2, so that it takes one; a head whose sink is -inf has none."""
    rng = np.random.default_rng(0)
    q, k, v, weights = (jnp.asarray(rng.normal(size=(3, 256, n, 8)), jnp.float32) for n in (8, 2, 2, 8))
    arrays = q, k, v, jnp.asarray(rng.normal(size=8), jnp.float32).at[3].set(-jnp.inf)
    with trying("flash_attention", "xla", Tiles(block=256, tile_mib=1, whole=256)):
        tiles = tiling(attention_spec(*arrays[:3]), "cpu")
        assert (tiles.groups, tiles.rows, tiles.whole) == (3, 1, True)

        def run(implementation):
            def loss(*arrays):
                *qkv, sinks = arrays
                return jnp.sum(weights * flash_attention(*qkv, sinks=sinks, implementation=implementation))

            return jax.value_and_grad(loss, (0, 1, 2, 3))(*arrays)

        (value, grads), (want, exact) = run("xla"), run("reference")
    assert abs(value - want) < 1e-5 * jnp.abs(weights).sum()
    for a, b in zip(grads, exact, strict=True):
        assert relative(a, b) < 1e-5


def test_keys_of_short_rows_are_those_that_shapes_allow():
    """Causal queries align with the last keys; the first of 40 queries of 24 keys see none, and get one."""

    def keys(T, S, **options):
        q, k = (jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (T, S))
        with trying("flash_attention", "xla", Tiles(block=16, tile_mib=1, whole=64)):
            spec = attention_spec(q, k, k, **options)
            return [(found.start, found.stop) for found in key_ranges(spec, tiling(spec, "cpu"))]

    assert keys(48, 48) == [(0, 16), (0, 32), (0, 48)]
    assert keys(48, 48, window=9) == [(0, 16), (8, 32), (24, 48)]
    assert keys(48, 48, causal=False) == [(0, 48)] * 3
    assert keys(48, 48, chunk=16) == [(0, 16), (16, 32), (32, 48)]
    assert keys(20, 44) == [(0, 40), (0, 44)]
    assert keys(40, 24) == [(0, 1), (0, 16), (0, 24)]


def test_dropout_of_the_weights():
    """Reference only: each head's weights go by its own key, the rest over 1 - rate; no share dropped, no change."""
    random = np.random.default_rng(0)
    B, T, N, K, H = 2, 6, 4, 2, 8
    q, k, v = (jnp.asarray(random.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), (B, N)))
    dropping = {"dropout_rate": 0.4, "dropout_keys": keys}
    out, lse = flash_attention(q, k, v, **dropping, return_lse=True, implementation="reference")
    _, plain_lse = flash_attention(q, k, v, return_lse=True, implementation="reference")
    np.testing.assert_array_equal(lse, plain_lse)
    scores = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, 2)) / np.sqrt(H)
    probs = np.exp(
        np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf) - np.asarray(lse).transpose(0, 2, 1)[..., None]
    )
    for b in range(B):
        for n in range(N):
            kept = np.asarray(jax.random.bernoulli(jax.random.wrap_key_data(keys[b, n]), 0.6, (T, T)))
            want = (probs[b, n] * kept / 0.6) @ np.asarray(v[b, :, n // (N // K)])
            np.testing.assert_allclose(out[b, :, n], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_dropout_is_refused_where_there_is_none(implementation):
    x = jnp.ones((1, 4, 2, 8))
    keys = jnp.zeros((1, 2, 2), jnp.uint32)
    with pytest.raises(UserError, match="dropout_rate.*reference"):
        flash_attention(x, x, x, dropout_rate=0.1, dropout_keys=keys, implementation=implementation)
    with pytest.raises(UserError, match="go together"):
        flash_attention(x, x, x, dropout_rate=0.1, implementation="reference")

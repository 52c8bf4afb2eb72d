"""flash_attention's TPU kernels in the TPU interpreter: against float64, and what no query may see."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import flash_attention, supports
from llm_jax.kernels.flash_attention.spec import attention_spec, mask_arrays
from llm_jax.kernels.flash_attention.tpu import Tiles
from llm_jax.kernels.flash_attention.tpu_schedule import (
    FIRST,
    LAST,
    MASKED,
    UNMASKED,
    blocks_of,
    inner,
    outer,
    schedule,
)
from llm_jax.kernels.tiles import trying
from tests.kernels import devices
from tests.kernels.attention_cases import (
    BATCH,
    OPTIONS,
    compiled,
    cotangents,
    formula,
    make_case,
    numpy_mask,
)
from tests.kernels.numerics import assert_float32, assert_half, distance
from tests.kernels.pairwise import covering, everything

TILES = Tiles(*[128] * 6)
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
"""Interpreters compile longer than they run."""
PER_HEAD = {"bfloat16": 1e-2, "float16": 2e-3}
"""Gradients of slopes and sinks are few numbers, sums that cancel; the saved output that they need is rounded."""


def check(case):
    """Against the formula, with NaN in all that nobody sees; then again with numbers there and one key far larger:
    queries that may not see this key get the same bits."""
    arrays, options = make_case(**case)
    d_out, d_lse = cotangents(arrays)
    (B, T), S = arrays["q"].shape[:2], arrays["k"].shape[1]
    seen = numpy_mask(options, B, T, S)
    unseen = {"q": ~seen.any(2), "k": ~seen.any(1), "v": ~seen.any(1)}
    holes = {name: jnp.where(unseen[name][:, :, None, None], jnp.nan, arrays[name]) for name in "qkv"}
    key = int(np.abs(seen.sum((0, 1)) - B * T / 2).argmin())  # that some see and some do not, if there is one
    changed = {name: arrays[name].at[:, key].multiply(1e4) for name in "kv"}
    run = compiled(options, "tpu", QUICK)
    with devices.interpreter("tpu"), trying("flash_attention", "tpu", TILES):
        got = run(arrays | holes, d_out, d_lse)
        again = run(arrays | changed, d_out, d_lse)
    exact = formula(arrays, options, seen, d_out, d_lse)
    plain = compiled(options, "reference")(arrays, d_out, d_lse)
    for name, x in got.items():
        assert x.dtype == plain[name].dtype
        if name == "lse" or case["dtype"] == "float32":
            assert_float32(name, x, exact[name])
        elif name in "qkv" or name == "out":
            assert_half(name, x, plain[name], exact[name])
        else:
            assert distance(x, exact[name]) < PER_HEAD[case["dtype"]], name
    untouched = ~seen[:, :, key]
    for name in ("out", "lse", "q"):
        np.testing.assert_array_equal(np.asarray(again[name])[untouched], np.asarray(got[name])[untouched], name)
    assert not untouched.all() and not np.array_equal(again["out"], got["out"])


@pytest.mark.parametrize("case", covering(OPTIONS), ids=lambda case: "-".join(str(x) for x in case.values()))
def test_every_pair_of_options(case):
    check(case)


@pytest.mark.slow
def test_every_combination_of_options():
    small = OPTIONS | {"heads": [(4, 2, 16, 24)], "dtype": ["float32", "bfloat16"]}
    for case in everything(small):
        check(case)


@pytest.mark.parametrize(
    "mask, data, lengths, chunk",
    [
        ("causal", "none", (130, 270), None),
        ("causal", "segments", (200, 140), None),
        ("full", "none", (200, 140), 70),
        ("full", "segments", (300, 300), None),
        ("full", "ranges", (130, 270), None),
        ("window", "none", (300, 300), None),
        ("window_both_sides", "none", (200, 140), None),
        ("window_both_sides", "positions", (130, 270), 70),
    ],
)
def test_the_schedule_visits_what_is_visible(mask, data, lengths, chunk):
    """Each block once, in order, if something in it is visible; without a mask only where everything is."""
    arrays, options = make_case(mask, data, (1, 1, 8, 8), lengths, None, False, False, chunk, "float32")
    spec = attention_spec(**arrays, **options)
    tiles = blocks_of(spec, 128, 128)
    names = ("segment_ids", "q_positions", "kv_positions", "kv_ranges")
    masks = mask_arrays(spec, **{name: options.get(name) for name in names})
    seen = np.zeros((BATCH, tiles.q_padded, tiles.kv_padded), bool)
    seen[:, : lengths[0], : lengths[1]] = numpy_mask(options, BATCH, *lengths)
    blocks = (BATCH, tiles.q_blocks, 128, tiles.kv_blocks, 128)
    some = seen.reshape(blocks).any((2, 4))
    seen[:, lengths[0] :] = True  # what is not there needs no mask
    every = seen.reshape(blocks).all((2, 4))
    for by_keys, row in itertools.product((False, True), range(BATCH)):
        plan = schedule(spec, tiles, masks, by_keys=by_keys)
        steps = [int(plan.at(np.asarray(plan.steps), row, s)) for s in range(int(plan.count))]
        visits = [(outer(step), inner(step)) for step in steps if step & 15]
        assert visits == sorted(set(visits)) and len(steps) <= plan.length
        count = tiles.kv_blocks if by_keys else tiles.q_blocks
        assert {i for i, _ in visits} == set(range(count))
        for bit, end in ((FIRST, min), (LAST, max)):
            assert at_bits(steps, bit) == {end(visit for visit in visits if visit[0] == i) for i in range(count)}
        visible, whole = ({tuple(at) for at in np.argwhere(x[row].T if by_keys else x[row])} for x in (some, every))
        assert at_bits(steps, MASKED | UNMASKED) >= visible
        assert at_bits(steps, UNMASKED) <= whole
        if data == "none":
            assert at_bits(steps, MASKED | UNMASKED) == visible and at_bits(steps, UNMASKED) == whole


def at_bits(steps, bits):
    """Blocks of the steps that have one of the bits."""
    return {(outer(step), inner(step)) for step in steps if step & bits}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"platform": "cpu"}, "written for TPUs, not for cpu"),
        ({"head": 320}, "head sizes up to 256"),
        ({"length": 2**20}, "scalar memory"),
        ({"dropout_rate": 0.1, "dropout_keys": jax.ShapeDtypeStruct((1, 1, 2), jnp.uint32)}, "dropout"),
    ],
)
def test_what_is_refused(change, reason):
    options = dict(change)
    platform, head, length = options.pop("platform", "tpu"), options.pop("head", 128), options.pop("length", 2**18)
    x = jax.ShapeDtypeStruct((1, length, 1, head), jnp.bfloat16)
    said = supports("flash_attention", x, x, x, implementation="tpu", platform=platform, **options)
    assert said is None if reason is None else re.search(reason, said)


SMALL = dict(
    heads=(2, 1, 16, 24), lengths=(150, 150), softcap=None, alibi=True, sinks=True, chunk=None, dtype="float32"
)


@pytest.mark.parametrize("way", ["shard_map", "vmap"])
def test_under_transformations(way, monkeypatch):
    """Rows of the batch on two devices, slopes and sinks on both; or one by one. Gradients as in one call."""
    monkeypatch.setattr("llm_jax.kernels.choice.target_platform", lambda: "tpu")
    arrays, options = make_case(mask="causal", data="segments", **SMALL)
    segments = options.pop("segment_ids")
    d_out, _ = cotangents(arrays)
    P = jax.sharding.PartitionSpec
    ours = {name: name in "qkv" for name in arrays}

    def grads(implementation, wrap=lambda attend: attend):
        def attend(arrays, segments):
            return flash_attention(**arrays, **options, segment_ids=segments, implementation=implementation)

        out, pull = jax.vjp(lambda arrays: wrap(attend)(arrays, segments), arrays)
        return pull(d_out)[0] | {"out": out}

    def shard_map(attend):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        specs = {name: P("data") if mine else P() for name, mine in ours.items()}
        # The interpreter does not track what varies over the mesh; compiled kernels do (`aot/test_flash_attention.py`).
        return jax.shard_map(attend, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=False)

    def vmap(attend):
        def one(arrays, segments):
            return attend({name: x[None] if ours[name] else x for name, x in arrays.items()}, segments[None])[0]

        return jax.vmap(one, ({name: 0 if mine else None for name, mine in ours.items()}, 0))

    with devices.interpreter("tpu"), trying("flash_attention", "tpu", TILES):
        got = jax.jit(lambda: grads("tpu", {"shard_map": shard_map, "vmap": vmap}[way]), compiler_options=QUICK)()
    want = grads("reference")
    for name in want:
        assert_float32(name, got[name], want[name])

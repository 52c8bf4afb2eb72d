"""flash_attention's TPU kernels in the TPU interpreter: against float64, and what no query may see."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import flash_attention, supports
from llm_jax.kernels.flash_attention.spec import attention_spec, mask_arrays
from llm_jax.kernels.flash_attention.tpu import Tiles
from llm_jax.kernels.flash_attention.tpu_blocks import Blocks
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
from tests.conftest import forget_programs
from tests.kernels import devices
from tests.kernels.attention_cases import (
    BATCH,
    OPTIONS,
    QUICK,
    RISING,
    SHARED,
    called,
    check,
    cotangents,
    make_case,
    numpy_mask,
)
from tests.kernels.numerics import assert_float32
from tests.kernels.pairwise import covering, everything

TILES = Tiles(*[128] * 6)
HEADS = {(64, 64): (4, 2), (96, 96): (2, 1), (192, 128): (1, 1), (256, 256): (2, 1)}
CASES = covering(OPTIONS | {"heads": list(HEADS.values())}, lambda case: case["heads"] == HEADS[case["sizes"]])
CASES += [*SHARED, RISING]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x) for x in case.values()))
def test_every_pair_of_options(case):
    check(case, "tpu", TILES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "mask, data, lengths", list(itertools.product(OPTIONS["mask"], OPTIONS["data"], OPTIONS["lengths"]))
)
def test_every_combination_of_options(mask, data, lengths, dtype):
    one = {"mask": [mask], "data": [data], "lengths": [lengths], "sizes": [(16, 24)], "heads": [(2, 1)]}
    for case in everything(OPTIONS | one | {"dtype": [dtype]}):
        check(case, "tpu", TILES, reference=called)
    forget_programs()


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
    arrays, options = make_case(mask, data, (8, 8), (1, 1), lengths, None, False, False, chunk, "float32")
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


def test_rows_with_fewer_steps_copy_nothing_in_the_others():
    """In the kernel for the keys' gradient too, whose grid has every head of a group at each step."""
    arrays, options = make_case("causal", "segments", (8, 8), (3, 1), (300, 300), None, False, False, None, "float32")
    spec = attention_spec(**arrays, **options)
    tiles, masks = blocks_of(spec, 128, 128), mask_arrays(spec, segment_ids=options["segment_ids"])
    blocks = Blocks(spec, tiles, schedule(spec, tiles, masks, by_keys=True), by_keys=True)
    steps = np.asarray(blocks.plan.steps)
    idle = [(row, s) for row, s in np.ndindex(BATCH, int(blocks.plan.count)) if not blocks.plan.at(steps, row, s) & 15]
    assert idle
    for index in (block.index_map for block in (blocks.queries(8), blocks.query_row(), blocks.keys(8))):
        assert index is not None
        for row, s in idle:
            before = index(row, 0, s - 1, 2, steps)
            assert all(index(row, 0, s, member, steps) == before for member in range(3))


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
    assert said is None if reason is None else re.search(reason, said or "")


SMALL: dict[str, Any] = dict(
    sizes=(16, 24),
    heads=(2, 1),
    lengths=(150, 150),
    softcap=None,
    alibi=True,
    sinks=True,
    chunk=None,
    dtype="float32",
)


@pytest.mark.parametrize("way", ["shard_map", "vmap"])
def test_under_transformations(way, monkeypatch):
    """Rows of the batch on two devices, slopes and sinks on both; or one by one. Gradients as in one call."""
    monkeypatch.setattr("llm_jax.kernels.choice.target_platform", lambda: "tpu")
    arrays, options = make_case("causal", "segments", **SMALL)
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

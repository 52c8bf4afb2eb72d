"""flash_attention's Hopper kernels in the GPU interpreter: against float64, and what no query may see."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.kernels import explain, flash_attention
from llm_jax.kernels.flash_attention.bounds import Tiling, section_bounds
from llm_jax.kernels.flash_attention.gpu_tiles import ForwardTiles
from llm_jax.kernels.flash_attention.spec import attention_spec, mask_arrays
from llm_jax.kernels.tiles import trying
from tests.conftest import forget_programs
from tests.kernels import attention_cases, devices
from tests.kernels.attention_cases import (
    MASKS,
    OPTIONS,
    QUICK,
    RISING,
    SHARED,
    called,
    compiled,
    cotangents,
    formula,
    make_case,
    numpy_mask,
)
from tests.kernels.numerics import assert_float32, assert_half
from tests.kernels.pairwise import covering, everything

CASES = OPTIONS | {
    "heads": [(2, 1)],
    "lengths": [(70, 70), (66, 134), (134, 70)],
}
SMALL = dict(sizes=(64, 64), heads=(2, 1), lengths=(70, 70))
PLAIN: dict[str, Any] = attention_cases.PLAIN | SMALL
FEW = CASES | {
    "lengths": [(70, 70), (66, 134)],
    "mask": ["causal", "full", "window"],
    "sizes": [(64, 64), (192, 128), (256, 256)],
}
"""A case takes 5 s."""
OTHERS = [
    PLAIN | dict(mask="window_both_sides", data="none", sizes=(96, 96), lengths=(134, 70)),
    # More blocks of keys than buffers for them, without a warpgroup that fetches.
    PLAIN | dict(mask="full", data="none", sizes=(128, 128), lengths=(66, 262)),
    *(case | dict(heads=(2, 1), lengths=(134, 134)) for case in SHARED),
]


def run(case, options, *calls):
    """Results of calls that differ in what their arrays hold."""
    tiles = ForwardTiles(kv_block=64, producer=1 if case["data"] == "none" and case["sizes"][0] < 128 else 0)
    call = compiled(options, "gpu", QUICK)
    with devices.interpreter("gpu"), trying("flash_attention", "gpu", tiles):
        return [jax.block_until_ready(call(arrays, *cotangents(arrays))) for arrays in calls]


def check(case, reference=compiled):
    """Against the formula, with NaN in all that nobody sees; `reference` as for `attention_cases.check`."""
    arrays, options = make_case(**case)
    (B, T), S = arrays["q"].shape[:2], arrays["k"].shape[1]
    seen = numpy_mask(options, B, T, S)
    unseen = {"q": ~seen.any(2), "k": ~seen.any(1), "v": ~seen.any(1)}
    holes = {name: jnp.where(unseen[name][:, :, None, None], jnp.nan, arrays[name]) for name in "qkv"}
    (got,) = run(case, options, arrays | holes)
    exact = formula(arrays, options, seen, *cotangents(arrays))
    plain = reference(options, "reference")(arrays, *cotangents(arrays))
    for name, x in got.items():
        assert x.dtype == plain[name].dtype
        if name == "lse":
            assert_float32(name, x, exact[name])
        else:
            assert_half(name, x, plain[name], exact[name])


def name(case):
    return "-".join(str(x) for x in case.values())


@pytest.mark.parametrize("case", [*covering(FEW), *OTHERS, RISING], ids=name)
def test_every_pair_of_options(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", covering(CASES), ids=name)
def test_every_pair_of_more_options(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("data", OPTIONS["data"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_combination_of_options(mask, data):
    small = {"heads": [(2, 1)], "sizes": [(64, 64)], "dtype": ["bfloat16"]}
    for case in everything(CASES | small | {"mask": [mask], "data": [data]}):
        with devices.unoptimized():
            check(case, reference=called)
    forget_programs()


@pytest.mark.parametrize("case", [dict(mask="window", data="none"), dict(mask="causal", data="segments")], ids=name)
def test_a_key_that_is_not_seen_changes_nothing(case):
    """One key is made far larger: queries that may not see it get the same bits."""
    case = PLAIN | case
    arrays, options = make_case(**case)
    seen = numpy_mask(options, 2, 70, 70)
    changed = {name: arrays[name].at[:, 30].multiply(1e4) for name in "kv"}
    before, after = run(case, options, arrays, arrays | changed)
    untouched = ~seen[:, :, 30]
    for name in ("out", "lse", "q"):
        np.testing.assert_array_equal(np.asarray(after[name])[untouched], np.asarray(before[name])[untouched], name)
    assert 0 < untouched.sum() < untouched.size and not np.array_equal(after["out"], before["out"])


@pytest.mark.parametrize("data", OPTIONS["data"])
@pytest.mark.parametrize("mask", MASKS)
def test_sections_hold_what_is_visible(mask, data):
    """Nothing visible is outside of [low, high), and nothing hidden within [full_low, full_high)."""
    arrays, options = make_case(**(PLAIN | {"mask": mask, "data": data, "lengths": (200, 200)}))
    spec = attention_spec(**arrays, **options)
    names = ("segment_ids", "q_positions", "kv_positions", "kv_ranges")
    masks = mask_arrays(spec, **{name: options.get(name) for name in names})
    seen = np.zeros((2, 224, 208), bool)
    seen[:, :200, :200] = numpy_mask(options, 2, 200, 200)
    blocks = seen.reshape(2, 7, 32, 13, 16)
    some, every = blocks.any((2, 4)), blocks.all((2, 4))
    for of in ("queries", "keys"):
        bounds = np.asarray(section_bounds(spec, Tiling(2, 1, 7, 32, 13, 16), masks, of=of))
        low, full_low, full_high, high = np.moveaxis(bounds, -1, 0)[..., None]
        assert ((low <= full_low) & (full_low <= full_high) & (full_high <= high)).all()
        index = np.arange(some.shape[-1])
        assert not (some & ~((low <= index) & (index < high))).any()
        full = (full_low <= index) & (index < full_high)
        # A block of queries may end with padding, which is dropped.
        whole = every | (np.arange(7)[:, None] == 6) if of == "queries" else every | (index == 6)
        assert not (full & ~whole).any()
        assert full.any() or data == "ranges" or mask.startswith("window")
        some, every = some.mT, every.mT


def test_inside_shard_map(monkeypatch):
    """Traced only: rows of the batch on two devices, slopes and sinks on both. Gradients have the types they should."""
    arrays, options = make_case(**(PLAIN | {"mask": "causal", "data": "segments", "alibi": True, "sinks": True}))
    segments = options.pop("segment_ids")
    d_out, _ = cotangents(arrays)
    P = jax.sharding.PartitionSpec
    specs = {name: P("data") if name in "qkv" else P() for name in arrays}

    def grads(implementation, wrap=lambda attend: attend):
        def attend(arrays, segments):
            return flash_attention(**arrays, segment_ids=segments, implementation=implementation)

        out, pull = jax.vjp(lambda arrays: wrap(attend)(arrays, segments), arrays)
        return pull(d_out)[0] | {"out": out}

    def shard_map(attend):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        return jax.shard_map(attend, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))

    monkeypatch.setattr("llm_jax.kernels.choice.target_platform", lambda: "gpu")
    with devices.target(devices.GPU):
        got = jax.eval_shape(lambda: grads("gpu", shard_map))
    assert got == jax.eval_shape(lambda: grads("reference"))


@pytest.mark.parametrize("data", OPTIONS["data"])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_lowers(mask, data, monkeypatch):
    """Forward and backward, as far as machine code: the search for layouts ends, and TMA takes lengths that are odd."""
    case = PLAIN | {"mask": mask, "data": data, "lengths": (70, 67), "alibi": data == "positions"}
    arrays, options = make_case(**case)
    monkeypatch.setattr("llm_jax.kernels.choice.target_platform", lambda: "gpu")
    unstable = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    with devices.target(devices.GPU):
        export = jax.export.export(compiled(options, "gpu"), platforms=["cuda"], disabled_checks=[unstable])
        made = export(arrays, *cotangents(arrays))
    assert made.mlir_module().count("mosaic_gpu_v2") >= 3


def test_what_is_refused():
    arrays: Any
    arrays, options = make_case(mask="causal", data="none", **PLAIN)

    def reason(**change) -> Any:
        with devices.target(devices.GPU):
            return explain(flash_attention, **arrays | change, **options).reasons.get("gpu")

    assert reason() is None
    assert "not float32" in reason(**{name: arrays[name].astype(jnp.float32) for name in "qkv"})
    wide = {name: jnp.zeros((2, 70, 2, 320), jnp.bfloat16) for name in "qkv"}
    assert "256, not 320" in reason(**wide)
    dropping = dict(dropout_rate=0.1, dropout_keys=jnp.zeros((2, 2, 2), jnp.uint32))
    assert "dropout" in reason(**dropping)
    assert explain(flash_attention, **arrays).reasons["gpu"] == "written for Hopper GPUs, not for cpu"

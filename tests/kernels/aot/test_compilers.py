"""The compilers themselves, with the smallest kernel of our own."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax.kernels.platform import target_device_kind
from tests.kernels.compilers import gpu_compile, tpu_compile

X = jax.ShapeDtypeStruct((1024, 128), jnp.float32)


@pytest.mark.aot
@pytest.mark.parametrize("topology, kind", [("v5e:2x2", "TPU v5 lite"), ("tpu7x:2x2x1", "TPU7x")])
def test_a_tpu_kernel_is_named(topology, kind):
    pytest.importorskip("libtpu")
    from jax.experimental import pallas as pl

    kinds = []

    def double(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    def f(x):
        kinds.append(target_device_kind())
        spec = pl.BlockSpec((256, 128), lambda i: (i, 0))
        call = pl.pallas_call(double, out_shape=X, grid=(4,), in_specs=[spec], out_specs=spec, name="double")
        return call(x) + call(x + 1)

    assert tpu_compile(f, X, topology=topology).kernels == ("double", "double")
    assert kinds == [kind]


@pytest.mark.aot_gpu
def test_a_gpu_kernel_is_named_and_measured():
    pytest.importorskip("jax_cuda13_plugin")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kinds = []

    def double(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    def f(x):
        kinds.append(target_device_kind())
        tile = jax.ShapeDtypeStruct((128, 128), jnp.float32)
        call = plgpu.kernel(double, out_type=tile, grid=(1,), grid_names=("i",), kernel_name="double")
        return call(x[:128]) + call(x[128:256])

    for _ in range(2):  # the second time the compiler takes the kernel that it has
        program = gpu_compile(f, X)
        assert [name for name in program.kernels if name == "double"] == ["double"] * 2
        (taken,) = program.resources
        assert taken.kernel == "double" and taken.threads == 128 and taken.registers > 0
        assert taken.spill_stores == taken.spill_loads == 0
    assert set(kinds) == {"NVIDIA H200"}

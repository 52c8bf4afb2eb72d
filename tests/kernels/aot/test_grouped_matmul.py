"""grouped_matmul and its gradients at the shapes of Mixtral's and DeepSeek-V3's experts, by the real compilers."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax.kernels.grouped_matmul import gpu, tpu
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from tests.kernels.compilers import TABLE, gpu_compile, on_every_tpu, tpu_compile

SHAPES = {
    "Mixtral up": GroupedSpec(16384, 8, 4096, 14336, "bfloat16"),
    "Mixtral down": GroupedSpec(16384, 8, 14336, 4096, "bfloat16"),
    "DeepSeek-V3 up": GroupedSpec(65536, 256, 7168, 2048, "bfloat16"),
    "DeepSeek-V3 down": GroupedSpec(65536, 256, 2048, 7168, "bfloat16"),
}
FLOAT32 = {"Qwen3-30B-A3B up, float32": GroupedSpec(16384, 128, 2048, 768, "float32")}


def calls(spec: GroupedSpec, implementation):
    """The three products, each with the structs of its arrays. Apart: a v5e has no room for 256 experts twice."""
    x = jax.ShapeDtypeStruct((spec.rows, spec.inputs), spec.dtype)
    w = jax.ShapeDtypeStruct((spec.groups, spec.inputs, spec.outputs), spec.dtype)
    g = jax.ShapeDtypeStruct((spec.rows, spec.outputs), spec.dtype)
    sizes = jax.ShapeDtypeStruct((spec.groups,), jnp.int32)
    return {
        "llm_jax_grouped_matmul": (lambda *a: implementation.product(spec, *a), (x, w, sizes)),
        "llm_jax_grouped_matmul_input_gradient": (lambda *a: implementation.input_gradient(spec, *a), (g, w, sizes)),
        "llm_jax_grouped_matmul_weight_gradient": (lambda *a: implementation.weight_gradient(spec, *a), (x, g, sizes)),
    }


@on_every_tpu(SHAPES | FLOAT32, sample={"Mixtral up": "v5p:2x2x1"})
def test_tpu(case, topology):
    pytest.importorskip("libtpu")
    for name, (f, structs) in calls(case, tpu).items():
        found = tpu_compile(f, *structs, topology=topology).kernels
        assert [kernel for kernel in found if kernel.startswith("llm_jax")] == [name]


@pytest.mark.aot_gpu
@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_gpu(spec):
    """No spills, and no product that waits for the one before: ptxas says so in other warnings than C7504, which tells
    that the registers are shared evenly between the warpgroups."""
    pytest.importorskip("jax_cuda13_plugin")
    for name, (f, structs) in calls(spec, gpu).items():
        program = gpu_compile(f, *structs)
        print(TABLE, *program.resources, sep="\n")
        (taken,) = program.resources
        assert program.kernels == (name,) and taken.spill_stores == taken.spill_loads == 0
        assert all(warning.startswith("(C7504)") for warning in taken.warnings)

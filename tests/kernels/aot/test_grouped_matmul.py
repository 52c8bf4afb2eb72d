"""grouped_matmul and its gradients at the shapes of Mixtral's and DeepSeek-V3's experts, by the real compilers."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax.kernels.grouped_matmul import gpu, tpu
from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from tests.kernels.compilers import assert_one_kernel_each, assert_products_run_freely, on_every_tpu

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
    assert_one_kernel_each(calls(case, tpu), topology)


@pytest.mark.aot_gpu
@pytest.mark.parametrize("spec", SHAPES.values(), ids=SHAPES)
def test_gpu(spec):
    pytest.importorskip("jax_cuda13_plugin")
    assert_products_run_freely(calls(spec, gpu))

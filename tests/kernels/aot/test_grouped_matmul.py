"""grouped_matmul and its gradients at the shapes of Mixtral's and DeepSeek-V3's experts, by the real compilers."""

import functools

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
TAKEN = {
    "Mixtral up, rows of tokens": GroupedSpec(16384, 8, 4096, 14336, "bfloat16", tokens=8192),
    "Qwen3-30B-A3B up, rows of tokens": GroupedSpec(131072, 128, 2048, 768, "bfloat16", tokens=16384),
}
FLOAT32 = {"Qwen3-30B-A3B up, float32": GroupedSpec(16384, 128, 2048, 768, "float32")}


def calls(spec: GroupedSpec, implementation):
    """The three products, each with the structs of its arrays. Apart: a v5e has no room for 256 experts twice.

    The input gradient is the same with rows that are taken from tokens.
    """
    x = jax.ShapeDtypeStruct((spec.tokens or spec.rows, spec.inputs), spec.dtype)
    w = jax.ShapeDtypeStruct((spec.groups, spec.inputs, spec.outputs), spec.dtype)
    g = jax.ShapeDtypeStruct((spec.rows, spec.outputs), spec.dtype)
    sizes = jax.ShapeDtypeStruct((spec.groups,), jnp.int32)
    rows = [] if spec.tokens is None else [jax.ShapeDtypeStruct((spec.rows,), jnp.int32)]
    made = {
        "llm_jax_grouped_matmul": (functools.partial(implementation.product, spec), (x, w, sizes, *rows)),
        "llm_jax_grouped_matmul_weight_gradient": (
            functools.partial(implementation.weight_gradient, spec),
            (x, g, sizes, *rows),
        ),
    }
    if not rows:
        backward = functools.partial(implementation.input_gradient, spec)
        made["llm_jax_grouped_matmul_input_gradient"] = backward, (g, w, sizes)
    return made


@on_every_tpu(SHAPES | TAKEN | FLOAT32, sample={"Mixtral up": "v5p:2x2x1"})
def test_tpu(case, topology):
    pytest.importorskip("libtpu")
    assert_one_kernel_each(calls(case, tpu), topology)


@pytest.mark.aot_gpu
@pytest.mark.parametrize("spec", (SHAPES | TAKEN).values(), ids=SHAPES | TAKEN)
def test_gpu(spec):
    pytest.importorskip("jax_cuda13_plugin")
    assert_products_run_freely(calls(spec, gpu))

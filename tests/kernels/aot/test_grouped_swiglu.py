"""grouped_swiglu and its input gradient at the shapes of published models' experts, by the real compilers.

Its weight gradients are `grouped_matmul`'s, and so are the products of a call that is differentiated.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from llm_jax.kernels.grouped_matmul.spec import GroupedSpec
from llm_jax.kernels.grouped_swiglu import gpu, tpu
from tests.kernels.compilers import assert_one_kernel_each, assert_products_run_freely, on_every_tpu

# DeepSeek-V3's experts as one of eight chips has them: all 256 twice are 15 GiB, of the 16 that a v5e has.
SHAPES = {
    "Mixtral": GroupedSpec(16384, 8, 4096, 14336, "bfloat16"),
    "DeepSeek-V3 cut by 8": GroupedSpec(65536, 256, 7168, 256, "bfloat16"),
    "Qwen3-30B-A3B": GroupedSpec(131072, 128, 2048, 768, "bfloat16"),
}
TAKEN = {
    "Mixtral, rows of tokens": GroupedSpec(16384, 8, 4096, 14336, "bfloat16", tokens=8192),
    "Qwen3-30B-A3B, rows of tokens": GroupedSpec(131072, 128, 2048, 768, "bfloat16", tokens=16384),
}
FLOAT32 = {"Qwen3-30B-A3B, float32": GroupedSpec(16384, 128, 2048, 768, "float32")}


def calls(spec: GroupedSpec, implementation):
    """Both kernels, each with the structs of its arrays; the gradient's is the same with rows taken from tokens."""
    x = jax.ShapeDtypeStruct((spec.tokens or spec.rows, spec.inputs), spec.dtype)
    w = jax.ShapeDtypeStruct((spec.groups, spec.inputs, spec.outputs), spec.dtype)
    g = jax.ShapeDtypeStruct((spec.rows, spec.outputs), spec.dtype)
    sizes = jax.ShapeDtypeStruct((spec.groups,), jnp.int32)
    rows = [] if spec.tokens is None else [jax.ShapeDtypeStruct((spec.rows,), jnp.int32)]
    made = {"llm_jax_grouped_swiglu": (functools.partial(implementation.swiglu, spec), (x, w, w, sizes, *rows))}
    if not rows:
        backward = functools.partial(implementation.input_gradient, spec)
        made["llm_jax_grouped_swiglu_input_gradient"] = backward, (g, g, w, w, sizes)
    return made


@on_every_tpu(SHAPES | TAKEN | FLOAT32, sample={})
def test_tpu(case, topology):
    pytest.importorskip("libtpu")
    assert_one_kernel_each(calls(case, tpu), topology)


@pytest.mark.aot_gpu
@pytest.mark.parametrize("spec", (SHAPES | TAKEN).values(), ids=SHAPES | TAKEN)
def test_gpu(spec):
    pytest.importorskip("jax_cuda13_plugin")
    assert_products_run_freely(calls(spec, gpu))

"""flash_attention's Hopper kernels by the real compiler, at the shapes of models: no spills, and what they take."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax.kernels import flash_attention
from tests.kernels.compilers import TABLE, gpu_compile

LENGTH = 4096
MODELS = {
    "llama 8B": dict(heads=(32, 8), sizes=(128, 128)),
    "llama 70B, 8192 tokens": dict(heads=(64, 8), sizes=(128, 128), length=8192),
    "llama 8B, full": dict(heads=(32, 8), sizes=(128, 128), causal=False),
    "llama 8B, packed": dict(heads=(32, 8), sizes=(128, 128), packed=True),
    "llama 3.2 1B": dict(heads=(32, 8), sizes=(64, 64)),
    "phi 3 mini": dict(heads=(32, 32), sizes=(96, 96)),
    "deepseek V3": dict(heads=(128, 128), sizes=(192, 128)),
    "gemma 2 9B": dict(heads=(16, 8), sizes=(256, 256), window=4096, softcap=50.0),
    "gpt-oss": dict(heads=(64, 8), sizes=(64, 64), window=128, sinks=True),
    "bloom": dict(heads=(112, 112), sizes=(128, 128), alibi=True),
}


def program(heads, sizes, length=LENGTH, packed=False, sinks=False, alibi=False, **options):
    """Forward and backward of one call, and its shapes."""
    (N, K), (H, Hv) = heads, sizes
    bf16 = jnp.bfloat16
    q, k, v = ((1, length, n, size) for n, size in ((N, H), (K, H), (K, Hv)))
    arrays = {name: jax.ShapeDtypeStruct(shape, bf16) for name, shape in (("q", q), ("k", k), ("v", v))}
    if sinks:
        arrays["sinks"] = jax.ShapeDtypeStruct((N,), bf16)
    if alibi:
        arrays["alibi_slopes"] = jax.ShapeDtypeStruct((N,), jnp.float32)
    data = {"segment_ids": jax.ShapeDtypeStruct((1, length), jnp.int32)} if packed else {}

    def run(arrays, data, d_out):
        out, pull = jax.vjp(lambda x: flash_attention(**x, **data, **options, implementation="gpu"), arrays)
        return out, pull(d_out)

    return run, arrays, data, jax.ShapeDtypeStruct((1, length, N, Hv), bf16)


@pytest.mark.aot_gpu
@pytest.mark.parametrize("model", MODELS)
def test_compiles_without_spills(model):
    pytest.importorskip("jax_cuda13_plugin")
    compiled = gpu_compile(*program(**MODELS[model]))
    print(f"\n{model}\n{TABLE}", *compiled.resources, sep="\n")
    assert {taken.kernel for taken in compiled.resources} == {
        f"llm_jax_flash_attention_{part}" for part in ("forward", "dq", "dkv")
    }
    for taken in compiled.resources:
        assert taken.spill_stores == taken.spill_loads == 0, str(taken)

"""ssd and selective_scan at the shapes of published models, by the real compilers."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax import kernels
from tests.kernels.compilers import TABLE, gpu_compile, on_every_tpu, tpu_compile

SSD = {"Mamba-2 2.7B": (2, 4096, 80, 64, 1, 128), "Nemotron-H 8B": (1, 8192, 128, 64, 8, 128)}
"""B, T, heads, head size, groups, states."""
SELECTIVE_SCAN = {"Mamba 2.8B": (2, 4096, 5120, 16), "Jamba": (1, 8192, 8192, 16)}
"""B, T, channels, states."""
GPU_KERNELS = {
    "ssd": {"forward", "backward_states", "backward_products", "backward"},
    "selective_scan": {"forward", "backward"},
}


def gradients(op: str, shape: tuple[int, ...]):
    """A function of all arrays of a packed call with states, and their structs."""

    def loss(arrays, segments, state):
        y, final = getattr(kernels, op)(*arrays, segment_ids=segments, initial_state=state, return_final_state=True)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(final**2)

    B, T, *inner = shape
    if op == "ssd":
        H, P, G, N = inner
        sizes = (B, T, H, P), (B, T, H), (H,), (B, T, G, N), (B, T, G, N), (H,)
        state = (B, H, P, N)
    else:
        D, N = inner
        sizes = (B, T, D), (B, T, D), (D, N), (B, T, N), (B, T, N), (D,)
        state = (B, D, N)
    half = {0, 3, 4}
    arrays = tuple(jax.ShapeDtypeStruct(s, jnp.bfloat16 if i in half else jnp.float32) for i, s in enumerate(sizes))
    structs = arrays, jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct(state, jnp.float32)
    return jax.grad(loss, argnums=(0, 2)), structs


CASES = {model: ("ssd", shape) for model, shape in SSD.items()}
CASES |= {model: ("selective_scan", shape) for model, shape in SELECTIVE_SCAN.items()}


@on_every_tpu(CASES, sample={"Mamba-2 2.7B": "v5p:2x2x1", "Mamba 2.8B": "v5e:2x2"})
def test_tpu(case, topology):
    pytest.importorskip("libtpu")
    op, shape = case
    f, structs = gradients(op, shape)
    found = tpu_compile(f, *structs, topology=topology).kernels
    assert {f"llm_jax_{op}_forward", f"llm_jax_{op}_backward"} <= set(found)


@pytest.mark.aot_gpu
@pytest.mark.parametrize("op, shape", CASES.values(), ids=CASES)
def test_gpu(op, shape):
    pytest.importorskip("jax_cuda13_plugin")
    f, structs = gradients(op, shape)
    resources = gpu_compile(f, *structs).resources
    print(TABLE, *resources, sep="\n")
    assert {taken.kernel.removeprefix(f"llm_jax_{op}_") for taken in resources} == GPU_KERNELS[op]
    for taken in resources:
        # ptxas keeps one register of the forward kernel, which has 255, in local memory: written before its loops and
        # read behind them.
        assert taken.spill_stores <= (4 if taken.kernel == "llm_jax_ssd_forward" else 0)
        assert taken.spill_depth <= 0

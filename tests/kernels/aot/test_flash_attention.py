"""flash_attention's kernels by the real compilers, at the shapes of models, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax.kernels import flash_attention
from llm_jax.sharding.described import custom_calls, devices_of
from tests.kernels.compilers import on_every_tpu, tpu_compile

TPU_KERNELS = {f"llm_jax_flash_attention_{part}" for part in ("forward", "dq", "dkv")}
BASE = dict(T=4096, S=4096, N=32, K=8, H=128, Hv=128, dtype="bfloat16", marks=(), options={})
CALLS = {
    "llama_8b": dict(),
    "llama_8b_packed": dict(T=8192, S=8192, marks=("segments", "positions")),
    "llama_70b": dict(T=8192, S=8192, N=64),
    "deepseek_v3": dict(N=128, K=128, H=192),
    "gemma_2_9b": dict(N=16, H=256, Hv=256, options={"softcap": 50.0, "window": 2048}),
    "phi_3": dict(N=32, K=32, H=96, Hv=96, options={"window": 2047}),
    "gpt_oss": dict(N=64, H=64, Hv=64, marks=("sinks",), options={"window": 128}),
    "bloom": dict(T=2048, S=2048, K=32, marks=("alibi",)),
    "everything": dict(
        T=1000,
        S=3000,
        marks=("segments", "positions", "ranges", "sinks", "alibi"),
        options={"causal": False, "softcap": 30.0, "window": 700, "chunk": 1024},
    ),
    "float32": dict(T=1000, S=3000, H=256, Hv=256, dtype="float32", options={"softcap": 30.0}),
    "float16": dict(dtype="float16", marks=("segments",)),
}


def gradients(call):
    """A function of arrays and its arguments' shapes: output, log-sum-exp and every gradient."""
    c = BASE | call
    T, S, N, dtype = c["T"], c["S"], c["N"], c["dtype"]

    def integers(*shape):
        return jax.ShapeDtypeStruct((1, *shape), jnp.int32)

    sizes = {"q": (T, N, c["H"]), "k": (S, c["K"], c["H"]), "v": (S, c["K"], c["Hv"])}
    arrays = {name: jax.ShapeDtypeStruct((1, *shape), dtype) for name, shape in sizes.items()}
    per_head = {"alibi": "alibi_slopes", "sinks": "sinks"}
    arrays |= {name: jax.ShapeDtypeStruct((N,), jnp.float32) for mark, name in per_head.items() if mark in c["marks"]}
    data = {
        "segments": {"segment_ids": (integers(T), integers(S))},
        "positions": {"q_positions": integers(T), "kv_positions": integers(S)},
        "ranges": {"kv_ranges": integers(T, 2)},
    }
    masks = {name: shape for mark, given in data.items() if mark in c["marks"] for name, shape in given.items()}

    def run(arrays, masks, d_out, d_lse):
        def attend(arrays):
            return flash_attention(**arrays, **masks, **c["options"], return_lse=True)

        out, pull = jax.vjp(attend, arrays)
        return out, pull((d_out, d_lse))

    d_out = jax.ShapeDtypeStruct((1, T, N, c["Hv"]), dtype)
    return run, (arrays, masks, d_out, jax.ShapeDtypeStruct((1, T, N), jnp.float32))


def attention_kernels(compiled):
    """Names of ours in a program."""
    names = (name for name, _ in custom_calls(compiled.as_text() or ""))
    return {name for name in names if name.startswith("llm_jax_flash_attention_")}


@on_every_tpu(CALLS, sample={"llama_8b_packed": "v6e:2x2"})
def test_tpu(case, topology, request):
    pytest.importorskip("libtpu")
    run, shapes = gradients(case)
    program = tpu_compile(run, *shapes, topology=topology)
    assert attention_kernels(program.compiled) == TPU_KERNELS
    memory = program.compiled.memory_analysis()
    assert memory is not None
    print(f"{request.node.callspec.id}: temporaries {memory.temp_size_in_bytes / 2**20:.0f} MiB")


@pytest.mark.aot
def test_tpu_inside_shard_map():
    """Heads over four chips, with JAX's account of what varies; the slopes' and sinks' gradients are the heads' own."""
    pytest.importorskip("libtpu")
    run, shapes = gradients(CALLS["everything"])
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(devices_of("v5e:2x2"), ("tensor",))
    heads = P(None, None, "tensor")
    arrays = {name: heads if name in "qkv" else P("tensor") for name in shapes[0]}
    specs = (arrays, P(), heads, heads)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=((heads, heads), (arrays,)))
    compiled = jax.jit(sharded).lower(*shapes).compile()
    assert attention_kernels(compiled) == TPU_KERNELS

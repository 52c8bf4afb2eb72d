"""ragged_paged_attention by the real compilers: decoding and mixed batches at the shapes of models.

Llama 3.1 8B and 70B, DeepSeek-V3's latent attention, Gemma's head size; 8192 slots per request.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llm_jax.base.errors import UserError
from llm_jax.kernels import init_pages, ragged_paged_attention, write_pages
from llm_jax.kernels.ragged_paged_attention import tpu
from tests.kernels.compilers import TABLE, gpu_compile, on_every_tpu, tpu_compile

NAME = "llm_jax_ragged_paged_attention"
MODELS = {"8B": (32, 8, 128), "70B": (64, 8, 128), "hd64": (32, 8, 64), "gemma": (16, 8, 256), "latent": (128, 1, 576)}
"""Heads, key heads, head size."""
BATCHES = {"decode": (64, 64), "one": (1, 1), "mixed": (512, 16), "prefill": (4096, 4)}
"""Tokens, requests."""
ALL = dict(window=1024, softcap=50.0, alibi_slopes=True, sinks=True, return_lse=True)
CASES = [
    ("8B", "decode", 16, "bfloat16", {}),
    ("8B", "mixed", 64, "bfloat16", ALL),
    ("8B", "one", 64, "bfloat16", {}),
    ("8B", "decode", 64, "float8_e4m3fn", {}),
    ("8B", "mixed", 64, "int8", ALL),
    ("70B", "decode", 128, "bfloat16", {}),
    ("70B", "prefill", 128, "bfloat16", {}),
    ("hd64", "decode", 32, "bfloat16", {}),
    ("gemma", "mixed", 64, "bfloat16", {}),
    ("latent", "decode", 64, "bfloat16", {}),
    ("latent", "mixed", 64, "bfloat16", ALL),
    ("latent", "mixed", 64, "int8", ALL),
]
ids = [f"{model}-{batch}-{page}-{dtype}{'-all' if options else ''}" for model, batch, page, dtype, options in CASES]


def call(case, implementation, multiple):
    """The function and its shapes; 2048 pages."""
    model, batch, page, dtype, options = case
    (N, K, H), (T, R) = MODELS[model], BATCHES[batch]
    latent: dict[str, Any] = dict(value_dim=512, latent=True) if model == "latent" else {}
    pages = jax.eval_shape(lambda: init_pages(2048, page, K, H, dtype=dtype, multiple=multiple, **latent))
    whole = jax.ShapeDtypeStruct
    shapes = (
        whole((T, N, H), jnp.bfloat16),
        pages,
        whole((R,), jnp.int32),
        whole((R, 8192 // page), jnp.int32),
        whole((R + 1,), jnp.int32),
    )
    per_head = {
        name: whole((N,), jnp.float32) for name, wanted in options.items() if wanted is True and name[-1] == "s"
    }
    static = {name: value for name, value in options.items() if name not in per_head}

    def f(args, arrays):
        return ragged_paged_attention(*args, **arrays, **static, implementation=implementation)

    return f, shapes, per_head


@on_every_tpu(dict(zip(ids, CASES, strict=True)), sample={"8B-mixed-64-bfloat16-all": "v5e:2x2"})
def test_tpu(case, topology):
    pytest.importorskip("libtpu")
    program = tpu_compile(*call(case, "tpu", multiple=128), topology=topology)
    assert program.kernels.count(NAME) == 1


WRITES = [(tokens, dtype) for tokens in (1, 256, 2048) for dtype in ("bfloat16", "int8")]


@on_every_tpu({f"{tokens}-{dtype}": (tokens, dtype) for tokens, dtype in WRITES}, sample={"2048-bfloat16": "v5e:2x2"})
def test_tokens_are_written_where_they_belong_and_nothing_is_copied(case, topology):
    pytest.importorskip("libtpu")
    tokens, dtype = case
    pages = jax.eval_shape(lambda: init_pages(2048, 64, 8, 128, dtype=dtype))
    new = jax.ShapeDtypeStruct((tokens, 8, 128), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    memory = tpu_compile(write_pages, pages, new, new, slots, topology=topology, donated=[0]).compiled.memory_analysis()
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(pages)]
    assert memory is not None and memory.alias_size_in_bytes == sum(sizes)
    # What is left is of the tokens.
    assert memory.temp_size_in_bytes < max(sizes) / 4


@on_every_tpu({"full": None}, sample={})
def test_tpu_with_a_full_scalar_memory(case, topology):
    """As many page ids and tiles as the kernel takes, one token in each tile."""
    pytest.importorskip("libtpu")
    struct = jax.ShapeDtypeStruct
    tokens, table = (tpu.SCALAR_WORDS - 2**17) // tpu.PER_TILE, 2**15
    pages = jax.eval_shape(lambda: init_pages(64, 16, 1, 128, multiple=128))
    shapes = struct((tokens, 256, 128), jnp.bfloat16), pages, *(struct(s, jnp.int32) for s in ((4,), (4, table), (5,)))
    program = tpu_compile(partial(ragged_paged_attention, implementation="tpu"), *shapes, topology=topology)
    assert program.kernels.count(NAME) == 1


@pytest.mark.aot_gpu
@pytest.mark.parametrize("case", CASES[:-1], ids=ids[:-1])
def test_gpu(case):
    pytest.importorskip("jax_cuda13_plugin")
    program = gpu_compile(*call(case, "gpu", multiple=1))
    (taken,) = (kernel for kernel in program.resources if kernel.kernel == NAME)
    print(f"{TABLE}\n{taken}")
    assert taken.spill_stores == taken.spill_loads == 0 and not taken.warnings


@pytest.mark.aot_gpu
def test_gpu_refuses_what_does_not_fit():
    f, shapes, arrays = call(CASES[-1], "gpu", multiple=1)
    with pytest.raises(UserError, match="int8 latent values of 512 numbers do not fit"):
        gpu_compile(f, shapes, arrays)

"""linear_cross_entropy and its gradients at the shapes of published models, by the real compilers."""

import jax
import jax.numpy as jnp
import pytest

from llm_jax.kernels import linear_cross_entropy
from llm_jax.kernels.linear_cross_entropy.spec import OUTPUTS
from tests.kernels.compilers import TABLE, gpu_compile, on_every_tpu, tpu_compile

EVERY = dict(outputs=OUTPUTS, label_smoothing=0.1, z_loss=1e-4)
CASES = {
    "Llama 8B": ((8192, 4096, 128256), "bfloat16", False, {}),
    "Llama 8B, every output, masked": ((8192, 4096, 128256), "bfloat16", True, EVERY),
    "Llama 8B, every output, masked, softcap": ((8192, 4096, 128256), "bfloat16", True, EVERY | {"softcap": 30.0}),
    "Llama 70B, a quarter of the vocabulary": ((8192, 8192, 32064), "bfloat16", False, {}),
    "GPT-2, masked": ((4000, 768, 50257), "bfloat16", True, {}),
    "DeepSeek-V3": ((8192, 7168, 129280), "bfloat16", False, {}),
}
TPU_CASES = CASES | {
    "Llama 405B, an eighth of the vocabulary": ((4096, 16384, 16032), "bfloat16", False, {}),
    "float32": ((1024, 8192, 16000), "float32", False, {}),
}


def gradients(case):
    """Outputs and both gradients, and the structs of the arrays."""
    (tokens, width, vocab), dtype, masked, options = case

    def loss(hidden, head, targets, mask):
        made = linear_cross_entropy(hidden, head, targets, mask=mask if masked else None, **options)
        return sum(jnp.sum(x) for name, x in made.items() if name != "argmax"), made

    hidden, head = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((tokens, width), (width, vocab)))
    targets, mask = (jax.ShapeDtypeStruct((tokens,), kind) for kind in (jnp.int32, jnp.bool_))
    return jax.value_and_grad(loss, (0, 1), has_aux=True), (hidden, head, targets, mask)


@on_every_tpu(TPU_CASES, sample={"Llama 8B": "tpu7x:2x2x1"})
def test_tpu(case, topology):
    pytest.importorskip("libtpu")
    f, structs = gradients(case)
    found = tpu_compile(f, *structs, topology=topology).kernels
    for part in ("", "_hidden_gradient", "_head_gradient"):
        assert found.count(f"llm_jax_linear_cross_entropy{part}") == 1


@pytest.mark.aot_gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gpu(case):
    """What training uses spills nothing; all outputs at once spill a few registers, once per tile, outside of the
    products' loop. Of the warnings, C7504 tells that registers are shared evenly between the warpgroups."""
    pytest.importorskip("jax_cuda13_plugin")
    f, structs = gradients(case)
    resources = gpu_compile(f, *structs).resources
    print(TABLE, *resources, sep="\n")
    names = {"llm_jax_linear_cross_entropy", "llm_jax_linear_cross_entropy_logit_gradient"}
    assert {taken.kernel for taken in resources} == names
    for taken in resources:
        assert taken.spill_loads <= (128 if "outputs" in case[3] else 0)
        assert taken.spill_depth < taken.product_depth
        assert all(w.startswith("(C7504)") or "spilled" in w for w in taken.warnings)

"""Adapters put together, and PiSSA's start: as PEFT's (golden file of `oracles/peft_merging.py`)."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm_jax.adapters import combine
from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.loading import AdaptedModel, load
from llm_jax.adapters.peft_files import to_tensors
from llm_jax.adapters.sites import Adaptation
from llm_jax.adapters.start import init_adapter
from llm_jax.base.config import bind
from llm_jax.base.errors import UserError
from tests.adapters.conftest import drawn, write_model
from tests.oracles import adapters_recipe as recipe

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "peft_merging.npz")
META = json.loads(GOLDEN["meta"].tobytes())


def of(method: str) -> dict[str, np.ndarray]:
    return {name.partition("/")[2]: GOLDEN[name] for name in GOLDEN.files if name.startswith(f"{method}/")}


def product(tensors: dict, module: str) -> np.ndarray:
    """B A: what the signs of singular vectors do not change."""
    a, b = ("embedding_A", "embedding_B") if module.endswith("embed_tokens") else ("A.weight", "B.weight")
    return tensors[f"{module}.lora_{b}"] @ tensors[f"{module}.lora_{a}"]


@pytest.fixture(scope="module")
def adapters(llama):
    return [drawn(name, llama, fields) for name, fields in recipe.MERGED.items()]


@pytest.mark.parametrize("method", list(recipe.METHODS))
def test_as_peft(adapters, method):
    arguments = {
        {"svd_rank": "rank", "majority_sign_method": "majority_sign"}.get(k, k): v
        for k, v in META["methods"][method].items()
    }
    adaptation, adapter = combine(adapters, META["weights"], method, **arguments)
    ours, expected = to_tensors(adaptation, adapter.params), of(method)
    modules = {name.partition(".lora_")[0] for name in expected}
    assert len(modules) == 4
    for module in modules:
        wanted = product(expected, module)
        assert np.abs(product(ours, module) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    if not method.endswith("svd"):
        for name, wanted in expected.items():
            own = ours[name]
            # PEFT's concatenation has zeros where a module has fewer of the adapters than the largest.
            wanted = wanted[: own.shape[0], : own.shape[1]]
            np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-6)


def test_cat_is_the_sum(adapters, llama):
    """Loaded as one, the concatenation gives what the three do together, by their weights (float64 closed form)."""
    one = AdaptedModel(llama, {"all": combine(adapters, [1.0, 1.0, 1.0], "cat")})
    three = AdaptedModel(llama, dict(zip(recipe.MERGED, adapters)))
    tokens = np.arange(22).reshape(2, 11)
    np.testing.assert_allclose(one(tokens), three(tokens), atol=1e-5)


def test_pissa_starts_as_peft(tmp_path):
    family, name, fields = recipe.CASES["llama_pissa"]
    write_model(family, name, tmp_path / "base")
    model = load(tmp_path / "base")
    adaptation = Adaptation(model.decoder, bind(LoraConfig, fields))
    ours, expected = to_tensors(adaptation, init_adapter(adaptation, model.params, 0)), of("pissa")
    for module in {name.partition(".lora_")[0] for name in expected}:
        wanted = product(expected, module)
        assert np.abs(product(ours, module) - wanted).max() <= 1e-5 * np.abs(wanted).max()
        for kind in ("A.weight", "B.weight"):
            np.testing.assert_allclose(
                np.abs(ours[f"{module}.lora_{kind}"]), np.abs(expected[f"{module}.lora_{kind}"]), atol=2e-5
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "mean"}, "method 'mean' is not one of"),
        ({"method": "ties"}, "density is None"),
        ({"weights": [1.0]}, "1 weights are given for 3 adapters"),
        ({"method": "linear", "rank": 3}, "rank=3 is for svd"),
        ({"method": "svd", "density": 0.5}, "density=0.5 is for ties"),
    ],
)
def test_bad_arguments(adapters, change, message):
    arguments = {"weights": [1.0, 1.0, 1.0], **change}
    with pytest.raises(UserError, match=message):
        combine(adapters, **arguments)


def test_what_is_no_sum(llama, adapters):
    dora = drawn("dora", llama, {"target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(UserError, match="DoRA"):
        combine([*adapters, dora], [1.0] * 4)
    small = drawn("small", llama, {"target_modules": ["q_proj"], "r": 2})
    with pytest.raises(UserError, match=r"ranks \[2, 4\]"):
        combine([*adapters, small], [1.0] * 4, "linear")

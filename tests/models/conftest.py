"""The golden Llamas: their recipe, and folders made from it."""

import importlib.util
import json
import pathlib
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

TESTS = pathlib.Path(__file__).parents[1]


def _load_recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llama_recipe", TESTS / "oracles" / "llama_recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPE = _load_recipe()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `llama` runs for every golden configuration."""
    if "llama" in metafunc.fixturenames:
        metafunc.parametrize("llama", list(RECIPE.CONFIGS), scope="module")


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    return RECIPE


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """`hf_folder(name, dtype=None, **fields)`: a Hugging Face folder of a golden Llama; `fields` go to config.json."""

    def make(name: str, dtype=None, **fields) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(name)
        tensors = {k: v if dtype is None else v.astype(dtype) for k, v in RECIPE.weights(name).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {"architectures": ["LlamaForCausalLM"], **RECIPE.config(name)}
        config["dtype"] = str(np.dtype(dtype or np.float32))
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return folder

    return make

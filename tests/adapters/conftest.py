"""Tiny models and adapters on them, in folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_jax.adapters.config import LoraConfig
from llm_jax.adapters.loading import load
from llm_jax.adapters.peft_files import Adapter, from_tensors, to_tensors
from llm_jax.adapters.sites import Adaptation
from llm_jax.base.config import bind
from tests.oracles import adapters_recipe, family_recipe

GOLDEN = Path(__file__).parents[1] / "golden"


def write_model(family: str, name: str, folder: Path) -> dict[str, np.ndarray]:
    """A Hugging Face folder of a tiny model of `family_recipe`; its tensors."""
    meta = json.loads(np.load(GOLDEN / "families" / f"{family}.npz")["meta"].tobytes())["configs"][name]
    weights = family_recipe.weights(family, meta["shapes"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(meta["new"]))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def drawn(name: str, model, fields: dict) -> tuple[Adaptation, Adapter]:
    """An adapter of PEFT's `fields` on a model, its numbers by `adapters_recipe.draw`."""
    adaptation = Adaptation(model.decoder, bind(LoraConfig, fields))
    tensors = {key: adapters_recipe.draw(name, key, shape, {}) for key, shape in to_tensors(adaptation).items()}
    return adaptation, Adapter(adaptation.config, from_tensors(adaptation, tensors))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """Three layers, tied."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    write_model("llama", "tied", folder)
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder):
    return load(llama_folder)

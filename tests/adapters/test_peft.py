"""Adapters that PEFT wrote: equal here, and written again bit for bit. Golden files of `oracles/peft_adapters.py`."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import llm_jax
from tests.adapters.conftest import load_adapted
from tests.conftest import forget_programs
from tests.oracles import adapters_recipe, family_recipe

GOLDEN = Path(__file__).parents[1] / "golden"


class Case:
    """An adapter's folder as PEFT wrote it, and its model's."""

    def __init__(self, name: str, folder: Path):
        self.family, self.config, _ = adapters_recipe.CASES[name]
        file = np.load(GOLDEN / "peft" / f"{name}.npz")
        self.meta, self.logits = json.loads(file["meta"].tobytes()), file["logits"]
        model = json.loads(np.load(GOLDEN / "families" / f"{self.family}.npz")["meta"].tobytes())["configs"][
            self.config
        ]
        weights = family_recipe.weights(self.family, model["shapes"])
        self.base, self.adapter = folder / "base", folder / "adapter"
        for path, config, contents in (
            (self.base, "config.json", model["new"]),
            (self.adapter, "adapter_config.json", self.meta["config"]),
        ):
            path.mkdir(parents=True)
            (path / config).write_text(json.dumps(contents))
        save_file(weights, self.base / "model.safetensors", metadata={"format": "pt"})
        tensors = {
            key: adapters_recipe.draw(name, key, tuple(shape), weights) for key, shape in self.meta["shapes"].items()
        }
        save_file(tensors, self.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        self.tokens = family_recipe.tokens(self.family, self.config)


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    yield Case(request.param, tmp_path_factory.mktemp(request.param))
    forget_programs()


def said(model, tokens: np.ndarray) -> np.ndarray:
    """Logits or scores of tokens, or the scores of texts."""
    if model.config.head.labels is None:
        return np.asarray(model(tokens))
    scores = np.asarray(model.scores(tokens))
    return scores if model.config.head.pooling == "none" else scores[:, 0]


@pytest.mark.parametrize("case", list(adapters_recipe.CASES), indirect=True)
def test_as_peft(case, tmp_path):
    model = load_adapted(case.adapter, base=case.base)
    allowed = 1e-4 * max(1.0, np.abs(case.logits).max())
    logits = said(model, case.tokens)
    seen = logits if case.logits.ndim == 2 else logits[:, family_recipe.POSITIONS]
    assert seen.shape == case.logits.shape and np.abs(seen - case.logits).max() <= allowed
    merged = said(model.merged(), case.tokens)
    assert np.abs(merged - logits).max() <= 1e-5 * max(1.0, np.abs(logits).max())
    llm_jax.save(model, tmp_path)
    written = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(written).hexdigest() == case.meta["sha256"]
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == case.meta["config"]

"""Equal to transformers: the golden file of tests/oracles/transformers_mistral.py."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from llm_jax.base.errors import UserError
from llm_jax.inference import Generator, SamplingParams
from llm_jax.models.families import family
from llm_jax.models.flops import flops_per_token
from llm_jax.models.loading import load
from llm_jax.models.saving import save
from tests.models.conftest import RECIPE, TESTS

llama, mistral = family("llama"), family("mistral")
WINDOW = 7
FIELDS = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}


@pytest.fixture(scope="module")
def golden():
    return np.load(TESTS / "golden" / "mistral.npz")


@pytest.fixture(scope="module")
def folder(hf_folder):
    folder = hf_folder("gqa", **FIELDS)
    config = json.loads((folder / "config.json").read_text())
    del config["attention_bias"], config["mlp_bias"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_logits(folder, golden):
    model = load(folder)
    assert model.config.window == WINDOW
    logits = np.asarray(model(RECIPE.tokens("gqa")))
    np.testing.assert_array_less(np.abs(logits - golden["logits"]), 1e-4 * np.abs(golden["logits"]).max())


def test_greedy_tokens_round_the_ring(folder, golden):
    """32 tokens after a prompt of 9 through caches of 7 slots, identical up to the first near-tie."""
    generator = Generator(load(folder), max_batch=2)
    prompts = RECIPE.tokens("gqa")[:, : RECIPE.PROMPT].tolist()
    sampling = SamplingParams(max_tokens=RECIPE.NEW_TOKENS, temperature=0.0, ignore_eos=True)
    ours = np.asarray([done.tokens for done in generator.generate(prompts, sampling)])
    clear = np.logical_and.accumulate(golden["gaps"] > 1e-3, axis=1)
    assert clear.sum() > 32
    np.testing.assert_array_equal(np.where(clear, ours, 0), np.where(clear, golden["greedy"], 0))


def test_saved_as_it_came(folder, tmp_path):
    save(load(folder), tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    assert {name: after[name] for name in before} == before
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_what_the_family_lacks_is_refused(folder):
    fields = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match="mlp_bias=True is not a field of the mistral family"):
        mistral.from_hf({**fields, "mlp_bias": True})
    with pytest.raises(UserError, match="sliding_window=7 is not a field of the llama family"):
        llama.from_hf({**fields, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert mistral.from_hf({**fields, "sliding_window": None}).window is None
    assert mistral.from_hf({k: v for k, v in fields.items() if k != "sliding_window"}).window == 4096


def test_flops_of_a_window():
    """Keys that queries 0..9 see through a window of 7: 1, 2, ..., 7, 7, 7, 7; so 49 in place of 55."""
    config = mistral.from_hf({"sliding_window": WINDOW, "vocab_size": 61})
    other = mistral.from_hf({"sliding_window": None, "vocab_size": 61})
    saved = flops_per_token(other, 10) - flops_per_token(config, 10)
    assert saved == pytest.approx(4 * 32 * 32 * 128 * (55 - 49) / 10)

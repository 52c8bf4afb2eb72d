"""Equal to transformers, family by family: golden files of tests/oracles/transformers_families.py."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm_jax.inference import Generator, SamplingParams
from llm_jax.models.families import FAMILIES
from llm_jax.models.loading import Model, load
from llm_jax.models.parameter import bind
from llm_jax.models.saving import save
from tests.conftest import forget_programs
from tests.models.conftest import TESTS
from tests.oracles import family_recipe as recipe

GOLDEN = TESTS / "golden" / "families"
CASES = [(f, name) for f in FAMILIES if (GOLDEN / f"{f}.npz").exists() for name in recipe.CONFIGS[f]]


@functools.cache
def metas(family: str) -> dict:
    return json.loads(np.load(GOLDEN / f"{family}.npz")["meta"].tobytes())["configs"]


def over(wanted: Callable[[str, str], bool]) -> pytest.MarkDecorator:
    cases = [case for case in CASES if wanted(*case)]
    return pytest.mark.parametrize("case", cases, indirect=True, ids="-".join)


class Case:
    """One configuration: what transformers found, and folders of it in every spelling."""

    def __init__(self, family: str, name: str, folder: Path):
        self.family, self.name, self.folder = family, name, folder
        file = np.load(GOLDEN / f"{family}.npz")
        self.golden = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
        self.meta = metas(family)[name]
        self.weights = recipe.weights(family, self.meta["shapes"])
        self._write("new", self.meta["new"], self.weights)
        self._write("old", self.meta["old"], recipe.published(family, self.weights))
        if "fused" in self.meta:
            self._write("fused", self.meta["new"], recipe.fused(family, self.weights, self.meta["fused"]))
        self.model = load(self.folder / "new")

    def _write(self, spelling: str, config: dict, tensors: dict[str, np.ndarray]) -> None:
        (self.folder / spelling).mkdir()
        (self.folder / spelling / "config.json").write_text(json.dumps(config))
        save_file(tensors, self.folder / spelling / "model.safetensors", metadata={"format": "pt"})

    def logits(self, model: Model) -> np.ndarray:
        seen = recipe.seen(self.family)
        logits = model(self.golden["tokens"], None, seen.astype(np.int32))
        return np.where(seen[..., None], logits, 0.0)[:, recipe.POSITIONS]


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    family, name = request.param
    yield Case(family, name, tmp_path_factory.mktemp(f"{family}-{name}"))
    forget_programs()


@over(lambda family, name: True)
def test_logits(case):
    """Those of the folder as transformers 5 writes it."""
    expected = case.golden["logits"]
    allowed = 1e-4 * max(1.0, np.abs(expected).max())
    assert np.abs(case.logits(case.model) - expected).max() <= allowed
    if "short_logits" in case.golden:
        short = case.model(case.golden["tokens"][:, : recipe.PROMPT])[:, -1]
        assert np.abs(short - case.golden["short_logits"]).max() <= allowed


def check_same_model(case, spelling):
    other = load(case.folder / spelling)
    jax.tree.map(np.testing.assert_array_equal, other.params, case.model.params)
    if other.config != case.model.config:
        np.testing.assert_array_equal(case.logits(other), case.logits(case.model))


@over(lambda family, name: True)
def test_published_folders_are_the_same_model(case):
    """config.json and tensor names of older releases."""
    check_same_model(case, "old")


@over(lambda family, name: "fused" in metas(family)[name])
def test_fused_experts_are_the_same_model(case):
    """Tensor names of a running model of transformers 5."""
    check_same_model(case, "fused")


@over(lambda family, name: family not in recipe.ENCODERS)
def test_greedy_tokens(case):
    """Through the cache, identical up to the first near-tie."""
    golden = case.golden
    which = "full_" if "full_greedy" in golden and (case.family, case.name) not in recipe.AS_GENERATE else ""
    longest = recipe.PROMPT + recipe.NEW_TOKENS
    longest = max(longest, case.model.config.max_position_embeddings)
    generator = Generator(case.model, max_batch=recipe.BATCH, max_positions=longest)
    sampling = SamplingParams(max_tokens=recipe.NEW_TOKENS, temperature=0.0, ignore_eos=True)
    prompts = golden["tokens"][:, : recipe.PROMPT].tolist()
    ours = np.asarray([done.tokens for done in generator.generate(prompts, sampling)])
    clear = np.logical_and.accumulate(golden[which + "gaps"] > 1e-3, axis=1)
    assert clear.sum() > recipe.NEW_TOKENS
    np.testing.assert_array_equal(np.where(clear, ours, 0), np.where(clear, golden[which + "greedy"], 0))


@over(lambda family, name: True)
def test_saved_as_it_came(case, tmp_path):
    """Bit for bit, under the same names; and config.json says the same model."""
    save(case.model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == case.weights.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, case.weights[name])
    assert load(tmp_path).config == case.model.config


@over(lambda family, name: recipe.GRADIENTS.get(family) == name)
def test_gradients(case, tmp_path):
    """Of the mean cross-entropy of the next token, per tensor."""
    theirs = {key.removeprefix("grad/"): g for key, g in case.golden.items() if key.startswith("grad/")}
    tokens, model = case.golden["tokens"].astype(np.int32), case.model

    @jax.jit
    def gradients(params):
        def loss(params):
            bound = bind(model.decoder, params)
            logps = jax.nn.log_softmax(bound.logits(bound(tokens)[0])[:, :-1])
            return -jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1).mean()

        return jax.grad(loss)(params)

    # Saved as if they were weights: gives them their Hugging Face names and layout.
    save(Model(model.decoder, gradients(model.params), model.config), tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    assert theirs.keys() <= ours.keys()
    whole = np.sqrt(sum(np.linalg.norm(g) ** 2 for g in theirs.values()) / len(theirs))
    for name, expected in theirs.items():
        error = np.linalg.norm(ours[name] - expected)
        assert error <= 1e-5 * max(np.linalg.norm(expected), 1e-3 * whole), (name, error)

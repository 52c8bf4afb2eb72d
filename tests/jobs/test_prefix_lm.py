"""Prefix language models: what training takes for the prefix, and that generation takes the same."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax
from llm_jax import convert
from llm_jax.base.door import run_door
from llm_jax.base.errors import UserError
from llm_jax.base.trees import flatten
from llm_jax.data.prepare import open_rows
from llm_jax.inference import Generator, SamplingParams
from llm_jax.jobs.graph import run
from llm_jax.jobs.scoring import before_targets, score_rows
from llm_jax.models import ModelConfig, bind, init_params
from llm_jax.models.decoder import Decoder
from llm_jax.models.loading import Model
from llm_jax.models.mamba_config import MambaConfig
from tests.jobs.conftest import CONFIGS


def test_the_prefix_ends_at_the_first_target():
    rows = {
        "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 3, 3, 0, 0, 0, 0]],
        "positions": [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0], [0, 1, 0, 1, 2, 0, 1, 0, 0, 0, 0]],
        "loss_mask": [[0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]],
    }
    prefix = [[1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]]
    found = before_targets({name: jnp.asarray(values) for name, values in rows.items()})
    np.testing.assert_array_equal(found, np.asarray(prefix, bool))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A base model and its fine-tuned one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("prefix_lm"))
        base = run(f"{CONFIGS / 'pretrain.py'}:prefix_lm_test", [("task_eval.problems", "0")])
        yield base, run(f"{CONFIGS / 'sft.py'}:test", [("init_from", str(base.workdir.path))])


def test_training_and_generation_read_a_prompt_alike(chain):
    """The log-probabilities with which tokens were drawn are those that rows of prompt and answer are scored with,
    two of them in one window."""
    exported = llm_jax.load(chain[1].workdir.export)
    assert exported.config.prefix_lm
    config = dataclasses.replace(exported.config, init_std=0.3)  # Weights this young hardly attend.
    model = SimpleNamespace(config=config, decoder=Decoder(config), params=init_params(Decoder(config), 3))
    prompts = [[7, 9, 11, 200, 31, 5, 90], [41, 250, 6, 12]]
    drawn = Generator(model, buckets=(16,)).generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
    pieces = [(prompt, one.tokens) for prompt, one in zip(prompts, drawn, strict=True)]
    lengths = [len(prompt) + len(answer) for prompt, answer in pieces]
    rows = {
        "tokens": [token for prompt, answer in pieces for token in [*prompt, *answer]],
        "segment_ids": np.repeat([1, 2], lengths),
        "positions": np.concatenate([np.arange(length) for length in lengths]),
        "loss_mask": [mark for prompt, answer in pieces for mark in [0] * len(prompt) + [1] * len(answer)],
    }
    placed = {name: jnp.asarray(values, jnp.int32)[None] for name, values in rows.items()}

    def scores(config):
        found, mask = score_rows(bind(Decoder(config), model.params), placed, ("logps",))
        return np.asarray(found["logps"])[np.asarray(mask)]

    wanted = [logp for one in drawn for logp in one.logprobs]
    np.testing.assert_allclose(scores(model.config), wanted, atol=1e-5)
    causal = scores(dataclasses.replace(model.config, prefix_lm=False))
    assert np.abs(causal - wanted).max() > 1e-3  # What the prefix is for.


def test_every_text_begins_with_a_prefix_of_random_length(chain):
    rows = open_rows(chain[0].workdir.data, "train")
    shares = []
    for row in (rows[i] for i in range(len(rows))):
        for segment in range(1, row["segment_ids"].max() + 1):
            mask = row["loss_mask"][row["segment_ids"] == segment]
            first = int(mask.argmax())
            assert not mask[:first].any() and (mask[first:].all() or len(mask) < 2)
            if len(mask) > 20:
                shares.append(first / len(mask))
    assert len(shares) > 200
    # Uniform: each quarter of (0, 1) has its share, within four standard deviations.
    counts = np.histogram(shares, bins=4, range=(0, 1))[0]
    assert np.abs(counts - len(shares) / 4).max() < 4 * (len(shares) * 3 / 16) ** 0.5


@pytest.mark.parametrize(
    ("config", "overrides", "reason"),
    [
        ("pretrain.py:test", [("data.random_prefix", "True")], "model.prefix_lm=False"),
        ("pretrain.py:prefix_lm_test", [("data.random_prefix", "False")], "data.random_prefix=False"),
        ("pretrain.py:prefix_lm_test", [("model.family", "llama")], "prefix_lm"),
        ("pretrain.py:prefix_lm_test", [("model.mtp", "1")], "model.mtp"),
        ("sft.py:test", [("data.random_prefix", "True")], "data.random_prefix is for pretrain"),
    ],
)
def test_refused(config, overrides, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=reason):
        run(str(CONFIGS / config), overrides)
    assert not (tmp_path / "runs").exists()


def test_layers_that_read_in_one_direction_are_refused():
    mamba = MambaConfig(inner_size=64, state_size=4, dt_rank=2)
    config = ModelConfig(vocab_size=32, num_layers=2, mixers=("mamba", "attention"), mamba=mamba, prefix_lm=True)
    with pytest.raises(UserError, match="a prefix is for causal attention in all layers"):
        config.resolved()


def test_a_causal_model_is_made_one_by_the_command(chain, tmp_path, capsys):
    config = dataclasses.replace(llm_jax.load(chain[0].workdir.export).config, family="llama", prefix_lm=False)
    decoder = Decoder(config)
    llm_jax.save(Model(decoder, init_params(decoder, 1), config, chain[0].workdir.tokenizer), tmp_path / "causal")
    assert run_door(convert.main, [*map(str, (tmp_path / "causal", tmp_path / "made")), "--prefix-lm", "--verify"]) == 0
    assert "(native layout, family llm_jax)" in capsys.readouterr().out
    made = llm_jax.load(tmp_path / "made")
    assert made.config.prefix_lm
    for name, leaf in flatten(llm_jax.load(tmp_path / "causal").params).items():
        np.testing.assert_array_equal(leaf, flatten(made.params)[name])
